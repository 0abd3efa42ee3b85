"""bf16 in vLLM against bf16 in transformers, both held against fp32 in transformers, on the same tokens and latents.

The yardstick is what bf16 costs transformers in one parallel forward over vLLM's rollouts; vLLM may cost twice that.
On a CPU with AMX this also shows that vLLM lives through bf16 (`rollout/vllm/cpu.py`).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_cases import SAMPLED
from helpers import FAMILIES
from vllm_cases import VLLMRig, opened, thinking

from rl_lvr.latents.format import get_format
from rl_lvr.rollout.replay import check_parity, teacher_force

FORMAT = get_format("lvr", k=3)
SAMPLING = replace(SAMPLED, max_tokens=14)


@pytest.fixture(scope="module")
def engines():
    """Closed with the module: vLLM's engines of one process go down together."""
    made = []
    yield made
    for engine in made:
        engine.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_is_as_close_as_bf16_in_transformers(name, engines, tiny_folder, tmp_path):
    folder = thinking(tiny_folder, tmp_path, name)
    full, half = VLLMRig(folder), VLLMRig(folder, dtype=torch.bfloat16)
    engine = half.vllm(FORMAT, dtype="bfloat16")
    engines.append(engine)
    requests = 2 * opened(half.requests(), engine.markers.start)
    rollouts = engine.generate(requests, SAMPLING)
    assert all(r.latents.dtype is torch.bfloat16 for r in rollouts)
    report = check_parity(engine, full.model, requests, SAMPLING, rollouts=rollouts)
    assert report.latents >= 20
    assert report.control_dh > 1

    images = [request.images for request in requests]
    exact, rounded = (
        teacher_force(rig.model, rollouts, images, engine.markers, SAMPLING, batch_size=1) for rig in (full, half)
    )
    dh = max(float((a - b.float()).abs().max()) for a, b in zip(exact.latents, rounded.latents, strict=True) if len(a))
    dlogp = float((exact.logprobs - rounded.logprobs).abs().max())
    assert 0 < report.max_dh <= 2 * dh, (report, dh)
    assert 0 < report.max_dlogp <= 2 * dlogp, (report, dlogp)
