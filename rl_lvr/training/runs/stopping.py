"""Ctrl-C and SIGTERM: whether a run was told to stop, and whether the step in progress can be given up for it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rl_lvr.agreement import largest
from rl_lvr.training.runs.moments import Moment


class Abandoned(KeyboardInterrupt):
    """The step in progress is given up, because the run was told to stop. No `except Exception` swallows it."""


class Interrupt(TrainerCallback):
    """Ctrl-C or SIGTERM ends the run with a checkpoint of the last whole step; another Ctrl-C ends it at once.

    A step that has not come to its update is given up: in one process at once, in several where all of them agree. In
    evaluation, and where half the parameters would be updated, a signal is only noted, and acted on after it. Launchers
    forward the signals that they and their group receive, so a process may receive one twice: SIGTERM counts once, and
    a second Ctrl-C only if it is not the echo of the first.
    """

    ECHO = 2.0
    """Seconds."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0
        self._stopping: Stopping | None = None
        self._before: dict[int, Any] = {}

    def install(self, stopping: Stopping) -> None:
        """Receive signals from now on."""
        self._stopping = stopping
        stopping.interrupt = self
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if number == signal.SIGINT and now - self._at > self.ECHO:
                raise KeyboardInterrupt
            return
        self.received, self._at = number, now
        print("stopping, with a checkpoint; Ctrl-C once more to stop at once", file=sys.stderr)
        if self._stopping is not None and self._stopping.rewindable:
            raise Abandoned

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.received = largest(self.received or 0)[0] or None  # all stop after the same step, whichever were told to
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.restore()

    def restore(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


class Stopping:
    """One for a trainer and its parts. `heed` is called by all processes at the same place."""

    def __init__(self, *, single: bool) -> None:
        self.interrupt: Interrupt | None = None
        self.moment: Moment | None = None
        """The end of the last step; None where the step in progress cannot be given up."""
        self._single = single
        self._alone = False

    @property
    def rewindable(self) -> bool:
        """Whether the step in progress may be given up at once, by this process alone."""
        return self.moment is not None and (self._single or self._alone)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, no other process waits for this one."""
        self._alone = True
        try:
            yield
        finally:
            self._alone = False

    def heed(self, problem: bool = False) -> bool:
        """Give the step up if any process was told to stop; else return whether any has a problem.

        Not while the model is evaluated: its step is done, and the next one has not begun.
        """
        received = self.interrupt.received if self.interrupt is not None else None
        told, problems = largest(received or 0, int(problem))
        if told and self.moment is not None and self.interrupt is not None:
            self.interrupt.received = told
            raise Abandoned
        return bool(problems)
