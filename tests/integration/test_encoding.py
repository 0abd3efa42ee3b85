"""Records as numbers: labels, target places and oracle vectors, for every family; and the cache on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lab_tools import PUZZLES, Bench, build_model, write_puzzles

from rl_lvr.data.cache import encoded_records
from rl_lvr.data.encoding import IGNORED, Encoded, Encoder
from rl_lvr.data.record import LatentSpec
from rl_lvr.data.records import load_records
from rl_lvr.data.targets import target_vectors
from rl_lvr.errors import UserError
from rl_lvr.latents.spans import find_spans


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("models")
    tiles = {"internvl": {"image_size": 168}}  # 6 x 6 tokens, so that every cell has some of its own
    return {
        family: build_model(place / family, family, **tiles.get(family, {}))
        for family in ("qwen2_5_vl", "internvl", "llava_onevision")
    }


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "llava_onevision"])
def test_labels_cover_the_free_text_alone(folders: dict[str, Path], family: str) -> None:
    bench = Bench(folders[family])
    for record, row in zip(bench.records, bench.encoded, strict=True):
        spans = find_spans(row.input_ids.numpy(), bench.markers).spans
        assert [span.slots for span in spans] == [PUZZLES.hops]
        learned = row.input_ids[row.labels != IGNORED].tolist()
        start = bench.tokenizer.convert_tokens_to_ids("<|lvr_start|>")
        expected = [start, *bench.tokenizer(record.answer)["input_ids"], bench.tokenizer.eos_token_id]
        assert learned == expected  # START is sampled, SLOT and END are forced


def test_free_length_learns_where_to_stop(folders: dict[str, Path]) -> None:
    bench = Bench(folders["qwen2_5_vl"], k=6, length="free")
    row = bench.encoded[0]
    span = find_spans(row.input_ids.numpy(), bench.markers).spans[0]
    assert span.slots == PUZZLES.hops  # as many as there are targets, below the cap
    assert (row.labels[span.first_slot : span.stop] != IGNORED).all()


def test_before_start_has_its_first_target_on_the_marker(folders: dict[str, Path]) -> None:
    bench = Bench(folders["qwen2_5_vl"], first="before_start")
    row = bench.encoded[0]
    span = find_spans(row.input_ids.numpy(), bench.markers).spans[0]
    assert span.slots == PUZZLES.hops - 1
    assert [t.position for t in row.targets] == list(range(span.start, span.start + PUZZLES.hops))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "llava_onevision"])
def test_targets_are_the_tokens_of_the_cells_on_the_path(folders: dict[str, Path], family: str) -> None:
    """Against features taken image by image, cell by cell; a path read backwards is the control."""
    bench = Bench(folders[family])
    batch = bench.batch()
    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    vectors, _ = target_vectors(bench.family, bench.model, images, batch["targets"])
    vectors = vectors.view(len(bench.records), PUZZLES.hops, -1)
    for b, (record, row) in enumerate(zip(bench.records, bench.encoded, strict=True)):
        features = bench.family.image_features(bench.model, row.images)[0]
        grid = bench.family.token_grid(row.images)[0]
        expected = []
        for cell in record.meta["cells"][: PUZZLES.hops]:
            r, c = divmod(cell, PUZZLES.cols)
            tall, wide = grid.rows / PUZZLES.rows, grid.cols / PUZZLES.cols
            inside = [
                grid.offset + y * grid.cols + x
                for y in range(grid.rows)
                for x in range(grid.cols)
                if r * tall - 0.5 <= y <= (r + 1) * tall - 0.5 and c * wide - 0.5 <= x <= (c + 1) * wide - 0.5
            ]
            expected.append(features[inside].mean(0))
        expected = torch.stack(expected).detach()
        assert (vectors[b] - expected).abs().max() < 1e-5
        assert (vectors[b] - expected.flip(0)).abs().max() > 1e-3


def test_crops_go_through_the_tower_on_their_own(folders: dict[str, Path]) -> None:
    bench = Bench(folders["qwen2_5_vl"], crops=True)
    batch = bench.batch()
    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    vectors, _ = target_vectors(bench.family, bench.model, images, batch["targets"])
    cell = bench.records[0].meta["cells"][0]
    r, c = divmod(cell, PUZZLES.cols)
    picture = (
        bench.records[0]
        .open_images()[0]
        .crop((c * PUZZLES.cell_px, r * PUZZLES.cell_px, (c + 1) * PUZZLES.cell_px, (r + 1) * PUZZLES.cell_px))
    )
    inputs = bench.family.image_inputs(bench.processor.image_processor(images=[picture], return_tensors="pt"))
    expected = bench.family.image_features(bench.model, inputs)[0].mean(0).detach()
    assert (vectors[0] - expected).abs().max() < 1e-5
    on_image = Bench(folders["qwen2_5_vl"])
    other = on_image.batch()
    plain, _ = target_vectors(on_image.family, on_image.model, images, other["targets"])
    assert (plain[0] - expected).abs().max() > 1e-3  # in the whole image, attention mixes the neighbours in


def test_a_twin_without_latents_has_the_same_prompt_and_answer(folders: dict[str, Path]) -> None:
    bench = Bench(folders["qwen2_5_vl"])
    twin = Encoder(bench.processor, bench.family, None).encode(bench.records)[0]
    row = bench.encoded[0]
    span = find_spans(row.input_ids.numpy(), bench.markers).spans[0]
    kept = torch.cat([row.input_ids[: span.begin], row.input_ids[span.stop :]])
    assert torch.equal(twin.input_ids, kept)


def test_what_does_not_fit_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="cannot share 3 targets evenly"):
        Bench(folders["qwen2_5_vl"], k=4)
    bench = Bench(folders["qwen2_5_vl"])
    stray = (
        *bench.records[0].messages[:-1],
        {"role": "assistant", "content": [{"type": "text", "text": "<|lvr|>red"}]},
    )
    with pytest.raises(UserError, match="write <latent> where a span belongs"):
        bench.encoder.encode([replace(bench.records[0], messages=stray, latents=None)])


def equal(a: Encoded, b: Encoded) -> bool:
    def dicts(x: dict | None, y: dict | None) -> bool:
        x, y = x or {}, y or {}
        return x.keys() == y.keys() and all(torch.equal(x[key], y[key]) for key in x)

    return (
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.labels, b.labels)
        and dicts(a.images, b.images)
        and dicts(a.target_images, b.target_images)
        and (a.prompt_length, a.targets) == (b.prompt_length, b.targets)
    )


@pytest.mark.parametrize("crops", [False, True])
def test_the_cache_gives_back_every_bit_and_is_built_once(
    folders: dict[str, Path], tmp_path: Path, crops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rl_lvr.data import cache

    monkeypatch.setattr(cache, "SHARD", 5)  # so that 12 records need three shards
    monkeypatch.setattr(cache, "CHUNK", 2)
    records = load_records(write_puzzles(tmp_path) / "test.parquet")
    bench = Bench(folders["qwen2_5_vl"], crops=crops)
    kept = encoded_records(records, bench.encoder, {"data": "x"}, tmp_path / "cache")
    direct = bench.encoder.encode(list(records))
    assert len(kept) == len(direct) == 12
    assert all(equal(a, b) for a, b in zip(kept, direct, strict=True))
    assert not equal(kept[0], direct[1])

    monkeypatch.setattr(bench.encoder, "encode", lambda records: pytest.fail("processed a second time"))
    again = encoded_records(records, bench.encoder, {"data": "x"}, tmp_path / "cache")
    assert equal(again[11], direct[11])


def test_an_interrupted_build_leaves_nothing_behind(folders: dict[str, Path], tmp_path: Path) -> None:
    records = load_records(write_puzzles(tmp_path) / "test.parquet")
    bench = Bench(folders["qwen2_5_vl"])
    whole = bench.encoder.encode

    def interrupted(chunk):
        whole(chunk)
        raise KeyboardInterrupt

    bench.encoder.encode = interrupted
    with pytest.raises(KeyboardInterrupt):
        encoded_records(records, bench.encoder, {"data": "x"}, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_spans_without_targets_and_boxes_over_a_whole_span(folders: dict[str, Path]) -> None:
    bench = Bench(folders["qwen2_5_vl"])
    plain = replace(bench.records[0], latents=None)
    assert bench.encoder.encode([plain])[0].targets == ()
    width, height = plain.open_images()[0].size
    box = replace(bench.records[0], latents=(LatentSpec(image=0, boxes=((0, 0, width, height),)),))
    targets = bench.encoder.encode([box])[0].targets
    assert [len(target.tokens) for target in targets] == [2, 2, 2]  # six cells shared out over three latents
