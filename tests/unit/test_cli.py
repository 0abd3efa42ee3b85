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


@pytest.mark.parametrize(("code", "ends"), [(None, 1), (0, 1), (3, 3)])
def test_what_ends_a_verb_by_sys_exit_is_no_success(code: int | None, ends: int) -> None:
    """Code of users runs in many places, such as that of a model with trust_remote_code."""
    words = (
        "import sys; from rl_lvr import cli; from rl_lvr.commands import doctor\n"
        f"doctor.run = lambda arguments: sys.exit({code})\n"
        "sys.exit(cli.main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
    assert done.returncode == ends
    assert ("was ended by sys.exit" in done.stderr) is (code in (None, 0))


GROUP = """
import sys, torch.distributed
from rl_lvr import cli
from rl_lvr.accelerated import group_ended
from rl_lvr.commands import doctor
from rl_lvr.errors import Fault

def begun():
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    torch.distributed.all_reduce(torch.ones(1))

def fail(error):
    raise error

for way in (lambda: 0, lambda: fail(Fault("x")), lambda: fail(KeyboardInterrupt()), lambda: sys.exit(5), lambda: 1 / 0):
    def run(arguments):
        begun()
        return way()

    doctor.run = run
    try:
        print(cli.main(["doctor"]), torch.distributed.is_initialized())
    except BaseException as error:
        print(type(error).__name__, torch.distributed.is_initialized())
with group_ended():
    begun()
    doctor.run = lambda arguments: 0
    print(cli.main(["doctor"]), torch.distributed.is_initialized())  # one that was there before stays
print(torch.distributed.is_initialized())
"""


def test_the_process_group_is_ended_on_every_path() -> None:
    done = subprocess.run([sys.executable, "-c", GROUP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = ["0 False", "1 False", "130 False", "SystemExit False", "ZeroDivisionError False", "0 True", "False"]
    assert done.stdout.splitlines() == ends
