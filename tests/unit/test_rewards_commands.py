"""`rl-lvr rewards` and `rl-lvr rollouts` as a user runs them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

from rl_lvr.cli import main
from rl_lvr.rollout.record import RecordedRollout, RolloutLog

REWARD = """
async def shorter(texts, spans, log_metric, *, limit=6):
    '''1 for a short one.'''
    log_metric("mean_length", sum(map(len, texts)) / len(texts))
    return [None if not s else float(len(c) <= limit) for c, s in zip(texts, spans)]

def fails(texts):
    return [1.0 / (c != "six") for c in texts]

def shapes(prompts, completions, texts, log_metric, **_):
    log_metric("messages", sum(isinstance(c, list) for c in (*prompts, *completions)))
    return [float(text == "six") for text in texts]

class Remembers:
    '''How many steps it has seen.'''

    def __init__(self):
        self.steps = 0

    def __call__(self, completions, **_):
        return [float(self.steps)] * len(completions)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

    def pending(self):
        return 1

    def merge(self, parts):
        self.steps += sum(parts)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder of a run with two steps of two rollouts."""
    log = RolloutLog(tmp_path / "run" / "rollouts")
    span = {"begin": 1, "stop": 6, "latents": 3, "status": "closed"}
    for step in (3, 8):
        log.append(
            step,
            [
                RecordedRollout(
                    "what is it?\nlook",
                    "seven",
                    marked="⟦3 latents⟧seven",
                    group=step,
                    spans=[span],
                    completion_ids=list(range(9)),
                    stop_reason="eos",
                    answer="seven",
                    category="hops-4",
                    images=["a/b.png"],
                    rewards={"accuracy": 1.0, "judge": None},
                    signals={"attention_mass_layers_0": 0.125 * step, "entropies": [0.5] * 20},
                ),
                RecordedRollout(
                    "what\x1b[31m?", "six", group=step, spans=[], answer="seven", rewards={"accuracy": 0.0}
                ),
            ],
        )
    (tmp_path / "mine.py").write_text(REWARD)
    return tmp_path / "run"


def test_a_line_by_hand_has_the_shape_that_a_recipe_gives(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["rewards", "test", f"{run.parent}/mine.py:shapes", "--data", str(run)]
    assert main(words) == main([*words, "--text"]) == 0
    said = capsys.readouterr().out
    assert said.count("shapes: mean 0.5000 of 4 scored") == 2
    assert "messages: 8\n" in said
    assert "messages: 0\n" in said


def test_a_reward_that_remembers_is_called_step_by_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "test", f"{run.parent}/mine.py:Remembers", "--data", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scores"] == [0, 0, 1, 1]


def test_list_names_every_reward_and_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from rl_lvr.cli import main\n"
        "assert main(['rewards', 'list']) == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "attention        Attention mass on the latents" in done.stdout
    assert "signals: attention_mass_layers_0" in done.stdout
    assert main(["rewards", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["confidence_text"]["signals"] == ["entropy_drop"]
    assert all(row["error"] is None and row["doc"] for row in rows.values())


def test_a_broken_package_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib.metadata import EntryPoint

    from rl_lvr import plugins

    points = [
        EntryPoint("broken", "no_such_module:f", "rl_lvr.rewards"),
        EntryPoint("ok", "rewards.presence:presence", ""),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    assert main(["rewards", "list"]) == 0
    out = capsys.readouterr().out
    assert "there is no module 'no_such_module'" in out
    assert "ok               `value` for a completion" in out


def test_test_prints_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "test", "accuracy", "--data", str(run), "--option", "wrong=-0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "sample", "reward", "answer", "completion"]
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["3", "0", "1"],
        ["3", "1", "-0.5"],
        ["8", "2", "1"],
        ["8", "3", "-0.5"],
    ]
    assert "⟦3 latents⟧seven" in lines[1]
    assert lines[5].startswith("accuracy: mean 0.2500 of 4 scored of 4, 0 excluded for faults")


def test_test_reads_recorded_signals(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "test", "attention", "--data", str(run), "--step", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["scores"], found["mean"], found["scored"]) == ([1.0, None], 1.0, 1)
    assert main(["rewards", "test", "attention", "--data", str(run), "--option", "layers=[5]"]) == 2
    assert "needs the signal 'attention_mass_layers_5', which was not measured" in capsys.readouterr().err


def test_test_runs_an_own_async_reward(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"{run.parent}/mine.py:shorter"
    assert main(["rewards", "test", own, "--data", str(run), "--limit", "2", "--option", "limit=4"]) == 0
    out = capsys.readouterr().out
    assert "shorter: mean 0.0000 of 1 scored of 2" in out
    assert "mean_length: 4" in out


def test_test_stops_at_a_fault_or_counts_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = f"{run.parent}/mine.py:fails"
    assert main(["rewards", "test", own, "--data", str(run)]) == 1
    error = capsys.readouterr().err
    assert "reward 'fails' raised ZeroDivisionError (float division by zero) at mine.py:8 on sample 1" in error
    assert error.count("\n") == 1
    assert main(["rewards", "test", own, "--data", str(run), "--on-error", "exclude"]) == 0
    assert "mean 1.0000 of 2 scored of 4, 2 excluded for faults" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--step", "4"], "has no step 4; it has 3, 8"),
        (["--limit", "0"], "--limit is 0"),
        (["--option", "wrong"], "is not of the form KEY=VALUE"),
        (["--option", "wrong=["], "is no valid YAML"),
        (["--option", "wrnog=1"], "did you mean 'wrong'"),
        (["--timeout", "0"], "timeout is 0"),
    ],
)
def test_refusals(run: Path, capsys: pytest.CaptureFixture[str], flags: list[str], problem: str) -> None:
    assert main(["rewards", "test", "accuracy", "--data", str(run), *flags]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_show_prints_plain_lines_where_there_is_no_terminal(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", "show", str(run), "--step", "8"]) == 0
    out = capsys.readouterr().out
    for line in (
        "rollout 0 of 2, step 8, group 8, hops-4",
        "image       a/b.png",
        "prompt      what is it?",
        "            look",
        "completion  ⟦3 latents⟧seven",
        "answer      seven",
        "stopped     eos after 9 tokens",
        "span        tokens 1 to 6, 3 latents, closed",
        "reward      accuracy 1",
        "reward      judge not scored",
        "signal      attention_mass_layers_0 1",
        "prompt      what\\x1b[31m?",
    ):
        assert line in out.splitlines()
    assert "0.5 ... (20)" in out
    assert "\x1b" not in out  # a prompt's control characters reach no terminal


def test_show_picks_one_or_all_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", "show", str(run), "--index", "-1"]) == 0
    assert capsys.readouterr().out.startswith("rollout 3 of 4, step 8")
    assert main(["rollouts", "show", str(run), "--json", "--limit", "3"]) == 0
    assert [json.loads(line)["step"] for line in capsys.readouterr().out.splitlines()] == [3, 3, 8]
    for flags, problem in (
        (["--index", "4"], "outside: they are numbered from 0 to 3"),
        (["--step", "5"], "has no step 5; it has 3, 8."),
        (["--limit", "0"], "at least 1"),
    ):
        assert main(["rollouts", "show", str(run), *flags]) == 2
        assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", ["rewards test accuracy --data", "rewards test accuracy --json --data", "rollouts show"]
)
def test_a_reader_may_leave(run: Path, command: str) -> None:
    log = RolloutLog(run / "rollouts")
    log.append(9, [RecordedRollout("q" * 1000, "seven", answer="seven") for _ in range(200)])  # more than a pipe holds
    first = subprocess.Popen(
        [sys.executable, "-m", "rl_lvr.cli", *command.split(), str(run)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert first.stdout is not None
    first.stdout.close()  # as `head` does, when it has its lines
    assert first.stderr is not None
    assert first.stderr.read() == b""
    assert first.wait(60) == 141


@pytest.mark.parametrize("columns", [20, 50, 100])
def test_lines_fit_the_terminal(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    wide = "\u65e5\u672c\u8a9e" * 30  # each takes two cells
    RolloutLog(run / "rollouts").append(9, [RecordedRollout("q", wide, answer=wide)] * 2)
    assert main(["rewards", "test", "accuracy", "--data", str(run)]) == 0
    table = capsys.readouterr().out.splitlines()[:7]
    assert all(cell_len(line) <= columns for line in table)
    assert columns < 100 or {cell_len(line) for line in table[5:]} == {100}  # and no more is cut than must be


@pytest.mark.parametrize("command", ["rewards test accuracy --data", "rollouts show"])
def test_a_terminal_without_unicode_is_served(run: Path, command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rl_lvr.cli", *command.split(), str(run)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u27e63 latents\u27e7seven" in done.stdout


@pytest.mark.timeout(60)
def test_show_pages_in_a_terminal(run: Path) -> None:
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "rl_lvr.cli", "rollouts", "show", str(run)]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal)
    os.close(terminal)
    for awaited, keys in (("[0/3]", ""), ("[1/3]", "3"), ("[3/3]", "p"), ("[2/3]", "99"), ("[3/3]", "q")):
        seen = ""
        while awaited not in seen:
            seen += os.read(screen, 65536).decode()
        os.write(screen, f"{keys}\n".encode())
    assert process.wait(30) == 0
    os.close(screen)
