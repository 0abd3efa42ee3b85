"""A reward that is constant over the first generation batches of a run is named, once."""

from __future__ import annotations

import json
import logging

import pytest

from rl_lvr.training.rewards.constant import BATCHES, Constant, shortened

NAN = float("nan")
GIVEN = {"mine": {"completions": [{"role": "assistant", "content": "red"}], "answer": "red"}}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


def feed(watch: Constant, *batches: list[float], **more) -> None:
    for values in batches:
        watch.note({"mine": values, "other": [0.0, float(len(values))]}, GIVEN, **more)


def test_it_is_named_with_what_it_was_given_and_what_it_gave(said) -> None:
    watch = Constant()
    feed(watch, [0.0, 0.0], [0.0, NAN])
    assert said() == []
    feed(watch, [0.0, 0.0], [0.0, 0.0])
    (sentence,) = said()
    assert "reward 'mine' gave 0 to each of the 6 completions of the first 3 generation batches" in sentence
    assert "completions = [{'role': 'assistant', 'content': 'red'}] (list)" in sentence
    assert "answer = 'red' (str)" in sentence


@pytest.mark.parametrize(
    "batches",
    [
        [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
        [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]],
        [[0.0, 0.0], [0.0, 0.0], [0.0, 1e-9], [0.0, 0.0]],
        [[NAN, NAN], [NAN, 1.0], [1.0, 1.0]],
    ],
    ids=["within a batch", "from batch to batch", "in the last one", "scored and not"],
)
def test_one_that_varies_is_not(said, batches) -> None:
    feed(Constant(), *batches)
    assert said() == []


def test_one_that_scores_nothing_is_named_too(said) -> None:
    feed(Constant(), *[[NAN, NAN]] * 3)
    assert "scored none of the 6 completions" in said()[0]


def test_a_short_run_is_judged_by_what_it_has(said) -> None:
    feed(Constant(), [2.5, 2.5], batches=1)
    assert "gave 2.5 to each of the 2 completions of the first generation batch," in said()[0]


def test_only_the_main_process_speaks_and_a_resumed_run_goes_on(said) -> None:
    feed(Constant(), *[[0.0, 0.0]] * BATCHES, speaks=False)
    assert said() == []
    before = Constant()
    feed(before, [0.0, 0.0], [0.0, 0.0])
    after = Constant()
    after.restore(json.loads(json.dumps(before.state())))
    feed(after, [0.0, 0.0])
    assert len(said()) == 1
    again = Constant()
    again.restore(after.state())
    feed(again, *[[0.0, 0.0]] * BATCHES)
    assert len(said()) == 1


def test_what_is_shown_is_short() -> None:
    assert shortened("red") == "'red'"
    assert len(shortened(["x" * 5000, "end"])) < 180
    assert shortened(["x" * 5000, "end"]).endswith("'end']")
