"""Training without latents works for models of families unknown to rl_lvr, with resumption and the best model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lab_tools import same
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rl_lvr.errors import Fault, UserError
from rl_lvr.models.registry import UnsupportedFamily, family_of
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.trainer import LatentGRPOTrainer
from rl_lvr.training.sft.config import LatentSFTConfig
from rl_lvr.training.sft.trainer import LatentSFTTrainer

STEPS = 4
COMMON: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 0.05,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "eval_steps": 1,
}
BEST = {"eval_strategy": "steps", "load_best_model_at_end": True}


@pytest.fixture(scope="module")
def tokenizer(place: Path) -> Any:
    return AutoTokenizer.from_pretrained(place / "model")


def llama(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def by_length(completions: Any, **_: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def grpo(tokenizer: Any, out: Path, **settings: Any) -> LatentGRPOTrainer:
    config = LatentGRPOConfig(output_dir=str(out), num_generations=4, max_completion_length=6, **{**COMMON, **settings})
    data = Dataset.from_dict({"prompt": ["from red", "from blue"] * 8})
    model = llama(tokenizer)
    return LatentGRPOTrainer(model, by_length, config, data, data.select(range(2)), tokenizer, latent_format=None)


def sft(tokenizer: Any, out: Path, **settings: Any) -> LatentSFTTrainer:
    config = LatentSFTConfig(output_dir=str(out), **{**COMMON, **settings})
    data = Dataset.from_dict({"text": ["from red to blue", "from blue to red"] * 16})
    return LatentSFTTrainer(
        llama(tokenizer),
        config,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=tokenizer,
        latent_format=None,
    )


TRAINERS = {"grpo": grpo, "sft": sft}


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_run_resumes_to_the_same_bits_and_ends_with_its_best_model(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    build = TRAINERS[kind]
    with pytest.raises(UnsupportedFamily):  # control: it is none of ours
        family_of(llama(tokenizer))
    best = dict(BEST, metric_for_best_model="eval_loss" if kind == "sft" else "eval_reward")
    worse = {"learning_rate": 3.0, "lr_scheduler_type": "constant"} if kind == "sft" else {}
    whole = build(tokenizer, tmp_path / "whole", **best, **worse)
    whole.train()
    whole.save_model()
    state = json.loads((tmp_path / "whole" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    chosen = Path(state["best_model_checkpoint"])
    assert chosen.parent == tmp_path / "whole"
    assert same(tmp_path / "whole", chosen)
    for step in range(1, STEPS + 1):
        if f"checkpoint-{step}" != chosen.name:
            assert not same(tmp_path / "whole", tmp_path / "whole" / f"checkpoint-{step}")

    resumed = build(tokenizer, tmp_path / "resumed", **best, **worse)
    resumed.train(str(tmp_path / "whole" / "checkpoint-2"))
    for step in (3, 4):
        assert same(tmp_path / "resumed" / f"checkpoint-{step}", tmp_path / "whole" / f"checkpoint-{step}")


def test_a_run_that_moved_still_finds_its_best_model(tokenizer: Any, tmp_path: Path) -> None:
    settings = {**BEST, "metric_for_best_model": "eval_loss", "learning_rate": 3.0, "lr_scheduler_type": "constant"}
    sft(tokenizer, tmp_path / "first", **settings).train()
    state = json.loads((tmp_path / "first" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    chosen = Path(state["best_model_checkpoint"]).name
    assert chosen != f"checkpoint-{STEPS}"
    (tmp_path / "first").rename(tmp_path / "moved")
    moved = sft(tokenizer, tmp_path / "moved", **settings)
    moved.train(True)
    moved.save_model()
    assert same(tmp_path / "moved", tmp_path / "moved" / chosen)

    (tmp_path / "moved" / chosen).rename(tmp_path / "gone")
    with pytest.raises(UserError, match=f"{chosen}, the best model so far, is not there"):
        sft(tokenizer, tmp_path / "moved", **settings).train(True)


def test_a_learning_rate_that_is_not_finite_stops_the_run(tokenizer: Any, tmp_path: Path) -> None:
    trainer = sft(tokenizer, tmp_path / "out", save_strategy="no")
    trainer.create_optimizer()
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda step: 1.0 if step < 2 else float("nan")
    )
    with pytest.raises(Fault, match="the learning rate is not finite after step 2 of 4"):
        trainer.train()
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_model_that_is_not_finite_is_not_trained(tokenizer: Any, tmp_path: Path) -> None:
    trainer = sft(tokenizer, tmp_path / "out")
    with torch.no_grad():
        trainer.model.lm_head.weight[-1, -1] = float("inf")
    with pytest.raises(Fault, match=r"parameter lm_head.weight is not finite as training begins"):
        trainer.train()
