"""Other families, modes and settings of TRL under latents; runs repeat themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from grpo_cases import LVR, logged, make_trainer, opening, rows
from helpers import noise_image

from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import get_format

FAMILIES = {"qwen3_vl": 6.0, "internvl": -3.0, "llava_onevision": 6.0}  # and what makes START likely


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["context", "unrolled"])
def test_other_families(load_tiny: Any, tmp_path: Path, family: str, policy: str) -> None:
    model, processor = opening(load_tiny, LVR, family, FAMILIES[family])
    trainer = make_trainer(model, processor, tmp_path, latent_policy=policy, reward_names=("letters", "looks"))
    trainer.train()
    assert logged(trainer, "latent/rate")[0] > 0
    assert logged(trainer, "latent/replay_logp_diff")[0] < 1e-3
    assert logged(trainer, "latent/replay_latent_diff")[0] < 1e-3


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_rows_of_one_and_two_images(load_tiny: Any, tmp_path: Path, family: str) -> None:
    data = [{"prompt": row["prompt"], "images": [row["image"]]} for row in rows()]
    for row in data[1::2]:
        row["images"] = [*row["images"], noise_image(9, 56, 56)]
    model, processor = opening(load_tiny, LVR, family)
    trainer = make_trainer(model, processor, tmp_path, data=Dataset.from_list(data), gradient_accumulation_steps=4)
    trainer.train()
    assert logged(trainer, "latent/rate")[0] > 0
    assert logged(trainer, "latent/replay_logp_diff")[0] < 1e-3


def test_evaluation_explores_nothing(load_tiny: Any, tmp_path: Path) -> None:
    model, processor = opening(load_tiny)
    trainer = make_trainer(
        model, processor, tmp_path, latent_policy="gaussian", per_device_eval_batch_size=4, eval_dataset=rows()
    )
    found = trainer.evaluate()
    assert found["eval_loss"] == found["eval_loss"]
    trainer.model.eval()
    made = trainer._generate_and_score_completions([dict(row) for row in rows()])
    latents = LatentBatch.from_tensors(made)
    assert torch.equal(latents.sigma, torch.zeros(4))
    assert torch.allclose(latents.values[latents.mask], made["latent_old_means"][latents.mask], atol=1e-4)
    trainer.model.train()
    explored = LatentBatch.from_tensors(trainer._generate_and_score_completions([dict(row) for row in rows()]))
    assert float(explored.sigma.min()) == pytest.approx(0.1)


@pytest.mark.parametrize("policy", ["context", "unrolled", "gaussian"])
def test_the_same_run_twice(load_tiny: Any, tmp_path: Path, policy: str) -> None:
    found = []
    for name in ("one", "two"):
        model, processor = opening(load_tiny)
        (tmp_path / name).mkdir()
        trainer = make_trainer(model, processor, tmp_path / name, latent_policy=policy, max_steps=2)
        trainer.train()
        found.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
    assert all(torch.equal(weight, found[1][name]) for name, weight in found[0].items())


@pytest.mark.parametrize("policy", ["context", "unrolled", "gaussian"])
def test_truncated_completions_masked(load_tiny: Any, tmp_path: Path, policy: str) -> None:
    model, processor = opening(load_tiny)
    trainer = make_trainer(
        model, processor, tmp_path, latent_policy=policy, mask_truncated_completions=True, max_completion_length=6
    )
    trainer.train()
    assert len(logged(trainer, "loss")) == 1
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


@pytest.mark.parametrize("policy", ["unrolled", "gaussian"])
def test_a_feedback_map_and_its_reference(load_tiny: Any, tmp_path: Path, policy: str) -> None:
    """TRL's reference comes from the model's folder, without the map: it is given one."""
    latent_format = get_format("lvr", k=3, projector="linear")
    model, processor = opening(load_tiny)
    attach_feedback(model, latent_format)
    before = model.latent_proj.linear.weight.detach().clone()
    trainer = make_trainer(
        model, processor, tmp_path, latent_format, latent_policy=policy, beta=0.1, max_steps=2, learning_rate=1e-2
    )
    trainer.train()
    assert not torch.equal(model.latent_proj.linear.weight, before)
    assert torch.equal(trainer.ref_model.latent_proj.linear.weight, before)
    assert not trainer.ref_model.latent_proj.linear.weight.requires_grad
    assert max(logged(trainer, "latent/replay_latent_diff")) < 1e-3


def test_unrolled_is_refused_where_nothing_is_generated(load_tiny: Any, tmp_path: Path) -> None:
    from rl_lvr.errors import UserError

    model, processor = load_tiny("qwen2_5_vl", latent_formats=("lvr", "slots"))
    with pytest.raises(UserError, match="generates no latents"):
        make_trainer(model, processor, tmp_path, get_format("slots"), latent_policy="unrolled")
    trainer = make_trainer(model, processor, tmp_path, get_format("slots"))
    trainer.train()
    assert logged(trainer, "latent/rate") == [0.0]
    assert logged(trainer, "latent/replay_logp_diff")[0] < 1e-3
