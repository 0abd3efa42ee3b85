"""Oracle vectors: group means, tokens under a box, boxes and crops."""

import pytest
import torch
from helpers import make_batch, noise_image
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from rl_lvr.errors import UserError
from rl_lvr.models import TokenGrid, family_of
from rl_lvr.models.oracle import (
    WHOLE,
    box_oracle,
    crop,
    crop_oracle,
    group_mean,
    groups_of,
    latent_groups,
    tokens_in_box,
)

# ---- group mean


@given(n=st.integers(1, 60), k=st.integers(1, 60))
def test_groups_are_consecutive_nearly_equal_and_complete(n, k):
    groups = groups_of(n, k)
    assert len(groups) == k
    flat = [i for group in groups for i in group]
    assert set(flat) == set(range(n))  # every token takes part
    assert flat == sorted(flat)
    sizes = {len(group) for group in groups}
    if n >= k:
        assert len(flat) == n
        assert max(sizes) - min(sizes) <= 1
    else:
        assert sizes == {1}
        repeats = [flat.count(i) for i in range(n)]
        assert max(repeats) - min(repeats) <= 1


def test_group_mean_by_hand():
    tokens = torch.arange(10.0)[:5, None].expand(5, 2)
    assert group_mean(tokens, 2).tolist() == [[0.5, 0.5], [3.0, 3.0]]
    assert group_mean(tokens, 5).tolist() == tokens.tolist()
    assert group_mean(tokens[:2], 4)[:, 0].tolist() == [0, 0, 1, 1]
    # LanteRn's way would leave out the last token: 0.5 and 2.5.
    assert group_mean(tokens, 2)[1, 0] != tokens[2:4].mean()


@pytest.mark.parametrize(("n", "k"), [(0, 1), (1, 0)])
def test_nothing_cannot_be_grouped(n, k):
    with pytest.raises(ValueError, match="cannot be reduced"):
        groups_of(n, k)


# ---- tokens under a box


def cell_box(row, col, rows, cols):
    return (col / cols, row / rows, (col + 1) / cols, (row + 1) / rows)


@given(rows=st.integers(1, 12), cols=st.integers(1, 12), data=st.data())
def test_the_box_of_a_cell_is_that_cell(rows, cols, data):
    row, col = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, cols - 1))
    grid = TokenGrid(7, rows, cols)
    assert tokens_in_box(grid, cell_box(row, col, rows, cols)).tolist() == [7 + row * cols + col]


edges = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted).filter(lambda e: e[1] - e[0] > 1e-3)


@given(rows=st.integers(1, 9), cols=st.integers(1, 9), xs=edges, ys=edges)
def test_any_box_has_tokens_and_they_are_covered_by_half(rows, cols, xs, ys):
    tokens = tokens_in_box(TokenGrid(0, rows, cols), (xs[0], ys[0], xs[1], ys[1])).tolist()
    assert tokens
    assert tokens == sorted(set(tokens))
    assert 0 <= tokens[0] <= tokens[-1] < rows * cols

    def cover(token):
        row, col = divmod(token, cols)
        wide = min(col + 1, xs[1] * cols) - max(col, xs[0] * cols)
        high = min(row + 1, ys[1] * rows) - max(row, ys[0] * rows)
        return max(wide, 0) * max(high, 0)

    half = {t for t in range(rows * cols) if cover(t) >= 0.5 + 1e-5}
    less = {t for t in range(rows * cols) if cover(t) < 0.5 - 1e-5}
    assert half <= set(tokens)
    if half:
        assert not set(tokens) & less
    else:
        assert len(tokens) == 1 or not set(tokens) & less


def test_a_small_box_is_the_token_under_its_centre():
    grid = TokenGrid(0, 4, 4)
    assert tokens_in_box(grid, (0.60, 0.10, 0.61, 0.11)).tolist() == [2]
    assert tokens_in_box(grid, (0.999, 0.999, 1.0, 1.0)).tolist() == [15]
    # Across a border, half in each cell: the centre decides.
    assert tokens_in_box(grid, (0.2, 0.2, 0.3, 0.3)).tolist() == [5]


def test_padding_around_an_image_is_skipped():
    # A wide image in the middle of a square grid: its upper half is the grid's second row.
    grid = TokenGrid(0, 4, 4, (0.0, 0.25, 1.0, 0.75))
    assert tokens_in_box(grid, (0, 0, 1, 0.5)).tolist() == [4, 5, 6, 7]
    assert tokens_in_box(grid, WHOLE).tolist() == list(range(4, 12))
    assert tokens_in_box(TokenGrid(0, 4, 4), (0, 0, 1, 0.5)).tolist() == list(range(8))


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 1), (0.5, 0, 0.4, 1), (-0.1, 0, 1, 1), (0, 0, 1, 1.1), (0, 0, float("nan"), 1)]
)
def test_what_is_no_box_is_refused(box):
    with pytest.raises(UserError, match="no region"):
        tokens_in_box(TokenGrid(0, 2, 2), box)


# ---- boxes to latents


