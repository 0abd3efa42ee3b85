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
from rl_lvr.rollout.vllm import state
from rl_lvr.rollout.vllm.state import LatentModelState

FORMATS = {"fixed": get_format("lvr", k=4), "free": get_format("lvr", k=4, length="free")}
STEPS = ("_overlay", "before_sampling", "after_sampling")
SAMPLING = replace(SAMPLED, max_tokens=8, sigma=0.1)


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
def kernel_aside(monkeypatch):
    """On a GPU the kernel of the decision is one launch; Triton's interpreter runs it row by row on the host."""
    launch = state.end_or_rest

    def aside(*args):
        profile = sys.getprofile()
        sys.setprofile(None)
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            launch(*args)
        sys.setprofile(profile)

    monkeypatch.setattr(state, "end_or_rest", aside)


def requests_of(rig, engine):
    return opened(rig.requests(), engine.markers.start)


def watched(monkeypatch, rig, engine, sampling, spoil=None):
    """What our part of vLLM's steps reads on the host and makes anew, over a few spans of six requests."""
    requests = requests_of(rig, engine)
    reads, made = HostReads(), NewTensors(len(requests) * engine.settings.limits.vocabulary)
    with monkeypatch.context() as patch:
        for name in STEPS:
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


@pytest.mark.usefixtures("kernel_aside")
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


@pytest.mark.usefixtures("kernel_aside")
def test_a_step_makes_as_many_calls_for_six_requests_as_for_two(rig, engine, monkeypatch):
    for name, (two, six) in calls(monkeypatch, rig, engine).items():
        assert two == six, name

    def loop(batch):
        for row in range(batch.num_reqs):
            divmod(row, 2)

    assert all(two < six for two, six in calls(monkeypatch, rig, engine, loop).values())
