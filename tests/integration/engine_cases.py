"""What the engine's tests share: a tiny model with an engine, six mixed prompts, and a bias on the logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from helpers import MIXED_ROWS, make_batch, noise_image

from rl_lvr.evaluation.questions import Question, Questions
from rl_lvr.latents.format import LatentFormat, get_format
from rl_lvr.models import Family, family_of
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.types import Request, Rollout, Sampling

FORMATS = ("lvr", "monet", "slots")
SIX_ROWS = (
    *MIXED_ROWS,
    ([], "green 2 hops from blue what is next"),
    ([noise_image(3, 56, 56)], "yellow"),
    ([noise_image(4)], "what is next from red"),
)
ANSWERS = ("x", "y", "x", "y", "z", "z")


@dataclass
class Rig:
    """A model, its processor and what the tests do with them."""

    model: Any
    processor: Any

    @property
    def family(self) -> Family:
        return family_of(self.model)

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def engine(self, format_: LatentFormat | None = None, **more: Any) -> HFRolloutEngine:
        return HFRolloutEngine(self.model, self.processor, format_ or get_format("lvr", k=3), **more)

    def requests(self, rows: Any = SIX_ROWS, **more: Any) -> list[Request]:
        """One request per row, as the processor writes it, without padding."""
        made = []
        for images, question in rows:
            batch = make_batch(self.processor, [(images, question)])
            inputs = self.family.image_inputs(batch) if images else {}
            made.append(Request(batch["input_ids"][0].tolist(), inputs, pictures=tuple(images), **more))
        return made

    @contextmanager
    def bias(self, wanted: dict[int, float]) -> Iterator[None]:
        """The head's logits with something added."""
        added = torch.zeros(self.model.config.get_text_config().vocab_size)
        for token, value in wanted.items():
            added[token] = value

        def hook(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output + added.to(output)

        handle = self.family.head(self.model).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def thinking(self, format_: LatentFormat | None = None, start: float = 6.0, end: float = 0.0) -> Any:
        """A bias under which untrained weights open a span every few tokens."""
        markers = self.engine(format_).markers
        assert markers.start is not None
        assert markers.end is not None
        return self.bias({markers.start: start, markers.end: end, self.tokenizer.eos_token_id: -3.0})


class Asked(Questions):
    """Questions of requests at hand."""

    def __init__(
        self, requests: list[Request], answers: Sequence[str] = ANSWERS, clusters: Sequence[str] | None = None
    ) -> None:
        named: Any = [None] * len(answers) if clusters is None else clusters
        rows = [Question(str(i), a, c) for i, (a, c) in enumerate(zip(answers, named, strict=True))]
        family: Any = None
        super().__init__(rows, lambda rows: [], family)
        self._requests = requests

    def requests(self, rows: Sequence[int]) -> list[Request]:
        return [self._requests[row] for row in rows]


def same(left: Rollout, right: Rollout, tolerance: float = 1e-5) -> bool:
    """Whether two rollouts agree: tokens exactly, numbers closely."""
    return (
        left.ids == right.ids
        and left.latent_positions == right.latent_positions
        and left.stop_reason == right.stop_reason
        and torch.equal(left.forced, right.forced)
        and torch.allclose(left.logprobs, right.logprobs, atol=tolerance)
        and torch.allclose(left.uncut_logprobs, right.uncut_logprobs, atol=tolerance)
        and torch.allclose(left.log_kept_mass, right.log_kept_mass, atol=tolerance)
        and torch.allclose(left.latents, right.latents, atol=tolerance)
    )


def span_counts(rollouts: Iterable[Rollout], start: int) -> list[int]:
    """Spans that each completion opens."""
    return [r.completion_ids.count(start) for r in rollouts]


SAMPLED = Sampling(max_tokens=24, temperature=1.0, seed=7)
GREEDY = Sampling(max_tokens=24, temperature=0.0)
FILTERED = Sampling(
    max_tokens=24, temperature=0.8, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.2, sigma=0.1, seed=3
)
