"""`rl-lvr evaluate`: does a checkpoint need its latents? The same questions under interventions, with intervals."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lvr.errors import UserError
from rl_lvr.rollout.options import ENGINES

if TYPE_CHECKING:
    from rl_lvr.evaluation.conditions import Condition
    from rl_lvr.evaluation.questions import Questions
    from rl_lvr.evaluation.rows import Rule
    from rl_lvr.latents.format import LatentFormat
    from rl_lvr.latents.interventions import Intervention
    from rl_lvr.rollout.types import Sampling

HELP = "answer a file of records under interventions on the latents, with intervals"
CONDITIONS = "own,zeros,noise,swap"
PICTURES = (".png", ".pdf", ".svg")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint")
    parser.add_argument("--data", required=True, metavar="FILE", help="records with answers")
    parser.add_argument(
        "--conditions", default=CONDITIONS, metavar="NAMES", help=f"separated by commas ({CONDITIONS}; docs/engines.md)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first records")
    parser.add_argument(
        "--out", metavar="FILE", help=".jsonl of the answers (runs/evaluate/MODEL-on-DATA.jsonl); figures stand beside"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw the accuracies with their intervals (.png, .pdf, .svg)")
    parser.add_argument("--overwrite", action="store_true", help="start anew instead of going on with --out")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--cluster", metavar="COLUMN", help="key of meta whose rows belong together (the record)")
    rows.add_argument("--category", metavar="COLUMN", help="key of meta to print tables by; `category` is the record's")
    answers = parser.add_argument_group("answers")
    answers.add_argument("--kind", choices=("auto", "choice", "numeric", "exact", "math"), default="auto")
    answers.add_argument("--source", choices=("any", "tags", "boxed", "line"), default="any")
    answers.add_argument("--tolerance", type=float, default=1e-6, help="relative, of numbers (1e-6)")
    latents = parser.add_argument_group("latents")
    latents.add_argument(
        "--format", metavar="NAME", help="latent format, for a checkpoint that was trained without one"
    )
    latents.add_argument("--k", type=int, metavar="K", help="latents per span (the format's)")
    latents.add_argument("--filler", metavar="TEXT", default=".", help="for plain_tokens: text of one token (.)")
    latents.add_argument(
        "--signals",
        default="",
        metavar="NAMES",
        help="to measure on own latents, separated by commas (docs/signals.md)",
    )
    drawing = parser.add_argument_group("sampling")
    drawing.add_argument("--samples", type=int, default=1, metavar="N", help="answers per question and condition (1)")
    drawing.add_argument("--max-tokens", type=int, default=64, metavar="N", help="length of an answer (64)")
    drawing.add_argument("--temperature", type=float, help="0 is greedy (0; with several samples 1)")
    drawing.add_argument("--top-p", type=float, default=1.0)
    drawing.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (0)")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument(
        "--latent-start",
        default="free",
        metavar="HOW",
        help="free, forced, forbidden or 'bias X': what is done to START in all conditions that do not say it (free)",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", choices=ENGINES, default="hf")
    engine.add_argument("--engine-options", default="{}", metavar="YAML", help="{name: value, ...} (docs/engines.md)")
    engine.add_argument("--url", help="of the engine server")
    engine.add_argument("--batch", type=int, default=128, metavar="N", help="rows decoded together (128)")
    engine.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's own choice)")


def run(args: argparse.Namespace) -> int:
    from rl_lvr.evaluation.conditions import parse_conditions
    from rl_lvr.evaluation.engines import check_options
    from rl_lvr.locking import file_held

    # All that can be refused without the model is refused before it is read.
    if args.batch < 1:
        raise UserError(f"--batch is {args.batch}; it must be at least 1.")
    conditions = parse_conditions(args.conditions)
    if not conditions:
        raise UserError(f"--conditions names none: write them as {CONDITIONS}.")
    options = check_options(args.engine, _options(args))
    if args.picture is not None and Path(args.picture).suffix not in PICTURES:
        raise UserError(f"--picture is {args.picture}; name a file that ends in {', '.join(PICTURES)}.")
    out = _out(args)
    with file_held(out.with_name(f".{out.name}.lock"), "rl-lvr evaluate", f"--out {out}"):
        return _evaluate(args, conditions, options, out)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    import yaml

    from rl_lvr.settings_files import read_yaml

    try:
        options = read_yaml(args.engine_options, "--engine-options")
    except yaml.YAMLError as error:
        raise UserError(f"--engine-options is no YAML ({error}).") from error
    if not isinstance(options, Mapping):
        raise UserError(f"--engine-options is {args.engine_options!r}; write {{name: value, ...}}.")
    if args.url is not None and args.engine != "server":
        raise UserError(f"--url is for the engine server, not {args.engine}: leave it out, or add --engine server.")
    return {**options, **({} if args.url is None else {"url": args.url})}


def _out(args: argparse.Namespace) -> Path:
    if args.out is None:
        data = Path(args.data)
        return Path(
            "runs", "evaluate", f"{Path(args.model).resolve().name}-on-{data.resolve().parent.name}-{data.stem}.jsonl"
        )
    out = Path(args.out)
    if out.suffix != ".jsonl":
        raise UserError(f"--out is {out}; name a .jsonl file.")
    return out


def _evaluate(args: argparse.Namespace, conditions: Sequence[Condition], options: dict[str, Any], out: Path) -> int:
    from functools import partial

    import torch

    from rl_lvr import quiet
    from rl_lvr.data.check import require_valid
    from rl_lvr.data.encoding import Encoder
    from rl_lvr.data.records import load_records
    from rl_lvr.evaluation.conditions import filler_id
    from rl_lvr.evaluation.engines import load_for, open_engine
    from rl_lvr.evaluation.evaluate import Judge, Signals, evaluate
    from rl_lvr.evaluation.picture import draw, panel_of
    from rl_lvr.evaluation.plan import Plan
    from rl_lvr.evaluation.questions import questions_of
    from rl_lvr.evaluation.report import text_of
    from rl_lvr.evaluation.rows import AnswerFile, Rule, read_rows
    from rl_lvr.latents.format import LatentFormat, choose_format
    from rl_lvr.latents.interventions import Intervention
    from rl_lvr.models.loading import checkpoint_folder, load_processor
    from rl_lvr.signals import parse_signals

    quiet.transformers()
    if args.threads:
        torch.set_num_threads(args.threads)
    specs = parse_signals([name.strip() for name in args.signals.split(",") if name.strip()])
    kinds = {condition.intervention for condition in conditions}
    if specs and Intervention.OWN not in kinds:
        raise UserError("signals are measured on the model's own latents: add own to --conditions.")
    sampling = _sampling(args)
    records = load_records(args.data, args.limit)
    folder = checkpoint_folder(args.model)
    changes = {} if args.k is None else {"k": args.k}
    latent_format = choose_format(args.format, LatentFormat.load(folder), folder, **changes)
    family, processor = load_processor(folder)
    with_oracle = Intervention.ORACLE in kinds
    encoder = Encoder(processor, family, family.bind(latent_format, processor) if with_oracle else None)
    room = min(latent_format.span_tokens, sampling.max_tokens)
    require_valid(args.data, judge=partial(encoder.judge, learned=False, room=room))
    questions = questions_of(records, encoder, cluster=args.cluster, category=args.category)
    rule = Rule(args.kind, args.source, args.tolerance)
    rule.require_readable(questions.answers)
    settings = _settings(args, folder, latent_format, sampling, rule, kinds)
    file = AnswerFile(out, settings, overwrite=args.overwrite)
    if args.engine == "hf" or with_oracle or specs:
        model = load_for(folder, latent_format)
    plan = Plan(
        questions,
        conditions,
        sampling,
        samples=args.samples,
        filler_id=filler_id(args.filler, encoder.tokenizer) if Intervention.PLAIN_TOKENS in kinds else None,
        oracles=(lambda rows: questions.oracles(model, rows)) if with_oracle else None,
        at_once=max(args.batch, len(conditions)) * (1 if args.engine == "hf" else 4),
    )
    engine = open_engine(
        args.engine,
        options,
        folder=folder,
        processor=processor,
        latent_format=latent_format,
        model=model if args.engine == "hf" else None,
        batch_size=args.batch,
        max_model_len=lambda: _longest(questions) + args.max_tokens + 1,
    )
    try:
        signals = Signals(specs, model, engine.markers, args.batch) if specs else None
        judge = Judge(encoder.tokenizer, engine.markers, rule)
        summary = evaluate(engine, plan, judge, file, signals=signals)
    except KeyboardInterrupt:
        count = len(read_rows(out)) if out.is_file() else 0
        said = f"rl-lvr: stopped; {out} holds {count} answers, and the same command goes on from there."
        print(said, file=sys.stderr)
        return 130
    finally:
        engine.close()
    print(text_of(summary))
    print(out)
    if args.picture is not None:
        title = f"{Path(args.model).resolve().name} on {Path(args.data).stem}"
        draw([panel_of(title, summary["conditions"])], Path(args.picture), f"accuracy on {summary['records']} records")
        print(args.picture)
    return 0


def _sampling(args: argparse.Namespace) -> Sampling:
    from rl_lvr.latents.starting import LatentStart
    from rl_lvr.rollout.types import Sampling

    return Sampling(
        max_tokens=args.max_tokens,
        temperature=float(args.samples > 1) if args.temperature is None else args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        latent_start=LatentStart.parse(args.latent_start),
    )


def _settings(
    args: argparse.Namespace,
    folder: Path,
    latent_format: LatentFormat,
    sampling: Sampling,
    rule: Rule,
    kinds: Collection[Intervention],
) -> dict[str, Any]:
    """What all rows of one file have in common."""
    from dataclasses import asdict

    from rl_lvr.evaluation.stamps import stamp_of_data, stamp_of_weights
    from rl_lvr.latents.interventions import Intervention

    return {
        "weights": stamp_of_weights(folder),
        "data": stamp_of_data(Path(args.data)),
        "format": asdict(latent_format),
        "sampling": {name: _plain(getattr(sampling, name)) for name in vars(sampling)},
        "rule": asdict(rule),
        "engine": args.engine,
        "cluster": args.cluster,
        "category": args.category,
        "signals": args.signals,
        **({"filler": args.filler} if Intervention.PLAIN_TOKENS in kinds else {}),
    }


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value if isinstance(value, int | float | str) else str(value)


def _longest(questions: Questions) -> int:
    """Tokens of the longest prompt."""
    from rl_lvr.progress import track

    return max(
        len(questions.requests([row])[0].prompt_ids) for row in track(range(len(questions)), "measuring prompts")
    )
