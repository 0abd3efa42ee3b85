"""Time per decode step of the reference engine against `model.generate`, same model, same batch, same run.

    python benchmarks/hf_engine.py [--device cuda] [--repeats 5] [--tokens 48]

Two runs of different length are subtracted, so that prefill and set-up cancel out. Engine and `generate` take turns,
and the ratio is that of the medians: the machine's mood hits both. `text` draws ordinary tokens, `latents` feeds its
own hidden state at every step. Both sides sample at temperature 1. The last line is JSON; the bar is a ratio of 1.2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rl_lvr.lab.tiny import TinySpec, build_tiny
from rl_lvr.latents.format import get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.models import load_model
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.types import Request, Sampling

BAR = 1.2
PROMPT = 64
SHORT = 4

# Shape, rows in the batch, vocabulary (None: the tiny tokenizer's own).
CASES: dict[str, tuple[TinySpec, int, int | None]] = {
    "tiny": (TinySpec("qwen2_5_vl"), 8, None),
    "mid512": (
        TinySpec("qwen2_5_vl", hidden=512, heads=8, kv_heads=2, intermediate=1536, layers=8, init_std=0.02),
        16,
        32_000,
    ),
    "mid1024": (
        TinySpec("qwen2_5_vl", hidden=1024, heads=16, kv_heads=4, intermediate=2816, layers=8, init_std=0.02),
        8,
        32_000,
    ),
}


def clock(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    sides: dict[str, Callable[[int], object]], tokens: int, repeats: int, device: torch.device
) -> dict[str, float]:
    """Median seconds per step of each side, sides taking turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(SHORT)
    for _ in range(repeats):
        for name, side in sides.items():
            short = clock(lambda side=side: side(SHORT), device)
            long = clock(lambda side=side: side(SHORT + tokens), device)
            times[name].append((long - short) / tokens)
    return {name: statistics.median(values) for name, values in times.items()}


def build(spec: TinySpec, vocabulary: int | None, device: torch.device) -> tuple[Any, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model, processor = load_model(build_tiny(spec, Path(folder) / "model"), device=device)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    # Neither side may stop before the other.
    model.generation_config.eos_token_id = None
    return model, processor


def run_case(name: str, tokens: int, repeats: int, device: torch.device) -> dict[str, float]:
    spec, rows, vocabulary = CASES[name]
    model, processor = build(spec, vocabulary, device)
    engine = HFRolloutEngine(model, processor, get_format("lvr", k=4 * tokens), batch_size=rows)
    start, eos = engine.markers.start, processor.tokenizer.eos_token_id
    assert start is not None
    head = engine._parts.head

    def no_eos(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output[..., eos] = -1e9  # in place and for both sides: it costs the same
        return output

    head.register_forward_hook(no_eos)
    ids = torch.randint(50, 250, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    prompts = ids.tolist()
    text = [Request(row, intervention=Intervention.NONE) for row in prompts]
    latent = [Request([*row, start]) for row in prompts]
    ids = ids.to(device)
    mask = torch.ones_like(ids)

    def engine_side(requests: list[Request]) -> Callable[[int], object]:
        return lambda n: engine.generate(requests, replace(Sampling(), max_tokens=n))

    def generate(n: int) -> object:
        return model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=n, min_new_tokens=n
        )

    sides = {"generate": generate, "text": engine_side(text), "latents": engine_side(latent)}
    assert all(len(r.completion_ids) == 9 for r in engine.generate(text, Sampling(max_tokens=9)))
    assert all(len(r.latents) == 9 for r in engine.generate(latent, Sampling(max_tokens=9)))
    seconds = measure(sides, tokens, repeats, device)
    print(
        f"{name}: rows {rows}, ms per step " + ", ".join(f"{k} {1e3 * v:.2f}" for k, v in seconds.items()), flush=True
    )
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48, help="decode steps that are timed")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    args = parser.parse_args()
    device = torch.device(args.device)
    ratios, steps = {}, {}
    for name in args.cases:
        seconds = run_case(name, args.tokens, args.repeats, device)
        steps[name] = {side: round(1e3 * value, 3) for side, value in seconds.items()}
        ratios[name] = {side: round(seconds[side] / seconds["generate"], 3) for side in ("text", "latents")}
    worst = max(ratio for sides in ratios.values() for ratio in sides.values())
    print(
        json.dumps(
            {
                "engine_over_generate": ratios,
                "ms_per_step": steps,
                "worst": worst,
                "bar": BAR,
                "device": str(device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
