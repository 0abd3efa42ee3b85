"""A checkpoint on a file of records, under interventions: accuracies and every answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rl_lvr.data.check import require_valid
from rl_lvr.data.encoding import Encoder
from rl_lvr.data.records import load_records
from rl_lvr.errors import UserError
from rl_lvr.evaluation.accuracy import AnswerSet, Scored
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import LatentFormat, choose_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.models import family_of, load_model
from rl_lvr.models.loading import checkpoint_folder
from rl_lvr.progress import track
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.types import Sampling


@dataclass(frozen=True)
class Evaluation:
    """Accuracy per condition over the same records."""

    records: list[str]
    answers: list[str]
    scored: dict[str, Scored]
    undefined: dict[str, str]
    """Conditions without a figure, and why."""

    def summary(self) -> dict[str, Any]:
        """Accuracies by condition, null where there is none, and how many records they stand on."""
        found = {name: s.accuracy for name, s in self.scored.items()}
        return {"n": len(self.records), **found, **dict.fromkeys(self.undefined)}

    def rows(self) -> list[dict[str, Any]]:
        """One row per record and condition."""
        return [
            {"id": record, "condition": name, "answer": answer, "text": text, "right": right}
            for name, s in self.scored.items()
            for record, answer, text, right in zip(self.records, self.answers, s.texts, s.right, strict=True)
        ]


def evaluate(
    model_path: str,
    data_file: str,
    conditions: Sequence[Intervention],
    *,
    format_name: str | None = None,
    limit: int | None = None,
    batch_size: int = 128,
    sampling: Sampling | None = None,
) -> Evaluation:
    """Answer the records of `data_file` with the model under each condition.

    A checkpoint that was trained without latents needs `format_name` for the markers that the conditions speak of.
    """
    require_valid(data_file)
    records = load_records(data_file, limit)
    model_path = str(checkpoint_folder(model_path))
    latent_format = choose_format(format_name, LatentFormat.load(model_path), model_path)
    model, processor = load_model(model_path, device="cuda" if torch.cuda.is_available() else "cpu")
    family = family_of(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    markers = latent_format.bind(tokenizer, family.placeholder_ids(tokenizer))
    attach_feedback(model, latent_format, Path(model_path))
    missing = next((r.id for r in records if r.answer is None), None)
    if missing is not None:
        raise UserError(f"record {missing!r} of {data_file} has no answer to compare with.")
    with_oracle = Intervention.ORACLE in conditions
    encoder = Encoder(processor, family, markers if with_oracle else None)
    chunks = [records[i : i + batch_size] for i in range(0, len(records), batch_size)]
    encoded = [e for chunk in track(chunks, "processing records", unit="batches") for e in encoder.encode(list(chunk))]
    if with_oracle and not all(e.targets for e in encoded):
        raise UserError(f"{data_file} has records without latent targets: leave the condition oracle out.")
    answers = [r.answer or "" for r in records]
    questions = AnswerSet(encoded, answers, family, tokenizer, batch_size)
    engine = HFRolloutEngine(model, processor, latent_format, batch_size=batch_size, progress=True)
    found = questions.answer(engine, model, conditions, sampling or Sampling(max_tokens=64, temperature=0.0))
    return Evaluation([r.id for r in records], answers, found.scored, found.undefined)
