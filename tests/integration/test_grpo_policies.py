"""Latent credit in whole training steps: what each policy's loss is, and what must be refused or noticed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_cases import LOSSES, LVR, MONET, SIGMAS, generation, gradients, logged, make_trainer, opening, rows
from peft import LoraConfig
from torch import Tensor

from rl_lvr.errors import Fault, UserError
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import get_format
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.training.grpo.scoring import own_latents
from rl_lvr.training.grpo.trainer import LatentGRPOTrainer


@pytest.mark.parametrize("policy", ["context", "unrolled", "gaussian", "spherical"])
@pytest.mark.parametrize("latent_format", [LVR, MONET], ids=lambda f: f.name)
def test_every_policy_trains(load_tiny: Any, tmp_path: Path, policy: str, latent_format: Any) -> None:
    model, processor = opening(load_tiny, latent_format)
    more = {"max_steps": 2, "gradient_accumulation_steps": 2, "num_iterations": 2, "beta": 0.1}
    trainer = make_trainer(model, processor, tmp_path, latent_format, latent_policy=policy, **more)
    trainer.train()
    assert len(logged(trainer, "loss")) == 2
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert max(logged(trainer, "latent/replay_logp_diff")) < 1e-3
    assert max(logged(trainer, "latent/replay_latent_diff")) < 1e-3
    assert max(logged(trainer, "latent/rate")) > 0
    if policy in SIGMAS:
        assert logged(trainer, "latent/ratio")[0] == pytest.approx(1.0, abs=1e-3)  # fresh rollouts
        assert logged(trainer, "latent/kl")[0] == pytest.approx(0.0, abs=1e-4)
        assert logged(trainer, "latent/kl")[-1] > 0
        assert logged(trainer, "latent/clip_ratio")[0] == 0
    if policy == "unrolled":
        assert logged(trainer, "latent/unroll_difference")[0] < 1e-3


@pytest.mark.parametrize("policy", ["gaussian", "spherical"])
def test_a_latent_is_priced_by_the_state_before_it(load_tiny: Any, tmp_path: Path, policy: str) -> None:
    """Monet's code compares it with the state at its own position: that distance would be another latent's."""
    model, processor = opening(load_tiny)
    trainer = make_trainer(model, processor, tmp_path, latent_policy=policy)
    made = generation(trainer)
    latents, start = LatentBatch.from_tensors(made), made["prompt_ids"].shape[1]
    own = own_latents(latents, start)
    z, mean = latents.values[own], made["latent_old_means"][own]
    noise = (z - mean).norm(dim=-1) / mean.norm(dim=-1)
    size = SIGMAS[policy] * (mean.shape[1] ** 0.5) / (1 if policy == "spherical" else float(mean.norm(dim=-1).mean()))
    assert float(noise.mean()) == pytest.approx(size, rel=0.15)  # exploration, of the size that was asked for
    follows = own[:, 1:] & own[:, :-1] & (latents.positions[:, 1:] == latents.positions[:, :-1] + 1)
    misaligned = (latents.values[:, :-1] - made["latent_old_means"][:, 1:])[follows].norm(dim=-1)
    assert float(misaligned.mean()) > 2 * float((z - mean).norm(dim=-1).mean())  # the control: state at p


def test_noise_gives_latents_a_gradient_and_no_noise_gives_none(load_tiny: Any, tmp_path: Path) -> None:
    model, processor = opening(load_tiny)
    trainer = make_trainer(model, processor, tmp_path, latent_policy="gaussian", latent_scale="sum")
    made = generation(trainer)
    made["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    with_noise = gradients(trainer, made)
    silent = {
        **made,
        "latent_values": torch.where(made["latent_positions"][..., None] >= 0, made["latent_old_means"], 0),
    }
    trainer.args.latent_weight = 0.0
    text_only, text_silent = gradients(trainer, made), gradients(trainer, silent)
    trainer.args.latent_weight = 1.0
    silent_again = gradients(trainer, silent)
    name = next(n for n in with_noise if "layers.0.mlp.down_proj" in n and "language" in n)

    def size(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
        return float((one[name] - two[name]).abs().max())

    assert size(with_noise, text_only) > 1e-2
    # Monet's rollouts: the whole latent term moves nothing. (The means shift a little with the values fed.)
    assert size(silent_again, text_silent) < 0.05 * size(with_noise, text_only)


def test_unrolled_reaches_what_context_does_not(load_tiny: Any, tmp_path: Path) -> None:
    found = {}
    for policy in ("context", "unrolled"):
        trainer = make_trainer(*opening(load_tiny), tmp_path, latent_policy=policy)
        made = generation(trainer)
        made["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
        found[policy] = gradients(trainer, made), float(trainer._compute_loss(trainer.model, {**made}).detach())
    assert found["context"][1] == pytest.approx(found["unrolled"][1], abs=1e-4)
    name = next(n for n in found["context"][0] if "layers.0.mlp.down_proj" in n and "language" in n)
    one, two = (found[policy][0][name] for policy in ("context", "unrolled"))
    assert not torch.allclose(one, two, rtol=0.1)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_all_losses_of_trl(load_tiny: Any, tmp_path: Path, loss_type: str) -> None:
    mode = "token_truncate" if loss_type == "vespo" else "sequence_mask"
    trainer = make_trainer(
        *opening(load_tiny),
        tmp_path,
        latent_policy="gaussian",
        loss_type=loss_type,
        vllm_importance_sampling_mode=mode,
        epsilon_high=5.0 if loss_type == "cispo" else None,
    )
    made = generation(trainer)
    made["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    found = gradients(trainer, made)
    assert all(bool(torch.isfinite(g).all()) for g in found.values())
    assert max(float(g.abs().max()) for g in found.values()) > 0


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "off"])
def test_importance_sampling_corrections(load_tiny: Any, tmp_path: Path, mode: str) -> None:
    class Apart(LatentGRPOTrainer):
        """An engine whose log-probs are 0.2 off."""

        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            super()._generate_single_turn(*args, **kwargs)
            turn = self.batch
            turn.rollouts = [
                replace(r, logprobs=torch.where(r.forced, r.logprobs, r.logprobs - 0.2)) for r in turn.rollouts
            ]
            return [list(r.completion_ids) for r in turn.rollouts], [r.logprobs.tolist() for r in turn.rollouts]

    changes: dict[str, Any] = {"vllm_importance_sampling_correction": False}
    if mode != "off":
        changes = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.1}
    trainer = make_trainer(*opening(load_tiny), tmp_path, kind=Apart, replay_tolerance=1.0, **changes)
    made = generation(trainer)
    ratio = made["importance_sampling_ratio"]
    chosen = (made["completion_mask"] * made["tool_mask"]).bool()
    if mode == "off":
        assert torch.equal(ratio, torch.ones_like(ratio))
    elif mode.startswith("sequence"):
        assert ratio.shape == (4, 1)
        assert torch.allclose(ratio, torch.full_like(ratio, 1.1 if mode.endswith("truncate") else 0.0))
    else:
        wanted = 1.1 if mode.endswith("truncate") else 0.0
        assert torch.allclose(ratio[chosen], torch.full((int(chosen.sum()),), wanted))
        assert torch.equal(ratio[~chosen], torch.ones(int((~chosen).sum())))
    gradients(trainer, made)


@pytest.mark.parametrize("policy", ["context", "unrolled", "gaussian"])
def test_lora_with_the_adapter_off_as_reference(load_tiny: Any, tmp_path: Path, policy: str) -> None:
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    model, processor = opening(load_tiny)
    base = {n: p.clone() for n, p in model.named_parameters()}
    trainer = make_trainer(
        model, processor, tmp_path, latent_policy=policy, peft_config=config, beta=0.1, max_steps=3, learning_rate=1e-2
    )
    assert trainer.ref_model is None
    trainer.train()
    assert logged(trainer, "kl")[0] == pytest.approx(0.0, abs=1e-5)
    assert logged(trainer, "kl")[-1] > 1e-6
    assert max(logged(trainer, "latent/replay_logp_diff")) < 1e-3
    after = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in trainer.model.named_parameters()
    }
    assert all(torch.equal(weight, after[name]) for name, weight in base.items())
    if policy == "gaussian":
        assert logged(trainer, "latent/kl")[-1] > 0


@pytest.mark.parametrize("policy", ["unrolled", "gaussian", "spherical"])
def test_dropout_is_refused_where_latents_are_compared(load_tiny: Any, tmp_path: Path, policy: str) -> None:
    def config() -> LoraConfig:
        return LoraConfig(r=4, lora_dropout=0.05, target_modules=r".*language_model.*\.(q_proj|v_proj)")

    model, processor = opening(load_tiny)
    with pytest.raises(UserError, match=r"lora_dropout \(0.05\) changes them in training alone: set lora_dropout to 0"):
        make_trainer(model, processor, tmp_path, latent_policy=policy, peft_config=config())
    if policy == "unrolled":
        make_trainer(*opening(load_tiny), tmp_path, peft_config=config())  # context compares nothing
        for layer in model.model.language_model.layers:
            layer.self_attn.attention_dropout = 0.1
        with pytest.raises(UserError, match="set attention_dropout to 0"):
            make_trainer(model, processor, tmp_path, latent_policy=policy)


def test_what_masks_the_text_of_a_row_masks_its_latents(load_tiny: Any, tmp_path: Path) -> None:
    """By hand: the ratio of a fresh rollout is 1, so the latents' loss is -sum of w A over the rows that have any."""
    trainer = make_trainer(*opening(load_tiny), tmp_path, latent_policy="gaussian")
    made = generation(trainer)
    advantages = made["advantages"] = torch.tensor([1.0, -2.0, -0.5, 4.0])
    has = own_latents(LatentBatch.from_tensors(made), made["prompt_ids"].shape[1]).any(1)
    assert int(has.sum()) >= 3
    chosen = (made["completion_mask"] * made["tool_mask"]).bool()

    def loss(**changes: Any) -> float:
        trainer._compute_loss(trainer.model, made | changes)
        return trainer._metrics["train"]["latent/loss"][-1]

    def expected(*weights: float) -> Any:
        return pytest.approx(-float((torch.tensor(weights) * advantages * has).sum()) / 4, abs=1e-2)

    assert loss() == expected(1, 1, 1, 1)
    rows = torch.tensor([0.0, 1.0, 2.0, 0.5])
    assert loss(importance_sampling_ratio=rows[:, None]) == expected(*rows.tolist())
    tokens = torch.where(chosen, rows[:, None], 1.0)  # as TRL leaves it where nothing was drawn
    assert loss(importance_sampling_ratio=tokens) == expected(*rows.tolist())
    trainer.off_policy_mask_threshold = 0.5
    far = made["sampling_per_token_logps"] + torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None]
    assert loss() == expected(1, 1, 1, 1)
    assert loss(sampling_per_token_logps=far) == expected(1, 0, 1, 1)  # a better answer than its group stays


