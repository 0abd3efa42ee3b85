"""Random mixes of requests in a small KV cache, against the reference engine that runs each of them alone.

Both engines draw by the same numbers, so the tokens are the same at every temperature.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from vllm_cases import VLLMRig, thinking
from vllm_conditions import ROWS, TIGHT, eyes, latent_state, start, victims

from rl_lvr.latents.format import get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.spans import find_spans
from rl_lvr.latents.starting import LatentStart
from rl_lvr.rollout.replay import check_parity
from rl_lvr.rollout.types import Sampling
from rl_lvr.rollout.vllm.state import LatentModelState

FORMATS = {
    "fixed at_start": get_format("lvr", k=3),
    "free before_start": get_format("monet", k=4, length="free"),
}
TOLERANCE = 1e-4
CLOSED = (Intervention.NONE, Intervention.PLAIN_TOKENS)
"""Interventions that take no prompt with an open span."""


@dataclass(frozen=True)
class Row:
    """One request of a program; what it says about prompts is written out by `written`."""

    prompt: int
    history: bool
    """The prompt holds a block of latents."""
    opened: bool
    """The prompt ends in START."""
    intervention: Intervention
    k: int | None
    seed: int
    latent_start: str = "free"


@dataclass(frozen=True)
class Program:
    rows: tuple[Row, ...]
    sampling: Sampling
    victims: int
    """Requests beside them that are aborted."""
    steps: int
    """When."""


rows = st.builds(
    Row,
    prompt=st.integers(0, len(ROWS) - 1),
    history=st.booleans(),
    opened=st.booleans(),
    intervention=st.sampled_from([Intervention.OWN, Intervention.OWN, *Intervention]),
    k=st.none() | st.integers(1, 6),
    seed=st.integers(0, 2**31),
    latent_start=st.sampled_from(["free", "free", "forced", "forbidden", "bias 2.5", "bias -2.5"]),
)
samplings = st.builds(
    Sampling,
    max_tokens=st.integers(6, 14),
    temperature=st.sampled_from([0.0, 0.0, 1.0, 0.7]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    sigma=st.sampled_from([0.0, 0.3]),
)
programs = st.builds(
    Program,
    rows=st.lists(rows, min_size=3, max_size=4).map(tuple),
    sampling=samplings,
    victims=st.integers(0, 2),
    steps=st.integers(2, 8),
)


class Pair:
    """One model and format in both engines."""

    def __init__(self, rig, format_):
        self.rig = rig
        self.hf = rig.engine(format_)
        self.vllm = start(rig, format_, TIGHT, cache=True)
        self.markers = self.hf.markers
        self.width = rig.model.config.get_text_config().hidden_size

    def vectors(self, count, seed):
        return torch.randn(count, self.width, generator=torch.Generator().manual_seed(seed))

    def written(self, row):
        markers = self.markers
        request = self.rig.requests([ROWS[row.prompt]])[0]
        ids = list(request.prompt_ids)
        latents = None
        if row.history:
            ids += [markers.start, markers.slot, markers.slot, markers.end, 60]
            places = find_spans(ids, markers).spans[0].latent_positions(markers.format.first)
            latents = self.vectors(len(places), row.seed), list(places)
        if row.opened and row.intervention not in CLOSED:
            ids.append(markers.start)
        more = {}
        if row.intervention.needs_vectors:
            more["vectors"] = self.vectors(5, row.seed + 1)
        if row.intervention is Intervention.PLAIN_TOKENS:
            more["filler_id"] = 61
        if row.intervention is not Intervention.NONE:
            more["latent_start"] = LatentStart.parse(row.latent_start)
        return replace(
            request,
            prompt_ids=ids,
            prompt_latents=latents,
            intervention=row.intervention,
            k=row.k,
            seed=row.seed,
            **more,
        )

    def thinkers(self, count):
        return [[60 + i] * 20 + [self.markers.start] * (self.markers.format.first == "at_start") for i in range(count)]


@pytest.fixture(scope="module", params=FORMATS)
def pair(request, tiny_folder, tmp_path_factory):
    folder = thinking(tiny_folder, tmp_path_factory.mktemp("random"), "qwen2_5_vl")
    made = Pair(VLLMRig(folder), FORMATS[request.param])
    yield made
    made.vllm.close()


def run(pair, program):
    """The program on vLLM, with how often each condition arose."""
    requests = [pair.written(row) for row in program.rows]
    hurt = victims(pair.vllm, pair.thinkers(program.victims), program.steps, k=6) if program.victims else nullcontext()
    with eyes(pair.vllm) as seen, hurt:
        return requests, pair.vllm.generate(requests, program.sampling), seen


def fault(pair, requests, rollouts, sampling):
    """What is wrong with the rollouts; None if nothing is."""
    for i, (request, rollout) in enumerate(zip(requests, rollouts, strict=True)):
        alone = pair.hf.generate([request], sampling)[0]
        if rollout.ids != alone.ids or rollout.latent_positions != alone.latent_positions:
            return f"row {i}: {rollout.ids} at {rollout.latent_positions}, alone {alone.ids}"
        if not torch.equal(rollout.forced, alone.forced) or rollout.stop_reason != alone.stop_reason:
            return f"row {i}: {rollout.forced} {rollout.stop_reason}, alone {alone.forced} {alone.stop_reason}"
        # Rounding grows from latent to latent; what a single one differs by is judged below, on the same predecessors.
        if not torch.allclose(rollout.latents, alone.latents, rtol=0, atol=10 * TOLERANCE):
            return f"row {i}: latents differ by {(rollout.latents - alone.latents).abs().max()}"
    report = check_parity(pair.vllm, pair.rig.model, requests, sampling, rollouts=rollouts)
    apart = max(report.max_dh, report.max_dlogp, report.max_duncut, report.max_dkept)
    return None if apart <= TOLERANCE else str(report)


def test_random_programs_agree_with_the_reference_engine(pair):
    arose = Counter()

    @settings(
        max_examples=7,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(program=programs)
    def agree(program):
        requests, rollouts, seen = run(pair, program)
        assert fault(pair, requests, rollouts, program.sampling) is None
        arose.update(vars(seen), programs=1, latents=sum(len(r.latents) for r in rollouts))

    agree()
    assert arose["programs"] >= 5
    assert arose["latents"] > 30
    assert arose["chunks"] > 0
    assert arose["resumed"] > 0
    tables = latent_state(pair.vllm).history.counts()
    assert tables == {"live": 0, "preempted": 0, "finished": 0}


def test_control_a_program_without_its_latents_is_found(pair, monkeypatch):
    rows = tuple(Row(i, history=True, opened=True, intervention=Intervention.OWN, k=3, seed=i) for i in range(3))
    program = Program(rows, Sampling(max_tokens=8, temperature=1.0), victims=0, steps=1)
    monkeypatch.setattr(LatentModelState, "_write_planted", lambda self, embeds, batch: None)
    requests, rollouts, _ = run(pair, program)
    pair.vllm.llm.reset_prefix_cache()
    assert fault(pair, requests, rollouts, program.sampling) is not None
