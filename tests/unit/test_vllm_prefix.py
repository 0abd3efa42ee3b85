"""Which blocks of the prefix cache are private, and to whom."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rl_lvr.rollout.vllm import prefix, wire

START, SLOT = 90, 91


@pytest.fixture(autouse=True)
def slot_is_known(monkeypatch):
    monkeypatch.setattr(prefix, "_latent_ids", {SLOT})


def request(prompt, output=(), name="a", **extra):
    params = SimpleNamespace(extra_args=extra or None)
    return SimpleNamespace(
        all_token_ids=[*prompt, *output], num_prompt_tokens=len(prompt), request_id=name, sampling_params=params
    )


def test_text_is_shared():
    assert prefix.latent_keys(request([1, 2, START], [3, 4]), 0, 4) == []


def test_generated_latents_belong_to_one_request():
    one, two = (request([1, 2], [START, SLOT, 5, 6], name) for name in "ab")
    assert prefix.latent_keys(one, 0, 2) == []
    assert prefix.latent_keys(one, 2, 4) == [("latent", "a")]
    assert prefix.latent_keys(two, 2, 4) == [("latent", "b")]
    assert prefix.latent_keys(one, 0, 4) == [("latent", "a")]  # prompt and completion in one block


def test_latents_in_a_prompt_are_shared_by_content():
    def keys(vectors, positions=(1,), name="a"):
        extra = {wire.PROMPT_VECTORS: vectors, wire.PROMPT_POSITIONS: list(positions)}
        return prefix.latent_keys(request([1, SLOT, 2], [SLOT], name, **extra), 0, 3)

    assert keys("AAAA") == keys("AAAA", name="b")
    assert keys("AAAA") != keys("BBBB")
    assert keys("AAAA") != keys("AAAA", positions=(2,))
    assert len(keys("AAAA")) == 1
    both = request([1, SLOT], [SLOT, 3], **{wire.PROMPT_VECTORS: "AAAA", wire.PROMPT_POSITIONS: [1]})
    assert len(prefix.latent_keys(both, 0, 4)) == 2


@pytest.mark.parametrize(("vectors", "positions"), [(3, [1]), (["AAAA"], [1]), ("AAAA", 1), ("AAAA", None)])
def test_faulty_latents_in_a_prompt_are_nobodys_but_the_requests(vectors, positions):
    """The workers refuse them; the scheduler, which sees them first, would take everybody down with an error."""
    extra = {wire.PROMPT_VECTORS: vectors, wire.PROMPT_POSITIONS: positions}
    one, two = (prefix.latent_keys(request([1, SLOT, 2], name=name, **extra), 0, 3) for name in "ab")
    assert one != two


def test_a_request_that_says_nothing_of_latents_is_not_exempt():
    bare = request([1], [START, SLOT, 2])
    bare.sampling_params = None
    assert prefix.latent_keys(bare, 0, 4) == [("latent", "a")]


def test_start_holds_a_latent_under_before_start(monkeypatch):
    monkeypatch.setattr(prefix, "_latent_ids", {SLOT, START})
    assert prefix.latent_keys(request([1], [START, 2]), 0, 3) == [("latent", "a")]
