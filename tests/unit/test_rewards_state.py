"""Rewards that remember: which have state, and what a state may hold."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from rl_lvr.errors import UserError
from rl_lvr.training.rewards.call import guard
from rl_lvr.training.rewards.state import packed, require_shared, state_of, unpack


class Alone:
    def __init__(self, state: Any = None) -> None:
        self.state = {} if state is None else state

    def __call__(self, completions: Any, **_: Any) -> list[float]:
        return [0.0] * len(completions)

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class Shared(Alone):
    def pending(self) -> None:
        return None

    def merge(self, parts: Any) -> None:
        pass


def plain(completions: Any) -> list[float]:
    return [0.0] * len(completions)


def test_which_rewards_have_state() -> None:
    reward = Alone()
    for wrapped in (reward, guard(reward, "mine"), functools.partial(reward, option=1), reward.__call__):
        assert state_of(wrapped) is reward
    for other in (plain, guard(plain, "plain"), Alone, torch.nn.Linear(1, 1), "a/reward-model"):
        assert state_of(other) is None


def test_a_state_comes_back_as_it_was_and_is_no_longer_shared() -> None:
    reward, again = Alone({"a": [1, 2.5, None, "x"], "nan": float("nan")}), Alone()
    text = packed({"mine": reward})
    reward.state["a"].append(7)
    assert unpack(text, {"mine": again, "new": Alone()}) == ["new"]
    assert again.state["a"] == [1, 2.5, None, "x"]


@pytest.mark.parametrize("state", [{1: 2}, {"a": (1, 2)}, {"a": {1}}, {"a": torch.ones(1)}], ids=str)
def test_what_would_come_back_as_another_is_refused(state: Any) -> None:
    with pytest.raises(UserError, match=r"reward 'mine': state_dict\(\) returned what JSON cannot hold"):
        packed({"mine": Alone(state)})


def test_several_processes_need_a_shared_state() -> None:
    require_shared({"mine": Alone()}, 1)
    require_shared({"mine": Shared()}, 2)
    with pytest.raises(UserError, match="reward 'mine' has state, which the 2 processes would keep apart"):
        require_shared({"mine": Alone()}, 2)
