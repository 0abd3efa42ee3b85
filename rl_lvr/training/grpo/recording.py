"""What is written down about the rollouts of a training run, and said about them in TRL's tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL.Image import Image

from rl_lvr.answers import text_of
from rl_lvr.data.images import SOURCE
from rl_lvr.latents.format import FormatIds
from rl_lvr.latents.text import completion_text
from rl_lvr.rollout.record import FOLDER, RolloutLog, recorded
from rl_lvr.rollout.types import Rollout, latent_batch
from rl_lvr.training.grpo.batch import GenerationBatch
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.runs.metrics import Metrics

_TAKEN = ("prompt", "image", "images", "answer", "category")


class Recorder:
    """Writes the rollouts of a process below `output_dir/rollouts`."""

    def __init__(self, config: LatentGRPOConfig, markers: FormatIds, tokenizer: Any, metrics: Metrics) -> None:
        self._config, self._markers, self._tokenizer, self._metrics = config, markers, tokenizer, metrics
        self.shown: dict[str, list[Any]] = {}
        """Columns for TRL's table of completions, of the last batch."""

    @cached_property
    def _log(self) -> RolloutLog:
        """Opened at the first record: a resumption drops rows before it."""
        return RolloutLog(Path(self._config.output_dir) / FOLDER, self._config.process_index)

    def write(
        self,
        batch: GenerationBatch,
        step: int,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        rewards: Sequence[Sequence[float]],
        groups: Sequence[int],
        names: Sequence[str],
    ) -> None:
        """Record a batch of training, unless the settings say otherwise, and add its signals to the metrics.

        Args:
            prompts: As rewards see them; so are `completions`.
            rewards: [B][R], NaN where not scored.
            names: Of the rewards.
        """
        counts: list[Any] = [len(rollout.latent_positions) for rollout in batch.rollouts]
        self.shown = {"latents": counts} | {
            f"signal/{name}": list(column.values) for name, column in batch.columns.items()
        }
        for name, column in batch.columns.items():
            known = [v for v, n in zip(column.values, column.counts, strict=True) if n and isinstance(v, float)]
            self._metrics.add_mean(f"signal/{name}", sum(known), len(known))
        if not (self._config.record_rollouts and self._metrics.training):
            return
        rows = [
            recorded(
                rollout,
                self._tokenizer,
                self._markers,
                prompt=_without_images(prompts[row]),
                completion=completions[row],
                text=self._text_unless(completions[row], rollout),
                group=groups[row],
                answer=_text(batch.rows[row].get("answer")),
                category=_text(batch.rows[row].get("category")),
                rewards={
                    name: None if math.isnan(value) else value for name, value in zip(names, rewards[row], strict=True)
                },
                signals={name: column.values[row] for name, column in batch.columns.items()},
                images=_paths(batch.rows[row]),
                columns={name: value for name, value in batch.rows[row].items() if name not in _TAKEN and _plain(value)}
                | {name: values[row] for name, values in batch.made.items()},
            )
            for row, rollout in enumerate(batch.rollouts)
        ]
        self._log.append(step, rows, latent_batch(batch.rollouts))

    def _text_unless(self, completion: Any, rollout: Rollout) -> str | None:
        """The text of a rollout, if a completion as rewards see it does not say it already."""
        text = completion_text(rollout.completion_ids, self._tokenizer, self._markers)
        return None if text_of(completion) == text else text


def _without_images(prompt: Any) -> Any:
    """Messages whose image parts say only that an image stands there."""
    if isinstance(prompt, str):
        return prompt
    return [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [{k: part[k] for k in ("type", "text") if k in part} for part in message["content"]],
        }
        for message in prompt
    ]


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _paths(row: Mapping[str, Any]) -> list[str]:
    """Files that the row's images were opened from; images made in memory have none."""
    images = row.get("images") or [row.get("image")]
    known = [image.info.get(SOURCE) or getattr(image, "filename", "") for image in images if isinstance(image, Image)]
    return [str(path) for path in known if path]


def _plain(value: Any) -> bool:
    """Whether it can stand in a line of JSON; pictures and the like cannot."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
