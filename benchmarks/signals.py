"""What signals cost: an armed scoring forward against an unarmed one, and against `output_attentions=True`.

    python benchmarks/signals.py [--repeats 12] [--lengths 2048 4096] [--threads 1]

A random Qwen2.5-VL (8 layers, hidden 1024, 16 heads, 4 key-value heads) scores one rollout of T tokens: an image of T/4
tokens, a question, 8 latents and an answer of T/8. Armed measures the answer's attention to latents and image in all
layers and heads, relative and without the sink, and paper B's reward. Time: pairs taken in turns in one process, median
of their ratios. Memory: the highest resident set above the weights, each forward in a process of its own. Masses and
hidden states are checked first; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from entropy import entropy_errors

from rl_lvr.forward.batch import ReplayBatch, forward_hidden
from rl_lvr.forward.inject import inject
from rl_lvr.lab.tiny import TinySpec, build_tiny
from rl_lvr.latents.format import FormatIds, get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.models import family_of, load_model
from rl_lvr.rollout.replay import replay_batch
from rl_lvr.rollout.types import Rollout, StopReason
from rl_lvr.signals import measure, parse_signals

SPEC = TinySpec(
    "qwen2_5_vl", hidden=1024, heads=16, kv_heads=4, intermediate=2816, layers=8, init_std=0.02, max_positions=8192
)
LATENTS = 8
SIGNALS = parse_signals(
    [
        "attention_mass",
        {"attention_mass": {"to": "image", "name": "image_mass"}},
        "attention_relative",
        "attention_without_sink",
        "attention_mass_paper_b",
    ]
)
BARS = {"armed_over_unarmed_time": 1.05, "armed_over_unarmed_memory": 1.02}
EAGER_BARS = {"eager_over_armed_time": {2048: 3.0, 4096: 3.0}, "eager_over_armed_memory": {2048: 8.0, 4096: 16.0}}
WARM = 64
EAGER_REPEATS = 3


class Scoring:
    """The three forwards of one rollout."""

    def __init__(self, folder: Path, length: int) -> None:
        self.model, self.processor = load_model(folder)
        self.family = family_of(self.model)
        self.markers: FormatIds = get_format("lvr", k=LATENTS).bind(
            self.processor.tokenizer, self.family.placeholder_ids(self.processor)
        )
        self.batch = self.rollout_batch(length)
        self.warm = self.rollout_batch(WARM)

    def rollout_batch(self, length: int) -> ReplayBatch:
        draw = torch.Generator().manual_seed(length)
        image_tokens, answer = length // 4, length // 8
        side = SPEC.merge  # patches along the shorter side
        while (2 * side) ** 2 <= image_tokens * SPEC.merge**2:
            side *= 2
        long = image_tokens * SPEC.merge**2 // side
        images = {
            "pixel_values": torch.randn(side * long, 3 * 2 * SPEC.patch**2, generator=draw),
            "image_grid_thw": torch.tensor([[1, side, long]]),
        }
        config = self.model.config
        words = torch.randint(50, 250, (length,), generator=draw).tolist()
        image = [config.vision_start_token_id, *[config.image_token_id] * image_tokens, config.vision_end_token_id]
        completion = [*self.markers.span(), *words[:answer]]
        prompt = image + words[: length - len(image) - len(completion)]
        first = len(prompt) + 1
        rollout = Rollout(
            prompt_ids=tuple(prompt),
            completion_ids=tuple(completion),
            logprobs=torch.zeros(len(completion)),
            forced=torch.zeros(len(completion), dtype=torch.bool),
            latents=torch.randn(LATENTS, SPEC.hidden, generator=draw) * 0.02,
            latent_positions=tuple(range(first, first + LATENTS)),
            stop_reason=StopReason.LENGTH,
            seed=0,
            sigma=0.0,
            intervention=Intervention.OWN,
        )
        batch = replay_batch(self.model, [rollout], [images])
        assert batch.ids.shape == (1, length)
        return batch

    @torch.no_grad()
    def unarmed(self, batch: ReplayBatch) -> Any:
        return forward_hidden(self.model, batch, self.markers)

    def armed(self, batch: ReplayBatch) -> Any:
        return measure(self.model, batch, self.markers, SIGNALS)

    @torch.no_grad()
    def eager(self, batch: ReplayBatch) -> Any:
        """What peers do: the text model's attention switched to eager, all weights kept until the forward is over."""
        self.model.set_attn_implementation({"text_config": "eager"})
        try:
            with inject(self.model, batch.latents, self.markers):
                return self.family.core(self.model)(
                    input_ids=batch.ids,
                    attention_mask=batch.mask,
                    position_ids=self.family.positions(self.model, batch.ids, batch.mask, batch.images).prefill,
                    use_cache=False,
                    output_attentions=True,
                    **batch.images,
                )
        finally:
            self.model.set_attn_implementation({"text_config": "sdpa"})

    def gate(self) -> None:
        """The numbers are right, or nothing is timed."""
        assert torch.equal(self.unarmed(self.batch), self.armed(self.batch).hidden), "armed hidden states differ"
        small = self.rollout_batch(256)
        measured = self.armed(small).columns
        weights = torch.stack(self.eager(small).attentions)[:, 0].mean((0, 1))  # [T, T]
        answer = slice(256 - 256 // 8, 256)
        latents = [i for i, token in enumerate(small.ids[0].tolist()) if token == self.markers.slot]
        image = (small.ids[0] == self.model.config.image_token_id).nonzero()[:, 0]
        for name, keys in (("attention_mass", latents), ("image_mass", image)):
            expected = float(weights[answer][:, keys].sum(-1).mean())
            error = abs(measured[name].values[0] - expected)
            assert error < 1e-5, f"{name} is off by {error}"
        print(f"checked: hidden states bitwise equal at {self.batch.ids.shape[1]}, masses within 1e-5 of eager's")


def clocks(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the wall, and of this process on all cores: the second hardly feels what else the machine does."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def first_touches(work: Callable[[], object]) -> tuple[tuple[float, float], tuple[float, float]]:
    """`clocks`; and how often memory was touched for the first time, and the system's share of the cores' time."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    taken = clocks(work)
    after = resource.getrusage(resource.RUSAGE_SELF)
    return taken, (after.ru_minflt - before.ru_minflt, (after.ru_stime - before.ru_stime) / taken[1])


def time_ratios(scoring: Scoring, repeats: int) -> dict[str, list[float]]:
    """Medians [wall, cpu] of armed / unarmed, in alternating order, and of eager / armed; eager's first touches.

    The eager forwards come last: what one leaves behind (gigabytes to give back, cold caches) slows the next forward.
    """
    batch = scoring.batch
    for side in (scoring.unarmed, scoring.armed, scoring.eager):
        side(scoring.warm)
    scoring.armed(batch)
    armed_ratios, eager_ratios, unarmed_times, touches = [], [], [], []
    for repeat in range(repeats):
        sides = [scoring.unarmed, scoring.armed][:: 1 if repeat % 2 else -1]
        taken = {side.__name__: clocks(lambda side=side: side(batch)) for side in sides}
        armed_ratios.append(_ratio(taken["armed"], taken["unarmed"]))
        unarmed_times.append(taken["unarmed"])
    for _ in range(EAGER_REPEATS):
        eager, touched = first_touches(lambda: scoring.eager(batch))
        touches.append(touched)
        eager_ratios.append(_ratio(eager, clocks(lambda: scoring.armed(batch))))
    found = {
        "armed_over_unarmed": armed_ratios,
        "eager_over_armed": eager_ratios,
        "unarmed_seconds": unarmed_times,
        "eager_first_touches": touches,
    }
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}


def _ratio(above: tuple[float, float], below: tuple[float, float]) -> tuple[float, float]:
    return above[0] / below[0], above[1] / below[1]


def resident(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}.")


def peak_of_one(folder: Path, length: int, side: str) -> int:
    """Peak above the weights of one forward, in this process."""
    scoring = Scoring(folder, length)
    work = getattr(scoring, side)
    work(scoring.warm)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    result = work(scoring.batch)
    peak = resident("VmHWM") - before
    del result
    return peak


def peaks(folder: Path, length: int, threads: int) -> dict[str, int]:
    """Peak of each side in bytes, each in a fresh process."""
    # Every tensor gets pages of its own and gives them back: else the heap's holes count, and differ from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    command = [sys.executable, __file__, "--folder", str(folder), "--threads", str(threads), "--lengths", str(length)]
    found = {}
    for side in ("unarmed", "armed", "eager"):
        answer = subprocess.run([*command, "--one", side], check=True, capture_output=True, text=True, env=environment)
        found[side] = int(answer.stdout.split()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", choices=("unarmed", "armed", "eager"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(peak_of_one(args.folder, args.lengths[0], args.one))
        return
    names = (*BARS, *EAGER_BARS, "armed_over_unarmed_cpu_time", "eager_over_armed_cpu_time", "eager_system_share")
    table: dict[str, Any] = {name: {} for name in names}
    with tempfile.TemporaryDirectory() as made:
        folder = build_tiny(SPEC, Path(made) / "model")
        for length in args.lengths:
            scoring = Scoring(folder, length)
            scoring.gate()
            taken = time_ratios(scoring, args.repeats)
            del scoring
            print(f"T = {length}: unarmed forward {taken['unarmed_seconds'][0]:.2f} s", flush=True)
            for pair, digits in (("armed_over_unarmed", 4), ("eager_over_armed", 2)):
                wall, cpu = taken[pair]
                table[f"{pair}_time"][length] = round(wall, digits)
                table[f"{pair}_cpu_time"][length] = round(cpu, digits)
                print(f"  {pair}: wall {wall:.4f}, cpu {cpu:.4f}", flush=True)
            touched, share = taken["eager_first_touches"]
            table["eager_system_share"][length] = round(share, 2)
            print(f"  eager: {touched:.0f} page faults, {share:.0%} of its time in the system", flush=True)
            peak = peaks(folder, length, args.threads)
            table["armed_over_unarmed_memory"][length] = round(peak["armed"] / peak["unarmed"], 4)
            table["eager_over_armed_memory"][length] = round(peak["eager"] / peak["armed"], 2)
            print("  peak MiB " + ", ".join(f"{side} {value / 2**20:.0f}" for side, value in peak.items()), flush=True)
    table["entropy_rel_err"] = entropy_errors()
    missed = [
        f"{name} at {length}" for name, bar in BARS.items() for length, value in table[name].items() if value > bar
    ] + [
        f"{name} at {length}"
        for name, bars in EAGER_BARS.items()
        for length, value in table[name].items()
        if value < bars.get(length, 0)
    ]
    table |= {"missed": missed, "threads": args.threads, "torch": torch.__version__}
    print(json.dumps(table))


if __name__ == "__main__":
    main()
