"""A checkpoint on a file of records, under interventions: accuracies, every answer, and signals of its own latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rl_lvr.answers import Verdict
from rl_lvr.data.check import require_valid
from rl_lvr.data.encoding import Encoder
from rl_lvr.data.records import load_records
from rl_lvr.errors import UserError
from rl_lvr.evaluation.accuracy import AnswerSet, Scored
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import LatentFormat, choose_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.models import load_processor, load_weights
from rl_lvr.models.loading import checkpoint_folder
from rl_lvr.progress import track
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.replay import replay_batch
from rl_lvr.rollout.types import Sampling
from rl_lvr.signals import measure, parse_signals


@dataclass(frozen=True)
class Evaluation:
    """Accuracy per condition over the same records."""

    records: list[str]
    answers: list[str]
    scored: dict[str, Scored]
    undefined: dict[str, str]
    """Conditions without a figure, and why."""
    signals: dict[str, float | None]
    """Means over the completions with own latents that have a value; None if none has."""

    @property
    def measures(self) -> dict[str, float | None]:
        """The signals, and with own latents their `collapse` (paper C, `rl_lvr.signals.between_samples`)."""
        own = self.scored.get(Intervention.OWN.value)
        if own is None:
            return dict(self.signals)
        collapse = own.collapse
        return {**self.signals, "collapse": None if collapse is None else collapse.cosine}

    def summary(self) -> dict[str, Any]:
        """Accuracies by condition, null where there is none, how many records they stand on, `measures`, and by
        condition the share of unreadable answers."""
        found = {name: s.accuracy for name, s in self.scored.items()}
        unreadable = {"unreadable": {name: s.unreadable for name, s in self.scored.items()}}
        return {"n": len(self.records), **found, **dict.fromkeys(self.undefined), **self.measures, **unreadable}

    def rows(self) -> list[dict[str, Any]]:
        """One row per record and condition."""
        return [
            {
                "id": record,
                "condition": name,
                "answer": answer,
                "text": text,
                "right": verdict is Verdict.RIGHT,
                "verdict": verdict.value,
            }
            for name, s in self.scored.items()
            for record, answer, text, verdict in zip(self.records, self.answers, s.texts, s.verdicts, strict=True)
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
    signals: Sequence[str | Mapping[str, Any]] = (),
) -> Evaluation:
    """Answer the records of `data_file` with the model under each condition, and measure `signals` on own latents.

    A checkpoint that was trained without latents needs `format_name` for the markers that the conditions speak of.
    """
    specs = parse_signals(signals)
    if specs and Intervention.OWN not in conditions:
        raise UserError("signals are measured on the model's own latents: add own to the conditions.")
    sampling = sampling or Sampling(max_tokens=64, temperature=0.0)
    records = load_records(data_file, limit)
    model_path = str(checkpoint_folder(model_path))
    latent_format = choose_format(format_name, LatentFormat.load(model_path), model_path)
    family, processor = load_processor(model_path)
    tokenizer = getattr(processor, "tokenizer", processor)
    markers = family.bind(latent_format, processor)
    with_oracle = Intervention.ORACLE in conditions
    encoder = Encoder(processor, family, markers if with_oracle else None)
    room = min(latent_format.span_tokens, sampling.max_tokens)
    require_valid(data_file, judge=partial(encoder.judge, learned=False, room=room))
    model = load_weights(model_path).to("cuda" if torch.cuda.is_available() else "cpu")
    attach_feedback(model, latent_format, Path(model_path))
    missing = next((r.id for r in records if r.answer is None), None)
    if missing is not None:
        raise UserError(f"record {missing!r} of {data_file} has no answer to compare with.")
    chunks = [records[i : i + batch_size] for i in range(0, len(records), batch_size)]
    encoded = [e for chunk in track(chunks, "processing records", unit="batches") for e in encoder.encode(list(chunk))]
    if with_oracle and not all(e.targets for e in encoded):
        raise UserError(f"{data_file} has records without latent targets: leave the condition oracle out.")
    answers = [r.answer or "" for r in records]
    questions = AnswerSet(encoded, answers, family, tokenizer, batch_size)
    engine = HFRolloutEngine(model, processor, latent_format, batch_size=batch_size, progress=True)
    found = questions.answer(engine, model, conditions, sampling)
    columns: dict[str, list[float]] = {spec.name: [] for spec in specs}
    if specs:
        rollouts = found.scored[Intervention.OWN.value].rollouts
        for start in track(range(0, len(rollouts), batch_size), "measuring signals", unit="batches"):
            rows = slice(start, start + batch_size)
            batch = replay_batch(model, rollouts[rows], [e.images for e in encoded[rows]])
            for name, column in measure(model, batch, markers, specs).columns.items():
                pairs = zip(column.values, column.counts, strict=True)
                columns[name] += [v for v, count in pairs if count and isinstance(v, float)]
    means = {name: sum(values) / len(values) if values else None for name, values in columns.items()}
    return Evaluation([r.id for r in records], answers, found.scored, found.undefined, means)
