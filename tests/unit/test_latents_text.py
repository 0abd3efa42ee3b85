"""What of a completion is text, by token position, whatever the tokenizer calls special; control tokens in texts."""

from __future__ import annotations

import pytest
import torch
from transformers import AddedToken
from trl.chat_template_utils import qwen3_template

from rl_lvr.evaluation.conditions import Condition
from rl_lvr.evaluation.evaluate import Judge
from rl_lvr.evaluation.plan import Answered, Item
from rl_lvr.evaluation.questions import Question
from rl_lvr.evaluation.rows import Rule
from rl_lvr.lab.tokenizer import build_tokenizer
from rl_lvr.latents.format import get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.text import completion_text
from rl_lvr.rollout.readable import readable
from rl_lvr.rollout.record import recorded
from rl_lvr.rollout.types import Request, Rollout, StopReason
from rl_lvr.training.grpo.columns import read_completions

LVR = get_format("lvr", k=2)


@pytest.fixture(scope="module", params=("special", "text"))
def tokenizer(request):
    """With markers that are special tokens, and with markers that decoding would keep."""
    made = build_tokenizer("qwen2_5_vl", ("red", "blue", "next"), LVR.tokens if request.param == "special" else ())
    made.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in (*LVR.tokens, "<think>", "</think>")]
    )
    assert (LVR.slot in made.all_special_tokens) == (request.param == "special")
    return made


@pytest.fixture(scope="module")
def markers(tokenizer):
    return LVR.bind(tokenizer, {"image": tokenizer.image_token_id})


def completion(tokenizer, markers):
    """Text, a span, text, a stray slot, a sampled placeholder, text, the end."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    stray = [markers.slot, *markers.placeholders]
    return [*ids("<think>red"), *markers.span(2), *ids("</think> blue"), *stray, *ids(" next"), tokenizer.eos_token_id]


def rollout(tokenizer, markers):
    ids = completion(tokenizer, markers)
    return Rollout(
        prompt_ids=(1, 2),
        completion_ids=tuple(ids),
        logprobs=torch.zeros(len(ids)),
        forced=torch.zeros(len(ids), dtype=torch.bool),
        latents=torch.zeros(0, 8),
        latent_positions=(),
        stop_reason=StopReason.EOS,
        seed=0,
        sigma=0.0,
        intervention=Intervention.OWN,
    )


def test_spans_and_markers_are_no_text(tokenizer, markers):
    made = rollout(tokenizer, markers)
    assert completion_text(made.completion_ids, tokenizer, markers) == "<think>red</think> blue next"
    assert recorded(made, tokenizer, markers).completion == "<think>red</think> blue next"
    assert readable(made, tokenizer, markers) == "<think>red⟦2 empty slots⟧</think> blue next"
    answered = Answered(Item(0, Condition()), Request(made.prompt_ids), made)
    row = Judge(tokenizer, markers, Rule()).row([Question("a", "blue next")], answered)
    assert (row.text, row.extracted, row.right) == ("<think>red</think> blue next", "blue next", True)


def test_a_marker_that_was_spelled_out_of_ordinary_tokens_is_text(tokenizer, markers):
    start, *rest = LVR.start
    pieces = tokenizer.convert_tokens_to_ids([start, *rest])
    assert completion_text(pieces, tokenizer, markers) == LVR.start


@pytest.mark.parametrize("template", [None, qwen3_template])
def test_completions_of_rewards_hold_no_markers(tokenizer, markers, template):
    tokenizer.response_template = template
    ids = completion(tokenizer, markers)
    prompt = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    other_end = [*ids[:-1], tokenizer.pad_token_id]
    given = ([prompt] * 3, [ids, other_end, markers.span(2)], [[{"role": "assistant", "content": "of TRL"}]] * 3)
    read = read_completions(tokenizer, *given, markers, [tokenizer.eos_token_id, tokenizer.pad_token_id])
    if template is None:
        assert read == [[{"role": "assistant", "content": t}] for t in ("<think>red</think> blue next",) * 2 + ("",)]
        return
    assert [m["content"] for (m,) in read] == ["blue next", "blue next", ""]
    assert read[0][0] == {"role": "assistant", "reasoning_content": "red", "content": "blue next"}
    assert read_completions(tokenizer, *given[:2], ["text"] * 3, markers) == ["<think>red</think> blue next"] * 2 + [""]
