"""Progress: silent for short work, lines without a terminal, a bar with one."""

import io
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest

from rl_lvr.progress import clock, task, track


def work(stream, steps=6, step_seconds=0.02, after=0.05, every=0.05, total=6, **figures):
    with task("reading", total, "rows", stream=stream, after=after, every=every) as bar:
        for _ in range(steps):
            time.sleep(step_seconds)
            bar.advance(1, **figures)


def test_short_work_is_silent():
    stream = io.StringIO()
    work(stream, after=60)
    assert stream.getvalue() == ""
    work(stream)  # control: the same work shown at once
    assert stream.getvalue() != ""


def test_lines_have_count_rate_time_left_and_figures():
    stream = io.StringIO()
    work(stream, loss=0.123456, stage="one")
    first, *_, last = stream.getvalue().splitlines()
    assert re.fullmatch(r"reading: [1-5]/6 \(\d+%\) rows, [\d.]+ rows/s, \d s left, loss 0\.1235 stage one", first), (
        first
    )
    assert re.fullmatch(r"reading: 6/6 \(100%\) rows, .*, done in \d s, loss .*", last), last


def test_lines_keep_their_distance():
    stream = io.StringIO()
    work(stream, steps=100, step_seconds=0.002, after=0, every=60, total=None)
    assert len(stream.getvalue().splitlines()) == 2  # the first and the last
    assert stream.getvalue().splitlines()[-1].startswith("reading: 100 rows, ")


def test_work_that_fails_says_where_it_stopped():
    stream = io.StringIO()

    def interrupted():
        with task("reading", 9, stream=stream, after=0, every=60) as bar:
            bar.advance(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "4/9 (44%) it" in stream.getvalue()
    assert "stopped after" in stream.getvalue()
    assert "done" not in stream.getvalue()


def test_an_invisible_task_shows_nothing():
    stream = io.StringIO()
    with task("reading", stream=stream, visible=False, after=0) as bar:
        bar.advance(3, loss=1.0)
    assert stream.getvalue() == ""


def test_track_yields_everything_and_knows_the_total(capsys):
    assert list(track("abc", "letters")) == ["a", "b", "c"]
    assert list(track(iter(range(3)), "numbers", visible=False)) == [0, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_slow_units_are_told_in_seconds_each():
    stream = io.StringIO()
    with task("steps", 2, stream=stream, after=0, every=0) as bar:
        time.sleep(0.12)
        bar.advance(0.1)
    assert re.search(r"\d\.\d s/it", stream.getvalue()), stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(7.2, "7 s"), (125, "2:05"), (3725, "1:02:05"), (59.7, "1:00")])
def test_clock(seconds, text):
    assert clock(seconds) == text


SCRIPT = """
import sys, time
from rl_lvr.progress import task
with task("outer", 3, "rows", after={after}) as outer:
    for i in range(3):
        with task("inner", 2, after={after}) as inner:
            for _ in range(2):
                time.sleep(0.04)
                inner.advance()
        print("result", i)
        outer.advance(loss=0.5)
        assert "torch" not in sys.modules
"""


def run_on_a_terminal(after, term="xterm-256color"):
    """Run the script with stderr on a pseudo terminal and stdout on a pipe."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": term, "COLUMNS": "140"}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(after=after)], stdout=subprocess.PIPE, stderr=theirs, env=env
    )
    os.close(theirs)
    shown = b""
    try:
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            if select.select([ours], [], [], 0.05)[0]:
                shown += os.read(ours, 65536)
    except OSError:  # the terminal's other end is closed: the process is gone
        pass
    out = process.communicate(timeout=20)[0].decode()
    os.close(ours)
    assert process.returncode == 0, shown
    return out, shown.decode()


def test_a_terminal_gets_a_bar_and_a_pipe_keeps_the_result():
    out, shown = run_on_a_terminal(after=0.01)
    assert out == "result 0\nresult 1\nresult 2\n"
    assert "outer" in shown
    assert "inner" in shown
    assert "3/3" in shown
    assert "rows/s" in shown
    assert "loss 0.5" in shown
    assert "━" in shown
    assert "\x1b[?25h" in shown  # the cursor is given back


def test_a_terminal_stays_clean_after_short_work_and_gets_lines_if_it_cannot_draw():
    assert run_on_a_terminal(after=60) == ("result 0\nresult 1\nresult 2\n", "")
    _, shown = run_on_a_terminal(after=0.01, term="dumb")
    assert "\x1b" not in shown
    assert "outer: 3/3 (100%) rows" in shown
