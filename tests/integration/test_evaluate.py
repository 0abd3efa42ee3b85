"""`rl-lvr evaluate`: rows, intervals, resumption, and the same answers from the engines `hf` and `vllm`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from engine_cases import FORMATS
from lab_tools import PUZZLES, write_puzzles
from vllm_cases import LENGTH, thinking_folder

from rl_lvr.cli import main
from rl_lvr.data.puzzles import generate
from rl_lvr.data.writing import write_jsonl
from rl_lvr.evaluation.report import summarise
from rl_lvr.evaluation.rows import read_rows

FIELDS = ["id", "condition", "answer", "text", "extracted", "right", "rule", "latents", "cluster", "category", "seed"]
MANY = "own,own/forced,noise/forced,swap/forced,mean/forced,oracle,skip,plain_tokens,own/bias=-3"


@pytest.fixture(scope="module")
def folder(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that opens spans every few tokens, and knows the words of the puzzles."""
    source = tiny_folder("qwen2_5_vl", latent_formats=FORMATS, words=(*PUZZLES.words, "."))
    return thinking_folder(source, tmp_path_factory.mktemp("model") / "qwen2_5_vl")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_puzzles(tmp_path_factory.mktemp("data"), train=1, test=24) / "test.parquet"


def words(folder: Path, data: Path, out: Path, *more: str) -> list[str]:
    asked = ["evaluate", str(folder), "--data", str(data), "--format", "lvr", "--max-tokens", "12", "--out", str(out)]
    return [*asked, "--filler", ".", *more]


