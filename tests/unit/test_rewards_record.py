"""Recorded rollouts on disk: what is written is read, and what a crash leaves behind is survived."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl_lvr.errors import UserError
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.rollout.record import RecordedRollout, RolloutLog, plain_text, read_rollouts, reward_columns

SPAN = {"begin": 1, "stop": 5, "latents": 3, "status": "closed"}


def rollout(number: int, **more) -> RecordedRollout:
    return RecordedRollout(
        prompt=f"quéstion {number}\nline",
        completion=f"answer {number}",
        **{"group": number // 2, "spans": [SPAN], "answer": "7", "rewards": {"accuracy": 1.0, "judge": None}} | more,
    )


def latents(rows: int, seed: int = 0) -> LatentBatch:
    generator = torch.Generator().manual_seed(seed)
    counts = [row % 3 for row in range(rows)]
    values = [torch.randn(n, 4, generator=generator, dtype=torch.bfloat16) for n in counts]
    return LatentBatch.from_rows(values, [list(range(5, 5 + n)) for n in counts], [0.5] * rows)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    first, second = RolloutLog(tmp_path / "rollouts"), RolloutLog(tmp_path / "rollouts", rank=1)
    carried = latents(4)
    first.append(0, [rollout(0), rollout(1)])
    more = {"spans": [], "images": ["a.png"], "signals": {"mass": [0.25, float("inf")]}, "columns": {"x": 1}}
    more |= {"log_kept_mass": [-0.25, 0.0]}
    first.append(1, [rollout(2, **more)])
    second.append(0, [rollout(n) for n in range(4)], carried)
    second.append(0, [rollout(9)])
    found = read_rollouts(tmp_path)
    assert [(r.step, r.rank, r.index) for r in found] == [
        (0, 0, 0),
        (0, 0, 1),
        *((0, 1, n) for n in range(5)),
        (1, 0, 0),
    ]
    assert found.steps == [0, 1]
    assert found[0] == rollout(0)
    assert found[7] == rollout(2, step=1, **more)
    assert found[7].spans == []  # known to have none; None would be not known
    for number in range(4):
        back = found.latents(2 + number)
        assert back is not None
        values, positions = carried.row(number)
        assert torch.equal(back.row(0)[0], values)
        assert torch.equal(back.row(0)[1], positions)
    assert found.latents(0) is None
    assert [r.completion for r in found.of_step(1)] == ["answer 2"]
    assert read_rollouts(tmp_path / "rollouts")[1:3][0] == found[1]
    assert not list((tmp_path / "rollouts").glob("*.partial"))


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    RolloutLog(tmp_path).append(0, [rollout(0)])
    code = (
        "import sys\nfrom rl_lvr.rollout.record import read_rollouts\n"
        f"assert len(read_rollouts({str(tmp_path)!r})) == 1\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_resumed_run_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    log.append(0, [rollout(0)], latents(1))
    log.append(1, [rollout(1)], latents(1))
    resumed = RolloutLog(tmp_path)
    resumed.append(1, [rollout(5), rollout(6)], latents(2, seed=1))
    found = read_rollouts(tmp_path)
    assert [r.completion for r in found] == ["answer 0", "answer 5", "answer 6"]
    assert len(list(tmp_path.glob("latents-*"))) == 3  # nothing was overwritten
    assert torch.equal(found.latents(2).values, latents(2, seed=1).select([1]).trimmed().values)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
@given(cut=st.integers(1, 400))
def test_a_crash_at_any_byte_costs_at_most_the_lines_that_it_cut(tmp_path: Path, cut: int) -> None:
    for old in tmp_path.iterdir():
        old.unlink()
    log = RolloutLog(tmp_path)
    log.append(0, [rollout(0), rollout(1)])
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_bytes()
    kept = whole[: max(0, len(whole) - cut)]
    file.write_bytes(kept)
    complete = kept.count(b"\n") + (kept.rpartition(b"\n")[2].endswith(b"}}") and len(kept) in _ends(whole))
    warnings: list[str] = []
    assert len(read_rollouts(tmp_path, warnings.append)) == complete
    assert len(warnings) == int(bool(kept) and len(kept) not in _ends(whole) and not kept.endswith(b"\n"))

    RolloutLog(tmp_path).append(1, [rollout(2)])
    again = read_rollouts(tmp_path, lambda sentence: pytest.fail(sentence))
    assert [r.completion for r in again] == [*(f"answer {n}" for n in range(complete)), "answer 2"]


def _ends(whole: bytes) -> list[int]:
    """Lengths at which a file ends with a whole line, only its newline missing."""
    return [index for index, byte in enumerate(whole) if byte == ord("\n")]


def test_a_long_torn_tail_is_cut_too(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path)
    log.append(0, [rollout(0)])
    (file,) = tmp_path.glob("*.jsonl")
    with file.open("ab") as tail:
        tail.write(b'{"prompt": "' + b"x" * 200_000)
    RolloutLog(tmp_path).append(1, [rollout(1)])
    assert [r.completion for r in read_rollouts(tmp_path)] == ["answer 0", "answer 1"]


def test_a_warning_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "comp')
    assert len(read_rollouts(path)) == 1
    assert capsys.readouterr().err == f"rl-lvr: {path}: its last line, 2, was cut off and is left out.\n"


def test_lines_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "d", "answer": "d"}')
    found = read_rollouts(path)
    assert [(r.prompt, r.answer, r.spans) for r in found] == [("a", None, None), ("c", "d", None)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "line 1 is damaged"),
        ("[]", "line 1 is no JSON object"),
        ('{"prompt": "a"}', "completion is missing"),
        ('{"prompt": "a", "completion": "b", "anwser": "c"}', "unknown field 'anwser'; did you mean 'answer'?"),
        ('{"prompt": "a", "completion": "b", "zzz": 1}', "what is your own goes into columns"),
        ('{"prompt": 3, "completion": "b"}', "prompt is 3"),
        ('{"prompt": "a", "completion": "b", "step": true}', "step is True"),
        ('{"prompt": "a", "completion": "b", "spans": {}}', "spans is {}"),
    ],
)
def test_what_is_no_record_is_named(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError) as caught:
        read_rollouts(path)
    assert problem in str(caught.value)


def test_a_folder_without_rollouts_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recorded rollouts in"):
        read_rollouts(tmp_path)


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"file": "../secret.safetensors", "row": 0}, "must name a file beside it"),
        ({"file": "latents.safetensors", "row": -1}, "must name a file beside it"),
        ({"file": "latents.safetensors", "row": 0}, "no latents file"),
        ({}, "must name a file beside it"),
    ],
)
def test_latents_are_looked_for_beside_the_file_only(tmp_path: Path, entry: dict, problem: str) -> None:
    (tmp_path / "run").mkdir()
    latents(1).save(tmp_path / "secret.safetensors")
    path = tmp_path / "run" / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b", "latents": entry}) + "\n")
    with pytest.raises(UserError, match=problem):
        read_rollouts(path).latents(0)


def test_columns_are_those_of_trl() -> None:
    rows = [rollout(0, signals={"mass": 0.5}, columns={"level": 3}), rollout(1, spans=None, answer=None)]
    columns = reward_columns(rows)
    assert columns == {
        "prompts": [r.prompt for r in rows],
        "completions": ["answer 0", "answer 1"],
        "texts": ["answer 0", "answer 1"],
        "spans": [[SPAN], None],
        "group": [0, 0],
        "answer": ["7", None],
        "level": [3, None],
        "mass": [0.5, None],
    }
    assert "spans" not in reward_columns([rows[1]])


def test_lines_by_hand_get_the_shapes_of_a_recipe_and_records_keep_theirs() -> None:
    message = [{"role": "assistant", "content": "red"}]
    by_hand, of_text = RecordedRollout("q", "red"), RecordedRollout("q", "red", prompt_ids=[1], completion_ids=[2])
    parsed = RecordedRollout([{"role": "user", "content": "q"}], message, text="thought red", prompt_ids=[1])
    columns = reward_columns([by_hand, of_text, parsed], conversational=True)
    assert columns["prompts"] == [[{"role": "user", "content": "q"}], "q", [{"role": "user", "content": "q"}]]
    assert columns["completions"] == [message, "red", message]
    assert columns["texts"] == ["red", "red", "thought red"]
    assert reward_columns([by_hand])["completions"] == ["red"]


def test_spans_are_no_text_of_a_record() -> None:
    assert reward_columns([rollout(0, spans=[])])["spans"] == [[]]


def test_messages_as_text() -> None:
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}
    assert plain_text("so") == "so"
    assert plain_text([user]) == "[image] what"
    assert plain_text([user, {"role": "assistant", "content": "that"}]) == "user: [image] what\nassistant: that"
