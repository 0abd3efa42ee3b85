"""Records: one schema over three kinds of file, lazy, confined to the data folder."""

import json
import pickle

import pytest
from PIL import Image

from rl_lvr.data import Record, from_datasets, load_records
from rl_lvr.data.images import ImageError, ImageRef
from rl_lvr.data.puzzles import PuzzleConfig, generate
from rl_lvr.data.writing import write_jsonl, write_parquet
from rl_lvr.errors import UserError


def row(number: int = 0, **changes):
    base = {
        "id": f"r{number}",
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"question {number}"}]},
            {"role": "assistant", "content": "look <latent>red"},
        ],
        "images": ["images/0.png"],
        "answer": "red",
        "latents": [{"image": 0, "boxes": [[0, 0, 10, 5], [10, 5, 20, 10]]}],
        "category": "easy",
        "meta": {"number": number},
    }
    return base | changes


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10), "red").save(tmp_path / "images" / "0.png")
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def test_a_record_has_prompt_completion_images_and_normalised_targets(folder):
    record = load_records(write(folder / "a.jsonl", [row()]))[0]
    assert record.prompt_messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "question 0"}]}
    ]
    assert record.completion_text == "look <latent>red"
    assert record.spans == 1
    (image,) = record.open_images()
    assert (image.mode, image.size, image.getpixel((3, 3))) == ("RGB", (20, 10), (255, 0, 0))
    (target,) = record.targets
    assert target.image == 0
    assert target.boxes == ((0.0, 0.0, 0.5, 0.5), (0.5, 0.5, 1.0, 1.0))


def test_cells_and_boxes_of_the_same_place_are_the_same_target(folder):
    cells = row(latents=[{"cells": [0, 3], "grid": [2, 2]}])
    by_box, by_cell = load_records(write(folder / "a.jsonl", [row(), cells]))
    assert by_box.targets == by_cell.targets
    other = Record.from_row(row(latents=[{"cells": [1, 3], "grid": [2, 2]}]), folder)
    assert by_box.targets != other.targets


def test_cells_are_counted_row_by_row(folder):
    record = Record.from_row(row(latents=[{"cells": [7], "grid": [3, 4]}]), folder)
    assert record.targets[0].boxes == ((0.75, 1 / 3, 1.0, 2 / 3),)


def test_auxiliary_images_open_on_their_own(folder):
    Image.new("RGB", (4, 4), "blue").save(folder / "aux.png")
    record = Record.from_row(row(latents=[{"images": ["aux.png"]}]), folder)
    (target,) = record.targets
    assert (target.image, target.boxes) == (None, ())
    assert target.aux_images[0].open().getpixel((0, 0)) == (0, 0, 255)


def test_a_record_without_an_assistant_is_prompt_only(folder):
    prompt = row(messages=row()["messages"][:1])
    record = Record.from_row(prompt, folder)
    assert record.is_prompt_only
    assert record.completion_text is None
    assert len(record.prompt_messages) == 1
    assert len(record.targets) == 1  # what an oracle would feed
    assert not Record.from_row(row(), folder).is_prompt_only


def test_a_box_that_ends_outside_its_image_is_refused_when_read(folder):
    record = Record.from_row(row(latents=[{"boxes": [[0, 0, 21, 5]]}]), folder)
    with pytest.raises(UserError, match=r"r0.*latents\[0\].boxes\[0\].*20 x 10"):
        _ = record.targets


def test_the_three_forms_hold_the_same_records(folder):
    pytest.importorskip("datasets")
    rows = [
        row(0),
        row(1, latents=[{"cells": [1], "grid": [1, 2]}], meta={"other": [1, {"a": None}]}),
        row(2),
    ]
    del rows[2]["latents"], rows[2]["meta"], rows[2]["category"]
    records = load_records(write(folder / "a.jsonl", rows))
    write_parquet(records, folder / "a.parquet")
    records.to_datasets(embed=True).save_to_disk(str(folder / "saved"))
    for name in ("a.parquet", "saved"):
        again = load_records(folder / name)
        assert len(again) == 3
        for ours, theirs in zip(records, again, strict=True):
            mine, other = ours.to_row(), theirs.to_row()
            assert mine.pop("images") == ["images/0.png"]
            assert other.pop("images")[0]["bytes"] == (folder / "images/0.png").read_bytes()
            assert mine == other
            assert ours.targets == theirs.targets
    assert load_records(folder / "a.parquet")[0] != load_records(folder / "a.parquet")[1]  # == can say no


def test_datasets_there_and_back(folder):
    records = load_records(write(folder / "a.jsonl", [row(n) for n in range(4)]))
    dataset = records.to_datasets()
    assert dataset[0]["images"][0].size == (20, 10)
    back = from_datasets(dataset)
    assert [r.id for r in back] == ["r0", "r1", "r2", "r3"]
    assert back[2].open_images()[0].size == (20, 10)
    assert [r.id for r in from_datasets(dataset.select([3, 1]))] == ["r3", "r1"]


def test_a_large_parquet_file_is_read_through_the_cache_on_disk(folder, monkeypatch, tmp_path):
    import datasets

    from rl_lvr.data import sources

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(generate(PuzzleConfig(), 5, "test"), folder / "p.parquet")
    small = load_records(folder / "p.parquet")
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 10)
    large = load_records(folder / "p.parquet")
    assert type(small.source) is not type(large.source)
    assert [r.to_row() for r in small] == [r.to_row() for r in large]