def test_it_writes_every_answer_and_prints_intervals(folder: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "answers.jsonl"
    ask = words(folder, data, out, "--limit", "12", "--conditions", "own, noise,swap,none")
    assert main([*ask, "--signals", "latent_norm", "--picture", str(out.with_suffix(".png"))]) == 0
    said = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 4 * 12
    assert all([name for name in line if name not in ("donor", "signals")] == FIELDS for line in lines)
    summary = json.loads(out.with_suffix(".json").read_text())
    rows = read_rows(out)
    for name, table in summary["conditions"].items():
        mine = [row.right for row in rows if row.condition == name]
        assert table["accuracy"] == sum(mine) / len(mine)
        low, high = table["interval"]
        assert low <= table["accuracy"] <= high
        assert f"{low:.3f} to {high:.3f}" in said
        assert ("minus_own" in table) == (name != "own")
    assert summary["conditions"]["own"]["trigger_rate"] > 0.5
    assert summary["conditions"]["none"]["trigger_rate"] is None
    assert {row.cluster for row in rows} == {row.id for row in rows}
    answers = {row.id: row.answer for row in rows}
    assert all(answers[row.donor] != row.answer for row in rows if row.condition == "swap")
    signals = summary["conditions"]["own"]["signals"]
    assert signals["latent_norm"] > 0
    assert -1 <= signals["collapse"] <= 1
    again = summarise(rows)["conditions"]  # the rows are all that is needed, but for collapse
    again["own"]["signals"]["collapse"] = signals["collapse"]
    assert again == summary["conditions"]
    assert list(summary["conditions"]) == ["own", "noise", "swap", "none"]
    assert out.with_suffix(".png").stat().st_size > 5000


def test_a_second_run_goes_on_and_other_settings_are_refused(
    folder: Path, data: Path, tmp_path: Path, capsys: Any
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    ask = ("--limit", "8", "--conditions", "own,swap", "--batch", "4")
    assert main(words(folder, data, whole, *ask)) == 0
    assert main(words(folder, data, out, *ask)) == 0
    kept = out.read_text().splitlines(keepends=True)
    # As a kill leaves it: own answers in part, one of them cut off, and no swap.
    out.write_text("".join(kept[:5]) + kept[5][:20])
    assert main(words(folder, data, out, *ask)) == 0
    assert sorted(out.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    before = out.read_text()
    capsys.readouterr()
    assert main(words(folder, data, out, *ask)) == 0  # all is there
    assert out.read_text() == before
    assert "8 records" in capsys.readouterr().out
    assert main(words(folder, data, out, "--limit", "10", "--conditions", "own,swap,zeros", "--batch", "4")) == 0
    assert len(read_rows(out)) == 30
    assert main(words(folder, data, out, *ask, "--max-tokens", "9")) == 2
    assert "holds answers with sampling" in capsys.readouterr().err
    assert main(words(folder, data, out, *ask, "--overwrite", "--samples", "2", "--temperature", "0")) == 2
    assert len(read_rows(out)) == 30  # refused, so nothing is deleted
    capsys.readouterr()
    write_jsonl(generate(PUZZLES, 9, "test")[1:], tmp_path / "moved.jsonl")
    assert main(words(folder, tmp_path / "moved.jsonl", out, *ask)) == 2  # a record's seed is by its place
    assert "holds answers with data" in capsys.readouterr().err
    assert main(words(folder, data, out, *ask, "--max-tokens", "9", "--overwrite")) == 0
    assert len(read_rows(out)) == 16
    out.with_suffix(".json").unlink()
    assert main(words(folder, data, out, *ask)) == 2
    assert "does not say what it was made with" in capsys.readouterr().err


def test_ctrl_c_loses_no_answer_that_was_written(folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = words(folder, data, out, "--conditions", "own,noise", "--batch", "2")
    process = subprocess.Popen([sys.executable, "-m", "rl_lvr.cli", *command], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 100
    while not (out.is_file() and len(out.read_bytes().splitlines()) >= 4):
        assert time.monotonic() < until
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    kept = read_rows(out)
    assert process.returncode == 130
    assert f"holds {len(kept)} answers, and the same command goes on" in said
    assert "Traceback" not in said
    assert 4 <= len(kept) < 48
    assert main(command) == 0
    rows = read_rows(out)
    assert rows[: len(kept)] == kept
    assert len({row.key for row in rows}) == len(rows) == 48


def test_clusters_categories_and_samples(folder: Path, tmp_path: Path, capsys: Any) -> None:
    from dataclasses import replace

    records = [
        replace(record, meta={**record.meta, "picture": f"p{number // 2}"}, category=("odd", "even")[number % 2])
        for number, record in enumerate(generate(PUZZLES, 8, "test"))
    ]
    write_jsonl(records, tmp_path / "data.jsonl")
    out = tmp_path / "out.jsonl"
    more = ["--cluster", "picture", "--category", "category", "--samples", "3", "--conditions", "own,swap"]
    assert main(words(folder, tmp_path / "data.jsonl", out, *more)) == 0
    said = capsys.readouterr().out
    rows = read_rows(out)
    assert len(rows) == 8 * 3 * 2
    assert {row.cluster for row in rows} == {f"p{i}" for i in range(4)}
    clusters = {row.id: row.cluster for row in rows}
    assert all(clusters[row.donor] != row.cluster for row in rows if row.condition == "swap")
    table = json.loads(out.with_suffix(".json").read_text())
    assert set(table["categories"]) == {"odd", "even"}
    assert table["conditions"]["own"]["pass"].keys() == {"1", "2", "3"}
    for word in ("category even", "pass@3", "maj@3", "8 records in 4 clusters, 3 samples each"):
        assert word in said
    assert main(words(folder, tmp_path / "data.jsonl", tmp_path / "o.jsonl", "--cluster", "nothing")) == 2
    assert "has no 'nothing'" in capsys.readouterr().err


def test_one_answer_in_the_majority_takes_donors_all_the_same(folder: Path, tmp_path: Path, capsys: Any) -> None:
    from dataclasses import replace

    records = [
        replace(record, answer="red" if number < 6 else "blue")
        for number, record in enumerate(generate(PUZZLES, 8, "test"))
    ]
    write_jsonl(records, tmp_path / "data.jsonl")
    out = tmp_path / "out.jsonl"
    assert main(words(folder, tmp_path / "data.jsonl", out, "--conditions", "own,swap")) == 0
    rows = [row for row in read_rows(out) if row.condition == "swap"]
    answers = {row.id: row.answer for row in rows}
    assert all(row.donor != row.id for row in rows)
    share = sum(answers[row.donor] == row.answer for row in rows) / len(rows)
    assert 0 < share < 1
    assert f"{share:.1%} of the donors have the same answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--conditions", "own,nose"], "did you mean 'noise'"),
        (["--conditions", ","], "names none"),
        (["--engine-options", "{a: 1}"], "engine hf takes no engine options"),
        (["--engine", "vllm", "--engine-options", "{max_len: 1}"], "has no 'max_len'"),
        (["--engine", "vllm", "--engine-options", "["], "no YAML"),
        (["--engine", "server"], "--url"),
        (["--url", "http://localhost:1"], "--url is for the engine server"),
        (["--samples", "2", "--temperature", "0"], "equal at temperature 0"),
        (["--signals", "latent_norm", "--conditions", "noise"], "add own"),
        (["--out", "table.json"], "name a .jsonl file"),
        (["--picture", "table.txt"], "--picture is table.txt"),
        (["--kind", "numeric"], "no answer of kind numeric"),
        (["--conditions", "plain_tokens", "--filler", "red blue"], "2 tokens"),
        (["--format", "nothing"], "nothing"),
        (["--conditions", "oracle"], "cannot share 3 targets evenly"),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path, data: Path, tmp_path: Path, capsys: Any, more: list[str], message: str
):
    assert main(words(folder, data, tmp_path / "out.jsonl", *more)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out.jsonl").exists()


def test_hf_and_vllm_give_the_same_answers(folder: Path, data: Path, tmp_path: Path) -> None:
    """Greedy, of every kind of condition. Control: conditions differ from each other."""
    out = {name: tmp_path / f"{name}.jsonl" for name in ("hf", "vllm")}
    options = {
        "max_model_len": LENGTH,
        "engine_args": {
            "enforce_eager": True,
            "num_gpu_blocks_override": 256,
            "limit_mm_per_prompt": {"image": 1, "video": 0},
        },
    }
    every = ["--conditions", MANY, "--k", "3", "--limit", "6", "--max-tokens", "8"]
    assert main(words(folder, data, out["hf"], *every)) == 0
    more = ["--engine", "vllm", "--engine-options", json.dumps(options), "--batch", "16"]
    assert main(words(folder, data, out["vllm"], *every, *more)) == 0
    one, other = ({row.key: row for row in read_rows(path)} for path in out.values())
    assert len(one) == 6 * 9
    assert one == other
    own = {key[0]: row.text for key, row in one.items() if key[1] == "own/forced"}
    others = [row for row in one.values() if row.condition in ("noise/forced", "swap/forced", "skip")]
    assert any(row.text != own[row.id] for row in others)
    assert all(row.latents >= 3 for row in one.values() if row.condition.endswith("/forced"))
