"""One model in both engines, for the tests that hold the vLLM engine against the reference engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import GREEDY, SAMPLED, same, span_counts
from vllm_cases import VLLMRig, opened, thinking

from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import LatentFormat, get_format
from rl_lvr.latents.starting import FREE, LatentStart
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.replay import check_parity
from rl_lvr.rollout.types import Request, Rollout, Sampling

CASES = {
    "qwen2_5_vl": get_format("lvr", k=3),
    "qwen3_vl": get_format("lvr", k=5, length="free"),
    "internvl": get_format("monet", k=3, length="fixed"),
    "llava_onevision": get_format("monet", k=5),
    "qwen2": get_format("lvr", k=3, projector="mlp", norm="embedding"),
    "qwen3": get_format("lvr", k=4),
}
TIED = ("qwen3",)
"""Output head and embedding share their weight."""
ROOM = {"qwen3": 12}
"""max_latents of the case, where it is not the default."""
FORCED = LatentStart.parse("forced")
STARTS = (None, *map(LatentStart.parse, ("free", "forbidden", "bias 12", "bias -12")), FORCED)
"""Of six requests, in a call that forces START."""
LONG = replace(GREEDY, max_tokens=20)
SHORT = replace(SAMPLED, max_tokens=14)


class Case:
    """One model in both engines."""

    def __init__(self, folder: Path, name: str) -> None:
        self.format: LatentFormat = CASES[name]
        self.rig = VLLMRig(folder)
        attach_feedback(self.rig.model, self.format, folder)
        self.said: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            from rl_lvr.rollout.vllm import state

            patch.setattr(state.logger, "info", lambda text, *values: self.said.append(text % values))
            self.vllm = self.rig.vllm(self.format, max_latents=ROOM.get(name, 128))
        self.hf = HFRolloutEngine(self.rig.model, self.rig.processor, self.format)
        self.markers = self.hf.markers

    def leftovers(self) -> dict[str, int]:
        return self.vllm.llm.collective_rpc("latent_status")[0]["tables"]

    def requests(self, **more: Any) -> list[Request]:
        assert self.markers.start is not None
        return opened(self.rig.requests(**more), self.markers.start)


@contextmanager
def started(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    """Cases by name, each made when it is first asked for. They end together, as vLLM's engines of one process do."""
    made: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in made:
            format_ = CASES[name]
            feedback = format_ if format_.projector != "none" else None
            folder = thinking(tiny_folder, tmp_path_factory.mktemp("vllm"), name, feedback, tie=name in TIED)
            made[name] = Case(folder, name)
        return made[name]

    try:
        yield case
    finally:
        for each in made.values():
            each.vllm.close()


def close(left: Rollout, right: Rollout) -> bool:
    """Tokens, places and forced tokens alike, numbers nearly: rounding grows from latent to latent."""
    return same(left, right, 1e-2)


def assert_parity(case: Case, long: Sampling, *others: Sampling) -> None:
    """Teacher forcing within 1e-4, and the reference engine's tokens; `long` has several spans."""
    requests = case.requests()
    for sampling in (long, *others):
        rollouts = case.vllm.generate(requests, sampling)
        report = check_parity(case.vllm, case.rig.model, requests, sampling, rollouts=rollouts)
        assert report.max_dh <= 1e-4, (sampling, report)
        assert report.max_dlogp <= 1e-4, (sampling, report)
        assert report.passes(control=0.1), (sampling, report)
        assert report.latents >= 6
        reference = case.hf.generate(requests, sampling)
        assert all(close(a, b) for a, b in zip(rollouts, reference, strict=True)), sampling
        if sampling is long:
            assert case.markers.start is not None
            assert max(span_counts(rollouts, case.markers.start)) >= 2


def assert_starts(case: Case, *samplings: Sampling) -> None:
    """Every control of START in one call, and more than it: teacher forcing, and the reference engine's tokens."""
    start, base = case.markers.start, case.rig.requests()
    requests = [replace(request, latent_start=wanted) for request, wanted in zip(base, STARTS, strict=True)]
    forced = [FORCED if wanted is None else wanted for wanted in STARTS]
    for sampling in (replace(sampling, latent_start=FORCED) for sampling in samplings):
        rollouts, reference = (engine.generate(requests, sampling) for engine in (case.vllm, case.hf))
        assert all(close(a, b) for a, b in zip(rollouts, reference, strict=True)), sampling
        assert [r.latent_start for r in rollouts] == [r.latent_start for r in reference] == forced
        assert [r.uncut is None for r in rollouts] == [r.uncut is None for r in reference]
        report = check_parity(case.vllm, case.rig.model, requests, sampling, rollouts=rollouts)
        assert report.passes(control=0.1), (sampling, report)
        for row in (0, 5):
            assert rollouts[row].completion_ids[0] == start
            assert (rollouts[row].forced[0], rollouts[row].logprobs[0]) == (True, 0.0)
        assert start not in rollouts[2].completion_ids
        shifts = [r.uncut_logprobs - r.logprobs for r in rollouts[3:5]]
        assert torch.cat(shifts).abs().max() > 0.1
        # The control: the same requests and seeds without any of it are others.
        free = case.vllm.generate(base, replace(sampling, latent_start=FREE))
        assert close(rollouts[1], free[1])
        for rows in ((0, 5), (2,), (3, 4)):
            assert not all(close(rollouts[row], free[row]) for row in rows), rows
