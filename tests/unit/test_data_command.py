"""`rl-lvr data` as a user runs it: check, make, show; and puzzle sets on disk."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rl_lvr.cli import main
from rl_lvr.data import load_records
from rl_lvr.data.puzzle_sets import make_pointers
from rl_lvr.data.puzzles import PALETTE, PuzzleConfig
from rl_lvr.errors import UserError

SMALL = ["data", "make", "pointers", "--train", "30", "--test", "10", "--grid", "2x3", "--hops", "4"]


def digests(folder):
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_make_check_and_show(tmp_path, capsys, form):
    out = tmp_path / "set"
    assert main([*SMALL, "--out", str(out), "--format", form]) == 0
    assert "made (train 30, test 10; chance 0.200)" in capsys.readouterr().out
    manifest = json.loads((out / "puzzles.json").read_text())
    assert manifest["config"]["hops"] == 4
    assert manifest["chance"] == pytest.approx(0.2)
    assert manifest["splits"]["train"]["records"] == len(load_records(out / f"train.{form}")) == 30

    assert main(["data", "check", str(out / f"train.{form}")]) == 0
    text = capsys.readouterr().out
    assert "30 records, 0 bad, 30 images" in text
    assert "categories: hops-4 30" in text
    assert "image sizes: 24x16 (30)" in text
    assert text.endswith("no findings\n")

    picture = tmp_path / "p.png"
    assert main(["data", "show", str(out / f"test.{form}"), "--index", "-1", "--image", str(picture)]) == 0
    text = capsys.readouterr().out
    record = load_records(out / f"test.{form}")[-1]
    assert f"[image 0: 24x16] from {record.meta['start']} 4 hops" in text
    assert f"answer    {record.answer}" in text
    assert f"cells {' '.join(map(str, record.latents[0].cells))} of the 2x3 grid" in text
    assert f"meta      path: {' '.join(record.meta['path'])}" in text
    image = np.asarray(Image.open(picture))
    assert image.shape == (320, 480, 3)
    for cell in range(6):  # drawn on: exactly the cells of the path have a frame
        r, c = divmod(cell, 3)
        framed = tuple(image[r * 160 + 80, c * 160]) not in PALETTE.values()
        assert framed == (cell in record.latents[0].cells)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_the_same_settings_give_the_same_bytes(tmp_path, form):
    for name in ("a", "b"):
        assert main([*SMALL, "--out", str(tmp_path / name), "--format", form]) == 0
    assert main([*SMALL, "--out", str(tmp_path / "c"), "--format", form, "--seed", "1"]) == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_a_set_that_is_there_is_left_alone_and_another_is_refused(tmp_path, capsys):
    out = tmp_path / "set"
    assert main([*SMALL, "--out", str(out)]) == 0
    before = digests(out)
    stamp = (out / "train.parquet").stat().st_mtime_ns
    assert main([*SMALL, "--out", str(out)]) == 0
    assert "already there, unchanged" in capsys.readouterr().out
    assert (out / "train.parquet").stat().st_mtime_ns == stamp

    assert main([*SMALL, "--out", str(out), "--hops", "3"]) == 2
    assert "another puzzle set (hops 4, not 3)" in capsys.readouterr().err
    assert main([*SMALL, "--out", str(out), "--val", "5"]) == 2
    assert "val None, not 5" in capsys.readouterr().err
    assert digests(out) == before

    (out / "keep.txt").write_text("mine")
    assert main([*SMALL, "--out", str(out), "--format", "jsonl", "--hops", "3", "--force"]) == 0
    assert not (out / "train.parquet").exists()
    assert (out / "keep.txt").read_text() == "mine"
    assert load_records(out / "train.jsonl")[0].meta["hops"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]  # nothing half made is left


def test_files_that_were_changed_or_are_no_set_are_not_overwritten(tmp_path, capsys):
    out = tmp_path / "set"
    assert main([*SMALL, "--out", str(out), "--format", "jsonl"]) == 0
    image = next((out / "test_images").iterdir())
    image.write_bytes(image.read_bytes() + b"x")
    assert main([*SMALL, "--out", str(out), "--format", "jsonl"]) == 2
    assert "its test files have been changed" in capsys.readouterr().err
    (out / "puzzles.json").write_text("{")
    assert main([*SMALL, "--out", str(out), "--format", "jsonl"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (out / "puzzles.json").unlink()
    assert main([*SMALL, "--out", str(out)]) == 2
    assert "is in the way" in capsys.readouterr().err
    assert main([*SMALL, "--out", str(image)]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main([*SMALL, "--out", str(image / "below")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_an_interrupted_making_leaves_nothing_behind(tmp_path, monkeypatch):
    from rl_lvr.data import puzzle_sets

    def interrupted(records, path):
        path.write_bytes(b"half")
        next(iter(records))
        raise KeyboardInterrupt

    with pytest.raises(UserError, match="choose from parquet, jsonl"):
        make_pointers(PuzzleConfig(), {"train": 5}, tmp_path / "set", "csv")
    monkeypatch.setattr(puzzle_sets, "write_parquet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_pointers(PuzzleConfig(), {"train": 5}, tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--hops", "6"], "come back to the start"),
        (["--train", "0", "--test", "0"], "without puzzles"),
        (["--k", "3"], "decorative latents only"),
        (["--grid", "1x3", "--hops", "1", "--train", "1000"], "different puzzles"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, flags, message):
    assert main([*SMALL, *flags, "--out", str(tmp_path / "set")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("flags", [["--grid", "3"], ["--train", "-1"], ["--latents", "paths"], ["--format", "csv"]])
def test_bad_flags_are_refused_by_the_parser(tmp_path, flags):
    with pytest.raises(SystemExit) as stop:
        main([*SMALL, *flags, "--out", str(tmp_path / "set")])
    assert stop.value.code == 2


@pytest.fixture
def bad_file(tmp_path):
    file = tmp_path / "bad.jsonl"
    rows = [{"id": f"r{n}", "messages": [{"role": "user", "content": "hi\x1b[2J"}], "answer": ""} for n in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_check_prints_place_field_and_cure_and_exits_with_2(bad_file, capsys):
    assert main(["data", "check", str(bad_file), "--max-errors", "2"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bad.jsonl line 1 (id 'r0'): answer: is empty; fill it in, or leave the field out."
    assert lines[2] == "... and 3 more findings (--max-errors shows more)"
    assert lines[3].endswith("5 records, 5 bad, 0 images")
    assert lines[-1] == "5 findings"
    assert main(["data", "check", str(bad_file), "--limit", "1"]) == 2
    assert capsys.readouterr().out.splitlines()[-1] == "1 finding"


def test_check_as_json(bad_file, capsys):
    assert main(["data", "check", str(bad_file), "--json", "--max-errors", "1"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["total_findings"], len(report["findings"])) == (False, 5, 1)
    assert report["findings"][0]["field"] == "answer"


def test_a_missing_file_is_one_line(tmp_path, capsys):
    for action in ("check", "show"):
        assert main(["data", action, str(tmp_path / "none.jsonl")]) == 2
        error = capsys.readouterr().err
        assert "does not exist" in error
        assert error.count("\n") == 1


def test_show_refuses_what_is_not_there_and_prints_no_control_characters(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    row = {"id": "a", "messages": [{"role": "user", "content": "hi\x1b[2J\nthere"}]}
    file.write_text(json.dumps(row) + "\n")
    assert main(["data", "show", str(file)]) == 0
    assert capsys.readouterr().out == "id        a\nuser      hi\\x1b[2J\n          there\n"
    assert main(["data", "show", str(file), "--index", "1"]) == 2
    assert "has 1 records" in capsys.readouterr().err
    assert main(["data", "show", str(file), "--image", str(tmp_path / "x.png")]) == 2
    assert "no images to draw" in capsys.readouterr().err


def test_the_command_needs_no_torch(tmp_path):
    """Making and checking puzzles is quick work; torch would add seconds to it."""
    script = f"""
import argparse, sys
from rl_lvr.commands import data
parser = argparse.ArgumentParser()
data.configure(parser)
assert not {{"torch", "datasets", "numpy"}} & set(sys.modules)
out = {str(tmp_path / "s")!r}
make = ["make", "pointers", "--out", out, "--train", "5", "--test", "5"]
assert data.run(parser.parse_args(make)) == 0
assert data.run(parser.parse_args(["check", out + "/test.parquet"])) == 0
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