def test_a_saved_set_with_splits_wants_one_named(folder):
    import datasets

    records = load_records(write(folder / "a.jsonl", [row(n) for n in range(3)]))
    splits = {"train": records[:2].to_datasets(embed=True), "test": records[2:].to_datasets(embed=True)}
    datasets.DatasetDict(splits).save_to_disk(str(folder / "saved"))
    assert [r.id for r in load_records(f"{folder}/saved:train")] == ["r0", "r1"]
    assert [r.id for r in load_records(f"{folder}/saved:test")] == ["r2"]
    with pytest.raises(UserError, match=r"several splits \(train, test\)"):
        load_records(folder / "saved")
    with pytest.raises(UserError, match="no split 'dev'"):
        load_records(f"{folder}/saved:dev")
    records.to_datasets(embed=True).save_to_disk(str(folder / "plain"))
    with pytest.raises(UserError, match="one data set without splits"):
        load_records(f"{folder}/plain:train")
    with pytest.raises(UserError, match="has no split"):
        load_records(f"{folder}/a.jsonl:train")


def test_slices_limits_and_selections_are_lazy_and_agree(folder):
    rows = [row(n) for n in range(6)]
    rows[5]["answer"] = 7  # broken, and nobody reads it
    records = load_records(write(folder / "a.jsonl", rows), limit=5)
    assert [r.id for r in records] == ["r0", "r1", "r2", "r3", "r4"]
    assert [r.id for r in records[1:4][::2]] == ["r1", "r3"]
    assert [r.id for r in records.select([4, 0])] == ["r4", "r0"]
    assert records[-1].id == "r4"
    with pytest.raises(IndexError):
        records[5]
    with pytest.raises(UserError, match=r"a\.jsonl line 6: answer: is a number"):
        load_records(folder / "a.jsonl")[5]
    with pytest.raises(UserError, match="limit"):
        load_records(folder / "a.jsonl", limit=0)


def test_records_survive_a_worker_process(folder):
    records = load_records(write(folder / "a.jsonl", [row(n) for n in range(3)]))
    again = pickle.loads(pickle.dumps(records[1:]))
    assert list(again) == list(records[1:])


def test_blank_lines_do_not_shift_line_numbers(folder):
    path = folder / "a.jsonl"
    path.write_text(f"\n{json.dumps(row(0))}\n\n\n" + '{"id": 1}\n', encoding="utf-8")
    records = load_records(path)
    assert len(records) == 2
    with pytest.raises(UserError, match="line 5"):
        records[1]


@pytest.mark.parametrize("name", ["../out.png", "images/../../out.png", "/etc/hostname", "C:\\a.png", "http://a/b.png"])
def test_paths_that_leave_the_folder_are_refused(folder, name):
    with pytest.raises(UserError):
        Record.from_row(row(images=[name]), folder)
    with pytest.raises(ImageError):
        ImageRef(name, folder).read_bytes()


def test_a_link_that_leaves_the_folder_is_refused_and_one_inside_is_not(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "x.png"
    Image.new("RGB", (4, 4)).save(outside)
    (folder / "out.png").symlink_to(outside)
    (folder / "in.png").symlink_to(folder / "images" / "0.png")
    with pytest.raises(ImageError, match="link that leaves"):
        ImageRef("out.png", folder).open()
    assert ImageRef("in.png", folder).open().size == (20, 10)
    assert ImageRef("images/../images/0.png", folder).open().size == (20, 10)


def test_orientation_and_transparency_are_what_a_viewer_shows(folder):
    turned = Image.new("RGB", (30, 10))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "t.jpg", exif=exif)
    reference = ImageRef("t.jpg", folder)
    assert reference.size() == reference.open().size == (10, 30)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(folder / "c.png")
    assert ImageRef("c.png", folder).open().getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.csv", "neither .jsonl nor .parquet"), ("none.jsonl", "does not exist"), ("images", "save_to_disk")],
)
def test_files_of_another_kind_are_refused(folder, name, message):
    (folder / "a.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=message):
        load_records(folder / name)


def test_meta_of_a_column_is_json_text_or_a_struct(folder):
    import datasets

    base = {"id": ["a"], "messages": [[{"role": "user", "content": "hi"}]]}
    for meta, read in (('{"a": [1, null]}', {"a": [1, None]}), ({"a": 1}, {"a": 1}), (None, {})):
        assert from_datasets(datasets.Dataset.from_dict({**base, "meta": [meta]}))[0].meta == read
    for meta in ("{", "[1]"):
        with pytest.raises(UserError, match="data set row 0: meta: is "):
            _ = from_datasets(datasets.Dataset.from_dict({**base, "meta": [meta]}))[0]


def test_what_only_a_program_can_hand_in_is_refused_too(folder):
    with pytest.raises(UserError, match="record: is a list"):
        Record.from_row([row()], folder)
    with pytest.raises(UserError, match=r"images\[0\]\.bytes: is a string"):
        Record.from_row(row(images=[{"bytes": "text", "path": None}]), folder)


def test_an_image_that_cannot_be_read_is_one_sentence():
    with pytest.raises(ImageError, match="cannot be read"):
        ImageRef("/proc/self/mem").read_bytes()  # a file that exists and whose first byte nobody may read


def test_a_broken_parquet_file_is_one_sentence(folder):
    (folder / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(UserError, match="no readable Parquet"):
        load_records(folder / "a.parquet")


def test_jsonl_moves_images_along(folder, tmp_path_factory):
    Image.new("RGB", (4, 4), "blue").save(folder / "aux.png")
    rows = [row(0), row(1, latents=[{"images": ["aux.png"]}])]
    records = load_records(write(folder / "a.jsonl", rows))
    target = tmp_path_factory.mktemp("copy") / "b.jsonl"
    assert write_jsonl(records, target) == 2
    again = load_records(target)
    assert again[0].targets == records[0].targets
    assert again[0].images[0].read_bytes() == records[0].images[0].read_bytes()
    assert again[1].targets[0].aux_images[0].open().getpixel((0, 0)) == (0, 0, 255)
