"""Rewards of paper B against a transcription of its released code (silent-lvr, RL/), and ours where they differ."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import torch

from rewards.length_excess import length_excess
from rewards.necessity import necessity
from rewards.paper_b import PaperBLength, paper_b_format, paper_b_necessity, paper_b_presence
from rewards.presence import presence
from rl_lvr.latents.format import FormatIds, get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.record import span_facts
from rl_lvr.rollout.types import Rollout, StopReason
from rl_lvr.training.grpo.columns import again_of, marker_order
from rl_lvr.training.rewards.load import load_rewards, signals_of

START, SLOT, END, WORD = 11, 12, 13, 5
MARKERS = FormatIds(get_format("lvr", k=2), start=START, slot=SLOT, end=END)
SPAN = [START, SLOT, SLOT, END]


def rollout(prompt: list[int], completion: list[int]) -> Rollout:
    ids = prompt + completion
    fed = tuple(p for p, token in enumerate(ids) if token == SLOT and p >= len(prompt))
    count = len(completion)
    return Rollout(
        prompt_ids=tuple(prompt),
        completion_ids=tuple(completion),
        logprobs=torch.zeros(count),
        forced=torch.zeros(count, dtype=torch.bool),
        latents=torch.zeros(len(fed), 4),
        latent_positions=fed,
        stop_reason=StopReason.EOS,
        seed=0,
        sigma=0.0,
        intervention=Intervention.OWN,
    )


# ---- the flat bonus


def their_presence(ids: list[int]) -> float:
    """`post_generate_update`: `has_valid_latent_start.cumsum(1) - has_valid_latent_end.cumsum(1) > 0`, anywhere."""
    row = torch.tensor([ids])
    return float((((row == START).cumsum(1) - (row == END).cumsum(1)) > 0).any()) * 0.5


@pytest.mark.parametrize(
    ("prompt", "completion", "ours"),
    [
        ([WORD], [WORD, *SPAN, WORD], 0.5),
        ([WORD], [WORD, START, SLOT], 0.0),  # unclosed
        ([WORD], [START, END, WORD], 0.0),  # empty
        ([WORD, START], [WORD], 0.0),  # in the prompt
        ([WORD], [END, START, WORD], 0.0),  # an END came before
        ([WORD], [WORD], 0.0),
    ],
)
def test_the_flat_bonus(prompt: list[int], completion: list[int], ours: float) -> None:
    made = rollout(prompt, completion)
    assert paper_b_presence([marker_order(made, MARKERS)]) == [their_presence(prompt + completion)]
    assert presence([span_facts(made, MARKERS)]) == [ours]


def test_the_flat_bonus_of_any_ids() -> None:
    draw = random.Random(0)
    for _ in range(200):
        prompt, completion = ([draw.choice([START, SLOT, END, WORD]) for _ in range(n)] for n in (3, 9))
        made = rollout(prompt, completion)
        assert paper_b_presence([marker_order(made, MARKERS)], value=0.5) == [their_presence(prompt + completion)]


# ---- length


def test_length_is_held_against_the_whole_run_so_far() -> None:
    """`look_up_min_mean_correct_resp_len` when a batch is generated, `update_...` when it is judged."""
    reward = PaperBLength()

    def step(answers: list[tuple[str, str, int]]) -> list[float]:
        scores = reward(
            completions=[text for _, text, _ in answers],
            completion_ids=[[WORD] * length for _, _, length in answers],
            answer=["red"] * len(answers),
            id=[question for question, _, _ in answers],
        )
        reward.merge([reward.pending()])
        return scores

    first = [("a", "red", 10), ("a", "red", 30), ("a", "blue", 5), ("b", "blue", 40)]
    assert step(first) == [0, 0, 0, 0]  # nothing was known before
    assert step([("a", "red", 12), ("a", "blue", 25), ("b", "red", 40), ("a", "red", 7)]) == pytest.approx(
        [-0.002, -0.015, 0, 0]
    )
    assert step([("a", "blue", 12), ("b", "red", 50)]) == pytest.approx([-0.005, -0.010])
    columns = {"completions": ["red", "red"], "completion_ids": [[1] * 10, [1] * 30], "answer": ["red", "red"]}
    assert length_excess(**columns, group=[0, 0]) == pytest.approx([0, -0.02])
    assert PaperBLength(this_batch=True)(**columns, id=["a", "a"]) == pytest.approx([0, -0.02])


def test_its_state_is_shared_and_survives() -> None:
    """Two processes that saw half of a batch each know what one knows that saw all, also after a resumption."""

    def see(reward: PaperBLength, rows: list[tuple[str, int]]) -> Any:
        reward(
            completions=["red"] * len(rows),
            completion_ids=[[WORD] * n for _, n in rows],
            answer=["red"] * len(rows),
            id=[q for q, _ in rows],
        )
        return reward.pending()

    rows = [("a", 9), ("b", 4), ("a", 6), ("c", 8)]
    alone, left, right, resumed = (PaperBLength() for _ in range(4))
    alone.merge([see(alone, rows)])
    parts = [see(left, rows[:2]), see(right, rows[2:])]
    left.merge(parts)
    right.merge(parts)
    assert left.state_dict() == right.state_dict() == alone.state_dict() == {"shortest": {"a": 6, "b": 4, "c": 8}}
    resumed.load_state_dict(json.loads(json.dumps(alone.state_dict())))
    more = {"completions": ["blue"], "completion_ids": [[1] * 10], "answer": ["red"], "id": ["a"]}
    assert resumed(**more) == alone(**more) == pytest.approx([-0.004])
    see(left, [("a", 1)])  # taken away in evaluation
    left.merge([])
    assert left.state_dict() == alone.state_dict()


# ---- necessity


def test_necessity_judges_the_continuation_and_skips_what_is_not_closed() -> None:
    texts = ["red", "red", "blue", "blue", "red", "red"]
    again = ["blue", "red", "red", "blue", None, "red"]
    after = ["blue", "red", "red", "blue", None, None]
    given = {"completions": texts, "answer": ["red"] * 6}
    assert paper_b_necessity(**given, necessity_continuations=after) == [1, -0.5, -0.5, 0, 0, 0]
    assert paper_b_necessity(**given, necessity_continuations=after, value=2.0)[:2] == [2, -1]
    # The text before the span answers already, and nothing follows: wrong there, right here.
    assert paper_b_necessity(["red"], ["red"], [""]) == [1]
    assert necessity(["red"], ["red"], ["red"]) == [-0.5]
    assert necessity(**given, necessity_completions=again)[5] == -0.5  # ours counts a truncated span


class Words:
    """A tokenizer of one letter per id."""

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + int(token)) for token in ids)


def test_the_continuation_follows_the_first_pair() -> None:
    made = again_of(rollout([WORD], [1, START, END, 2, START, END, 3]), Words(), MARKERS)
    assert (made.text, made.continuation) == ("bcd", "cd")
    made = again_of(rollout([START, SLOT, SLOT, END], [1, START, END]), Words(), MARKERS)
    assert (made.text, made.continuation) == ("b", "")


# ---- format


def their_format(predict: str) -> float:
    """`compute_score` and `format_reward`, as they stand there."""
    predict = re.sub(r"\s*(<|>|/)\s*", r"\1", predict)
    if not re.compile(r"\\boxed\{.*?\}", re.DOTALL).search(predict):
        matches = re.findall(r"<answer>(.*?)</answer>", predict)
        if len(matches) != 1 and len(predict) > 5:
            return 0.0
        return 1.0
    return 1.0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"so \boxed{red}", 1),
        (r"\boxed{} and \boxed{x}", 1),
        (r"\boxed{red", 0),
        ("<answer>red</answer>", 1),
        ("< answer > red < / answer >", 1),
        ("<answer>red</answer><answer>red</answer>", 0),
        ("<answer>red\ngreen</answer>", 0),
        ("<Answer>red</Answer>", 0),
        ("red", 1),
        ("green", 1),
        ("yellow", 0),
        ("", 1),
    ],
)
def test_format(text: str, wanted: float) -> None:
    assert their_format(text) == wanted
    assert paper_b_format([text], [[]]) == [wanted]
    # The markers of a span are text there: five characters are more then.
    with_span = their_format(f"<abs_vis_token><latent></abs_vis_token>{text}")
    assert paper_b_format([text], [[{"status": "closed"}]]) == [with_span]


def test_each_is_installed_and_says_what_it_reads() -> None:
    names = [f"paper_b_{name}" for name in ("attention", "presence", "length", "necessity", "format")]
    specs = load_rewards([*names, {"name": "paper_b_attention", "label": "relative", "options": {"relative": True}}])
    assert signals_of(specs) == ["attention_mass_paper_b", "attention_relative_paper_b"]
    assert specs[2].needs == {"id", "answer"}
    assert all("to the letter" in spec.doc for spec in specs)
