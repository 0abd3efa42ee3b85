"""The scoring pass of GRPO against token-by-token replay, on the same model and the same rollouts.

    python benchmarks/scoring.py [--device cuda] [--repeats 5] [--tokens 256] [--rows 8] [--cases tiny mid512]

The scoring pass feeds recorded latents into one parallel forward, as training does. The replay is how the public code
of LVR (2509.24251) scores: it makes the latents again, one position after another over the whole completion; here with
a key-value cache and all rows at once. Both give the log-prob of every chosen token and are compared first, in float64:
a recurrence over a hundred latents of an untrained model makes differences of units out of float32's rounding. They
take turns, and the ratio is that of the medians. The last line is JSON; the bar, on the tiny model, is a ratio of 10.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from hf_engine import clock
from torch import Tensor
from trl.trainer.utils import add_fused_lm_head

from rl_lvr.lab.tiny import TinySpec, build_tiny
from rl_lvr.latents.feedback import feedback
from rl_lvr.latents.format import get_format
from rl_lvr.models import family_of, load_model
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.types import Request, Rollout, Sampling, StopReason, latent_batch
from rl_lvr.training.grpo.scoring import FedModel
from rl_lvr.wrapping import input_embeddings

BAR = 10.0
PROMPT = 64
TOLERANCE = 1e-3
CASES = {
    "tiny": TinySpec("qwen2_5_vl"),
    "mid512": TinySpec("qwen2_5_vl", hidden=512, heads=8, kv_heads=2, intermediate=1536, layers=8, init_std=0.05),
}


class Scoring:
    """A model, rollouts of one length, and the two ways to score them."""

    def __init__(self, folder: Path, tokens: int, rows: int, device: torch.device, dtype: torch.dtype) -> None:
        self.model, processor = load_model(folder, device=device, dtype=dtype)
        self.latent_format = get_format("lvr", k=8)
        engine = HFRolloutEngine(self.model, processor, self.latent_format, batch_size=rows)
        self.markers = engine.markers
        weight = self.model.get_output_embeddings().weight
        with torch.no_grad():
            weight[self.markers.start] *= 2  # spans are opened now and then
            weight[processor.tokenizer.eos_token_id] = 0
        self.rollouts = _rollouts(engine, tokens, rows)
        add_fused_lm_head(self.model, outputs=("log_probs", "entropy"))
        self.ids = torch.tensor([rollout.ids for rollout in self.rollouts], device=device)
        self.forced = torch.stack([rollout.forced for rollout in self.rollouts]).to(device)
        self.latents = latent_batch(self.rollouts).to(device)
        self.banned = torch.tensor(self.markers.never_sampled, device=device)

    @torch.no_grad()
    def parallel(self) -> Tensor:
        """[B, C], 0 where forced."""
        fed = FedModel(self.model, self.latents, PROMPT, self.markers, 1.0)
        labels = self.ids.clone()
        labels[:, :PROMPT] = -100
        output = fed(self.ids, torch.ones_like(self.ids), labels, fused_lm_head=True)
        found: Tensor = output.log_probs[:, PROMPT - 1 :]
        return found

    @torch.no_grad()
    def replay(self) -> Tensor:
        """The same, one position at a time."""
        family = family_of(self.model)
        core, head, embedding = family.core(self.model), family.head(self.model), input_embeddings(self.model)
        ids, width = self.ids, self.ids.shape[1]
        positions = family.positions(self.model, ids).prefill
        prompt = ids[:, :PROMPT]
        output = core(input_ids=prompt, position_ids=positions[..., :PROMPT], use_cache=True)
        cache, hidden = output.past_key_values, output.last_hidden_state[:, -1]
        scored = []
        for place in range(PROMPT, width):
            token = ids[:, place]
            logits = head(hidden).index_fill(1, self.banned, float("-inf"))
            scored.append(logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
            embeds = torch.where((token == self.markers.slot)[:, None], feedback(self.model, hidden), embedding(token))
            output = core(
                inputs_embeds=embeds[:, None],
                position_ids=positions[..., place : place + 1],
                past_key_values=cache,
                use_cache=True,
            )
            hidden = output.last_hidden_state[:, -1]
        return torch.stack(scored, 1).masked_fill(self.forced, 0.0)


def _rollouts(engine: HFRolloutEngine, tokens: int, rows: int) -> list[Rollout]:
    """Rollouts that reached `tokens` tokens and hold latents."""
    kept: list[Rollout] = []
    for turn in range(20):
        ids = torch.randint(50, 250, (rows, PROMPT), generator=torch.Generator().manual_seed(turn))
        made = engine.generate([Request(row) for row in ids.tolist()], Sampling(max_tokens=tokens, seed=turn * rows))
        kept += [r for r in made if r.stop_reason is StopReason.LENGTH and len(r.latents)]
        if len(kept) >= rows:
            return kept[:rows]
    raise SystemExit(f"only {len(kept)} of {rows} rollouts reached {tokens} tokens with latents.")


def run_case(name: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model = build_tiny(CASES[name], Path(folder) / "model")
        exact, scoring = (
            Scoring(model, args.tokens, args.rows, device, dtype) for dtype in (torch.float64, torch.float32)
        )
    apart = float((exact.parallel() - exact.replay()).abs().max())
    times: dict[str, list[float]] = {"parallel": [], "replay": []}
    for _ in range(args.repeats):
        for side, work in (("parallel", scoring.parallel), ("replay", scoring.replay)):
            times[side].append(clock(work, device))
    seconds = {side: statistics.median(values) for side, values in times.items()}
    ratio = seconds["replay"] / seconds["parallel"]
    latents = int(scoring.latents.counts.sum())
    print(
        f"{name}: parallel {1e3 * seconds['parallel']:.1f} ms, replay {1e3 * seconds['replay']:.1f} ms, "
        f"ratio {ratio:.1f}, {latents} latents, log-probs {apart:.1e} apart",
        flush=True,
    )
    return {
        "ms": {side: round(1e3 * value, 2) for side, value in seconds.items()},
        "ratio": round(ratio, 2),
        "latents": latents,
        "apart": apart,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a completion")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=["tiny"])
    args = parser.parse_args()
    device = torch.device(args.device)
    found = {name: run_case(name, args, device) for name in args.cases}
    agrees = all(case["apart"] < TOLERANCE for case in found.values())
    fast = "tiny" not in found or found["tiny"]["ratio"] >= BAR
    print(
        json.dumps(
            {
                "replay_over_parallel": found,
                "tokens": args.tokens,
                "rows": args.rows,
                "bar": BAR,
                "passes": agrees and fast,
                "device": str(device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
    )
    return 0 if agrees and fast else 1


if __name__ == "__main__":
    sys.exit(main())
