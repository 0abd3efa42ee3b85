"""LatentGRPOTrainer in place of TRL's: models by path, plain configs, reward models, weights, environments."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from grpo_cases import FORMATS, LVR, logged, make_trainer, opening, rewards, rows, settings
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification
from trl import GRPOConfig, GRPOTrainer

from rl_lvr.errors import Fault, UserError
from rl_lvr.latents.feedback import NAME as FEEDBACK
from rl_lvr.latents.format import get_format
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.trainer import LatentGRPOTrainer

TEXT_TEMPLATE = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
"""Of a tokenizer that knows text alone."""


def letters(completions: list[Any], **_: Any) -> list[float]:
    return [float(sum(map(ord, str(c))) % 7) for c in completions]


def length(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(str(c))) for c in completions]


async def later(completions: list[Any], **_: Any) -> list[float]:
    return length(completions)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Path:
    """A sequence classifier with a tokenizer and a chat template of its own."""
    folder = tmp_path_factory.mktemp("reward") / "judge"
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder("qwen2_5_vl", latent_formats=FORMATS))
    tokenizer.chat_template = TEXT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def judge(folder: Path) -> Any:
    return Qwen2ForSequenceClassification.from_pretrained(folder)


def plain(folder: Path, **changes: Any) -> GRPOConfig:
    given = settings(folder, bf16=False, **changes)
    given.pop("on_rollout")
    return GRPOConfig(**given)


def history(trainer: Any) -> list[dict[str, Any]]:
    words = ("time", "runtime", "second", "idle_batches")
    return [{k: v for k, v in row.items() if not any(w in k for w in words)} for row in trainer.state.log_history]


MORE: dict[str, dict[str, Any]] = {
    "bnpo": {"loss_type": "bnpo", "num_iterations": 2, "epsilon_high": 0.3, "delta": 2.0},
    "two rewards": {"reward_weights": [0.5, 2.0], "scale_rewards": "batch", "loss_type": "dr_grpo"},
    "each for itself": {"reward_weights": [1.0, 0.3], "multi_objective_aggregation": "normalize_then_sum"},
    "reward model": {"reward_weights": [0.7, 1.0], "beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "truncated": {"mask_truncated_completions": True, "max_completion_length": 6, "loss_type": "grpo"},
    "sequence": {"importance_sampling_level": "sequence", "loss_type": "grpo", "steps_per_generation": 2},
    "entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.1, "scale_rewards": False, "pad_to_multiple_of": 8},
    "stream": {"max_steps": 2, "cache_implementation": "static", "generation_kwargs": {"length_penalty": 0.5}},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2},
}


@pytest.mark.parametrize("name", MORE)
def test_settings_of_trl_give_trls_numbers(
    tiny_folder: Callable[..., Path], reward_model: Path, tmp_path: Path, name: str
) -> None:
    """Model by path, a plain config, reward functions and models as TRL takes them: equal bit for bit."""
    folder = tiny_folder("qwen2_5_vl", latent_formats=FORMATS)
    data: Any = rows(images=name == "bnpo")
    funcs: dict[str, Any] = {
        "two rewards": [letters, later],
        "each for itself": [length, letters],
        "reward model": [letters, str(reward_model)],
    }

    def run(kind: type) -> Any:
        given = {"max_steps": 2, "save_strategy": "no", **MORE[name]}
        trainer = kind(
            str(folder),
            funcs.get(name, letters),
            plain(tmp_path, **given),
            data.to_iterable_dataset() if name == "stream" else data,
            data if name == "evaluated" else None,
        )
        trainer.train()
        return trainer

    one, two = run(GRPOTrainer), run(LatentGRPOTrainer)
    assert two.markers is None
    assert history(one) == history(two)
    assert max(map(abs, logged(one, "grad_norm"))) > 0 or name == "truncated"  # all are
    parameters = dict(two.model.named_parameters())
    for part, parameter in one.model.named_parameters():
        assert torch.equal(parameter, parameters[part]), part


def test_a_path_and_a_function_are_enough(tiny_folder: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """No config, no processor; the format is the stored one, and a feedback map comes with it."""
    monkeypatch.chdir(tmp_path)
    folder = tiny_folder("qwen2_5_vl", latent_formats=FORMATS)
    without = LatentGRPOTrainer(str(folder), reward_funcs=letters, train_dataset=rows(count=8))
    assert without.markers is None
    assert without.args.output_dir == f"{folder.name}-GRPO"
    one = get_format("lvr", k=2, projector="linear")
    model, processor = opening_of(folder)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="no latent format 'lvrr'; did you mean 'lvr'"):
        LatentGRPOTrainer(str(tmp_path / "model"), letters, train_dataset=rows(), latent_format="lvrr")
    mine = LatentGRPOTrainer(
        str(tmp_path / "model"), letters, plain(tmp_path), rows(), latent_format=get_format("lvr", k=3)
    )
    assert mine.markers is not None
    mine.train()
    assert logged(mine, "latent/rate")
    one.save(tmp_path / "model")
    with pytest.raises(UserError, match="no weights latent_proj"):
        LatentGRPOTrainer(str(tmp_path / "model"), letters, plain(tmp_path), rows())
    with pytest.raises(UserError, match="was trained with latent format 'lvr'"):
        LatentGRPOTrainer(str(tmp_path / "model"), letters, plain(tmp_path), rows(), latent_format="monet")


def opening_of(folder: Path) -> Any:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def test_a_missing_feedback_map_is_attached_and_trained_with_an_adapter(load_tiny: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    model, processor = opening(load_tiny)
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    mapped = get_format("lvr", k=3, projector="linear")
    trainer = make_trainer(model, processor, tmp_path, mapped, peft_config=adapter)
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert adapter.modules_to_save is None
    assert any(FEEDBACK in name and "modules_to_save" in name for name in trained) == (
        trainer.args.latent_policy != "context"
    )


@pytest.mark.parametrize("images", [True, False])
def test_a_reward_model_reads_the_text_without_latents(
    load_tiny: Any, reward_model: Path, tmp_path: Path, images: bool
) -> None:
    """Under latents, beside a function, with weights, in training and evaluation, by its own tokenizer."""
    model, processor = opening(load_tiny)
    read: list[str] = []
    own: Any = AutoTokenizer.from_pretrained(reward_model)

    class Reader(type(own)):  # type: ignore[misc]
        def __call__(self, *args: Any, **how: Any) -> Any:
            if "text" in how and isinstance(how["text"], list):
                read.extend(how["text"])
            return super().__call__(*args, **how)

    own.__class__ = Reader
    trainer = LatentGRPOTrainer(
        model,
        [letters, judge(reward_model)],
        LatentGRPOConfig(**settings(tmp_path, reward_weights=[0.5, 3.0], eval_strategy="steps", eval_steps=1)),
        rows(images),
        rows(images, 1),
        processor,
        [None, own],
        latent_format=LVR,
    )
    trainer.train()
    assert max(logged(trainer, "latent/rate")) > 0
    assert len(read) == 8
    for text in read:
        assert text.startswith("[user]")
        assert "[assistant]" in text
        assert not any(word in text for word in ("<|", "{'type'", "image"))
    name = "rewards/judge/mean"
    assert len({*logged(trainer, name), *logged(trainer, f"eval_{name}")}) == 2
    (row,) = [row for row in trainer.state.log_history if name in row]
    assert row["reward"] == pytest.approx(0.5 * row["rewards/letters/mean"] + 3 * row[name], rel=1e-5)
    with torch.no_grad():
        inputs = own(text=read[:4], return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        again = judge(reward_model)(**inputs).logits[:, 0]
    assert row[name] == pytest.approx(float(again.mean()), abs=1e-5)


def test_a_reward_model_that_gives_nan_stops_the_run(load_tiny: Any, reward_model: Path, tmp_path: Path) -> None:
    broken = judge(reward_model)
    nn.init.constant_(broken.score.weight, float("nan"))
    for latent_format in (LVR, None):
        trainer = make_trainer(
            *opening(load_tiny), tmp_path, latent_format, data=rows(False), reward_funcs=[letters, broken]
        )
        with pytest.raises(Fault, match="the reward model 'judge' gave 4 of 4 completions a reward that is not finite"):
            trainer.train()


def test_weights_come_from_the_config_and_schedules_are_factors(load_tiny: Any, tmp_path: Path) -> None:
    model, processor = opening(load_tiny)
    (spec,) = rewards(tmp_path)
    from dataclasses import replace

    from rl_lvr.training.rewards.load import Schedule

    falling = replace(spec, schedule=Schedule(1.0, 0.0, 0, 2))
    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        data=rows(False),
        reward_funcs=[falling, length],
        reward_weights=[4.0, 0.25],
        max_steps=3,
    )
    assert trainer.reward_weights.tolist() == [4.0, 0.25]
    trainer.train()
    assert trainer.args.reward_weights == [4.0, 0.25]
    for row, factor in zip(trainer.state.log_history[:3], (1.0, 0.5, 0.0), strict=True):
        wanted = 4 * factor * row["rewards/letters/mean"] + 0.25 * row["rewards/length/mean"]
        assert row["reward"] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(UserError, match="reward 'letters' has the weight 2 and reward_weights gives it 4"):
        make_trainer(model, processor, tmp_path, reward_funcs=replace(spec, weight=2.0), reward_weights=[4.0])
    with pytest.raises(ValueError, match="Number of reward weights"):
        make_trainer(model, processor, tmp_path, reward_weights=[4.0, 1.0])
    with pytest.raises(UserError, match="reward_funcs holds 3"):
        make_trainer(model, processor, tmp_path, reward_funcs=[3])


class Room:
    """An environment that owns its reward."""

    def reset(self, **_: Any) -> None:
        self.score = 0.5

    def look(self, place: str) -> str:
        """
        Look at a place.

        Args:
            place: Where to look.

        Returns:
            What is seen there.
        """
        return place

    def get_reward(self) -> float:
        self.score += 0.25
        return self.score


@pytest.mark.parametrize("others", [[], [letters, length]])
def test_rewards_of_environments_keep_their_weight(load_tiny: Any, tmp_path: Path, others: list[Any]) -> None:
    """Alone, and beside rewards with weights; as TRL's trainer, bit for bit."""
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"

    def run(kind: type) -> Any:
        model, processor = opening(load_tiny)
        processor.tokenizer.chat_template = processor.chat_template = template.read_text()
        trainer = kind(
            model,
            list(others),  # TRL appends to it
            plain(tmp_path, max_steps=2, reward_weights=[0.5, 2.0] if others else None),
            rows(images=False),
            processing_class=processor.tokenizer,
            environment_factory=Room,
        )
        trainer.train()
        return trainer

    one, two = run(GRPOTrainer), run(LatentGRPOTrainer)
    assert two.reward_weights.tolist() == [*([0.5, 2.0] if others else []), 1.0]
    assert history(one) == history(two)
    assert logged(two, "rewards/Room/mean")


