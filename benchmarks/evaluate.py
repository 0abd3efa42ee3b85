"""Prompt tokens that vLLM prefills for an evaluation: all conditions in one plan, against one call per condition.

    python benchmarks/evaluate.py [--questions N] [--max-tokens N] | python benchmarks/record.py evaluate

Counted, not timed, inside vLLM's scheduler: calls, requests, prefilled tokens of prompts, images that the vision tower
encodes. Every question has an image of its own. The calls of the baseline begin with empty caches (`calls`), or with
whatever the call before has left (`calls_kept`). Three engines: the KV cache of `roomy` holds all prompts, that of
`tight` half of them, and in `uncached`, the control, the prefix cache is off.

`least` is what any order must prefill: each block of a prompt once, and of every further request the last block, for
vLLM never takes a whole prompt from the cache. The exit code is 1 if answers differ between two ways or two engines, if
the plan in `roomy` prefills more than `least`, or if the control saves anything. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rl_lvr.data.encoding import Encoder
from rl_lvr.data.puzzles import PuzzleConfig, generate
from rl_lvr.evaluation.conditions import Condition
from rl_lvr.evaluation.plan import Answered, Item, Plan
from rl_lvr.evaluation.questions import questions_of
from rl_lvr.lab.tiny import TinySpec, build_tiny
from rl_lvr.latents.format import get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.models import family_of, load_model
from rl_lvr.rollout.types import Request, Sampling
from rl_lvr.rollout.vllm.engine import VLLMRolloutEngine

CUDA = torch.cuda.is_available()
BLOCK = 32
ROWS = 16
"""Requests that vLLM runs at a time."""
PUZZLES = PuzzleConfig(rows=3, cols=4, hops=3, cell_px=112)
"""Pictures of 336 x 448 pixels, 192 image tokens of 28 x 28."""
CONDITIONS = [Condition(kind) for kind in Intervention if kind not in (Intervention.GIVEN, Intervention.ORACLE)]


@dataclass
class Counts:
    """What an engine was asked for, and what it computed for that."""

    calls: int = 0
    requests: int = 0
    prefilled: int = 0
    """Tokens of prompts that were computed, those of prompts that were computed again included."""
    images: int = 0
    """Images that were encoded."""


@contextmanager
def counted(engine: VLLMRolloutEngine) -> Iterator[Counts]:
    """Count in the scheduler of an engine that lives in this process, and in the calls of its `generate`."""
    scheduler, seen = engine.llm.llm_engine.engine_core.engine_core.scheduler, Counts()
    stock, generate_ = scheduler.schedule, engine.generate

    def schedule(*args: Any, **more: Any) -> Any:
        output = stock(*args, **more)
        for name, count in output.num_scheduled_tokens.items():
            request = scheduler.requests[name]
            reached = request.num_computed_tokens  # this step's included
            prompt = request.num_prompt_tokens
            seen.prefilled += min(reached, prompt) - min(reached - count, prompt)
        seen.images += sum(map(len, output.scheduled_encoder_inputs.values()))
        return output

    def generate_counted(requests: Sequence[Request], sampling: Sampling) -> Any:
        seen.calls += 1
        seen.requests += len(requests)
        return generate_(requests, sampling)

    scheduler.schedule, engine.generate = schedule, generate_counted
    try:
        yield seen
    finally:
        del scheduler.schedule, engine.generate


def empty(engine: VLLMRolloutEngine) -> None:
    """Leave nothing in the caches of prefixes and of encoded images."""
    if not engine.llm.reset_prefix_cache():
        raise RuntimeError("vLLM kept its prefixes: requests are still running.")
    engine.llm.llm_engine.reset_encoder_cache()


def least(requests: Sequence[Request]) -> int:
    """Prompt tokens that must be computed for requests of which each image is the first thing that differs."""
    known: set[tuple[str, tuple[int, ...]]] = set()
    total = 0
    for request in requests:
        picture = hashlib.sha256(b"".join(image.tobytes() for image in request.pictures)).hexdigest()
        ids = tuple(request.prompt_ids)
        keys = [(picture, ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)]
        shared = next((at for at, key in enumerate(keys) if key not in known), len(keys))
        total += len(ids) - min(shared, (len(ids) - 1) // BLOCK) * BLOCK
        known.update(keys)
    return total


# ---- the ways to ask


def by_plan(plan: Plan, engine: VLLMRolloutEngine) -> dict[Item, Answered]:
    """All conditions in one plan."""
    empty(engine)
    return {one.item: one for call in plan.run(engine) for one in call}


def by_calls(plan: Plan, engine: VLLMRolloutEngine, *, kept: bool = False) -> dict[Item, Answered]:
    """One call per condition, those that need no other's latents first. `kept`: caches are not emptied between."""
    empty(engine)
    found: dict[Item, Answered] = {}
    for condition in sorted(plan.conditions, key=lambda condition: condition.donated):
        if not kept:
            empty(engine)
        own = {item: one.latents for item, one in found.items() if item.condition == item.own.condition}
        for call in plan.run(engine, done=lambda item, one=condition: item.condition != one, own=own):
            found |= {one.item: one for one in call}
    return found


