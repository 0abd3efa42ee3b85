"""What latent SFT trains on what: the loss against one without hooks, what is fed, what is a positive."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_tools import PUZZLES, Bench, build_model
from torch.nn import functional

from rl_lvr.data.targets import target_vectors
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.types import Request, Sampling
from rl_lvr.training.runs.settings import freeze_vision
from rl_lvr.training.sft.config import LatentSFTConfig
from rl_lvr.training.sft.trainer import LatentSFTTrainer


def trainer_of(bench: Bench, out: Path, encoded: list[Any] | None = None, **settings: Any) -> LatentSFTTrainer:
    config = LatentSFTConfig(
        output_dir=str(out),
        max_steps=10,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        **settings,
    )
    freeze_vision(bench.family, bench.model)
    return LatentSFTTrainer(
        bench.model,
        config,
        train_dataset=encoded or bench.encoded,
        processing_class=bench.processor,
        latent_format=bench.markers.format if bench.markers else None,
    )


def reference_loss(bench: Bench, batch: dict[str, Any], vectors: torch.Tensor) -> tuple[Any, Any, Any]:
    """Cross-entropy and predictions without any hook: the latents are tokens of their own in the embedding matrix."""
    model, family = copy.deepcopy(bench.model), bench.family
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"]
    images = {key: batch[key] for key in family.image_keys if key in batch}
    old = model.get_input_embeddings().weight.shape[0]
    head = copy.deepcopy(model.lm_head)
    model.resize_token_embeddings(old + len(vectors), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[old:] = vectors
    slots = ids == bench.markers.slot
    positions = family.positions(model, ids, mask, images).prefill
    labels = ids.clone()
    labels[(mask == 0) | slots | (ids == bench.markers.end)] = -100
    for row, record in enumerate(bench.encoded):
        labels[row, : record.prompt_length] = -100
    kinds = (ids == family.placeholder_ids(bench.tokenizer)["image"]).int()
    ids[slots] = old + torch.arange(len(vectors))
    more = {"mm_token_type_ids": kinds} if positions.ndim == 3 else {}
    hidden = family.core(model)(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **images, **more
    ).last_hidden_state
    logits = head(hidden).float()
    ce = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return ce, hidden[slots.roll(-1, 1)], head.weight


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"])
def test_loss_and_gradients_equal_a_forward_without_hooks(tmp_path: Path, family: str) -> None:
    bench = Bench(build_model(tmp_path / "model", family))
    trainer = trainer_of(bench, tmp_path / "out", latent_weight=0.7, latent_objective="nmse:1,cosine:0.5")
    batch = bench.batch()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradient = bench.model.lm_head.weight.grad.clone()

    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    vectors, _ = target_vectors(bench.family, bench.model, images, batch["targets"])
    ce, predicted, head = reference_loss(bench, batch, vectors)
    nmse = ((predicted - vectors) ** 2).mean() / vectors.var()
    cosine = (1 - functional.cosine_similarity(predicted, vectors, dim=-1)).mean()
    expected = ce + 0.7 * (nmse + 0.5 * cosine)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-4)
    expected.backward()
    assert (head.grad - gradient).abs().max() < 1e-4

    wrong, _, _ = reference_loss(bench, batch, vectors.flip(0))
    assert abs(float(wrong.detach()) - float(ce.detach())) > 1e-3  # the latents reach the text


def test_contrast_takes_the_tokens_of_the_cell_as_positives(place: Path, tmp_path: Path) -> None:
    bench = Bench(place / "model")
    trainer = trainer_of(bench, tmp_path / "out", latent_objective="contrast")
    batch = bench.batch()
    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    targets = batch["targets"]
    vectors, tokens = target_vectors(bench.family, bench.model, images, targets)
    hidden = torch.randn(*batch["input_ids"].shape, 64)
    pairs = trainer._pairs(hidden, vectors, vectors, tokens, targets, batch["input_ids"])
    cells, hops = PUZZLES.rows * PUZZLES.cols, PUZZLES.hops
    for number in range(len(vectors)):
        row, hop = divmod(number, hops)
        path = bench.records[row].meta["cells"][:hops]
        mine = [row * cells + path[hop]]  # one token a cell
        others = [row * cells + cell for cell in range(cells) if cell not in path]
        assert pairs.positive[number].nonzero()[:, 0].tolist() == mine
        assert pairs.negative[number].nonzero()[:, 0].tolist() == others
        place_of_image = (batch["input_ids"][row] == trainer.image_id).nonzero()[path[hop], 0]
        assert torch.equal(pairs.image[mine[0]], hidden[row, place_of_image])


def test_spans_without_targets_get_exactly_what_the_engine_feeds(place: Path, tmp_path: Path) -> None:
    bench = Bench(place / "model")
    encoded = [replace(row, targets=()) for row in bench.encoded]
    trainer = trainer_of(bench, tmp_path / "out", encoded)
    bench.encoded = encoded
    batch = bench.batch()
    targets = batch.pop("targets")
    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    batch["position_ids"] = bench.family.positions(
        bench.model, batch["input_ids"], batch["attention_mask"], images
    ).prefill
    latents, _, _ = trainer._latents(batch, bench.markers, images, targets)

    engine = HFRolloutEngine(bench.model, bench.processor, bench.markers.format)
    start = bench.markers.start
    requests = [
        Request(prompt_ids=[*row.input_ids[: row.prompt_length].tolist(), start], images=row.images) for row in encoded
    ]
    rollouts = engine.generate(requests, Sampling(max_tokens=4, temperature=0.0))
    for b, rollout in enumerate(rollouts):
        assert (latents.row(b)[0] - rollout.latents).abs().max() < 1e-4
        assert latents.row(b)[1].tolist() == list(rollout.latent_positions)
    assert (latents.values[0] - latents.values[1]).abs().max() > 1e-2


def test_scheduled_own_latents_replace_the_end_of_a_span(place: Path, tmp_path: Path) -> None:
    bench = Bench(place / "model")
    trainer = trainer_of(bench, tmp_path / "out", own_latents=0.67, own_latents_start=0.5)
    batch = bench.batch()
    targets = batch.pop("targets")
    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    batch["position_ids"] = bench.family.positions(
        bench.model, batch["input_ids"], batch["attention_mask"], images
    ).prefill
    trainer.model.train()
    trainer.state.max_steps = 10
    trainer.state.global_step = 5  # the ramp begins behind this step
    forced, _, _ = trainer._latents(batch, bench.markers, images, targets)
    trainer.state.global_step = 10
    mixed, _, _ = trainer._latents(batch, bench.markers, images, targets)
    changed = (forced.values - mixed.values).abs().amax(-1) > 1e-6
    assert changed.tolist() == [[False, True, True]] * 4  # round(0.67 * 3) = 2 of 3
    assert trainer.args.own_share_at(0.75) == pytest.approx(0.335)
    trainer.args.own_latents_end = 0.6
    assert [trainer.args.own_share_at(p) for p in (0.5, 0.55, 0.7)] == pytest.approx([0, 0.335, 0.67])


def test_noise_is_on_what_is_fed_and_not_on_what_is_predicted(place: Path, tmp_path: Path) -> None:
    bench = Bench(place / "model", count=24)
    batch = bench.batch()
    targets = batch.pop("targets")
    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    clean, _ = target_vectors(bench.family, bench.model, images, targets)
    trainer = trainer_of(bench, tmp_path / "out", latent_noise=0.25)
    trainer.model.train()
    latents, vectors, _ = trainer._latents(batch, bench.markers, images, targets)
    assert torch.equal(vectors, clean)
    noise = latents.values[latents.mask] - clean
    assert float(noise.std() / clean.std()) == pytest.approx(0.25, rel=0.05)
    trainer.model.eval()
    latents, _, _ = trainer._latents(batch, bench.markers, images, targets)
    assert torch.equal(latents.values[latents.mask], clean)
