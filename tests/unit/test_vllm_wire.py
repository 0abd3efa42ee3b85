"""A request's latent part through `extra_args` and back, and what is refused on the way."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl_lvr.errors import UserError
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.starting import FREE, LatentStart
from rl_lvr.rollout.types import Request
from rl_lvr.rollout.vllm import wire

WIDTH = 4
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
rows = st.integers(1, 3).flatmap(
    lambda n: st.lists(st.lists(numbers, min_size=WIDTH, max_size=WIDTH), min_size=n, max_size=n)
)
vectors = st.one_of(st.none(), rows.map(torch.tensor))
starts = st.sampled_from([None, *map(LatentStart.parse, ("free", "forced", "forbidden", "bias -2.5"))])


@given(
    kind=st.sampled_from(Intervention),
    start=starts,
    k=st.one_of(st.none(), st.integers(1, 99)),
    filler=st.one_of(st.none(), st.integers(0, 10**6)),
    given_vectors=vectors,
    prompt_vectors=vectors,
    sigma=st.floats(0, 10),
    uid=st.one_of(st.none(), st.text(min_size=1)),
    opens=st.booleans(),
)
def test_what_goes_in_comes_out(kind, start, k, filler, given_vectors, prompt_vectors, sigma, uid, opens):
    latents = None if prompt_vectors is None else (prompt_vectors, list(range(2, 2 + len(prompt_vectors))))
    request = Request(
        [1, 2, 3],
        intervention=kind,
        latent_start=start,
        k=k,
        filler_id=filler,
        vectors=given_vectors,
        prompt_latents=latents,
        seed=7,
    )
    sent = json.loads(json.dumps(wire.encode(wire.LatentArgs(request, sigma, uid, opens))))
    assert all(isinstance(value, str | int | float | list) for value in sent.values())
    got = wire.decode(sent, [1, 2, 3], 7, WIDTH)
    assert (got.sigma, got.uid, got.opens) == (sigma, uid, opens)
    same = got.request
    assert (same.intervention, same.k, same.filler_id, same.seed) == (kind, k, filler, 7)
    assert (same.latent_start or FREE) == (start or FREE)
    assert (same.vectors is None) == (given_vectors is None)
    assert given_vectors is None or torch.equal(same.vectors, given_vectors)
    assert (same.prompt_latents is None) == (latents is None)
    assert latents is None or (torch.equal(same.prompt_latents[0], latents[0]) and same.prompt_latents[1] == latents[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_vectors_are_exact(dtype):
    vectors = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(wire.from_text(wire.to_text(vectors), WIDTH).to(dtype), vectors)


def test_defaults_are_not_sent_and_keys_of_others_are_left_alone():
    assert wire.encode(wire.LatentArgs(Request([1]))) == {}
    got = wire.decode({"repetition_detection": 3}, [1], 0, WIDTH)
    assert got == wire.LatentArgs(Request([1], seed=0))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"latent_kk": 3}, "did you mean 'latent_k'"),
        ({"latent_k": 2.5}, "latent_k is 2.5; it must be a whole number"),
        ({"latent_k": True}, "must be a whole number"),
        ({"latent_intervention": "oqn"}, "latent_intervention is 'oqn'"),
        ({"latent_start": "force"}, "latent_start is 'force'; did you mean 'forced'"),
        ({"latent_start": 2.5}, "latent_start is 2.5: choose free, forced, forbidden or bias X"),
        ({"latent_start": "bias 1e9"}, "latent_start has the bias 1000000000.0; it must be from -1000 to 1000"),
        ({"latent_sigma": -1}, "latent_sigma is -1; it must be 0 or more"),
        ({"latent_sigma": "much"}, "it must be 0 or more"),
        ({"latent_sigma": 1e39}, "latent_sigma is 1e+39; it must be 0 or more, at most 1e+06"),
        ({"latent_sigma": float("nan")}, "it must be 0 or more"),
        ({"latent_k": 2**63}, "latent_k is 9223372036854775808; it must be a whole number, 0 to 1073741824"),
        ({"latent_k": -1}, "it must be a whole number, 0 to"),
        ({"latent_filler": 2**63}, "latent_filler is 9223372036854775808; it must be a whole number, 0 to"),
        ({"latent_opens": 2}, "latent_opens is 2; it must be 0 or 1"),
        ({"latent_opens": "yes"}, "it must be 0 or 1"),
        ({"latent_opens": 1.0}, "it must be 0 or 1"),
        ({"latent_vectors": "?!"}, "base64"),
        ({"latent_vectors": "AAAA"}, "no rows of 4"),
        ({"latent_vectors": 3}, "must be text"),
        ({"latent_prompt_positions": [1]}, "go together"),
        ({"latent_prompt_vectors": wire.to_text(torch.zeros(1, 4)), "latent_prompt_positions": "1"}, "list of whole"),
    ],
)
def test_faulty_values_are_refused_in_one_sentence(extra, words):
    with pytest.raises(UserError, match=re.escape(words)):
        wire.decode(extra, [1], 0, WIDTH)