def kept(plan: Plan, engine: VLLMRolloutEngine) -> dict[Item, Answered]:
    return by_calls(plan, engine, kept=True)


WAYS: dict[str, Callable[[Plan, VLLMRolloutEngine], dict[Item, Answered]]] = {
    "plan": by_plan,
    "calls": by_calls,
    "calls_kept": kept,
}
ENGINES = {"roomy": ("plan", "calls", "calls_kept"), "tight": ("plan", "calls_kept"), "uncached": ("plan", "calls")}
"""What is asked of which engine."""


def same(left: dict[Item, Answered], right: dict[Item, Answered]) -> bool:
    """Bit by bit: tokens, log-probs, latents, and whose latents were fed."""
    return left.keys() == right.keys() and all(
        left[item].rollout.ids == right[item].rollout.ids
        and left[item].donor == right[item].donor
        and torch.equal(left[item].rollout.logprobs, right[item].rollout.logprobs)
        and torch.equal(left[item].rollout.latents, right[item].rollout.latents)
        for item in left
    )


# ---- the engines


def build(folder: Path) -> Path:
    """A tiny random model in whose head START's row is long and points along its states, so that it opens spans."""
    build_tiny(TinySpec("qwen2_5_vl", words=PUZZLES.words, latent_formats=("lvr",)), folder)
    model, processor = load_model(folder, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[processor.tokenizer.convert_tokens_to_ids(get_format("lvr").start)] *= -6
    model.save_pretrained(folder)
    return folder


def start(folder: Path, processor: Any, longest: int, blocks: int, *, cache: bool) -> VLLMRolloutEngine:
    return VLLMRolloutEngine(
        folder,
        processor,
        get_format("lvr", k=3),
        max_model_len=longest * BLOCK,
        max_num_seqs=ROWS,
        dtype="float32",
        engine_args={
            "enforce_eager": True,
            "block_size": BLOCK,
            "enable_prefix_caching": cache,
            "num_gpu_blocks_override": blocks,
            "limit_mm_per_prompt": {"image": 1, "video": 0},
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=6)
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if not CUDA:
        os.environ.update(TRITON_INTERPRET="1", VLLM_CPU_KVCACHE_SPACE="1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = build(Path(scratch) / "model")
        model, processor = load_model(folder, dtype=torch.float32)
        records: Any = generate(PUZZLES, args.questions, "test")
        questions = questions_of(records, Encoder(processor, family_of(model), None))
        filler = processor.tokenizer.convert_tokens_to_ids("red")
        plan = Plan(questions, CONDITIONS, Sampling(args.max_tokens, temperature=1.0), filler_id=filler)
        result = measure(plan, folder, processor, questions.requests(range(args.questions)))
    print(json.dumps(result))
    return 0 if result["right"] else 1


def measure(plan: Plan, folder: Path, processor: Any, prompts: Sequence[Request]) -> dict[str, Any]:
    lengths = [len(prompt.prompt_ids) for prompt in prompts]
    longest = -(-(max(lengths) + plan.sampling.max_tokens) // BLOCK)
    shared = sum(length // BLOCK for length in lengths)
    private = ROWS * max(longest - length // BLOCK for length in lengths) + 1  # vLLM keeps one block for itself
    engines = {
        "roomy": {"blocks": shared + private, "cache": True},
        "tight": {"blocks": shared // 2 + private, "cache": True},
        "uncached": {"blocks": ROWS * longest + 1, "cache": False},
    }
    counts: dict[str, dict[str, dict[str, int]]] = {}
    answers: list[dict[Item, Answered]] = []
    for name, settings in engines.items():
        engine = start(folder, processor, longest, **settings)
        counts[name] = {}
        for way in ENGINES[name]:
            with counted(engine) as seen:
                answers.append(WAYS[way](plan, engine))
            counts[name][way] = asdict(seen)
            print(f"{name} {way}: {seen}", flush=True)
        engine.close()
    every = len(plan.conditions)
    expected = {"plan": least([p for p in prompts for _ in range(every)]), "calls": every * least(prompts)}
    prefilled = {name: {way: seen["prefilled"] for way, seen in ways.items()} for name, ways in counts.items()}
    equal = all(same(answers[0], one) for one in answers[1:])
    right = (
        equal
        and prefilled["roomy"]["plan"] == expected["plan"]
        and prefilled["roomy"]["calls"] == expected["calls"]
        and set(prefilled["uncached"].values()) == {every * sum(lengths)}
    )
    return {
        "calls_over_plan": {
            name: {way: round(ways[way] / ways["plan"], 2) for way in ways if way != "plan"}
            for name, ways in prefilled.items()
        },
        "counts": counts,
        "least": expected,
        "prompts": sum(lengths),
        "questions": len(prompts),
        "conditions": [condition.name for condition in plan.conditions],
        "latents": sum(len(one.latents) for one in answers[0].values()),
        "blocks": {name: settings["blocks"] for name, settings in engines.items()} | {"tokens": BLOCK},
        "equal": equal,
        "right": right,
        "device": torch.cuda.get_device_name() if CUDA else "cpu, GPU kernels interpreted",
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