def test_a_checkpoint_of_trl_is_resumed(load_tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unverified, which one line says; not under a latent format, and not where only the manifest is gone."""
    model, processor = opening(load_tiny)
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    theirs = GRPOTrainer(model, letters, plain(tmp_path, **saves), rows(False), processing_class=processor)
    theirs.train()
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    checkpoint = tmp_path / "run" / "checkpoint-1"

    def ours(latent_format: Any) -> Any:
        return make_trainer(
            *opening(load_tiny), tmp_path, latent_format, data=rows(False), reward_funcs=letters, **saves
        )

    with pytest.raises(UserError, match="was trained without latents, this run asks for"):
        ours(LVR).train(resume_from_checkpoint=str(checkpoint))
    resumed = ours(None)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-1 was not written by rl-lvr and is not verified" in capsys.readouterr().err
    assert [row["step"] for row in resumed.state.log_history if "loss" in row] == [1, 2]
    (first, second) = logged(resumed, "grad_norm")
    assert first == logged(theirs, "grad_norm")[0]
    assert second > 0
    start = load_file(checkpoint / "model.safetensors")["lm_head.weight"]
    moved = (resumed.model.lm_head.weight - start).abs().max()
    assert 0 < moved < 2e-3
    sealed = tmp_path / "run" / "checkpoint-2"
    (sealed / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"was not written to its end.*: resume from .*checkpoint-1"):
        ours(None).train(resume_from_checkpoint=str(sealed))
