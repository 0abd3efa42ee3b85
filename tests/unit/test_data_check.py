"""rl-lvr data check: each bad record is named with line, field and cure; a good file has no finding."""

import copy
import json
import os
import struct
import zlib

import pytest
from PIL import Image

from rl_lvr.data import load_records
from rl_lvr.data.check import check_records, require_valid
from rl_lvr.data.puzzles import PuzzleConfig, generate
from rl_lvr.data.schema import Problem
from rl_lvr.data.sources import RowError
from rl_lvr.data.writing import write_jsonl, write_parquet
from rl_lvr.errors import UserError

GOOD = {
    "id": "a",
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour?"}]},
        {"role": "assistant", "content": "<latent>red"},
    ],
    "images": ["images/0.png"],
    "answer": "red",
    "latents": [{"image": 0, "boxes": [[0, 0, 10.5, 5]]}],
    "category": "easy",
    "meta": {"anything": [1, None]},
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.effect_noise((20, 10), 90).convert("RGB").save(tmp_path / "images" / "0.png")
    return tmp_path


@pytest.fixture
def check(folder):
    """Write rows (dicts or raw lines) to a file, the good one first, and check it."""

    def run(*rows, **options):
        lines = [r if isinstance(r, str) else json.dumps(r) for r in (GOOD, *rows)]
        (folder / "d.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return check_records(folder / "d.jsonl", **options)

    return run


def changed(path, value):
    """The good record under another id with one place changed; `...` removes the place."""
    row = copy.deepcopy(GOOD) | {"id": "b"}
    at = row
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return row


def only(report):
    """The one finding, which must be on the second line and have a cure."""
    (finding,) = report.findings
    assert finding.place == "d.jsonl line 2", finding
    assert finding.cure
    assert (report.total_findings, report.bad_records, report.records) == (1, 1, 2)
    return finding


def test_a_good_file_has_no_finding(check, folder):
    (folder / "aux.png").write_bytes((folder / "images/0.png").read_bytes())
    prompt_only = changed(["messages"], GOOD["messages"][:2])
    others = [
        prompt_only,
        changed(["latents"], ...) | {"id": "c"},
        changed(["latents"], [{"images": ["aux.png"]}]) | {"id": "d"},
        changed(["latents"], [{"cells": [0, 11], "grid": [3, 4]}]) | {"id": "e"},
        {"id": "f", "messages": [{"role": "user", "content": "no image"}]},
        changed(["messages", 2, "content"], "x <|lvr_start|><|lvr|><|lvr_sep|><|lvr_end|> <latent>y") | {"id": "g"},
    ]
    report = check(*others)
    assert report.findings == []
    assert report.ok
    assert (report.records, report.images, report.spans, report.targets) == (7, 6, 5, 5)
    assert report.prompt_only == 2
    assert report.categories == {"easy": 6}
    assert report.sizes == {(20, 10): 6}
    assert require_valid(folder / "d.jsonl") == report


MESSAGES = GOOD["messages"]
BAD = [
    # path, value, field of the finding, text of the finding
    (["id"], 7, "id", "is a number"),
    (["id"], " ", "id", "is empty"),
    (["id"], ..., "id", "is missing"),
    (["answer"], "", "answer", "is empty"),
    (["answer"], ["red"], "answer", "is a list"),
    (["answer"], None, "answer", "is null"),
    (["category"], True, "category", "is a boolean"),
    (["meta"], "text", "meta", "is a string"),
    (["images"], "images/0.png", "images", "is a string"),
    (["images"], [3], "images[0]", "is a number"),
    (["images"], [""], "images[0]", "is empty"),
    (["images"], ["images/1.png"], "images[0]", "does not exist"),
    (["images"], ["images"], "images[0]", "is not a file"),
    (["images"], ["/etc/hostname"], "images[0]", "absolute path"),
    (["images"], ["images/../../x.png"], "images[0]", "leaves the folder"),
    (["images"], ["https://a.example/0.png"], "images[0]", "nothing is fetched"),
    (["images"], ["data:image/png;base64,AAAA"], "images[0]", "is image data"),
    (["images"], ["A" * 5000], "images[0]", "too long"),
    (["messages", 1, "content"], [{"type": "image"}] * 2, "messages", "holds 2 image parts"),
    (["images"], ["images/0.png", "images/0.png"], "messages", "images holds 2"),
    (["messages"], ..., "messages", "is missing"),
    (["messages"], {}, "messages", "is an object"),
    (["messages"], [], "messages", "is empty"),
    (["messages", 1], "what colour?", "messages[1]", "is a string"),
    (["messages"], MESSAGES[:1], "messages", "no message of the user"),
    (["messages"], MESSAGES[2:], "messages[0].role", "stands first"),
    (["messages"], [*MESSAGES, MESSAGES[2]], "messages[3].role", "stands after assistant"),
    (["messages"], [MESSAGES[1], MESSAGES[0]], "messages[1].role", "stands after user"),
    (["messages", 1, "role"], "human", "messages[1].role", "is 'human'"),
    (["messages", 1, "content"], 5, "messages[1].content", "is a number"),
    (["messages", 2, "content"], " ", "messages[2].content", "is empty"),
    (["messages", 2, "content"], ..., "messages[2].content", "is null"),
    (["messages", 0, "content"], "<latent>", "messages[0].content", "holds <latent>"),
    (
        ["messages", 0, "content"],
        [{"type": "image"}],
        "messages[0].content[0]",
        "image in a message of the system",
    ),
    (["messages", 1, "content", 1], "text", "messages[1].content[1]", "is a string"),
    (["messages", 1, "content", 1, "text"], 1, "messages[1].content[1].text", "is a number"),
    (["messages", 1, "content", 1, "type"], "txt", "messages[1].content[1].type", "is 'txt'"),
    (["messages", 1, "content", 0, "text"], "x", "messages[1].content[0].text", "stands in an image part"),
    (["messages", 1, "content", 0, "img"], "x", "messages[1].content[0].img", "unknown field"),
    (["messages", 1, "contents"], "x", "messages[1].contents", "unknown field"),
    (["messages", 2, "content"], "red", "latents", "has 1 entries but the assistant's text has 0 <latent>"),
    (["messages", 2, "content"], "<latent><latent>", "latents", "has 2 <latent>"),
    (["messages", 2, "content"], "<latent><|lvr_start|>red", "messages[2].content", "<|lvr_start|> without"),
    (
        ["messages", 2, "content"],
        "<latent><|lvr_start|><|lvr_start|><|lvr_end|><|lvr_end|>",
        "messages[2].content",
        "inside an open",
    ),
    (["messages", 2, "content"], "<latent><|lvr_end|>red", "messages[2].content", "<|lvr_end|> without"),
    (["messages", 2, "content"], "<latent><|lvr|>", "messages[2].content", "outside <|lvr_start|>"),
    (
        ["messages", 2, "content"],
        "<latent><abs_vis_token>",
        "messages[2].content",
        "without </abs_vis_token>",
    ),
    (["messages", 1, "content", 1, "text"], "<|lvr_start|>", "messages[1].content", "holds the marker"),
    (["latents"], {}, "latents", "is an object"),
    (["latents"], ["x"], "latents[0]", "is a string"),
    (["latents"], [{"image": 0}], "latents[0]", "none of boxes, cells, images"),
    (["latents", 0, "images"], ["images/0.png"], "latents[0]", "boxes and images"),
    (["latents", 0, "image"], 1, "latents[0].image", "is 1 but the record has 1"),
    (["latents", 0, "image"], -1, "latents[0].image", "is -1"),
    (["latents", 0, "image"], "0", "latents[0].image", "is a string"),
    (["latents", 0, "box"], [], "latents[0].box", "unknown field"),
    (["latents", 0, "grid"], [1, 1], "latents[0].grid", "does not go with boxes"),
    (["latents", 0, "boxes"], [], "latents[0].boxes", "is empty"),
    (["latents", 0, "boxes"], "0 0 5 5", "latents[0].boxes", "is a string"),
    (["latents"], [{"image": 0, "images": ["images/0.png"]}], "latents[0].image", "does not go with images"),
    (["latents", 0, "boxes"], [5], "latents[0].boxes[0]", "is 5"),
    (["latents", 0, "boxes"], [[0, 0, 5]], "latents[0].boxes[0]", "is [0, 0, 5]"),
    (["latents", 0, "boxes"], [[0, 0, 5, "5"]], "latents[0].boxes[0]", "'5'"),
    (["latents", 0, "boxes"], [[9, 0, 5, 5]], "latents[0].boxes[0]", "wrong order"),
    (["latents", 0, "boxes"], [[5, 0, 5, 5]], "latents[0].boxes[0]", "no area"),
    (["latents", 0, "boxes"], [[0.1, 0.1, 0.9, 0.9]], "latents[0].boxes[0]", "smaller than one pixel"),
    (["latents", 0, "boxes"], [[-1, 0, 5, 5]], "latents[0].boxes[0]", "begins outside"),
    (["latents", 0, "boxes"], [[0, 0, 20, 10], [0, 0, 20, 10.5]], "latents[0].boxes[1]", "ends outside"),
    (["latents"], [{"cells": [12], "grid": [3, 4]}], "latents[0].cells[0]", "outside the grid"),
    (["latents"], [{"cells": [-1], "grid": [3, 4]}], "latents[0].cells[0]", "outside the grid"),
    (["latents"], [{"cells": [1.5], "grid": [3, 4]}], "latents[0].cells[0]", "is a number"),
    (["latents"], [{"cells": [1]}], "latents[0].grid", "is None"),
    (["latents"], [{"cells": [0], "grid": [0, 4]}], "latents[0].grid", "is [0, 4]"),
    (["latents"], [{"images": ["none.png"]}], "latents[0].images[0]", "does not exist"),
    (["latents"], [{"images": ["../none.png"]}], "latents[0].images[0]", "leaves the folder"),
]


@pytest.mark.parametrize(("path", "value", "field", "text"), BAD, ids=[f"{b[2]}: {b[3]}" for b in BAD])
def test_a_bad_record_is_named(check, path, value, field, text):
    finding = only(check(changed(path, value)))
    assert finding.field == field
    assert text in finding.what


def test_an_unknown_field_gets_the_nearest_valid_name(check):
    finding = only(check(changed(["anwser"], "red")))
    assert (finding.field, finding.what) == ("anwser", "unknown field")
    assert "'answer'" in finding.cure
    assert "meta" in only(check(changed(["zzz"], 1))).cure


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"id": "b", ', "not valid JSON"),
        ("[1, 2]", "no object"),
        ('{"id": "b", "id": "c"}', "given twice"),
        ('{"id": "b", "meta": {"x": NaN}}', "NaN"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_no_record(check, line, text):
    assert text in only(check(line)).what


def test_a_line_that_is_not_utf8(folder):
    (folder / "d.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"id": "\xff"}\n')
    assert "not UTF-8" in only(check_records(folder / "d.jsonl")).what


def test_a_repeated_id_names_the_first_place(check):
    finding = only(check(GOOD))
    assert (finding.field, finding.what) == ("id", "is the id of d.jsonl line 1 too")


def bomb(width, height):
    """A well-formed PNG header that promises width x height pixels; decoding it would need them all."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def damaged(good):
    jpeg_cut = good.with_name("x.jpg")
    Image.open(good).save(jpeg_cut)
    sixteen = good.with_name("y.png")
    Image.new("I;16", (20, 10)).save(sixteen)
    data = good.read_bytes()
    return {
        "truncated": (data[: len(data) // 2], "truncated or damaged"),
        "truncated jpeg": (jpeg_cut.read_bytes()[:-20], "truncated or damaged"),
        "cut header": (jpeg_cut.read_bytes()[:200], "broken header"),
        "no pixels": (bomb(0, 4), "is not an image"),
        "flipped bit": (data[:60] + bytes([data[60] ^ 255]) + data[61:], "damaged"),
        "text": (b"no image at all", "is not an image"),
        "empty": (b"", "is not an image"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
        "huge": (bomb(10_000, 10_000), "huge"),
        "bomb": (bomb(2**31 - 1, 2**31 - 1), "huge"),
        "16 bits": (sixteen.read_bytes(), "more than 8 bits"),
    }


KINDS = (
    "cut header",
    "no pixels",
    "truncated",
    "truncated jpeg",
    "flipped bit",
    "text",
    "empty",
    "postscript",
    "huge",
    "bomb",
    "16 bits",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["file", "bytes"])
def test_a_bad_image_is_named(check, folder, kind, place):
    data, text = damaged(folder / "images/0.png")[kind]
    if place == "file":
        (folder / "bad.png").write_bytes(data)
        finding = only(check(changed(["images"], ["bad.png"])))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        write_parquet(generate(PuzzleConfig(), 2, "test"), folder / "p.parquet")
        table = pq.read_table(folder / "p.parquet")
        images = table.column("images").to_pylist()
        images[1][0]["bytes"] = data
        index = table.schema.get_field_index("images")
        table = table.set_column(index, table.schema.field(index), pa.array(images, table.schema.field(index).type))
        pq.write_table(table, folder / "p.parquet")
        (finding,) = check_records(folder / "p.parquet").findings
        assert (finding.place, finding.id) == ("p.parquet row 1", "test-000001")
        if kind == "empty":
            assert (finding.field, finding.what) == ("images[0].bytes", "is empty")
            return
    assert finding.field == "images[0]"
    assert text in finding.what


def test_the_pixel_limit_is_the_callers(check):
    assert check(max_pixels=200).ok
    (finding,) = check(max_pixels=199).findings
    assert "20 x 10 is more than 199 pixels" in finding.what


def test_a_huge_image_is_not_decoded(check, folder):
    """10,000 x 10,000 pixels as RGB are 300 MB; the check must stay far below."""
    import resource

    (folder / "bad.png").write_bytes(bomb(10_000, 10_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not check(changed(["images"], ["bad.png"])).ok
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_links_that_leave_the_folder_or_turn_in_circles(check, folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "0.png"
    outside.write_bytes((folder / "images/0.png").read_bytes())
    (folder / "out.png").symlink_to(outside)
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "in.png").symlink_to(folder / "images" / "0.png")
    assert "link that leaves" in only(check(changed(["images"], ["out.png"]))).what
    assert "cannot be followed" in only(check(changed(["images"], ["circle.png"]))).what
    assert check(changed(["images"], ["in.png"])).ok


def test_a_pipe_is_not_read(check, folder):
    os.mkfifo(folder / "pipe.png")
    assert "is not a file" in only(check(changed(["images"], ["pipe.png"]))).what


def test_targets_per_span(check):
    two = changed(["latents", 0, "boxes"], [[0, 0, 5, 5], [5, 5, 10, 10]])
    assert check(two).ok
    assert check(two, targets_per_span=2).ok
    finding = only(check(two, targets_per_span=8))
    assert (finding.field, finding.what) == ("latents[0]", "has 2 targets for a span of 8 latents")


def test_only_the_named_formats_markers_count(check):
    from rl_lvr.latents.format import PRESETS

    row = changed(["messages", 2, "content"], "<latent><|lvr_start|>red")
    assert not check(row, latent_formats=[PRESETS["lvr"]]).ok
    assert check(row, latent_formats=[PRESETS["monet"]]).ok


def test_an_empty_and_a_missing_file(folder):
    (folder / "d.jsonl").write_text("\n\n")
    (finding,) = check_records(folder / "d.jsonl").findings
    assert finding.what == "holds no records"
    with pytest.raises(UserError, match="does not exist"):
        check_records(folder / "none.jsonl")


def test_several_findings_in_file_order_and_only_some_kept(check):
    rows = [changed(["answer"], n) | {"id": f"n{n}"} for n in range(150)]
    report = check(*rows, max_findings=40)
    assert (report.total_findings, len(report.findings), report.bad_records) == (150, 40, 150)
    assert [f.id for f in report.findings] == [f"n{n}" for n in range(40)]
    assert check(*rows, limit=3).total_findings == 2


def test_require_valid_names_the_first_findings_and_the_command(check, folder):
    check(changed(["answer"], ""), changed(["id"], 1), changed(["id"], 2), changed(["id"], 3))
    with pytest.raises(UserError) as error:
        require_valid(folder / "d.jsonl")
    text = str(error.value)
    assert "\n" not in text
    assert "d.jsonl line 2 (id 'b'): answer: is empty; fill it in" in text
    assert "And 1 more." in text
    assert f"rl-lvr data check {folder}/d.jsonl" in text


def test_a_runs_own_judge_refuses_what_the_run_cannot_use(check, folder):
    def judge(record):
        if record.answer == "blue":
            raise RowError(Problem("answer", "is not in this run's vocabulary", "choose another run"))

    assert check(changed(["answer"], "green"), judge=judge).ok
    finding = only(check(changed(["answer"], "blue"), judge=judge))
    assert (finding.field, finding.id) == ("answer", "b")
    assert require_valid(folder / "d.jsonl").ok  # the file itself is well
    with pytest.raises(UserError) as error:
        require_valid(folder / "d.jsonl", judge=judge)
    assert "rl-lvr data check" not in str(error.value)  # which would find nothing


def test_the_digest_of_image_files_changes_with_a_file(check, folder):
    first = check(changed(["answer"], "green")).image_files
    assert check(changed(["answer"], "blue")).image_files == first
    Image.effect_noise((20, 10), 10).convert("RGB").save(folder / "images" / "0.png")
    assert check(changed(["answer"], "green")).image_files != first


def test_the_check_agrees_with_reading(check, folder):
    """Whatever the check passes can be read, and what breaks the structure cannot."""
    check(changed(["answer"], ""))
    records = load_records(folder / "d.jsonl")
    assert records[0].id == "a"
    with pytest.raises(UserError, match="answer"):
        records[1]


def test_an_unknown_column_is_one_finding(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_parquet(generate(PuzzleConfig(), 3, "test"), folder / "p.parquet")
    assert check_records(folder / "p.parquet").ok
    table = pq.read_table(folder / "p.parquet").append_column("catgory", pa.array(["a", "b", "c"]))
    pq.write_table(table, folder / "p.parquet")
    (finding,) = check_records(folder / "p.parquet").findings
    assert (finding.field, finding.place) == ("catgory", "p.parquet")
    assert "'category'" in finding.cure


def test_generated_puzzles_pass_in_every_form(folder):
    records = generate(PuzzleConfig(), 100, "test")
    write_parquet(records, folder / "p.parquet")
    write_jsonl(records, folder / "p.jsonl")
    load_records(folder / "p.parquet").to_datasets().save_to_disk(str(folder / "saved"))
    for name in ("p.parquet", "p.jsonl", "saved"):
        report = require_valid(folder / name, targets_per_span=6)
        assert (report.records, report.images, report.targets) == (100, 100, 100)
