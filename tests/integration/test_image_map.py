"""`image_map` against eager attention's weights on all families, with more image tokens than labels of a mass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_cases import FORMATS, Rig
from helpers import noise_image
from probe_cases import LAYERS, Case, make_case, packed
from signal_cases import by_hand, plain_forward
from torch import Tensor

from rl_lvr.latents.format import get_format
from rl_lvr.rollout.replay import replay_batch
from rl_lvr.signals import Reading, image_map

CLOSE = 1e-5
LARGE = noise_image(0, 280, 280)
ROWS = (
    ([LARGE], "from red 3 hops what is next"),
    ([], "what"),
    ([noise_image(1, 84, 56), noise_image(2, 280, 196)], "from blue 1 hops"),
)
EVERY = Reading("image_map", by_layer=True, by_head=True)
TILES = {"image_size": 140}
"""25 or 100 tokens a tile."""


@pytest.fixture(scope="module")
def cases(load_tiny) -> Any:
    made: dict[tuple[str, str], Case] = {}

    def case(family: str, side: str = "left") -> Case:
        if (family, side) not in made:
            made[family, side] = make_case(*load_tiny(family, layers=LAYERS, **TILES), side, ROWS)
        return made[family, side]

    return case


def eager_map(case: Case) -> Tensor:
    """[N, L, H, M] at all real tokens, from the weights on each row's own image tokens."""
    weights = case.eager_weights().float()  # [L, H, B * T, T]
    sequences, image = case.regions.sequences, case.regions.labels == 2
    counts = [int((image & (sequences == s)).sum()) for s in range(case.regions.count)]
    found = weights.new_zeros(*weights.shape[:3], max(counts))
    for s, count in enumerate(counts):
        b = int((sequences == s).any(1).nonzero()[0])
        queries = (sequences == s).flatten().nonzero()[:, 0]
        keys = (image[b] & (sequences[b] == s)).nonzero()[:, 0]
        found[:, :, queries, :count] = weights[:, :, queries][..., keys]
    return found.permute(2, 0, 1, 3)[case.rows.flatten()]


def probed(case: Case, *readings: Reading, **how: Any) -> list[Tensor]:
    with case.probe(list(readings), **how) as probe, torch.no_grad():
        case.forward()
    return [probe[reading] for reading in readings]


def agrees(case: Case, **how: Any) -> Tensor:
    truth = eager_map(case)
    assert truth.shape[-1] >= 100  # beyond the labels of a mass
    some = Reading("image_map", (-1, 0), (1,))
    layers, heads = Reading("image_map", (-1, 0), by_layer=True), Reading("image_map", None, (1, 0), by_head=True)
    mean, got, part, by_layer, by_head = probed(case, Reading("image_map"), EVERY, some, layers, heads, **how)
    assert got.shape == truth.shape
    assert (got - truth).abs().max() < CLOSE
    assert (mean - truth.mean((1, 2))).abs().max() < CLOSE
    assert (part - truth[:, [-1, 0], 1].mean(1)).abs().max() < CLOSE
    assert (by_layer - truth[:, [-1, 0]].mean(2)).abs().max() < CLOSE
    assert (by_head - truth[:, :, [1, 0]].mean(1)).abs().max() < CLOSE
    (mass,) = probed(case, Reading("mass"), **how)
    assert (mean.sum(-1) - mass[:, 2]).abs().max() < CLOSE
    # Controls: tokens one further on, and the same weights in another order of layers or tokens.
    (wrong,) = probed(case.wrong, EVERY, **how)
    width = min(wrong.shape[-1], truth.shape[-1])
    assert (wrong[..., :width] - truth[..., :width]).abs().max() > 1e-3
    assert (got.flip(1) - truth).abs().max() > 1e-3
    assert (got.flip(-1) - truth).abs().max() > 1e-3
    return got


@pytest.mark.parametrize("side", ["left", "right"])
def test_maps_equal_eager_attention(cases, family_name, side):
    agrees(cases(family_name, side))


def test_maps_of_packed_sequences(cases, family_name):
    case = cases(family_name, "right")
    (alone,) = probed(case, EVERY)
    assert (agrees(packed(case)) - alone).abs().max() < CLOSE


def test_maps_with_the_denominator_computed_anew(cases):
    agrees(cases("qwen2_5_vl"), recompute=True)


def test_maps_under_a_sliding_window(load_tiny):
    model, processor = load_tiny("qwen2_5_vl", layers=LAYERS, **TILES)
    for layer in range(1, LAYERS):
        model.config.text_config.layer_types[layer] = "sliding_attention"
        model.model.language_model.layers[layer].self_attn.sliding_window = 40
    model.config.text_config.sliding_window = 40
    model.model.language_model.has_sliding_layers = True
    case = make_case(model, processor, "left", ROWS)
    assert (agrees(case)[:, 1] > 0).sum(-1).max() <= 40