@pytest.mark.parametrize("case", ["context", "gaussian", "free"])
def test_the_gradient_of_the_loss_by_finite_differences(load_tiny: Any, tmp_path: Path, case: str) -> None:
    """Of the whole loss of a micro-batch, in float64, with ratios that are not 1."""
    latent_format = LVR if case != "free" else get_format("monet", k=4)
    model, processor = opening(load_tiny, latent_format, init_std=0.1, times=8.0)
    policy = "gaussian" if case == "gaussian" else "context"
    more = {"parity_check": False, "epsilon": 10.0, **({"latent_epsilon": 10.0} if case == "gaussian" else {})}
    trainer = make_trainer(model.double(), processor, tmp_path, latent_format, latent_policy=policy, **more)
    made = generation(trainer)
    assert bool((made["latent_positions"] >= 0).any())
    ids, markers = made["completion_ids"], trainer.markers
    if case == "free":
        decided = made["tool_mask"].bool() & torch.isin(ids, torch.tensor([markers.slot, markers.end]))
        assert bool(decided.any())
    made["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    made["old_per_token_logps"] = made["old_per_token_logps"] - 0.05
    if case == "gaussian":
        made["latent_old_means"] = made["latent_old_means"] * 1.01
    found, others = gradients(trainer, made), gradients(trainer, made | {"advantages": made["advantages"].flip(0)})
    name = next(n for n in found if n.endswith("layers.0.mlp.down_proj.weight") and "language" in n)
    if case == "gaussian":
        trainer.args.latent_weight = 0.0
        others = gradients(trainer, made)  # the control: without the latents' term
        trainer.args.latent_weight = 1.0
    weight = dict(model.named_parameters())[name]
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype)
    direction = found[name] / found[name].norm() + noise / weight.numel() ** 0.5
    step, values = 1e-3, []  # not smaller: norms and log-probs are rounded to float32
    with torch.no_grad():
        for sign in (1, -2):
            weight += sign * step * direction
            values.append(float(trainer._compute_loss(model, {**made})))
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float((found[name] * direction).sum()), rel=1e-2)
    assert slope != pytest.approx(float((others[name] * direction).sum()), rel=5e-2)


