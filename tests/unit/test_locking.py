"""One run holds a folder: against other processes, links, forks, dead holders, other hosts and file systems without
locks. The processes are real ones."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rl_lvr import locking
from rl_lvr.errors import UserError
from rl_lvr.locking import LOCK, Holder, folder_held
from rl_lvr.training.runs.folder import RUN_FILE, clear_run, open_run, write_run

HOLDER = """
import sys
from pathlib import Path
from rl_lvr.errors import UserError
from rl_lvr.locking import folder_held
place, how = Path(sys.argv[1]), sys.argv[2]
try:
    with folder_held(place, "rl-lvr sft"):
        print("held", flush=True)
        if how == "fail":
            raise ValueError("no such model")
        else:
            sys.stdin.read()
except UserError as error:
    print(error, flush=True)
"""


def process(place: Path, how: str = "wait") -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLDER, str(place), how]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def holding(place: Path) -> subprocess.Popen[str]:
    holder = process(place)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_living_run_keeps_its_folder_and_the_message_names_it(tmp_path: Path) -> None:
    place = tmp_path / "a" / "run"
    holder = holding(place)
    (tmp_path / "link").symlink_to(place)
    for way in (place, tmp_path / "link", tmp_path / "a" / ".." / "a" / "run"):
        said = (
            rf"output_dir .* is in use \(rl-lvr sft, process {holder.pid} on {re.escape(socket.gethostname())} since 2"
        )
        with pytest.raises(UserError, match=said), folder_held(way, "another"):
            pass
    assert (place / LOCK).is_file()  # a refusal takes nothing away
    holder.communicate("", timeout=30)
    assert not (tmp_path / "a").exists()  # nothing was written, so nothing is left
    with folder_held(place, "another"):
        (place / "kept").touch()
    assert [entry.name for entry in place.iterdir()] == ["kept"]


def test_a_dead_run_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = holding(tmp_path / "run")
    holder.kill()
    holder.wait(30)
    assert Holder.of((tmp_path / "run" / LOCK).read_text()) is not None  # control: it could not remove it
    with folder_held(tmp_path / "run", "another"):
        assert f"process {os.getpid()} " in str(Holder.of((tmp_path / "run" / LOCK).read_text()))
    assert f"taken over from a run that was killed (rl-lvr sft, process {holder.pid}" in capsys.readouterr().err


def test_of_two_that_start_at_once_one_wins(tmp_path: Path) -> None:
    both = [process(tmp_path / "run") for _ in range(2)]
    said = sorted(one.stdout.readline() for one in both if one.stdout is not None)
    assert said[0] == "held\n"
    assert "is in use" in said[1]
    for one in both:
        one.communicate("", timeout=30)


def test_an_exception_and_signals_release_it(tmp_path: Path) -> None:
    failed = process(tmp_path / "run", "fail")
    assert failed.wait(30) == 1
    assert list(tmp_path.iterdir()) == []
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)):
        told = holding(tmp_path / "run")
        told.send_signal(number)
        assert told.wait(30) == code
        assert list(tmp_path.iterdir()) == []


def test_one_process_may_hold_it_twice_and_a_fork_does_not(tmp_path: Path) -> None:
    with folder_held(tmp_path, "run"):
        with folder_held(tmp_path, "trainer"):
            pass
        assert (tmp_path / LOCK).is_file()
        child = os.fork()
        if child == 0:  # as a worker of a data loader that outlives its killed parent
            os._exit(1 if locking._held else 0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = os.fork()
        if child == 0:
            try:
                with folder_held(tmp_path, "child"):
                    pass
            except UserError:
                os._exit(3)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        assert (tmp_path / LOCK).is_file()
    assert list(tmp_path.iterdir()) == []


def test_what_another_host_left_is_refused_with_the_cure(tmp_path: Path) -> None:
    theirs = replace(Holder.this_process("rl-lvr grpo"), host="node17", pid=4711)
    (tmp_path / LOCK).write_text(json.dumps(asdict(theirs)))
    with (
        pytest.raises(
            UserError, match=rf"taken by rl-lvr grpo, process 4711 on node17 .* delete {tmp_path / LOCK} and"
        ),
        folder_held(tmp_path, "x"),
    ):
        pass
    assert (tmp_path / LOCK).is_file()


def test_a_process_id_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    """The test's parent is alive; only with its own start is it the holder, where locks say nothing."""
    parent = os.getppid()
    alive = replace(Holder.this_process("rl-lvr sft"), pid=parent, born=locking._born(parent) or "")
    (tmp_path / LOCK).write_text(json.dumps(asdict(alive)))
    with pytest.raises(UserError, match="is in use"), folder_held(tmp_path, "x"):
        pass
    for born in ("another-boot 1", alive.born + "1", ""):
        (tmp_path / LOCK).write_text(json.dumps(asdict(replace(alive, born=born))))
        with folder_held(tmp_path, "x"):
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\x00\x01"])
def test_a_lock_file_that_says_nothing_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with folder_held(tmp_path, "x"):
        pass


def test_without_locks_the_text_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    holder = holding(tmp_path / "run")
    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(UserError, match="is in use"), folder_held(tmp_path / "run", "x"):
        pass
    assert "its file system has no locks" in capsys.readouterr().err
    holder.kill()
    holder.wait(30)
    with folder_held(tmp_path / "run", "x"):
        pass


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis").touch()
    with pytest.raises(UserError, match="is a file"), folder_held(tmp_path / "thesis", "x"):
        pass


def test_overwriting_keeps_the_lock_and_a_fresh_folder_with_a_lock_is_empty(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with folder_held(run, "x"):
        assert open_run(str(run), None, overwrite=False) is None
        write_run(str(run), "sft", {}, {})
        (run / "checkpoint-1").mkdir()
        (run / "link").symlink_to(tmp_path)
        clear_run(str(run))
        assert [entry.name for entry in run.iterdir()] == [LOCK]
        write_run(str(run), "sft", {}, {})
    assert [entry.name for entry in run.iterdir()] == [RUN_FILE]


@pytest.mark.parametrize("verb", ["sft", "grpo"])
@pytest.mark.parametrize("more", [{}, {"resume_from_checkpoint": "auto"}, {"overwrite": True}])
def test_the_verbs_refuse_a_living_run_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, more: dict[str, object]
) -> None:
    from rl_lvr import cli

    (tmp_path / "model").mkdir()
    holder = holding(tmp_path / "run")
    (tmp_path / "run" / RUN_FILE).write_text('{"starts": []}')
    settings = {"model_name_or_path": tmp_path / "model", "train_file": "none.jsonl", "output_dir": tmp_path / "run"}
    settings |= {"report_to": "none", "use_cpu": True, **({"rewards": "accuracy"} if verb == "grpo" else {}), **more}
    code = cli.main([verb, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))])
    assert code == 2
    assert f"is in use (rl-lvr sft, process {holder.pid} " in capsys.readouterr().err
    assert (tmp_path / "run" / RUN_FILE).is_file()
    holder.communicate("", timeout=30)
    code = cli.main([verb, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))])
    assert code == 2  # control: what comes next is another refusal
    assert "is in use" not in capsys.readouterr().err
