"""`rl-lvr generate`: answer one question about images from the shell, with latents and an intervention of choice."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lvr.errors import UserError

if TYPE_CHECKING:
    from rl_lvr.data.encoding import Encoder
    from rl_lvr.data.record import Record
    from rl_lvr.latents.format import LatentFormat
    from rl_lvr.rollout.types import Rollout

HELP = "answer one question about images, with latents and an intervention of choice"

# Written out because the enum's module stands beside torch; a test holds the two together.
INTERVENTIONS = (
    *("own", "zeros", "noise", "unit_noise", "mean", "swap", "given", "oracle"),
    *("skip", "none", "markers_only", "plain_tokens"),
)
FROM_FILE = ("mean", "swap", "given")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint")
    parser.add_argument("--question", required=True, metavar="TEXT", help="what to ask")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image; may be repeated")
    latents = parser.add_argument_group("latents")
    latents.add_argument("--format", metavar="NAME", help="latent format (the one stored beside the checkpoint)")
    latents.add_argument("--k", type=int, metavar="K", help="latents per span (the format's)")
    latents.add_argument(
        "--intervention", choices=INTERVENTIONS, default="own", metavar="NAME", help=f"{', '.join(INTERVENTIONS)} (own)"
    )
    latents.add_argument(
        "--oracle-box",
        action="append",
        type=_box,
        default=[],
        metavar="X0,Y0,X1,Y1",
        help="for oracle: the evidence on the first image, in pixels; may be repeated",
    )
    latents.add_argument(
        "--vectors", metavar="FILE", help="for given, swap (first row) and mean (over rows): a file of --save-latents"
    )
    latents.add_argument("--filler", metavar="TEXT", default=".", help="for plain_tokens: text of one token (.)")
    latents.add_argument(
        "--latent-start",
        default="free",
        metavar="HOW",
        help="the start token of spans: free, forced as the first token, forbidden, or 'bias X' on its logit (free)",
    )
    latents.add_argument("--sigma", type=float, default=0.0, help="exploration noise on own latents (0)")
    latents.add_argument("--save-latents", metavar="FILE", help="write the fed vectors as safetensors")
    drawing = parser.add_argument_group("sampling")
    drawing.add_argument("--max-tokens", type=int, default=256, metavar="N", help="length of the answer (256)")
    drawing.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    drawing.add_argument("--top-p", type=float, default=1.0)
    drawing.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (0)")
    drawing.add_argument("--min-p", type=float, default=0.0)
    drawing.add_argument("--repetition-penalty", type=float, default=1.0)
    drawing.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop string; may be repeated")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--n", type=int, default=1, help="answers, with seeds SEED, SEED + 1, ... (1)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (a GPU if there is one)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    from rl_lvr.latents.feedback import attach_feedback
    from rl_lvr.latents.starting import LatentStart
    from rl_lvr.models.loading import checkpoint_folder, load_processor, load_weights
    from rl_lvr.rollout.types import Sampling, latent_batch

    # All that can be refused without the model is refused before it is read.
    sampling = Sampling(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        sigma=args.sigma,
        latent_start=LatentStart.parse(args.latent_start),
    )
    _check(args)
    folder = checkpoint_folder(args.model)
    format_ = _format(args, folder)

    import torch

    from rl_lvr import quiet
    from rl_lvr.rollout.hf import HFRolloutEngine

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used here ({str(error).splitlines()[0]}).") from error
    quiet.transformers()
    family, processor = load_processor(folder)
    record, encoder = _question(args, format_, family, processor)
    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    model = load_weights(folder, dtype=dtype).to(device)
    attach_feedback(model, format_, folder)
    engine = HFRolloutEngine(model, processor, format_, progress=True)
    requests = _requests(args, engine, record, encoder)
    rollouts = engine.generate(requests, sampling)
    if args.save_latents:
        latent_batch(rollouts).save(args.save_latents)
    _print(args, engine, rollouts)
    return 0


# ---- what was asked for


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        x0, y0, x1, y1 = (float(edge) for edge in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no box: write X0,Y0,X1,Y1 in pixels") from None
    return x0, y0, x1, y1


def _check(args: argparse.Namespace) -> None:
    if args.n < 1:
        raise UserError(f"n is {args.n}; it must be at least 1.")
    if (args.intervention == "oracle") != bool(args.oracle_box):
        raise UserError("intervention 'oracle' and --oracle-box go together: give both or neither.")
    if args.oracle_box and not args.image:
        raise UserError("--oracle-box needs an image: name it with --image.")
    if (args.intervention in FROM_FILE) != bool(args.vectors):
        raise UserError(
            f"--vectors goes with the interventions {', '.join(FROM_FILE)}, which need it: give both or none."
        )
    from rl_lvr.data.images import ImageRef

    for path in args.image:
        ImageRef(path).size()
    if args.save_latents:
        path = Path(args.save_latents)
        if path.exists():
            raise UserError(f"{path} exists: choose another file for --save-latents, or delete it first.")
        if not path.parent.is_dir():
            raise UserError(f"there is no folder {str(path.parent)!r} for --save-latents: create it first.")


def _format(args: argparse.Namespace, folder: Path) -> LatentFormat:
    from rl_lvr.latents.format import LatentFormat, choose_format

    changes = {} if args.k is None else {"k": args.k}
    return choose_format(args.format, LatentFormat.load(folder), folder, **changes)


def _question(args: argparse.Namespace, format_: LatentFormat, family: Any, processor: Any) -> tuple[Record, Encoder]:
    """The question as a record that the model can take, and what encodes it: the same as in training, so that it is
    written exactly as the model learned it."""
    from rl_lvr.data.encoding import Encoder
    from rl_lvr.data.images import ImageRef
    from rl_lvr.data.record import Record
    from rl_lvr.data.sources import RowError

    content = [{"type": "image"} for _ in args.image] + [{"type": "text", "text": args.question}]
    record = Record(
        id="question",
        messages=({"role": "user", "content": content},),
        images=tuple(ImageRef(path) for path in args.image),
    )
    encoder = Encoder(processor, family, family.bind(format_, processor))
    try:
        encoder.judge(record, learned=False, room=min(format_.span_tokens, args.max_tokens))
    except RowError as error:
        where, what, cure = error.problem
        if where.startswith("images["):
            where = f"--image {args.image[int(where[7:-1])]}"
        raise UserError(f"{where.replace('messages[0].content', '--question')}: {what}; {cure}.") from error
    return record, encoder


def _requests(args: argparse.Namespace, engine: Any, record: Record, encoder: Encoder) -> list[Any]:
    """The question, once for each answer that is wanted."""
    from rl_lvr.evaluation.conditions import filler_id
    from rl_lvr.latents.interventions import Intervention
    from rl_lvr.rollout.types import Request

    ((ids, images),) = encoder.prompts([record])
    pictures = tuple(image.open() for image in record.images)
    kind = Intervention(args.intervention)
    vectors = None
    if args.vectors:
        vectors = _vectors(args)
    elif args.oracle_box:
        vectors = _oracle(args, engine, images, record.images[0].size())
    filler = filler_id(args.filler, engine.tokenizer) if kind is Intervention.PLAIN_TOKENS else None
    return [
        Request(
            ids,
            images,
            pictures=pictures,
            intervention=kind,
            vectors=vectors,
            seed=args.seed + i,
            k=engine.format.k,
            filler_id=filler,
        )
        for i in range(args.n)
    ]


def _vectors(args: argparse.Namespace) -> Any:
    from rl_lvr.evaluation.conditions import mean_latents
    from rl_lvr.latents.batch import LatentBatch

    batch = LatentBatch.load(args.vectors)
    rows = [batch.row(i)[0] for i in range(len(batch))]
    if not rows or not len(rows[0]):
        raise UserError(f"{args.vectors} holds no latents in its first row.")
    return mean_latents(rows) if args.intervention == "mean" else rows[0]


def _oracle(args: argparse.Namespace, engine: Any, images: dict[str, Any], size: tuple[int, int]) -> Any:
    from rl_lvr.forward.batch import batch_images
    from rl_lvr.models import family_of
    from rl_lvr.models.oracle import box_oracle

    width, height = size
    for x0, y0, x1, y1 in args.oracle_box:
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise UserError(
                f"box {x0:g},{y0:g},{x1:g},{y1:g} is no region of the image of {width} x {height} pixels: "
                "it must be X0,Y0,X1,Y1 with X0 < X1 and Y0 < Y1."
            )
    boxes = [(x0 / width, y0 / height, x1 / width, y1 / height) for x0, y0, x1, y1 in args.oracle_box]
    family = family_of(engine.model)
    inputs = batch_images(family, engine.model, [images])
    features = family.image_features(engine.model, inputs)[0]
    return box_oracle(features, family.token_grid(inputs)[0], boxes, engine.format.k).cpu()


# ---- what came out


def _print(args: argparse.Namespace, engine: Any, rollouts: Sequence[Rollout]) -> None:
    from rl_lvr.latents.text import completion_text
    from rl_lvr.rollout.readable import readable
    from rl_lvr.rollout.types import describe

    answers = []
    for rollout in rollouts:
        answers.append(
            {
                "text": readable(rollout, engine.tokenizer, engine.markers),
                "answer": completion_text(rollout.completion_ids, engine.tokenizer, engine.markers),
                "latents": len(rollout.latent_positions),
                "latent_norms": [round(x, 4) for x in rollout.latents.float().norm(dim=-1).tolist()],
                **describe(rollout),
            }
        )
    if args.json:
        question = {"model": args.model, "format": engine.format.name, "question": args.question, "images": args.image}
        print(json.dumps({**question, "answers": answers}, ensure_ascii=False))
        return
    for answer in answers:
        norms = answer["latent_norms"]
        facts = [
            f"stopped by {answer['stop_reason']}",
            f"{len(answer['completion_ids'])} tokens",
            f"{answer['latents']} latents" + (f" of norm {min(norms):.3g} to {max(norms):.3g}" if norms else ""),
            f"intervention {answer['intervention']}",
            *([] if answer["latent_start"] == "free" else [f"latent_start {answer['latent_start']}"]),
            f"seed {answer['seed']}",
        ]
        print(answer["text"])
        print(f"  [{', '.join(facts)}]")
