"""Operations of a text model: our count against torch's own, on a real forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rl_lvr.training.grpo.flops import forward_flops, peak_flops


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_count_is_torchs(load_tiny: Any, family: str) -> None:
    model, _ = load_tiny(family, hidden=32, layers=3, heads=4, kv_heads=2, intermediate=80)
    model.set_attn_implementation("eager")  # whose two products the counter knows on every device
    config = model.config.get_text_config()
    ids = torch.full((3, 40), 20)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        model.get_output_embeddings()(hidden[:, -10:])
    counted = counter.get_total_flops()
    assert forward_flops(config, [40] * 3, scored=30) == pytest.approx(counted, rel=0.1)
    assert forward_flops(config, [40] * 3, scored=0) < 0.98 * counted
    assert forward_flops(config, [20] * 6, scored=30) < forward_flops(config, [40] * 3, scored=30)


def test_no_utilisation_without_a_gpu() -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None
