"""What our part of vLLM's decode step costs: it waits for nothing, copies no vocabulary, and loops over no requests."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from engine_cases import SAMPLED, span_counts
from torch.utils._python_dispatch import _disable_current_modes
from vllm_cases import HostReads, NewTensors, VLLMRig, opened, thinking

from rl_lvr.latents.format import get_format
from rl_lvr.rollout import sampling as draws
from rl_lvr.rollout.types import Sampling
from rl_lvr.rollout.vllm import state
from rl_lvr.rollout.vllm.sampler import score_uncut
from rl_lvr.rollout.vllm.state import LatentModelState

FORMATS = {"fixed": get_format("lvr", k=4), "free": get_format("lvr", k=4, length="free")}
STEPS = ("_overlay", "before_sampling", "after_sampling")
SAMPLING = replace(SAMPLED, max_tokens=8, sigma=0.1, top_k=200)


@pytest.fixture(scope="module")
def rig(tiny_folder, tmp_path_factory):
    return VLLMRig(thinking(tiny_folder, tmp_path_factory.mktemp("step"), "qwen3"))


@pytest.fixture(scope="module")
def engines(rig):
    made = {length: rig.vllm(format_) for length, format_ in FORMATS.items()}
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture(params=FORMATS)
def engine(engines, request):
    return engines[request.param]


@pytest.fixture
def kernels_aside(monkeypatch):
    """On a GPU a kernel of ours is one launch; Triton's interpreter runs it row by row on the host."""
    for name in ("end_or_rest", "score_uncut"):
        kernel = getattr(state, name)

        def aside(*args, launch=kernel):
            profile = sys.getprofile()
            sys.setprofile(None)
            with torch._C.DisableTorchFunction(), _disable_current_modes():
                launch(*args)
            sys.setprofile(profile)

        monkeypatch.setattr(state, name, aside)


def requests_of(rig, engine):
    return opened(rig.requests(), engine.markers.start)


def watched(monkeypatch, rig, engine, sampling, spoil=None):
    """What our part of vLLM's steps reads on the host and makes anew, over a few spans of six requests."""
    requests = requests_of(rig, engine)
    reads, made = HostReads(), NewTensors(len(requests) * engine.settings.limits.vocabulary)
    with monkeypatch.context() as patch:
        for name in (*STEPS, "after_filters"):
            original = getattr(LatentModelState, name)

            def step(self, first, *rest, original=original):
                with reads, made:
                    if spoil is not None:
                        spoil(first)
                    return original(self, first, *rest)

            patch.setattr(LatentModelState, name, step)
        rollouts = engine.generate(requests, sampling)
    assert sum(span_counts(rollouts, engine.markers.start)) + len(requests) // 2 >= 4
    return reads.seen, made.seen


@pytest.mark.usefixtures("kernels_aside")
def test_a_step_waits_for_nothing_and_makes_nothing_of_the_vocabularys_size(rig, engine, monkeypatch):
    assert watched(monkeypatch, rig, engine, SAMPLING) == ([], [])

    def read(first):
        if torch.is_tensor(first):
            float(first.flatten()[0])

    def copy(first):
        if torch.is_tensor(first):
            first.masked_fill(first > 0, 0)

    short = replace(SAMPLING, max_tokens=2)
    assert watched(monkeypatch, rig, engine, short, read)[0]
    assert watched(monkeypatch, rig, engine, short, copy)[1]


def calls(monkeypatch, rig, engine, spoil=None):
    """Function calls that our part of a decode step makes, by the number of requests in the batch."""
    found = defaultdict(set)
    here = {"calls": 0, "rows": 0}

    def count(frame, event, argument):
        here["calls"] += event in ("call", "c_call")

    with monkeypatch.context() as patch:
        for name in STEPS:
            original = getattr(LatentModelState, name)

            def step(self, first, batch, *rest, original=original):
                here["calls"] = 0
                sys.setprofile(count)
                try:
                    if spoil is not None:
                        spoil(batch)
                    return original(self, first, batch, *rest)
                finally:
                    sys.setprofile(None)
                    if int(batch.num_scheduled_tokens.max()) == 1:
                        found[original.__name__, batch.num_reqs].add(here["calls"])

            patch.setattr(LatentModelState, name, step)
        for count_of_requests in (2, 6):
            requests = requests_of(rig, engine)[:count_of_requests]
            engine.generate(requests, replace(SAMPLING, max_tokens=6))
    return {name: [max(found[name, rows]) for rows in (2, 6)] for name in STEPS}


@pytest.mark.usefixtures("kernels_aside")
def test_a_step_makes_as_many_calls_for_six_requests_as_for_two(rig, engine, monkeypatch):
    for name, (two, six) in calls(monkeypatch, rig, engine).items():
        assert two == six, name

    def loop(batch):
        for row in range(batch.num_reqs):
            divmod(row, 2)

    assert all(two < six for two, six in calls(monkeypatch, rig, engine, loop).values())


def test_the_kernel_of_the_kept_mass_equals_float64():
    """Several blocks of the vocabulary, one of them all banned, rows with settings of their own."""
    logits = 3 * torch.randn(6, 2500, generator=torch.Generator().manual_seed(0))
    logits[:, :1100] = float("-inf")
    temperature = torch.tensor([1.0, 0.7, 2.0, 0.0, 1.0, 1.3])
    cuts = [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.05}, {}, {"top_k": 2000}, {"top_k": 1}]
    hot = torch.where(temperature == 0, 1.0, temperature)[:, None]
    rows = [draws.warp(row[None], Sampling(**cut)) for row, cut in zip(logits / hot, cuts, strict=True)]
    processed = torch.cat(rows)
    sampled = processed.argmax(-1)
    wanted = torch.tensor([True, True, True, True, True, False])
    output = torch.full((8, 2), 7.0)
    score_uncut(logits, processed, temperature, wanted, sampled, output)
    exact = (logits.double() / hot.double()).log_softmax(-1)
    kept = exact.masked_fill(processed.isinf(), float("-inf")).logsumexp(-1)
    truth = torch.stack((exact.gather(-1, sampled[:, None])[:, 0], kept), -1).float()
    assert torch.allclose(output[:5], truth[:5], atol=2e-6)
    assert output[3:5, 1].tolist() == [0.0, 0.0]  # nothing was dropped
    assert bool((output[5:] == 7.0).all())  # a row that did not ask, and those that are not there
