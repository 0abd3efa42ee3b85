"""LatentGRPOTrainer is TRL's trainer without latents, and scores what its engine drew with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_cases import LVR, MONET, logged, make_trainer, opening, rewards, rows, settings
from trl import GRPOConfig, GRPOTrainer

from rl_lvr.errors import UserError
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.format import get_format
from rl_lvr.rollout.record import read_rollouts
from rl_lvr.training.grpo.batch import GenerationBatch
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.trainer import LatentGRPOTrainer


def history(trainer: Any) -> list[dict[str, Any]]:
    apart = (
        "step_time",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "rollouts/idle_batches",
    )
    return [{k: v for k, v in row.items() if k not in apart} for row in trainer.state.log_history]


@pytest.mark.parametrize("images", [True, False])
def test_without_a_format_it_is_trl_bit_for_bit(load_tiny: Any, tmp_path: Path, images: bool) -> None:
    (spec,) = rewards(tmp_path)
    more = {"max_steps": 3, "gradient_accumulation_steps": 2, "num_iterations": 2, "beta": 0.1}

    def theirs() -> Any:
        model, processor = opening(load_tiny)
        given = settings(tmp_path, reward_weights=[1.0], bf16=False, **more)
        given.pop("on_rollout")
        arguments = GRPOConfig(**given)
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=[spec.function],
            args=arguments,
            train_dataset=rows(images),
            processing_class=processor,
        )
        trainer.train()
        return trainer

    def ours() -> Any:
        trainer = make_trainer(*opening(load_tiny), tmp_path, None, data=rows(images), **more)
        trainer.train()
        return trainer

    one, two = theirs(), ours()
    assert history(one) == history(two)
    assert len(logged(one, "loss")) == 3
    assert max(map(abs, logged(one, "loss"))) > 0
    parameters = dict(two.model.named_parameters())
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


@pytest.mark.parametrize("name", ["lvr", "slots"])
def test_a_text_batch_is_trl_with_the_banned_ids_out(load_tiny: Any, tmp_path: Path, name: str) -> None:
    """With a format, a micro-batch without latents: TRL's loss on a head that has the same ban, bit for bit. A format
    without feedback never generates any."""
    latent_format = LVR if name == "lvr" else get_format("slots")
    model, processor = load_tiny("qwen2_5_vl", latent_formats=("lvr", "monet", "slots"))
    trainer = make_trainer(model, processor, tmp_path, latent_format, data=rows(False, 1))
    made = trainer._generate_and_score_completions([{**row} for row in rows(False, 1)] * 4)
    if name == "slots":
        assert not bool((made["latent_positions"] >= 0).any())
        assert bool((made["tool_mask"] * made["completion_mask"]).any(1).all())
    else:
        text, start = made["completion_ids"], trainer.markers.start
        text = torch.where(torch.isin(text, torch.tensor([*trainer.markers.never_sampled, start])), 40, text)
        made |= {"completion_ids": text, "latent_positions": torch.full_like(made["latent_positions"], -1)}
        made["tool_mask"] = torch.ones_like(made["completion_mask"])
    made["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    model.train()
    found = trainer._compute_loss(model, {**made})
    markers, trainer.run = trainer.markers, None
    plain = trainer._compute_loss(model, {**made})
    head = model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[list(markers.never_sampled)] = -1e4
    head.__dict__["bias"] = bias
    banned = trainer._compute_loss(model, {**made})
    assert torch.equal(found, banned)
    assert not torch.equal(found, plain)  # the control


@pytest.mark.parametrize("name", ["lvr", "monet"])
def test_a_run_scores_what_its_engine_drew(load_tiny: Any, tmp_path: Path, name: str) -> None:
    latent_format = {"lvr": LVR, "monet": MONET}[name]
    model, processor = opening(load_tiny, latent_format)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer = make_trainer(
        model,
        processor,
        tmp_path,
        latent_format,
        reward_names=("letters", "looks"),
        max_steps=3,
        gradient_accumulation_steps=2,
        temperature=0.9,
        beta=0.05,
        log_completions=True,
    )
    trainer.train()
    assert len(logged(trainer, "loss")) == 3
    for metric in ("replay_logp_diff", "replay_latent_diff"):
        assert max(logged(trainer, f"latent/{metric}")) < 1e-3
    assert max(logged(trainer, "latent/rate")) > 0
    assert max(logged(trainer, "latent/count")) > 1
    assert min(logged(trainer, "latent/norm")) > 0
    assert max(logged(trainer, "signal/attention_mass")) > 0
    assert max(logged(trainer, "kl")) >= 0
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())

    found = read_rollouts(tmp_path / "run")
    assert found.steps == [0, 1, 2]
    assert len(found) == 24
    assert {r.group for r in found.of_step(0)} == {0, 1}
    with_latents = [n for n, r in enumerate(found) if any(span["latents"] for span in r.spans)]
    assert with_latents
    assert int(found.latents(with_latents[0]).counts) >= 1
    assert len({r.seed for r in found}) == 24
    assert {"letters", "looks"} == set(found[0].rewards)
    assert found[0].signals.keys() == {"attention_mass"}
    for record in found:
        assert json.dumps(record.columns) is not None
        mass = record.signals["attention_mass"]
        assert record.rewards["looks"] == pytest.approx(mass + len(record.spans), rel=1e-5)


def test_forced_tokens_take_no_part(load_tiny: Any, tmp_path: Path) -> None:
    model, processor = opening(load_tiny)
    trainer = make_trainer(model, processor, tmp_path)
    made = trainer._generate_and_score_completions([dict(row) for row in rows(count=1)] * 4)
    forced = torch.isin(made["completion_ids"], torch.tensor([trainer.markers.slot, trainer.markers.end]))
    assert bool(forced.any())
    assert not bool((made["tool_mask"].bool() & forced).any())
    assert bool((made["tool_mask"].bool() | forced)[made["completion_mask"].bool()].all())
    assert float(made["old_per_token_logps"][forced].abs().max()) == 0
    assert int(made["num_items_in_batch"]) == int((made["completion_mask"] * made["tool_mask"]).sum())
    with torch.no_grad():
        loss = trainer._compute_loss(model, {**made})
        made["old_per_token_logps"] = made["old_per_token_logps"] + 3.0 * forced
        assert torch.equal(trainer._compute_loss(model, {**made}), loss)


def test_free_length_is_one_decision(load_tiny: Any, tmp_path: Path) -> None:
    """END against anything else: the two log-probs add up to 1, and SLOT's own logit plays no part."""
    model, processor = opening(load_tiny, MONET)
    head, markers = model.get_output_embeddings().weight, MONET.bind(processor.tokenizer)
    with torch.no_grad():
        head[markers.end] = head[markers.start]
    trainer = make_trainer(model, processor, tmp_path, get_format("monet", k=4), max_completion_length=20)
    made = trainer._generate_and_score_completions([dict(row) for row in rows()])
    ids = made["completion_ids"]
    decided = made["tool_mask"].bool() & torch.isin(ids, torch.tensor([trainer.markers.slot, trainer.markers.end]))
    assert bool(decided.any())
    value = made["old_per_token_logps"][decided]
    assert torch.allclose(value, made["sampling_per_token_logps"][decided], atol=1e-4)
    assert float(value.min()) < -1e-3  # a choice, not a certainty
    slots = trainer.markers.slot == ids[decided]
    with torch.no_grad():
        head[markers.end] *= 0.5
        trainer.batch = GenerationBatch(latents=LatentBatch.from_tensors(made), in_loss=True)
        both = [torch.cat([made[f"{part}_{what}"] for part in ("prompt", "completion")], 1) for what in ("ids", "mask")]
        images = {k: made[k] for k in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
        after = trainer._get_per_token_logps_and_entropies(model, *both, ids.shape[1], compute_entropy=True, **images)
    now, entropy = (part[decided] for part in after[:2])
    assert not torch.allclose(now, value, atol=1e-2)
    ended = torch.where(slots, 1 - now.exp(), now.exp())
    assert torch.allclose(entropy, -(ended * ended.log() + (1 - ended) * (1 - ended).log()), atol=1e-3)


def test_chunks_and_padding_do_not_change_log_probs(load_tiny: Any, tmp_path: Path) -> None:
    model, processor = opening(load_tiny)
    trainer = make_trainer(model, processor, tmp_path)
    made = trainer._generate_and_score_completions([dict(row) for row in rows()])
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], 1)
    mask = torch.cat([made["prompt_mask"], made["completion_mask"]], 1)
    images = {k: made[k] for k in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")}
    trainer.batch = GenerationBatch(latents=LatentBatch.from_tensors(made), in_loss=True)
    keep = made["completion_ids"].shape[1]
    with torch.no_grad():
        found = [
            trainer._get_per_token_logps_and_entropies(model, ids, mask, keep, size, **images)[0] for size in (1, 3, 4)
        ]
        latents = LatentBatch.from_tensors(made)
        moved = LatentBatch(latents.values.roll(1, 0), latents.positions, latents.sigma)
        trainer.batch = GenerationBatch(latents=moved, in_loss=True)
        others = trainer._get_per_token_logps_and_entropies(model, ids, mask, keep, **images)[0]
    for other in found[:2]:
        assert torch.allclose(other, found[2], atol=1e-5)
    assert not torch.allclose(others, found[2], atol=1e-2)  # the control: vectors of another row


def test_nothing_is_left_on_the_head(load_tiny: Any, tmp_path: Path) -> None:
    model, processor = opening(load_tiny)
    make_trainer(model, processor, tmp_path).train()
    head = model.get_output_embeddings()
    assert head.bias is None
    assert "bias" not in head.__dict__
    assert "get_output_embeddings" not in model.__dict__
    assert not model.model._forward_hooks


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_policy": "gausian"}, "did you mean 'gaussian'"),
        ({"latent_policy": "gaussian", "latent_sigma": 0.0}, "gradient of a fresh rollout is exactly zero"),
        ({"latent_policy": "spherical", "latent_sigma": 0.0}, "latent_policy unrolled, which is exact without noise"),
        ({"latent_policy": "unrolled", "latent_sigma": 0.1}, "set latent_sigma to 0"),
        ({"latent_policy": "unrolled", "gradient_checkpointing": True}, "key-value cache that carries gradients"),
        ({"latent_scale": "max"}, "choose mean or sum"),
        ({"latent_sigma": -1.0}, "latent_sigma is -1.0"),
        ({"latent_start": "force"}, "latent_start is 'force'; did you mean 'forced'"),
        ({"latent_start": "bias inf"}, "latent_start has the bias inf"),
        ({"latent_sigma": float("nan")}, "latent_sigma is nan"),
        ({"replay_tolerance": 0.0}, "above 0"),
        ({"latent_policy": "unrolled", "latent_gradient_clip": 0.0}, "latent_gradient_clip is 0.0; it must be above 0"),
        ({"rollout_batch": 0}, "at least 1"),
        ({"latent_weight": 2.0}, "latent_weight cannot be used with latent_policy context"),
        (
            {"latent_policy": "unrolled", "latent_epsilon": 0.1},
            "latent_epsilon cannot be used with latent_policy un",
        ),
        ({"latent_gradient_clip": 1.0}, "latent_gradient_clip cannot be used with latent_policy context"),
    ],
)
def test_settings_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LatentGRPOConfig(**settings(tmp_path, **changes))


