"""`rl-lvr data check | make | show`: judge a data file, make puzzles, look at one record."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rl_lvr.errors import UserError
from rl_lvr.piping import pipeable
from rl_lvr.printable import printable

if TYPE_CHECKING:
    from rl_lvr.data.check import Judge, Report
    from rl_lvr.data.record import LatentSpec, Record

HELP = "check a data file, make puzzles, or look at one record"


def configure(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    check = actions.add_parser("check", help="name the line, field and cure of each bad record")
    check.add_argument("file", help=".jsonl or .parquet file, or a folder saved by datasets (folder:split)")
    check.add_argument("--limit", type=_positive, metavar="N", help="check the first N records only")
    check.add_argument("--max-errors", type=_positive, default=20, metavar="N", help="print the first N findings (20)")
    check.add_argument("--max-pixels", type=_positive, metavar="N", help="refuse images with more pixels (50000000)")
    check.add_argument("--k", type=_positive, metavar="K", help="each span must have 1 target or K")
    check.add_argument(
        "--model", metavar="FOLDER", help="also whether this model's tokenizer, template and image processor take them"
    )
    check.add_argument("--json", action="store_true", help="print the report as JSON")

    make = actions.add_parser("make", help="make a puzzle set")
    make.add_argument("kind", choices=("pointers",), help="what puzzles: pointers (docs/data.md)")
    make.add_argument("--out", required=True, metavar="DIR", help="folder of the set")
    make.add_argument("--hops", type=int, default=6, help="pointers to follow (6)")
    make.add_argument("--grid", type=_grid, default=(3, 4), metavar="RxC", help="rows x columns of cells (3x4)")
    make.add_argument("--cell-px", type=int, default=8, help="side of a cell in pixels, an even number (8)")
    make.add_argument("--latents", choices=("path", "decorative", "none"), default="path", help="targets (path)")
    make.add_argument("--k", type=int, help="latents of a decorative span (as many as hops)")
    make.add_argument("--train", type=_count, default=20_000, metavar="N", help="puzzles for training (20000)")
    make.add_argument("--val", type=_count, default=0, metavar="N", help="puzzles for validation (0)")
    make.add_argument("--test", type=_count, default=1_000, metavar="N", help="held-out puzzles (1000)")
    make.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (0)")
    make.add_argument("--format", choices=("parquet", "jsonl"), default="parquet", help="kind of file (parquet)")
    make.add_argument("--force", action="store_true", help="replace another set in DIR")

    show = actions.add_parser("show", help="print one record, and draw its targets")
    show.add_argument("file", help="as for check")
    show.add_argument("--index", type=int, default=0, metavar="I", help="which record, from 0; negative from the end")
    show.add_argument("--image", metavar="PNG", help="save its images, enlarged, with the latent targets drawn")
    show.add_argument("--scale", type=_positive, metavar="N", help="enlarge N times (to about 480 pixels)")


@pipeable
def run(args: argparse.Namespace) -> int:
    return {"check": _check, "make": _make, "show": _show}[args.action](args)


def _positive(text: str) -> int:
    value = _count(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _grid(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,3})x(\d{1,3})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not rows x columns, such as 3x4")
    return int(match[1]), int(match[2])


def _check(args: argparse.Namespace) -> int:
    from rl_lvr.data.check import check_records
    from rl_lvr.data.images import MAX_PIXELS

    report = check_records(
        args.file,
        limit=args.limit,
        max_pixels=args.max_pixels or MAX_PIXELS,
        targets_per_span=args.k,
        max_findings=args.max_errors,
        judge=None if args.model is None else _judge(args.model, args.k),
    )
    if args.json:
        print(json.dumps(report.to_json()))
    else:
        for finding in report.findings:
            print(printable(str(finding)))
        hidden = report.total_findings - len(report.findings)
        if hidden:
            print(f"... and {hidden} more findings (--max-errors shows more)")
        print(printable(_summary(report)))
    return 0 if report.ok else 2


def _judge(model: str, k: int | None) -> Judge:
    """What latent SFT of the model would refuse; records without an answer are judged as prompts."""
    from rl_lvr.data.encoding import Encoder
    from rl_lvr.latents.format import LatentFormat
    from rl_lvr.models.loading import checkpoint_folder, load_processor

    folder = checkpoint_folder(model)
    family, processor = load_processor(folder)
    format_ = LatentFormat.load(folder)
    markers = None
    if format_ is not None:
        format_ = format_ if k is None else replace(format_, k=k)
        markers = family.bind(format_, processor)
    encoder = Encoder(processor, family, markers)

    def judge(record: Record) -> None:
        encoder.judge(record, learned=not record.is_prompt_only)

    return judge


def _summary(report: Report) -> str:
    lines = [f"{report.path}: {report.records} records, {report.bad_records} bad, {report.images} images"]
    spans = f"latent spans: {report.spans}, targets given for {report.targets}"
    lines.append(f"{spans}; records that end with the question: {report.prompt_only}")
    if report.categories:
        lines.append("categories: " + _some([f"{name} {n}" for name, n in report.categories.most_common()]))
    if report.sizes:
        lines.append("image sizes: " + _some([f"{w}x{h} ({n})" for (w, h), n in report.sizes.most_common()]))
    total = report.total_findings
    lines.append("no findings" if report.ok else f"{total} finding{'s' if total > 1 else ''}")
    return "\n".join(lines)


def _some(items: list[str], count: int = 8) -> str:
    rest = len(items) - count
    return ", ".join(items[:count]) + (f" and {rest} more" if rest > 0 else "")


def _make(args: argparse.Namespace) -> int:
    from rl_lvr.data.puzzle_sets import make_pointers
    from rl_lvr.data.puzzles import PuzzleConfig

    rows, cols = args.grid
    config = PuzzleConfig(rows, cols, args.hops, args.cell_px, args.seed, args.latents, args.k)
    counts = {"train": args.train, "val": args.val, "test": args.test}
    manifest, made = make_pointers(config, counts, args.out, args.format, args.force)
    sizes = ", ".join(f"{split} {entry['records']}" for split, entry in manifest["splits"].items())
    state = "made" if made else "already there, unchanged"
    print(f"{args.out}: {state} ({sizes}; chance {manifest['chance']:.3f})")
    return 0


def _show(args: argparse.Namespace) -> int:
    from rl_lvr.data.records import load_records

    records = load_records(args.file)
    if not -len(records) <= args.index < len(records):
        raise UserError(f"{args.file} has {len(records)} records: --index {args.index} is outside.")
    record = records[args.index]
    print(printable("\n".join(_describe(record))))
    if args.image is not None:
        from rl_lvr.data.picture import draw_record

        picture = draw_record(record, args.scale)
        try:
            picture.save(args.image)
        except (OSError, ValueError) as error:  # ValueError: unknown file ending
            raise UserError(f"the image cannot be saved as {args.image} ({error}).") from error
        print(f"image saved as {args.image}", file=sys.stderr)
    return 0


def _describe(record: Record) -> list[str]:
    lines = [f"id        {record.id}"]
    if record.category is not None:
        lines.append(f"category  {record.category}")
    number = 0
    for message in record.messages:
        shown = ""
        for part in message["content"]:
            if part["type"] == "image":
                width, height = record.images[number].size()
                shown += f"[image {number}: {width}x{height}] "
                number += 1
            else:
                shown += part["text"]
        first, *rest = shown.splitlines() or [""]
        lines.append(f"{message['role']:<10}{first}")
        lines.extend(" " * 10 + line for line in rest)
    if record.answer is not None:
        lines.append(f"answer    {record.answer}")
    for index, spec in enumerate(record.latents or ()):
        lines.append(f"latents   span {index}: {_targets(spec)}")
    lines.extend(f"meta      {key}: {_value(value)}" for key, value in record.meta.items())
    return lines


def _targets(spec: LatentSpec) -> str:
    if spec.images is not None:
        return "images " + ", ".join(image.name or "(embedded)" for image in spec.images)
    if spec.cells is not None and spec.grid is not None:
        cells = " ".join(str(cell) for cell in spec.cells)
        return f"cells {cells} of the {spec.grid[0]}x{spec.grid[1]} grid on image {spec.image}"
    boxes = " ".join("(" + ", ".join(f"{v:g}" for v in box) + ")" for box in spec.boxes or ())
    return f"boxes {boxes} on image {spec.image}"


def _value(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(v, (str, int, float)) for v in value):
        return " ".join(str(v) for v in value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
