"""What the tests of GRPO share: a tiny model that likes to open spans, prompts with and without images, trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from helpers import noise_image

from rl_lvr.latents.format import LatentFormat, get_format
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.trainer import LatentGRPOTrainer
from rl_lvr.training.rewards.load import RewardSpec, load_rewards

FORMATS = ("lvr", "monet")
LVR = get_format("lvr", k=3)
MONET = get_format("monet", k=3)
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
SIGMAS = {"gaussian": 0.1, "spherical": 0.05}
REWARDS = """
def letters(completions, **_):
    return [float(sum(map(ord, str(c))) % 7) for c in completions]

def looks(attention_mass, spans, group, stop_reason, log_extra, **_):
    assert all(reason in ("eos", "length") for reason in stop_reason)
    log_extra("group", group)
    return [mass + len(found) for mass, found in zip(attention_mass, spans)]

looks.signals = ["attention_mass"]

def needed(necessity_completions, **_):
    return [float(len(text or "")) for text in necessity_completions]

def same(completions, **_):
    return [1.0] * len(completions)

def tenth(completions, **_):
    return [0.1] * len(completions)

def first_half(completions, **_):
    found = letters(completions)
    return [value if row < len(found) // 2 else 0.1 for row, value in enumerate(found)]
"""
Tiny = Callable[..., tuple[Any, Any]]


def opening(
    load_tiny: Tiny, latent_format: LatentFormat = LVR, family: str = "qwen2_5_vl", times: float = 3.0, **spec: Any
) -> tuple[Any, Any]:
    """A model in whose head START's row is long, so that untrained weights open spans."""
    model, processor = load_tiny(family, latent_formats=FORMATS, **spec)
    start = processor.tokenizer.convert_tokens_to_ids(latent_format.start)
    with torch.no_grad():
        model.get_output_embeddings().weight[start] *= times
    return model, processor


def rows(images: bool = True, count: int = 4) -> Dataset:
    texts = ("what is next", "from red 3 hops", "blue", "green 2 hops from blue what is next")
    made = []
    for number in range(count):
        row: dict[str, Any] = {"prompt": [{"role": "user", "content": texts[number % 4]}], "answer": "red"}
        if images:
            row["image"] = noise_image(number, 56, 56 if number % 2 else 84)
        made.append(row)
    return Dataset.from_list(made)


def rewards(folder: Path, *names: str) -> list[RewardSpec]:
    path = folder / "rewards_of_test.py"
    path.write_text(REWARDS)
    return load_rewards([f"{path}:{name}" for name in names or ("letters",)])


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 14,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "on_rollout": {"unclosed": "keep", "empty": "keep"},  # what is left out is tested in test_grpo_faults.py
        **changes,
    }


def make_trainer(
    model: Any,
    processor: Any,
    folder: Path,
    latent_format: LatentFormat | None = LVR,
    *,
    kind: type[LatentGRPOTrainer] = LatentGRPOTrainer,
    reward_names: tuple[str, ...] = ("letters",),
    reward_funcs: Any = None,
    data: Dataset | None = None,
    engine: Any = None,
    peft_config: Any = None,
    eval_dataset: Dataset | None = None,
    given: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """`changes` are settings, `given` further arguments of the trainer."""
    policy = changes.get("latent_policy", "context")
    changes.setdefault("latent_sigma", SIGMAS.get(policy, 0.0))
    if latent_format is None:
        changes.setdefault("on_rollout", None)
    trainer = kind(
        model,
        rewards(folder, *reward_names) if reward_funcs is None else reward_funcs,
        LatentGRPOConfig(**settings(folder, **changes)),
        latent_format=latent_format,
        train_dataset=rows() if data is None else data,
        processing_class=processor,
        engine=engine,
        peft_config=peft_config,
        eval_dataset=eval_dataset,
        **(given or {}),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by train(), and read by a loss on its own
    return trainer


def generation(trainer: Any) -> dict[str, Any]:
    return trainer._generate_and_score_completions([dict(row) for row in rows()])


def gradients(trainer: Any, made: dict[str, Any]) -> dict[str, torch.Tensor]:
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, {**made}).backward()
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]
