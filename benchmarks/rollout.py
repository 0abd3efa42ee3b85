"""Tokens per second of latent decoding against text decoding in the same vLLM engine, and against the reference engine.

    python benchmarks/rollout.py [--model FOLDER] [--batches 1 8 64] [--tokens N] [--repeats N]

A latent row feeds its own hidden state at every step, a text row draws ordinary tokens; all rows have the same length.
Each measure subtracts a short run from a long one, so that prefill and set-up cancel out; sides take turns, and a ratio
is the median over the turns. First the rollouts must be right: against teacher forcing within 1e-4 in fp32, in bf16
within twice what the reference engine's bf16 differs from fp32. The last line is JSON.

On a CUDA GPU with graphs on, the bar is latent >= 0.95 x text; the exit code is 1 if it is missed, or the rollouts are
wrong. Text is decoded in the same engine (intervention none), so it pays what the plugin does at every step too: a vLLM
without the plugin would need a second engine and is not measured here. Without --model a tiny random model is taken. On
a CPU the GPU's kernels run in Triton's interpreter: the ratio says how many of them a latent step adds, not what it
costs. 16 steps and 3 turns are the default there, 64 and 5 on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rl_lvr.lab.tiny import TinySpec, build_tiny
from rl_lvr.latents.format import LatentFormat, get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.models import family_of, load_model
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.replay import ParityReport, check_parity
from rl_lvr.rollout.types import Request, Sampling
from rl_lvr.rollout.vllm import calls
from rl_lvr.rollout.vllm.engine import VLLMRolloutEngine

BAR = 0.95
TOLERANCE = 1e-4
LEAST = 2.0
"""Seconds in which a short call is repeated."""
PROMPT = 32
SHORT = 4
GATE_TOKENS = 12
CUDA = torch.cuda.is_available()
SAMPLING = Sampling(temperature=1.0)

Side = Callable[[int], object]


def use_cpu_runtime() -> None:
    """What vLLM's GPU code needs to run on a CPU at all; must come before vLLM is imported."""
    os.environ.update(TRITON_INTERPRET="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")


