"""`reward_funcs` of a trainer as one list, and its reward models: what they read, and what they return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import get_callable_name

from rl_lvr.errors import UserError
from rl_lvr.training.rewards.load import RewardSpec, Schedule, spec_of
from rl_lvr.training.runs.arguments import name_of


def readers(tokenizers: Sequence[Any]) -> list[Any]:
    """TRL's `reward_processing_classes`, which read the text of messages whose content is a list of parts.

    TRL's prompts with images are such messages. A chat template that knows text alone would print the list.
    """
    return [
        _TextOfMessages(reader) if isinstance(reader, PreTrainedTokenizerBase) and not _reads_parts(reader) else reader
        for reader in tokenizers
    ]


def defect_of(rewards: Tensor, funcs: Sequence[Any], names: Sequence[str]) -> str | None:
    """What is wrong with the rewards [B, R] that reward models gave; None if all are finite."""
    for column, (reward, name) in enumerate(zip(funcs, names, strict=True)):
        wrong = int((~rewards[:, column].isfinite()).sum()) if isinstance(reward, nn.Module) else 0
        if wrong:
            return f"the reward model {name!r} gave {wrong} of {len(rewards)} completions a reward that is not finite"
    return None


def specs_of(reward_funcs: Any, weights: Sequence[float] | None) -> list[RewardSpec]:
    """The rewards of a trainer: functions, `RewardSpec`s, reward models and paths of reward models, one or a list.

    `weights` are TRL's `reward_weights`: they stand in for weights of 1, and a schedule is a factor on them.
    """
    given = reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs] if reward_funcs else []
    specs = [_spec(reward) for reward in given]
    if weights is None or len(weights) != len(specs):  # TRL refuses another number of weights
        return specs
    for spec, weight in zip(specs, weights, strict=True):
        if spec.weight not in (1.0, weight):
            raise UserError(
                f"reward {spec.name!r} has the weight {spec.weight:g} and reward_weights gives it {weight:g}: "
                "set one of them."
            )
    return [replace(spec, weight=float(weight)) for spec, weight in zip(specs, weights, strict=True)]


def _spec(reward: Any) -> RewardSpec:
    if isinstance(reward, RewardSpec):
        return reward
    if isinstance(reward, str | nn.Module):
        if isinstance(reward, nn.Module):
            reward.eval()
        name = name_of(reward).split("/")[-1]
        doc = "a reward model, which TRL runs on prompts and completions"
        return RewardSpec(name, name_of(reward), reward, 1.0, Schedule(), (), frozenset(), frozenset(), doc)
    if not callable(reward):
        raise UserError(
            f"reward_funcs holds {reward!r}: give functions, reward models or their paths, or rewards of load_rewards."
        )
    return spec_of(reward, get_callable_name(reward))


class _TextOfMessages:
    """A tokenizer whose chat template gets the text of each message."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer

    def __call__(self, *args: Any, **how: Any) -> Any:
        return self._tokenizer(*args, **how)

    def apply_chat_template(self, conversation: Sequence[dict[str, Any]], **how: Any) -> Any:
        return self._tokenizer.apply_chat_template([_plain(message) for message in conversation], **how)


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "".join(part["text"] for part in content if part.get("type") == "text")}


def _reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template renders a part of text as it renders the text itself."""
    if tokenizer.chat_template is None:
        return True
    try:
        one, other = (
            tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            for content in ("a", [{"type": "text", "text": "a"}])
        )
    except (TemplateError, TypeError):  # it adds the list to a text
        return False
    return one == other