def test_what_the_trainer_cannot_do_is_refused(load_tiny: Any, tmp_path: Path) -> None:
    model, processor = opening(load_tiny)
    for changes, message in (
        ({"generation_kwargs": {"top_h": 1}}, "generation_kwargs"),
        ({"temperature": 0.0}, "above 0"),
        ({"loss_type": "vespo"}, "token_truncate or token_mask"),
        ({"latent_policy": "spherical", "latent_sigma": 0.5}, "choose a sigma of at most"),
    ):
        with pytest.raises(UserError, match=message):
            make_trainer(model, processor, tmp_path, **changes)
    with pytest.raises(UserError, match="needs a latent format"):
        make_trainer(model, processor, tmp_path, None, reward_names=("looks",))
    for name in ("tools", "environment_factory", "rollout_func"):
        with pytest.raises(UserError, match=f"{name} cannot be used with a latent format"):
            make_trainer(model, processor, tmp_path, given={name: [print] if name == "tools" else print})
    with pytest.raises(ValueError, match="No reward source provided"):
        LatentGRPOTrainer(
            model,
            [],
            LatentGRPOConfig(**settings(tmp_path)),
            latent_format=LVR,
            train_dataset=rows(),
            processing_class=processor,
        )
    other = make_trainer(model, processor, tmp_path).engine
    with pytest.raises(UserError, match="another k"):
        make_trainer(model, processor, tmp_path, get_format("lvr", k=2), engine=other)