def clock(work: Side, tokens: int) -> float:
    """Seconds of one call: the fastest of as many as LEAST holds, for the reference engine's take milliseconds."""
    fastest, begin = float("inf"), time.perf_counter()
    while fastest == float("inf") or time.perf_counter() - begin < LEAST:
        start = time.perf_counter()
        work(tokens)
        if CUDA:
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def measure(sides: dict[str, Side], tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds per step of each side in each turn."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side(SHORT)
    for _ in range(repeats):
        for name, side in sides.items():
            short = clock(side, SHORT)
            times[name].append((clock(side, SHORT + tokens) - short) / tokens)
    return times


def ratio(times: dict[str, list[float]], fast: str, slow: str) -> float:
    """How many times the tokens per second of `slow` the side `fast` makes, median over the turns."""
    pairs = zip(times[fast], times[slow], strict=True)
    return round(statistics.median(theirs / own for own, theirs in pairs), 3)


class Bench:
    """One model in both engines."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        length = PROMPT + SHORT + args.tokens + 1
        self.format: LatentFormat = get_format("lvr", k=length)
        self.folder, self.rows = folder, max(args.batches)
        self.model, self.processor = load_model(folder, device=torch.device("cuda" if CUDA else "cpu"))
        self.vllm = VLLMRolloutEngine(
            folder,
            self.processor,
            self.format,
            max_model_len=max(length, args.max_model_len),
            max_num_seqs=self.rows,
            max_latents=length,
            dtype=args.dtype,
            gpu_memory_utilization=args.gpu_memory_utilization if CUDA else None,
            engine_args={
                "enforce_eager": not CUDA or args.enforce_eager,
                "enable_prefix_caching": False,
                **({} if CUDA else {"num_gpu_blocks_override": 2 * self.rows + 16}),
                "limit_mm_per_prompt": {"image": 1, "video": 0},
            },
        )
        self.model = self.model.to(self.vllm.dtype)
        self.hf = HFRolloutEngine(self.model, self.processor, self.format, batch_size=self.rows)
        self._forbid_end_of_sequence()
        assert self.hf.markers.start is not None
        self.start: int = self.hf.markers.start

    def _forbid_end_of_sequence(self) -> None:
        """The reference engine has no setting for it; vLLM gets `ignore_eos`."""
        ids = torch.tensor(self.vllm.settings.eos)

        def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output.index_fill_(-1, ids.to(output.device), -1e9) if self.endless else output

        self.endless = False
        family_of(self.model).head(self.model).register_forward_hook(hook)

    # ---- correctness

    def gate(self) -> tuple[bool, ParityReport, ParityReport | None]:
        """Whether vLLM's rollouts are right, what they differ by, and in bf16 what the reference engine does."""
        requests, sampling = self.pictured(), replace(SAMPLING, max_tokens=GATE_TOKENS, sigma=0.1)
        rollouts = self.vllm.generate(requests, sampling)
        if self.vllm.dtype == torch.float32:
            report = check_parity(self.vllm, self.model, requests, sampling, rollouts=rollouts)
            return report.passes(TOLERANCE), report, None
        theirs = self.hf.generate(requests, sampling)
        exact, _ = load_model(self.folder, dtype=torch.float32, device=self.model.device)
        report, reference = (
            check_parity(self.vllm, exact, requests, sampling, rollouts=rows) for rows in (rollouts, theirs)
        )
        ok = report.max_dh <= 2 * reference.max_dh and report.max_dlogp <= 2 * reference.max_dlogp
        return ok and report.control_dlogp > report.max_dlogp, report, reference

    def pictured(self) -> list[Request]:
        """An image in each: one row does as it likes, the others open a span at once."""
        pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels)
        content = [{"type": "image"}, {"type": "text", "text": "what is red next to blue"}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        batch = self.processor(text=[text], images=[[picture]], return_tensors="pt")
        ids, images = batch["input_ids"][0].tolist(), family_of(self.model).image_inputs(batch)
        plain = Request(ids, images, (picture,), k=3)
        opened = Request([*ids, self.start], images, (picture,), k=3)
        return [plain, opened, replace(opened, k=6), replace(opened, intervention=Intervention.ZEROS)]

    # ---- speed

    def requests(self, rows: int, *, latents: bool) -> list[Request]:
        draw = torch.Generator().manual_seed(0)
        ordinary = [i for i in range(min(len(self.hf.tokenizer), 50_000)) if i not in self.never()]
        picked = torch.randint(len(ordinary), (rows, PROMPT), generator=draw).tolist()
        prompts = [[ordinary[i] for i in row] for row in picked]
        if latents:
            return [Request([*ids, self.start]) for ids in prompts]
        return [Request(ids, intervention=Intervention.NONE) for ids in prompts]

    def never(self) -> set[int]:
        return {*self.vllm.settings.limits.special_ids, *self.vllm.markers.never_sampled, self.start}

    def vllm_side(self, requests: Sequence[Request]) -> Side:
        """The engine's own calls, with vLLM's `ignore_eos`; the latents are fetched too."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]

        def generate(tokens: int) -> list[int]:
            sampling = replace(SAMPLING, max_tokens=tokens)
            uids = [f"row {i}" for i in range(len(requests))]
            fields = [
                calls.sampling_fields(request, i, sampling, self.vllm.settings, uid)
                | {"stop_token_ids": [], "ignore_eos": True}
                for i, (request, uid) in enumerate(zip(requests, uids, strict=True))
            ]
            outputs = self.vllm.llm.generate(prompts, [SamplingParams(**row) for row in fields], use_tqdm=False)
            self.vllm.llm.collective_rpc("latent_pop", args=(uids,))
            return [len(output.outputs[0].token_ids) for output in outputs]

        return generate

    def hf_side(self, requests: Sequence[Request]) -> Side:
        def generate(tokens: int) -> list[int]:
            self.endless = True
            rollouts = self.hf.generate(requests, replace(SAMPLING, max_tokens=tokens))
            self.endless = False
            return [len(rollout.completion_ids) for rollout in rollouts]

        return generate

    def sides(self, rows: int) -> dict[str, Side]:
        text, latents = self.requests(rows, latents=False), self.requests(rows, latents=True)
        made = {"text": self.vllm_side(text), "latents": self.vllm_side(latents), "hf": self.hf_side(latents)}
        for name, side in made.items():
            lengths = side(SHORT)
            if lengths != [SHORT] * rows:
                raise RuntimeError(f"{name}: completions of {lengths} tokens, all should have {SHORT}.")
        return made


def build(folder: Path) -> Path:
    """A tiny random model; on a GPU one of a size at which a step is more than its launch."""
    shape: dict[str, Any] = {}
    if CUDA:
        shape = {"hidden": 1024, "heads": 16, "kv_heads": 4, "intermediate": 2816, "layers": 8, "init_std": 0.02}
    return build_tiny(TinySpec("qwen2_5_vl", latent_formats=("lvr",), **shape), folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, help="folder of a model whose tokenizer has the format's markers")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtype", default="bfloat16" if CUDA else "float32", choices=("bfloat16", "float32"))
    parser.add_argument("--tokens", type=int, default=64 if CUDA else 16, help="decode steps that are timed")
    parser.add_argument("--repeats", type=int, default=5 if CUDA else 3, help="turns of every side")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.4)
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs; the bar then does not apply")
    args = parser.parse_args()
    if not CUDA:
        use_cpu_runtime()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args.model or build(Path(scratch) / "model"), args)
        right, report, reference = bench.gate()
        print(f"{'right' if right else 'WRONG'}: {report}" + (f", reference {reference}" if reference else ""))
        result: dict[str, Any] = {"latent_over_text": {}, "vllm_over_hf": {}}
        steps: dict[str, dict[str, float]] = {}
        for rows in args.batches if right else ():
            times = measure(bench.sides(rows), args.tokens, args.repeats)
            result["latent_over_text"][str(rows)] = ratio(times, "latents", "text")
            result["vllm_over_hf"][str(rows)] = ratio(times, "latents", "hf")
            steps[str(rows)] = {name: round(rows / statistics.median(times[name]), 1) for name in times}
            print(f"{rows} rows, tokens per second: {steps[str(rows)]}", flush=True)
        bench.vllm.close()
    barred = CUDA and not args.enforce_eager and right
    result |= {
        "max_dh": report.max_dh,
        "max_dlogp": report.max_dlogp,
        "right": right,
        "tokens_per_second": steps,
        "bar": BAR,
        "met": min(result["latent_over_text"].values()) >= BAR if barred else None,
        "model": str(args.model or "tiny"),
        "dtype": str(bench.vllm.dtype),
        "device": torch.cuda.get_device_name() if CUDA else "cpu, GPU kernels interpreted",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))
    return exit_code(result)


def exit_code(result: dict[str, Any]) -> int:
    """0 if the rollouts are right and the bar, where there is one, is met."""
    return 0 if result["right"] and result["met"] is not False else 1


if __name__ == "__main__":
    sys.exit(main())