@pytest.mark.parametrize("policy", ["context", "gaussian"])
def test_gradient_checkpointing_changes_nothing(load_tiny: Any, tmp_path: Path, policy: str) -> None:
    """With a feedback map, which has a gradient only where latents have a price."""
    latent_format = get_format("lvr", k=3, projector="linear")
    model, processor = opening(load_tiny)
    attach_feedback(model, latent_format)
    trainer = make_trainer(model, processor, tmp_path, latent_format, latent_policy=policy, gradient_checkpointing=True)
    model.gradient_checkpointing_disable()  # TRL switches it on
    made = generation(trainer)
    made["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
    calls: list[int] = []
    model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    off, once = gradients(trainer, made), len(calls)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    on = gradients(trainer, made)
    assert len(calls) == 3 * once  # the control: layers were computed again
    assert on.keys() == off.keys()
    assert all(torch.allclose(on[name], gradient, atol=1e-6) for name, gradient in off.items())
    assert (
        ("latent_proj.linear.weight" in off) == model.latent_proj.linear.weight.requires_grad == (policy != "context")
    )


# ---- faults in the carrier


class Swapped(LatentGRPOTrainer):
    """Two rows' vectors exchanged on the way from the engine to the trainer; every position stays right."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        made = super()._generate_single_turn(*args, **kwargs)
        turn = self.batch
        pairs = [
            (i, j)
            for i, one in enumerate(turn.rollouts)
            for j, two in enumerate(turn.rollouts)
            if i < j
            and len(one.latents)
            and len(two.latents)
            # After the same text of the same prompt they are equal.
            and float((one.latents[0] - two.latents[0]).norm()) > float(one.latents[0].norm()) / 2
        ]
        assert pairs
        i, j = pairs[0]
        one, two = turn.rollouts[i], turn.rollouts[j]
        shared = min(len(one.latents), len(two.latents))

        def taking(row: Any, other: Any) -> Any:
            return replace(row, latents=torch.cat([other.latents[:shared], row.latents[shared:]]))

        turn.rollouts[i], turn.rollouts[j] = taking(one, two), taking(two, one)
        return made


@pytest.mark.parametrize("policy", ["context", "unrolled", "gaussian", "spherical"])
def test_two_swapped_rows_stop_the_run(load_tiny: Any, tmp_path: Path, policy: str) -> None:
    model, processor = opening(load_tiny)
    trainer = make_trainer(model, processor, tmp_path, kind=Swapped, latent_policy=policy, parity_check=False)
    with pytest.raises(UserError, match="do not agree with their replay"):
        trainer.train()
    assert logged(trainer, "loss") == []
    assert trainer._metrics["train"]["latent/replay_logp_diff"][0] > 1e-3


HALF = {"mixed": {"bf16": True}, "whole": {}}
"""In bfloat16: the policy pass alone, or the parameters too."""


def half_run(load_tiny: Any, folder: Path, half: str, **more: Any) -> Any:
    """Rollouts of prompts of several lengths; the engine's own weights are `stale` times the model's, if given."""
    model, processor = opening(load_tiny)
    stale = more.pop("stale", None)
    if half == "whole":
        model = model.to(torch.bfloat16)
    engine = None
    if stale is not None:
        other, _ = opening(load_tiny)
        other = other.to(model.dtype)
        with torch.no_grad():
            for layer in other.model.language_model.layers:
                layer.mlp.down_proj.weight *= stale
        engine = Stale(other, processor, LVR, batch_size=16)
    given = {"per_device_train_batch_size": 16, "parity_check": False, **HALF[half], **more}
    return make_trainer(model, processor, folder, engine=engine, **given)


@pytest.mark.parametrize("half", HALF)
def test_in_half_precision_a_run_passes(load_tiny: Any, tmp_path: Path, half: str) -> None:
    trainer = half_run(load_tiny, tmp_path, half, latent_policy="gaussian", parity_check=True)
    trainer.train()
    assert trainer.checks.tolerance == (0.1, False)
    assert logged(trainer, "latent/rate")[0] > 0.3
    for name in ("logp", "latent"):
        mean, row, most = (logged(trainer, f"latent/replay_{name}_diff{end}")[0] for end in ("_mean", "_row", ""))
        # Rounding, far from what is refused. Some processors round the replay as the rollout, and leave next to none.
        assert mean <= row <= most < 0.1


@pytest.mark.parametrize("half", HALF)
def test_in_half_precision_two_swapped_rows_stop_the_run(load_tiny: Any, tmp_path: Path, half: str) -> None:
    """Their difference is lost in the mean over all rows."""
    trainer = half_run(load_tiny, tmp_path, half, kind=Swapped, per_device_train_batch_size=64, data=rows(count=16))
    with pytest.raises(Fault, match="the mean difference within one rollout of l"):
        trainer.train()
    seen = trainer._metrics["train"]
    assert max(seen["latent/replay_logp_diff_row"] + seen.get("latent/replay_latent_diff_row", [])) > 0.3
    assert seen["latent/replay_logp_diff_mean"][0] < 0.1


@pytest.mark.parametrize("half", HALF)
def test_in_half_precision_stale_weights_stop_the_run(load_tiny: Any, tmp_path: Path, half: str) -> None:
    with pytest.raises(Fault, match="do not agree with their replay"):
        half_run(load_tiny, tmp_path, half, stale=1.5).train()
    with pytest.raises(Fault, match="the engine does not agree with the model"):
        half_run(load_tiny, tmp_path, half, stale=4.0, parity_check=True).train()
    half_run(load_tiny, tmp_path, half, stale=1.0, parity_check=True).train()  # the control


def test_swapped_latents_alone_are_noticed(load_tiny: Any, tmp_path: Path) -> None:
    """Also where no token was chosen, so that there is no log-prob to compare."""

    class Forced(Swapped):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            made = super()._generate_single_turn(*args, **kwargs)
            self.batch.rollouts = [replace(r, forced=torch.ones_like(r.forced)) for r in self.batch.rollouts]
            return made

    more = {"parity_check": False, "per_device_train_batch_size": 8}
    trainer = make_trainer(*opening(load_tiny), tmp_path, kind=Forced, **more)
    with pytest.raises(UserError, match="of latents, relative to their norm"):
        trainer.train()
    assert trainer._metrics["train"]["latent/replay_logp_diff"] == [0.0]
    with pytest.raises(UserError, match="of log-probs"):  # under a cut they can be compared all the same
        make_trainer(*opening(load_tiny), tmp_path, kind=Swapped, top_p=0.95, **more).train()


def test_latents_that_are_left_out_stop_the_run(load_tiny: Any, tmp_path: Path) -> None:
    """Monet's fallback: a carrier without latents trains on SLOT's embeddings and nobody is told."""

    class Dropped(LatentGRPOTrainer):
        def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
            made = super()._generate_single_turn(*args, **kwargs)
            self.batch.rollouts = [replace(r, latents=r.latents[:0], latent_positions=()) for r in self.batch.rollouts]
            return made

    trainer = make_trainer(*opening(load_tiny), tmp_path, kind=Dropped, parity_check=False)
    with pytest.raises(UserError, match="do not agree with their replay"):
        trainer.train()


def test_latents_shifted_by_one_are_refused(load_tiny: Any, tmp_path: Path) -> None:
    trainer = make_trainer(*opening(load_tiny), tmp_path)
    made = generation(trainer)
    positions = made["latent_positions"]
    made["latent_positions"] = torch.where(positions >= 0, positions + 1, positions)
    with pytest.raises(ValueError, match=r"takes no latent|sits at position"):
        trainer._compute_loss(trainer.model, made)


class Stale(HFRolloutEngine):
    """Keeps the weights that it has."""

    def sync_weights(self, model: Any) -> None:
        pass


def test_an_engine_with_other_weights_is_found_at_the_start(load_tiny: Any, tmp_path: Path) -> None:
    model, processor = opening(load_tiny)
    other, _ = opening(load_tiny)
    with torch.no_grad():
        other.model.language_model.layers[0].mlp.down_proj.weight *= 1.1
    trainer = make_trainer(model, processor, tmp_path, engine=Stale(other, processor, LVR))
    with pytest.raises(Fault, match=r"does not agree with the model.*its weights are not the trainer's\.$") as caught:
        trainer.train()
    assert caught.value.exit_code == 1
    synced = make_trainer(model, processor, tmp_path, engine=HFRolloutEngine(other, processor, LVR))
    synced.train()  # the control
    assert max(logged(synced, "latent/replay_logp_diff")) < 1e-3
