"""Progress on long work: a bar with rate and time left on a terminal, plain lines on stderr elsewhere.

rich draws the bar, which outside of a terminal shows nothing until the end. Nothing is shown for work that ends within
two seconds. Standard output is never touched, so that a verb's result can be piped. What is logged for later
(metrics.jsonl) is not here.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Item = TypeVar("Item")

AFTER = 2.0
"""Seconds before anything is shown."""

EVERY = 10.0
"""Seconds between two plain lines."""


class Bar(Protocol):
    """What `task` hands out."""

    def advance(self, n: float = 1, **figures: float | str) -> None:
        """`n` more units are done; the figures (loss=0.3) replace those shown before under the same names."""
        ...


@contextmanager
def task(
    description: str,
    total: float | None = None,
    unit: str = "it",
    *,
    stream: TextIO | None = None,
    visible: bool = True,
    after: float = AFTER,
    every: float = EVERY,
) -> Iterator[Bar]:
    """Show the progress of the work in the block.

    `stream` is stderr unless given; `visible=False` shows nothing (all ranks but the first).
    """
    stream = sys.stderr if stream is None else stream
    bar: _Silent | _Lines | _Terminal
    if not visible:
        bar = _Silent()
    elif _draws(stream):
        bar = _Terminal(_Work(description, total, unit), stream, after)
    else:
        bar = _Lines(_Work(description, total, unit), stream, after, every)
    try:
        yield bar
    except BaseException:
        bar.close(complete=False)
        raise
    bar.close(complete=True)


def track(
    items: Iterable[Item],
    description: str,
    total: float | None = None,
    unit: str = "it",
    *,
    stream: TextIO | None = None,
    visible: bool = True,
) -> Iterator[Item]:
    """The items, with progress shown; `total` is their number where they know it."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with task(description, total, unit, stream=stream, visible=visible) as bar:
        for item in items:
            yield item
            bar.advance()


def _draws(stream: TextIO) -> bool:
    """True if the stream is a terminal that can move its cursor."""
    if not stream.isatty():
        return False
    from rich.console import Console

    console = Console(file=stream)
    return console.is_terminal and not console.is_dumb_terminal


class _Work:
    """How far the work is, and how to say so in one line."""

    def __init__(self, description: str, total: float | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done: float = 0
        self.figures: dict[str, float | str] = {}
        self.begun = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def rate(self) -> str:
        """Units per second, or seconds per unit where that is the number above one."""
        seconds = self.seconds
        if not self.done or not seconds:
            return ""
        speed = self.done / seconds
        return f"{speed:.1f} {self.unit}/s" if speed >= 1 else f"{1 / speed:.1f} s/{self.unit}"

    def left(self) -> float | None:
        """Seconds left at the mean speed so far."""
        if self.total is None or not self.done:
            return None
        return max(0.0, self.total - self.done) * self.seconds / self.done

    def figures_text(self) -> str:
        return " ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.figures.items())

    def line(self, ending: str | None) -> str:
        """`ending` is None while the work goes on."""
        count = f"{self.done:g}" if self.total is None else f"{self.done:g}/{self.total:g}"
        if self.total:
            count += f" ({100 * self.done / self.total:.0f}%)"
        left = self.left()
        time_text = f"{clock(left)} left" if ending is None and left is not None else ""
        time_text = f"{ending} {clock(self.seconds)}" if ending is not None else time_text
        parts = [f"{count} {self.unit}", self.rate(), time_text, self.figures_text()]
        return f"{self.description}: {', '.join(part for part in parts if part)}"


def clock(seconds: float) -> str:
    """Seconds as 7 s, 2:05 or 1:02:05."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Silent:
    def advance(self, n: float = 1, **figures: float | str) -> None:
        """Nobody looks."""

    def close(self, complete: bool) -> None:
        """Nothing to close."""


class _Lines:
    """At most one line every `every` seconds, and one at the end of what was not short."""

    def __init__(self, work: _Work, stream: TextIO, after: float, every: float) -> None:
        self._work, self._stream, self._after, self._every = work, stream, after, every
        self._next = after

    def advance(self, n: float = 1, **figures: float | str) -> None:
        self._work.done += n
        self._work.figures.update(figures)
        seconds = self._work.seconds
        if seconds >= self._next:
            self._next = seconds + self._every
            self._print(None)

    def close(self, complete: bool) -> None:
        if self._work.seconds >= self._after:
            self._print("done in" if complete else "stopped after")

    def _print(self, ending: str | None) -> None:
        print(self._work.line(ending), file=self._stream, flush=True)


class _Terminal:
    """A row in the terminal's display, added when the work turns out to be long."""

    def __init__(self, work: _Work, stream: TextIO, after: float) -> None:
        self._work, self._stream = work, stream
        self._row: TaskID | None = None
        self._closed = False
        self._lock = threading.Lock()
        # A timer and not a look at the clock in `advance`: the first step may be the long one.
        self._timer = threading.Timer(after, self._show)
        self._timer.daemon = True
        self._timer.start()

    def advance(self, n: float = 1, **figures: float | str) -> None:
        self._work.done += n
        self._work.figures.update(figures)
        if self._row is not None:
            self._update()

    def close(self, complete: bool) -> None:
        self._timer.cancel()
        with self._lock:
            self._closed = True
        if self._row is not None:
            self._update("" if complete else "stopped")
            _display.remove(self._row)

    def _show(self) -> None:
        with self._lock:
            if not self._closed:
                self._row = _display.add(self._work, self._stream)

    def _update(self, ending: str = "") -> None:
        figures = " ".join(text for text in (self._work.figures_text(), ending) if text)
        _display.update(self._row, completed=self._work.done, rate=self._work.rate(), figures=figures)


class _Display:
    """The rows of all running tasks: nested work shares one live display, for a terminal has one cursor."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._progress: Progress | None = None
        self._running: set[TaskID] = set()

    def add(self, work: _Work, stream: TextIO) -> TaskID:
        with self._lock:
            if self._progress is None:
                self._progress = _rich_progress(stream)
                self._progress.start()
            row = self._progress.add_task(
                work.description,
                total=work.total,
                unit=work.unit,
                rate=work.rate(),
                figures="",
            )
            # rich starts its clock when the row appears; the work began before
            self._progress.tasks[self._progress.task_ids.index(row)].start_time = (
                self._progress.get_time() - work.seconds
            )
            self._progress.update(row, completed=work.done)
            self._running.add(row)
            return row

    def update(self, row: TaskID | None, completed: float, rate: str, figures: str) -> None:
        with self._lock:
            if self._progress is not None and row is not None:
                self._progress.update(row, completed=completed, rate=rate, figures=figures)

    def remove(self, row: TaskID) -> None:
        """The row is final; the display ends with the last running one and leaves its rows on the screen."""
        with self._lock:
            self._running.discard(row)
            if self._progress is None:
                return
            self._progress.stop_task(row)
            if not self._running:
                self._progress.stop()
                self._progress = None


def _rich_progress(stream: TextIO) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TextColumn("{task.fields[rate]}", style="cyan", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[figures]}", style="dim", markup=False),
        console=Console(file=stream),
        # What is printed while a bar is shown goes above it; a piped standard output must stay what it is.
        redirect_stdout=sys.stdout.isatty(),
    )


_display = _Display()
