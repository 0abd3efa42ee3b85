"""LatentBatch: whatever happens to a batch, a vector stays with its row and its position.

Every vector is tagged: element 0 names the row it was made for, element 1 its position there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from rl_lvr.errors import UserError
from rl_lvr.latents.batch import LatentBatch

H = 3
Rows = list[list[int]]

rows_of_positions = st.lists(st.lists(st.integers(0, 40), max_size=5, unique=True).map(sorted), min_size=1, max_size=6)


def tagged(rows: Rows, first_name: int = 0) -> LatentBatch:
    values = [
        torch.tensor([[first_name + name, place, 1.0] for place in places]).reshape(-1, H)
        for name, places in enumerate(rows)
    ]
    return LatentBatch.from_rows(values, rows, [first_name + name + 0.5 for name in range(len(rows))])


def check(batch: LatentBatch, names: list[int], rows: Rows, moved: list[int] | None = None) -> None:
    """Row i of `batch` is the row that was made as `names[i]`, with these positions, shifted by `moved[i]`."""
    assert len(batch) == len(names)
    moved = moved or [0] * len(names)
    for index, (name, offset) in enumerate(zip(names, moved, strict=True)):
        values, positions = batch.row(index)
        assert positions.tolist() == [place + offset for place in rows[name]]
        assert values.tolist() == [[name, place, 1.0] for place in rows[name]]
        assert batch.sigma[index].item() == name + 0.5
        count = len(rows[name])
        assert batch.counts[index] == count
        assert batch.mask[index, :count].all()
        assert (batch.positions[index, count:] == -1).all()
        assert (batch.values[index, count:] == 0).all()


@st.composite
def rows_and_order(draw: st.DrawFn) -> tuple[Rows, list[int]]:
    rows = draw(rows_of_positions)
    return rows, draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))


# ---- nothing moves a vector


@given(rows_of_positions, st.integers(0, 4))
def test_padding_and_trimming(rows: Rows, extra: int) -> None:
    batch = tagged(rows)
    check(batch, list(range(len(rows))), rows)
    wide = batch.padded(batch.positions.shape[1] + extra)
    check(wide, list(range(len(rows))), rows)
    narrow = wide.trimmed()
    check(narrow, list(range(len(rows))), rows)
    assert narrow.positions.shape[1] == max(map(len, rows))


def test_the_check_notices_a_moved_vector() -> None:
    """Negative control of every test here: vectors or positions moved alone, within a row or between rows."""
    rows = [[1, 4], [2, 3]]
    batch = tagged(rows)
    check(batch, [0, 1], rows)
    swapped_rows = LatentBatch(batch.values[[1, 0]], batch.positions, batch.sigma)
    swapped_places = LatentBatch(batch.values[:, [1, 0]], batch.positions, batch.sigma)
    swapped_sigma = LatentBatch(batch.values, batch.positions, batch.sigma[[1, 0]])
    moved = LatentBatch(batch.values, batch.positions + 1, batch.sigma)
    for wrong in (swapped_rows, swapped_places, swapped_sigma, moved):
        with pytest.raises(AssertionError):
            check(wrong, [0, 1], rows)


@given(rows_and_order())
def test_selecting_and_repeating_rows(case: tuple[Rows, list[int]]) -> None:
    rows, order = case
    check(tagged(rows).select(order), order, rows)
    check(tagged(rows).select(torch.tensor(order, dtype=torch.long)), order, rows)


@given(rows_of_positions, st.data())
def test_splitting_and_joining(rows: Rows, data: st.DataObject) -> None:
    batch, size = tagged(rows), data.draw(st.integers(1, len(rows)))
    pieces = batch.split(size)
    assert [len(piece) for piece in pieces] == [min(size, len(rows) - at) for at in range(0, len(rows), size)]
    cut = data.draw(st.integers(0, len(rows)))
    for parts in (pieces, batch.split([cut, len(rows) - cut])):
        at = 0
        for part in parts:
            check(part, list(range(at, at + len(part))), rows)
            at += len(part)
        # Pieces are trimmed, so that joining has to pad them to different widths again.
        check(LatentBatch.concat(part.trimmed() for part in parts), list(range(len(rows))), rows)


@given(rows_of_positions, rows_of_positions)
def test_concat_keeps_each_batch_in_its_place(one: Rows, two: Rows) -> None:
    joined = LatentBatch.concat([tagged(one), tagged(two, first_name=len(one))])
    check(joined, list(range(len(one) + len(two))), one + two)


@given(rows_of_positions, st.integers(0, 9), st.data())
def test_shifting(rows: Rows, offset: int, data: st.DataObject) -> None:
    names = list(range(len(rows)))
    check(tagged(rows).shifted(offset), names, rows, [offset] * len(rows))
    each = data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    moved = tagged(rows).shifted(torch.tensor(each))
    check(moved, names, rows, each)
    check(moved.shifted(-torch.tensor(each)), names, rows)


@given(rows_of_positions, st.integers(0, 2**31), st.data())
def test_through_the_shuffle_and_split_of_trl(rows: Rows, seed: int, data: st.DataObject) -> None:
    """What GRPOTrainer does to a generation batch: our tensors go along with its own token ids."""
    chunks = data.draw(st.sampled_from([n for n in range(1, len(rows) + 1) if len(rows) % n == 0]))
    torch.manual_seed(seed)
    inputs = {"completion_ids": torch.arange(len(rows))[:, None], "none": None, **tagged(rows).as_tensors()}
    shuffled = shuffle_sequence_dict(inputs)
    order = shuffled["completion_ids"][:, 0].tolist()
    check(LatentBatch.from_tensors(shuffled), order, rows)
    for chunk in split_tensor_dict(shuffled, chunks):
        check(LatentBatch.from_tensors(chunk), chunk["completion_ids"][:, 0].tolist(), rows)


def test_the_shuffle_of_trl_does_move_rows() -> None:
    """Negative control of the test above: read in the old order, the shuffled batch fails the check."""
    rows = [[place] for place in range(8)]
    torch.manual_seed(0)
    shuffled = shuffle_sequence_dict(tagged(rows).as_tensors())
    with pytest.raises(AssertionError):
        check(LatentBatch.from_tensors(shuffled), list(range(8)), rows)


def test_two_batches_live_in_one_dict_under_their_prefixes() -> None:
    own, oracle = tagged([[1]]), tagged([[2, 3]])
    tensors = own.as_tensors() | oracle.as_tensors("oracle_")
    check(LatentBatch.from_tensors(tensors), [0], [[1]])
    check(LatentBatch.from_tensors(tensors, "oracle_"), [0], [[2, 3]])


# ---- gradients


@pytest.mark.parametrize(
    "operation",
    [
        lambda batch: batch.padded(7),
        lambda batch: batch.select([1, 0]),
        lambda batch: LatentBatch.concat([batch, tagged([[1, 2, 3, 4]])]),
        lambda batch: LatentBatch.concat(batch.split(1)),
        lambda batch: batch.shifted(3).trimmed(),
        lambda batch: LatentBatch.from_tensors(batch.as_tensors()),
        lambda batch: batch.to(torch.float64),
    ],
    ids=["padded", "select", "concat", "split", "shifted", "tensors", "to"],
)
def test_gradients_reach_the_vectors(operation: Callable[[LatentBatch], LatentBatch]) -> None:
    rows = [torch.ones(2, H, requires_grad=True), torch.ones(1, H, requires_grad=True)]
    batch = operation(LatentBatch.from_rows(rows, [[0, 3], [2]]))
    (batch.values * batch.mask[..., None]).sum().backward()
    assert all(row.grad is not None and torch.equal(row.grad, torch.ones_like(row)) for row in rows)


def test_a_repeated_row_sums_its_gradients() -> None:
    values = torch.ones(1, H, requires_grad=True)
    LatentBatch.from_rows([values], [[0]]).select([0, 0, 0]).values.sum().backward()
    assert torch.equal(values.grad, torch.full((1, H), 3.0))


# ---- files


def same_bits(one: Tensor, two: Tensor) -> bool:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    view = whole[one.element_size()]
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.view(view), two.view(view))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [[[0, 5], [], [3]], [[], []], []], ids=["mixed", "zero width", "no rows"])
def test_save_and_load_give_every_bit_back(rows: Rows, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    values = [torch.randn(len(places), H).to(dtype) for places in rows]
    if rows and rows[0]:
        values[0][0] = torch.tensor([-0.0, float("inf"), torch.finfo(dtype).smallest_normal / 2])
    batch = LatentBatch.from_rows(values, rows, [0.1] * len(rows), hidden_size=H)
    batch = batch.to(dtype)
    batch.save(tmp_path / "latents.safetensors")
    again = LatentBatch.load(tmp_path / "latents.safetensors")
    for name in ("values", "positions", "sigma"):
        assert same_bits(getattr(batch, name), getattr(again, name)), name
    assert again.hidden_size == H


def test_same_bits_notices_the_sign_of_zero() -> None:
    """Negative control of the test above: plain equality would not."""
    assert torch.equal(torch.zeros(1), -torch.zeros(1))
    assert not same_bits(torch.zeros(1), -torch.zeros(1))


def test_a_view_that_requires_gradients_is_saved(tmp_path: Path) -> None:
    values = torch.randn(2, 4, H, requires_grad=True)
    places = torch.tensor([[0, 1, -1, -1], [0, -1, -1, -1]])
    batch = LatentBatch(values, places, torch.zeros(2)).trimmed().select([1, 0])
    batch.save(tmp_path / "latents")
    again = LatentBatch.load(tmp_path / "latents")
    assert torch.equal(again.values, values.detach()[[1, 0], :2])
    assert not again.values.requires_grad


def refused(path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        LatentBatch.load(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kept", [0, 4, 40, -1], ids=["empty", "cut header", "cut names", "cut data"])
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "latents.safetensors"
    tagged([[0, 1]]).save(path)
    LatentBatch.load(path)  # the control
    path.write_bytes(path.read_bytes()[:kept])
    refused(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path, good = tmp_path / "other.safetensors", tmp_path / "good.safetensors"
    refused(path)  # there is none
    refused(tmp_path)  # a folder
    path.write_text("latents", encoding="utf-8")
    refused(path)
    tagged([[0, 1]]).save(good)
    tensors, kind = load_file(good), {"format": "rl-lvr latents 1"}
    save_file(tensors, path, metadata=kind)
    LatentBatch.load(path)  # the control: written in the same way, it is accepted
    save_file(tensors, path, metadata={"format": "rl-lvr latents 2"})
    refused(path)
    save_file(tensors, path)
    refused(path)
    save_file({"values": tensors["values"], "sigma": tensors["sigma"]}, path, metadata=kind)
    refused(path)
    for change in (
        {"sigma": torch.zeros(2)},
        {"values": torch.zeros(1, 3, H)},
        {"positions": torch.tensor([0, 1])},
        {"positions": torch.tensor([[0, 1]], dtype=torch.int32)},
        {"positions": torch.tensor([[1, 1]])},
        {"positions": torch.tensor([[-1, 1]])},
    ):
        save_file({**tensors, **change}, path, metadata=kind)
        refused(path)


# ---- refusals


@pytest.mark.parametrize(
    ("values", "positions", "sigma"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2)),
        (torch.zeros(2, 3, H), torch.zeros(2, 2, dtype=torch.long), torch.zeros(2)),
        (torch.zeros(2, 3, H), torch.zeros(3, 3, dtype=torch.long), torch.zeros(3)),
        (torch.zeros(2, 3, H), torch.zeros(2, 3, dtype=torch.long), torch.zeros(1)),
        (torch.zeros(2, 3, H), torch.zeros(2, dtype=torch.long), torch.zeros(2)),
        (torch.zeros(2, 3, H), torch.zeros(2, 3), torch.zeros(2)),
        (torch.zeros(2, 3, H, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2)),
    ],
)
def test_shapes_and_types_that_disagree_are_refused(values: Tensor, positions: Tensor, sigma: Tensor) -> None:
    LatentBatch(torch.zeros(2, 3, H), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2))  # the control
    with pytest.raises(ValueError, match="LatentBatch"):
        LatentBatch(values, positions, sigma)


@pytest.mark.parametrize(
    ("values", "positions", "line"),
    [
        ([torch.zeros(2, H)], [[0]], "row 0: 2 vectors but 1 positions"),
        ([torch.zeros(2, H)], [], "1 rows of vectors but 0 rows of positions"),
        ([torch.zeros(1, H), torch.zeros(1, 1)], [[0], [0]], "row 1 is"),
        ([torch.zeros(1, H), torch.zeros(H)], [[0], [0, 1, 2]], "row 1 is"),
        ([torch.zeros(1, H), torch.zeros(1, H).bfloat16()], [[0], [0]], "one precision"),
        ([torch.zeros(2, H)], [[1, 1]], "strictly increasing"),
        ([torch.zeros(2, H)], [[2, 1]], "strictly increasing"),
        ([torch.zeros(2, H)], [[-1, 1]], "0 or more"),
        ([], [], "needs its hidden size"),
    ],
)
def test_rows_that_do_not_fit_are_refused(values: list[Tensor], positions: Rows, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        LatentBatch.from_rows(values, positions)


def test_operations_refuse_what_would_lose_or_misplace_a_vector() -> None:
    batch = tagged([[1, 2], [3]])
    with pytest.raises(ValueError, match="cannot pad 2 latents per row to 1"):
        batch.padded(1)
    with pytest.raises(ValueError, match="before the start"):
        batch.shifted(-2)
    with pytest.raises(ValueError, match="2 rows cannot be shifted"):
        batch.shifted(torch.tensor([1]))
    with pytest.raises(ValueError, match="not a mask"):
        batch.select(torch.tensor([True, False]))
    with pytest.raises(ValueError, match="at least one"):
        LatentBatch.concat([])
    with pytest.raises(RuntimeError):
        batch.split([1])


def test_empty_batches() -> None:
    empty = LatentBatch.empty(2, H, dtype=torch.bfloat16)
    assert (len(empty), empty.hidden_size, empty.values.dtype) == (2, H, torch.bfloat16)
    assert empty.counts.tolist() == [0, 0]
    assert len(empty.select([])) == 0
    assert empty.trimmed().positions.shape == (2, 0)
    assert LatentBatch.concat([empty.to(torch.float32), tagged([[4]])]).counts.tolist() == [0, 0, 1]
    assert [len(piece) for piece in LatentBatch.empty(0, H).split(3)] == [0]