def test_boxes_share_the_latents():
    grid = TokenGrid(0, 2, 4)
    assert latent_groups(grid, [WHOLE], 2) == ((0, 1, 2, 3), (4, 5, 6, 7))
    left, right = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
    assert latent_groups(grid, [left, right], 2) == ((0, 1, 4, 5), (2, 3, 6, 7))
    assert latent_groups(grid, [right, left], 2) == ((2, 3, 6, 7), (0, 1, 4, 5))
    assert latent_groups(grid, [left, right], 4) == ((0, 1), (4, 5), (2, 3), (6, 7))
    for boxes in ([left] * 3, []):
        with pytest.raises(UserError, match="evenly"):
            latent_groups(grid, boxes, 4)


@torch.no_grad()
def test_a_box_around_one_token_gives_that_token(load_tiny):
    for name in ("qwen2_5_vl", "qwen3_vl"):
        model, processor = load_tiny(name)
        family = family_of(model)
        batch = make_batch(processor, [([noise_image(0, 56, 84)], "red")])
        (features,), (grid,) = family.image_features(model, batch), family.token_grid(batch)
        assert (grid.rows, grid.cols) == (2, 3)
        boxes = [cell_box(r, c, 2, 3) for r in range(2) for c in range(3)]
        assert torch.equal(box_oracle(features, grid, boxes, 6), features)
        order = [4, 0, 3, 5, 1, 2]
        assert torch.equal(box_oracle(features, grid, [boxes[i] for i in order], 6), features[order])
        for index, box in enumerate(boxes):
            found = box_oracle(features, grid, [box], 1)[0]
            distance = (features - found).abs().amax(-1)
            assert distance[index] == 0
            assert (distance > 1e-2).sum() == 5  # a wrong box is another vector


def test_box_oracle_has_no_gradient(load_tiny):
    model, processor = load_tiny("qwen3_vl")
    family = family_of(model)
    batch = make_batch(processor, [([noise_image(0)], "red")])
    (features,), (grid,) = family.image_features(model, batch), family.token_grid(batch)
    assert features.requires_grad
    assert not box_oracle(features, grid, [WHOLE], 2).requires_grad


# ---- crops


@torch.no_grad()
def test_a_crop_of_everything_is_the_mean_of_the_image(tiny):
    model, processor = tiny
    family = family_of(model)
    images = [noise_image(0, 56, 56), noise_image(1, 56, 112)]
    batch = make_batch(processor, [([image], "red") for image in images])
    found = crop_oracle(model, processor, images, [WHOLE, WHOLE], 2)
    assert found.shape == (2, 2, family.hidden_size)
    grids, features = family.token_grid(batch), family.image_features(model, batch)
    for ours, grid, tokens in zip(found, grids, features, strict=True):
        whole = tokens[grid.offset : grid.offset + grid.rows * grid.cols]
        assert torch.allclose(ours, group_mean(whole, 2), atol=1e-4)
    # Negative control: half of the image is another picture.
    half = crop_oracle(model, processor, images, [(0, 0, 0.5, 1)] * 2, 2)
    assert ((half - found).abs().amax((1, 2)) > 1e-2).all()


@torch.no_grad()
def test_crops_follow_their_box_and_image(load_tiny):
    model, processor = load_tiny("qwen2_5_vl")
    a, b = noise_image(0, 56, 112), noise_image(1, 56, 112)
    left, right = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
    found = crop_oracle(model, processor, [a, a, b], [left, right, left], 3)
    again = crop_oracle(model, processor, [b, a, a], [left, left, right], 3)
    assert torch.allclose(found, again[[1, 2, 0]], atol=1e-5)
    assert not torch.allclose(found, again, atol=1e-2)
    assert not found.requires_grad


def test_crop_takes_every_pixel_it_touches():
    image = noise_image(0, 10, 20)
    assert crop(image, (0.26, 0.0, 0.5, 0.95)).size == (5, 10)
    assert crop(image, (0.1, 0.1, 0.3, 0.3)).tobytes() == image.crop((2, 1, 6, 3)).tobytes()
    assert crop(image, (0.5, 0.5, 0.500001, 0.500001)).size == (1, 1)


# ---- the image's place in the grid


@torch.no_grad()
def test_the_padded_square_of_several_images_is_known(load_tiny, monkeypatch):
    """LLaVA-OneVision pads the images of a row to squares: the painted half is found inside the padding."""
    model, processor = load_tiny("llava_onevision")
    family = family_of(model)
    for layer in model.model.vision_tower.encoder.layers:
        monkeypatch.setattr(layer.self_attn.out_proj, "forward", torch.zeros_like)
    blank = Image.new("RGB", (112, 56), (90, 90, 90))
    painted = blank.copy()
    ImageDraw.Draw(painted).rectangle((60, 4, 108, 52), (255, 0, 0))
    (before, _), (after, _) = (
        family.image_features(model, make_batch(processor, [([image, blank], "red")])) for image in (blank, painted)
    )
    grid = family.token_grid(make_batch(processor, [([painted, blank], "red")]))[0]
    assert grid.area == (0.0, 0.25, 1.0, 0.75)
    changed = ((after - before).abs().amax(-1) > 1e-3).nonzero()[:, 0].tolist()
    assert changed == tokens_in_box(grid, (0.5, 0, 1, 1)).tolist() == [6, 7, 10, 11]
