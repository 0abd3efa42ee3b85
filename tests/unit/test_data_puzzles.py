"""Pointer puzzles: solvable from the pixels, unsolvable without the pointers, disjoint, reproducible."""

import dataclasses
import io
import itertools
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rl_lvr.data import puzzles as module
from rl_lvr.data.puzzles import COLOURS, PALETTE, PuzzleConfig, chance, draw, generate, render
from rl_lvr.errors import UserError

PINNED_PATH = ["forest", "grey", "green", "magenta", "orange", "cyan", "purple"]
PINNED_CELLS = (11, 8, 3, 2, 6, 10)


def solve(record, config, follow=True):
    """Answer from the pixels and the question alone; shares no code with the generator but the palette."""
    name = {rgb: colour for colour, rgb in PALETTE.items()}
    image = Image.open(io.BytesIO(record.images[0].data)).convert("RGB")
    px = image.width // config.cols
    points_to = {}
    for r, c in itertools.product(range(config.rows), range(config.cols)):
        y = r * px + px // 2
        own, other = image.getpixel((c * px, y)), image.getpixel((c * px + px - 1, y))
        points_to[name[own]] = name[other]
    _, at, hops, _ = record.messages[0]["content"][1]["text"].split()
    for _ in range(int(hops) if follow else 1):
        at = points_to[at]
    return at


@pytest.mark.parametrize(
    "config",
    [
        PuzzleConfig(),
        PuzzleConfig(rows=2, cols=3, hops=4, cell_px=2, seed=3, latents="decorative", k=5),
        PuzzleConfig(rows=4, cols=6, hops=23, cell_px=14, latents="none"),
    ],
)
def test_an_independent_solver_is_always_right(config):
    records = generate(config, 200, "test")
    assert all(solve(r, config) == r.answer for r in records)
    assert sum(solve(r, config, follow=False) == r.answer for r in records) < 20  # control: one hop is not enough


def test_every_pixel_of_a_cell_has_its_colour():
    config = PuzzleConfig(rows=2, cols=3, hops=2, cell_px=6)
    puzzles = draw(config, 3, "train")
    pictures = render(config, puzzles)
    assert pictures.shape == (3, 12, 18, 3)
    for i in range(3):
        for cell in range(6):
            r, c = divmod(cell, 3)
            block = pictures[i, r * 6 : r * 6 + 6, c * 6 : c * 6 + 6]
            assert (block[:, :3] == PALETTE[COLOURS[puzzles.own[i, cell]]]).all()
            assert (block[:, 3:] == PALETTE[COLOURS[puzzles.shown[i, cell]]]).all()


def test_the_path_is_recorded_and_its_cells_are_the_targets():
    config = PuzzleConfig(hops=5)
    for record in generate(config, 50, "train"):
        image = np.asarray(record.open_images()[0])
        (target,) = record.targets
        assert len(target.boxes) == 5
        for colour, box in zip(record.meta["path"], target.boxes, strict=False):
            x, y = round(box[0] * image.shape[1]), round(box[1] * image.shape[0])
            assert tuple(image[y, x]) == PALETTE[colour]
        assert record.meta["path"][0] == record.meta["start"]
        assert record.meta["path"][-1] == record.answer
        assert sorted(record.meta["cycle"]) == sorted(config.colours)
        assert record.category == "hops-5"
        assert record.completion_text == f"<latent>{record.answer}"


def test_decorative_and_absent_latents():
    decorative = generate(PuzzleConfig(latents="decorative", k=3), 5, "train")
    assert {r.latents[0].cells for r in decorative} == {(0, 0, 0)}
    plain = generate(PuzzleConfig(latents="none"), 5, "train")
    assert all(r.latents is None and r.completion_text == r.answer for r in plain)
    # the latents are no part of the draw: the same seed shows the same puzzles
    assert [r.images[0].data for r in decorative] == [r.images[0].data for r in plain]


def test_a_split_has_no_duplicates_and_shares_no_picture_with_another():
    # 6 cells leave room for 720 x 120 pictures: without the hash, 20,000 and 5,000 draws would meet
    config = PuzzleConfig(rows=2, cols=3, hops=3, cell_px=2)
    train, test = draw(config, 20_000, "train"), draw(dataclasses.replace(config, seed=7), 5_000, "test")

    def pictures(puzzles):
        return {a.tobytes() + b.tobytes() for a, b in zip(puzzles.own, puzzles.shown, strict=True)}

    whole = {a.tobytes() + b.tobytes() for a, b in zip(train.own, train.cycle, strict=True)}
    assert len(whole) == 20_000
    assert not pictures(train) & pictures(test)
    other = draw(dataclasses.replace(config, seed=1), 20_000, "train")
    assert pictures(train) & pictures(other)  # control: within one split, two seeds do meet


def test_the_split_does_not_depend_on_how_a_picture_is_entered():
    puzzles = draw(PuzzleConfig(), 500, "val")
    turned = module.Puzzles(puzzles.own, np.roll(puzzles.cycle, 1, axis=1))  # same picture, other start
    assert (module._eighth(turned) == 6).all()
    swapped = module.Puzzles(np.roll(puzzles.own, 1, axis=1), puzzles.cycle)  # another picture
    assert 0.05 < (module._eighth(swapped) == 6).mean() < 0.25


def test_a_grid_that_is_used_up_says_how_many_it_has():
    config = PuzzleConfig(rows=1, cols=3, hops=1)  # 3! x 2! pictures x 3 starts
    total = 0
    for split in module.SPLITS:
        with pytest.raises(UserError, match=r"has only \d+ different puzzles") as error:
            generate(config, 100, split)
        count = int(re.search(r"only (\d+) different", str(error.value))[1])
        assert len(draw(config, count, split)) == count
        total += count
    assert total == 36  # every puzzle is in exactly one split


