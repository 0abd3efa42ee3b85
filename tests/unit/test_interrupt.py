"""Signals: the first one counts, its echoes do not, and a second Ctrl-C ends a run at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from rl_lvr.training.runs.stopping import Abandoned, Interrupt


@pytest.fixture
def heard() -> Iterator[tuple[Interrupt, SimpleNamespace]]:
    interrupt, trainer = Interrupt(), SimpleNamespace(rewindable=False, interrupt=None)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    interrupt.install(trainer)
    yield interrupt, trainer
    interrupt.restore()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_launcher_may_pass_on_what_was_heard_already(heard: tuple[Interrupt, SimpleNamespace]) -> None:
    interrupt, trainer = heard
    assert trainer.interrupt is interrupt
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
    assert interrupt.received == signal.SIGTERM


def test_a_second_ctrl_c_is_meant(heard: tuple[Interrupt, SimpleNamespace]) -> None:
    interrupt, _ = heard
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)  # the echo of the first
    interrupt.ECHO = 0.0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert interrupt.received == signal.SIGINT


def test_a_step_that_may_be_given_up_is(heard: tuple[Interrupt, SimpleNamespace]) -> None:
    interrupt, trainer = heard
    trainer.rewindable = True
    with pytest.raises(Abandoned):
        signal.raise_signal(signal.SIGTERM)
    assert interrupt.received == signal.SIGTERM