@pytest.mark.gpu
def test_maps_on_a_gpu(load_tiny, family_name):
    """From the kernel's log-sum-exp and from one computed anew."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model, processor = load_tiny(family_name, layers=LAYERS, **TILES)
    case = make_case(model.to("cuda", torch.bfloat16), processor, "right", ROWS)
    (taken,), (anew,) = probed(case, EVERY), probed(case, EVERY, recompute=True)
    assert float(taken.max()) > 1e-3
    assert (taken - anew).abs().max() < 1e-4


# ---- the function


@pytest.fixture(scope="module")
def wide(load_tiny) -> Any:
    made: dict[str, Rig] = {}

    def rig(family: str) -> Rig:
        if family not in made:
            made[family] = Rig(*load_tiny(family, latent_formats=FORMATS, **TILES))
        return made[family]

    return rig


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_map_of_each_rollout(wide, family_name, side):
    """Weights, places, images and cells against one rollout alone on eager attention and the features of its images."""
    rig = wide(family_name)
    markers = rig.engine(get_format("lvr", k=3)).markers
    word = rig.tokenizer.convert_tokens_to_ids("red")
    span = [markers.start, markers.slot, markers.slot, markers.end]
    rollouts, images = by_hand(rig, markers, [[*span, word, word], [word, *span, word], [*span, word]], ROWS)
    batch = replay_batch(rig.model, rollouts, images, side=side)
    maps = image_map(rig.model, batch, markers, queries="latent", by_layer=True, by_head=True)
    means = image_map(rig.model, batch, markers, queries="latent")
    largest = 0
    for rollout, row, found, average in zip(rollouts, images, maps, means, strict=True):
        plain = plain_forward(rig, rollout, row, markers)
        assert found.queries.tolist() == plain.latents
        assert found.tokens.tolist() == plain.image
        truth = plain.weights[:, :, plain.latents][..., plain.image]
        assert found.weights.shape == truth.shape
        assert average.weights.shape == truth.shape[2:]
        if not row:
            assert found.grids == ()
            continue
        largest = max(largest, len(plain.image))
        assert (found.weights - truth).abs().max() < CLOSE
        assert (average.weights - truth.mean((0, 1))).abs().max() < CLOSE
        assert (found.weights.flip(0) - truth).abs().max() > 1e-4  # control
        with torch.no_grad():
            sizes = [len(features) for features in rig.family.image_features(rig.model, row)]
        assert found.images.bincount().tolist() == sizes
        assert list(found.grids) == rig.family.token_grid(row)
        for number, grid in enumerate(found.grids):
            first = sum(sizes[:number]) + grid.offset
            whole = truth[..., first : first + grid.rows * grid.cols]
            picture = found.drawn(number)
            assert picture.shape[-2:] == (grid.rows, grid.cols)
            assert (picture.flatten(-2) - whole).abs().max() < CLOSE
            mine = found.cells[found.images == number]
            cells = [(r, c) for r in range(grid.rows) for c in range(grid.cols)]
            assert [tuple(cell) for cell in mine.tolist() if cell[0] >= 0] == cells
            assert mine[grid.offset].tolist() == [0, 0]
    assert largest >= 100


def test_any_tokens_may_be_queries(wide):
    rig = wide("qwen2_5_vl")
    markers = rig.engine(get_format("lvr", k=3)).markers
    word = rig.tokenizer.convert_tokens_to_ids("red")
    rollouts, images = by_hand(rig, markers, [[word, word], [word]], ROWS)
    batch = replay_batch(rig.model, rollouts, images)
    last = batch.mask.bool() & (batch.mask.cumsum(1) == batch.mask.sum(1, keepdim=True))
    found, empty = image_map(rig.model, batch, markers, queries=last)
    plain = plain_forward(rig, rollouts[0], images[0], markers)
    end = len(rollouts[0].ids) - 1
    assert found.queries.tolist() == [end]
    assert (found.weights[0] - plain.weights[:, :, end][..., plain.image].mean((0, 1))).abs().max() < CLOSE
    assert empty.weights.shape == (1, 0)
    nothing = image_map(rig.model, batch, markers, queries="latent", by_head=True)
    assert [found.weights.shape for found in nothing] == [(2, 0, len(plain.image)), (2, 0, 0)]
    with pytest.raises(ValueError, match="not real tokens"):
        image_map(rig.model, batch, markers, queries=torch.ones_like(last))


def test_image_tokens_without_their_image_are_refused(wide):
    rig = wide("qwen2_5_vl")
    markers = rig.engine(get_format("lvr", k=3)).markers
    word = rig.tokenizer.convert_tokens_to_ids("red")
    rollouts, images = by_hand(rig, markers, [[word], [word]], ROWS)
    batch = replay_batch(rig.model, rollouts, images)
    hidden = torch.zeros(*batch.ids.shape, rig.family.hidden_size)
    batch.ids[1, 0] = rig.family.image_token  # a second run of one token, and one image in the batch

    def run() -> Tensor:
        with torch.no_grad():
            rig.family.core(rig.model)(inputs_embeds=hidden, attention_mask=batch.mask, use_cache=False)
        return hidden

    with pytest.raises(ValueError, match="image tokens in the batch, but its 1 images have"):
        image_map(rig.model, batch, markers, run=run)