def test_draws_are_uniform():
    config = PuzzleConfig(rows=2, cols=2, hops=2)
    bits = np.random.PCG64(0)
    orders = Counter(map(bytes, module._permutations(bits, 24_000, 4)))
    assert len(orders) == 24
    assert all(abs(count - 1000) < 160 for count in orders.values())  # 5 standard deviations
    assert chance(config) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("rows", "cols", "hops"), [(3, 4, 6), (2, 3, 4), (2, 2, 1)])
def test_chance_is_what_the_best_blind_solver_reaches(rows, cols, hops):
    """Strategies fitted on one half and scored on the other: none that reads no pointer beats 1 / (n - 1)."""
    config = PuzzleConfig(rows=rows, cols=cols, hops=hops, cell_px=2)
    n, m = config.cells, 30_000
    bits = np.random.PCG64(5)
    own, cycle = (module._permutations(bits, m, n).astype(int) for _ in range(2))  # all splits at once
    where = np.argsort(own, axis=1)
    start, answer = cycle[:, 0], cycle[:, hops]
    start_cell = np.take_along_axis(where, start[:, None], 1)[:, 0]
    answer_cell = np.take_along_axis(where, answer[:, None], 1)[:, 0]
    fit, test = slice(0, m // 2), slice(m // 2, m)

    def best(key, value):
        table = np.zeros((n, n))
        np.add.at(table, (key[fit], value[fit]), 1)
        return (table.argmax(1)[key[test]] == value[test]).mean()

    tolerance = 4 * np.sqrt(chance(config) / (m // 2))
    assert (answer != start).all()
    assert (start[test] == answer[test]).mean() == 0  # answering the start, the shortcut of permutations
    for score in (best(np.zeros(m, int), answer), best(start, answer), best(start_cell, answer_cell)):
        assert score < chance(config) + tolerance
    assert abs(best(start, answer) - chance(config)) < tolerance  # it is reached, too
    if 1 < hops < n - 1:  # what reading two pointers without chaining them rules out
        assert (answer != cycle[:, 1]).all()
        assert (answer != cycle[:, -1]).all()


def test_same_config_same_bytes_and_every_field_matters():
    config = PuzzleConfig()
    first = generate(config, 20, "train")
    assert first == generate(config, 20, "train")
    assert first[:5] == generate(config, 5, "train")  # a smaller set is the beginning of a larger one
    for change in ({"seed": 1}, {"hops": 5}, {"cell_px": 4}, {"rows": 4, "cols": 3}, {"latents": "none"}):
        assert first != generate(dataclasses.replace(config, **change), 20, "train"), change
    assert [r.id for r in first[:2]] == ["train-000000", "train-000001"]


def test_the_draw_is_pinned():
    """A change of numpy or of this code that alters published sets must not pass unseen."""
    record = generate(PuzzleConfig(), 1, "test")[0]
    assert record.meta["path"] == PINNED_PATH
    assert record.latents[0].cells == PINNED_CELLS


def test_colours_are_single_words_far_apart():
    rgb = np.array(list(PALETTE.values()), float)
    distance = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) + 1e6 * np.eye(len(rgb))
    assert len(COLOURS) >= 20
    assert all(name.isalpha() and name.islower() for name in COLOURS)
    assert distance.min() >= 67
    assert distance[:12, :12].min() >= 127
    spread = np.linalg.eigvalsh(np.cov(rgb[:9].T))
    assert spread.max() < 1.01 * spread.min(), "a direction with little spread is learned last, or not at all"


def test_words_cover_every_text():
    config = PuzzleConfig(rows=2, cols=3, hops=5)
    words = set(config.words)
    for record in generate(config, 50, "train"):
        assert set(record.messages[0]["content"][1]["text"].split()) <= words
        assert record.answer in words
    assert "black" not in words


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hops": 12}, "come back to the start"),
        ({"hops": 0}, "hops is 0"),
        ({"rows": 5, "cols": 5}, "25 cells"),
        ({"rows": 1, "cols": 2, "hops": 1}, "2 cells"),
        ({"cell_px": 7}, "even number"),
        ({"latents": "paths"}, "choose from path, decorative, none"),
        ({"k": 4}, "decorative latents only"),
        ({"k": 0, "latents": "decorative"}, "k is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"rows": True}, "rows is True"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        PuzzleConfig(**change)


def test_an_unknown_split_is_refused():
    with pytest.raises(UserError, match="choose from train, val, test"):
        generate(PuzzleConfig(), 1, "dev")
    with pytest.raises(UserError, match="number of puzzles is -1"):
        generate(PuzzleConfig(), -1, "train")
    assert generate(PuzzleConfig(), 0, "train") == []


@settings(max_examples=30)
@given(rows=st.integers(1, 4), cols=st.integers(3, 6), data=st.data())
def test_any_grid_is_one_cycle_and_its_answer_is_hops_away(rows, cols, data):
    hops = data.draw(st.integers(1, rows * cols - 1))
    config = PuzzleConfig(rows=rows, cols=cols, hops=hops, cell_px=2, seed=data.draw(st.integers(0, 99)))
    puzzles = draw(config, 2, "train")
    for pointer, cycle in zip(puzzles.pointer, puzzles.cycle, strict=True):
        at, seen = cycle[0], []
        for _ in range(config.cells):
            seen.append(at)
            at = pointer[at]
        assert at == cycle[0]
        assert len(set(seen)) == config.cells
        assert seen[hops] == cycle[hops]
