"""The command line as a user meets it: quick help, one line on a mistake, exit codes."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from rl_lvr import cli
from rl_lvr.errors import UserError


def rl_lvr(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rl_lvr.cli", *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("verb", ["", *cli.VERBS])
def test_help_does_not_import_torch(verb: str) -> None:
    code = (
        "import sys; from rl_lvr.cli import main\n"
        f"try: main({[*([verb] if verb else []), '--help']!r})\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: rl-lvr" in done.stdout


def test_help_is_quick() -> None:
    began = time.perf_counter()
    assert rl_lvr("--help").returncode == 0
    assert time.perf_counter() - began < 5  # a second on an idle machine; importing torch alone takes longer


def test_a_mistake_is_one_line_and_exit_code_2() -> None:
    done = rl_lvr("sft", "--config", "missing.yaml")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "rl-lvr: no recipe at missing.yaml."
    assert "Traceback" not in done.stderr


def test_unknown_verbs_and_flags_are_refused() -> None:
    assert rl_lvr("train").returncode == 2
    done = rl_lvr("doctor", "--jsn")
    assert done.returncode == 2
    assert "--jsn" in done.stderr


def test_user_errors_of_any_verb_become_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from rl_lvr.commands import doctor

    def fail(arguments: object) -> int:
        raise UserError("the disk is full: delete something.")

    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "rl-lvr: the disk is full: delete something.\n"
