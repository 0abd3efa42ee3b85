"""LatentFormat: the marker tokens of a latent span, its length policy and its feedback map.

A format is text only; `FormatIds` is the same format bound to one tokenizer. Nothing here holds a token id of
its own: Monet and LVR give the same numbers different meanings (docs/formats.md).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from rl_lvr.errors import UserError, near_miss

FORMAT_FILE = "latent_format.json"

LENGTHS = ("fixed", "free")
FIRSTS = ("at_start", "before_start")
FEEDBACKS = ("hidden", "none")
PROJECTORS = ("none", "linear", "mlp")
NORMS = ("none", "embedding")


@dataclass(frozen=True)
class LatentFormat:
    """How latents are written down, and how a hidden state becomes the next latent.

    `k` counts the vectors fed in one span. Recorded tokens of a span: START, SLOT x n, END, where n = k if the
    first latent sits at the first slot (`at_start`) and n = k - 1 if it replaces START's own embedding
    (`before_start`, Monet's inference runner; research notes call it "marker overwritten").
    """

    name: str
    slot: str
    start: str | None = None
    end: str | None = None
    k: int = 8
    length: Literal["fixed", "free"] = "fixed"
    """`fixed`: exactly k latents. `free`: END against anything else is sampled at every latent, k is the cap."""
    first: Literal["at_start", "before_start"] = "at_start"
    feedback: Literal["hidden", "none"] = "hidden"
    """`hidden`: the post-final-norm state of the previous position. `none`: slots are learned or optimised."""
    projector: Literal["none", "linear", "mlp"] = "none"
    norm: Literal["none", "embedding"] = "none"
    """`embedding`: rescale every latent to the mean norm of the token embeddings."""
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("name", "slot", "start", "end"):
            value = getattr(self, name)
            optional = name in ("start", "end")
            if not (isinstance(value, str) and value) and not (optional and value is None):
                cure = " (leave it out if the format has none)" if optional else ""
                raise UserError(
                    f"latent format {self.name!r}: {name} is {value!r}; it must be a text that is not empty{cure}."
                )
        for name, allowed in (
            ("length", LENGTHS),
            ("first", FIRSTS),
            ("feedback", FEEDBACKS),
            ("projector", PROJECTORS),
            ("norm", NORMS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(f"latent format {self.name!r}: {name} is {value!r}; choose {' or '.join(allowed)}.")
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k <= 0:
            raise UserError(f"latent format {self.name!r}: k is {self.k!r}; it must be a whole number above 0.")
        if (self.start is None) != (self.end is None):
            raise UserError(f"latent format {self.name!r} needs both a start and an end token, or neither.")
        if self.start is None and self.feedback == "hidden":
            raise UserError(
                f"latent format {self.name!r} feeds hidden states back but has no start and end token: "
                "give both, or set feedback to none."
            )
        if self.start is None and (self.length == "free" or self.first == "before_start"):
            what = "ends its spans freely" if self.length == "free" else "puts the first latent on its start token"
            raise UserError(
                f"latent format {self.name!r} {what} but has no start and end token: "
                "give both, or use length fixed and first at_start."
            )
        if self.feedback == "none" and self.projector != "none":
            raise UserError(
                f"latent format {self.name!r} has a projector but feeds nothing back: "
                "set projector to none, or feedback to hidden."
            )
        if len(set(self.tokens)) != len(self.tokens):
            raise UserError(f"latent format {self.name!r} uses one token twice: {', '.join(self.tokens)}.")

    @property
    def tokens(self) -> tuple[str, ...]:
        """Marker tokens in the order START, SLOT, END, without those that the format does not have."""
        return tuple(t for t in (self.start, self.slot, self.end) if t is not None)

    @property
    def slots(self) -> int:
        """SLOT tokens in a full span of k latents."""
        return self.slots_of(self.k)

    def slots_of(self, k: int) -> int:
        """SLOT tokens in a span of k latents. `before_start`: START holds one, so k = 0 and 1 both have none."""
        if k < 0:
            raise ValueError(f"a span cannot hold {k} latents.")
        return max(k - 1, 0) if self.first == "before_start" else k

    def text(self, k: int | None = None) -> str:
        """A span of k latents as text."""
        count = self.slots_of(self.k if k is None else k)
        return (self.start or "") + self.slot * count + (self.end or "")

    # ---- bound to a tokenizer

    @property
    def span_tokens(self) -> int:
        """Tokens of a full span of k latents, markers included."""
        return (self.start is not None) + self.slots + (self.end is not None)

    def most_latents(self, tokens: int) -> int:
        """The most latents that a completion of `tokens` tokens can hold: one span after another, the last one cut."""
        if self.feedback == "none":
            return 0
        whole, rest = divmod(tokens, self.span_tokens)
        head = 1 if self.start is not None and self.first == "at_start" else 0
        return whole * self.k + min(self.k, max(rest - head, 0))

    def require_room(self, positions: int) -> None:
        """Refuse a k whose span no sequence of `positions` tokens can hold behind a prompt."""
        if self.span_tokens >= positions:
            raise UserError(
                f"k is {self.k}: a span takes {self.span_tokens} tokens with its markers, and the model takes "
                f"{positions} positions, prompt included. Set a smaller k (latent_k in a recipe, --k elsewhere)."
            )

    def missing_tokens(self, tokenizer: Any) -> list[str]:
        """Marker tokens that the tokenizer does not hold as single tokens.

        An entry of the vocabulary is not enough: one that the tokenizer never makes from text cannot be a marker.
        """
        vocabulary = tokenizer.get_vocab()
        return [
            token
            for token in self.tokens
            if token not in vocabulary or tokenizer(token, add_special_tokens=False)["input_ids"] != [vocabulary[token]]
        ]

    def add_tokens(self, tokenizer: Any) -> int:
        """Add the missing marker tokens as special tokens; returns how many.

        The embedding must then grow to `len(tokenizer)` rows, if it has fewer: Qwen's has rows to spare, and a
        resize to `len(tokenizer)` would cut those off.
        """
        missing = self.missing_tokens(tokenizer)
        return (
            tokenizer.add_special_tokens({"additional_special_tokens": missing}, replace_extra_special_tokens=False)
            if missing
            else 0
        )

    def bind(self, tokenizer: Any, placeholders: dict[str, int] | None = None) -> FormatIds:
        """Token ids of the markers. `placeholders` are the family's image tokens and the like, by name."""
        missing = self.missing_tokens(tokenizer)
        if missing:
            raise UserError(
                f"the tokenizer has no token {', '.join(missing)} of latent format {self.name!r}: "
                "set add_marker_tokens to true to add and train them, "
                "or choose the format the checkpoint was trained with."
            )
        ids = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in self.tokens}
        if len(set(ids.values())) != len(ids):
            raise UserError(f"latent format {self.name!r}: two markers have the same token id: {ids}.")
        placeholders = placeholders or {}
        for token, index in ids.items():
            for what, other in placeholders.items():
                if index == other:
                    raise UserError(
                        f"latent format {self.name!r} uses {token!r}, which is the model's {what} token: "
                        "a latent needs a token of its own."
                    )
        return FormatIds(
            format=self,
            start=ids[self.start] if self.start is not None else None,
            slot=ids[self.slot],
            end=ids[self.end] if self.end is not None else None,
            placeholders=tuple(sorted(set(placeholders.values()))),
        )

    # ---- beside a checkpoint

    def save(self, folder: str | Path) -> None:
        """Write the format beside a checkpoint, so that no other one is used with it by mistake."""
        text = json.dumps(asdict(self), indent=1)
        (Path(folder) / FORMAT_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> LatentFormat | None:
        """The format a checkpoint was trained with; None if it was not trained with latents."""
        path = Path(folder) / FORMAT_FILE
        if not path.is_file():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no text file ({error.reason} at byte {error.start}).") from error
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is no valid JSON ({error.msg}, line {error.lineno}).") from error
        known = {f.name for f in fields(cls)}
        if not isinstance(values, dict) or not {"name", "slot"} <= set(values) <= known:
            raise UserError(f"{path} does not describe a latent format: expected the keys {', '.join(sorted(known))}.")
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def check_against(self, other: LatentFormat, folder: str | Path) -> None:
        """Refuse a format that disagrees with a checkpoint's own in anything that changes what the model sees."""
        for name in ("start", "slot", "end", "first", "feedback", "projector", "norm"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise UserError(
                    f"the checkpoint in {folder} was trained with latent format {other.name!r} ({name}: {theirs!r}), "
                    f"not {self.name!r} ({name}: {mine!r}): use its format, or start from another checkpoint."
                )


@dataclass(frozen=True)
class FormatIds:
    """A LatentFormat bound to one tokenizer."""

    format: LatentFormat
    start: int | None
    slot: int
    end: int | None
    placeholders: tuple[int, ...] = ()
    """Ids of image, video and vision markers: one of them sampled breaks the training forward of a whole batch."""

    @property
    def never_sampled(self) -> tuple[int, ...]:
        """Ids that no sampler may produce anywhere. SLOT and END are written by the engine alone."""
        extra = () if self.end is None else (self.end,)
        return tuple(sorted({*self.placeholders, self.slot, *extra}))

    def span(self, k: int | None = None) -> list[int]:
        """Token ids of one full span of k latents."""
        count = self.format.slots_of(self.format.k if k is None else k)
        head = [] if self.start is None else [self.start]
        return head + [self.slot] * count + ([] if self.end is None else [self.end])


PRESETS: dict[str, LatentFormat] = {
    preset.name: preset
    for preset in (
        LatentFormat(
            "lvr",
            "<|lvr|>",
            "<|lvr_start|>",
            "<|lvr_end|>",
            k=8,
            source="LVR (2509.24251), steps decoding with a fixed K",
        ),
        LatentFormat(
            "lantern",
            "<|lvr_sep|>",
            "<|lvr_start|>",
            "<|lvr_end|>",
            k=8,
            source="LanteRn (2603.25629) and paper C (2605.18445)",
        ),
        LatentFormat(
            "monet",
            "<abs_vis_token_pad>",
            "<abs_vis_token>",
            "</abs_vis_token>",
            k=10,
            length="free",
            first="before_start",
            source="Monet (2511.21395) at inference: K counts the overwritten start marker; 8 in its SFT",
        ),
        LatentFormat(
            "mirage",
            "<|latent_pad|>",
            "<|latent_start|>",
            "<|latent_end|>",
            k=4,
            source="Mirage (2506.17218)",
        ),
        LatentFormat(
            "skila",
            "<|skila|>",
            "<|sketch_start|>",
            "<|sketch_end|>",
            k=54,
            length="free",
            source="SkiLa (2512.16584): trained with 27 per image, runs until its end token, hard cap 54",
        ),
        LatentFormat("ilvr", "<|latent_pad|>", "<|latent_start|>", "<|latent_end|>", k=8, source="ILVR (2512.05665)"),
        LatentFormat(
            "slots",
            "<|latent_slot|>",
            k=4,
            feedback="none",
            source="learned or optimised slots without feedback, as LaViT (2601.10129) and paper A (2605.02735)",
        ),
    )
}


def get_format(name: str, **changes: Any) -> LatentFormat:
    """A preset by name, with some fields changed: ``get_format("lvr", k=6)``."""
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"no latent format {name!r}{near_miss(name, PRESETS)} Presets: {', '.join(PRESETS)}.")
    known = {f.name for f in fields(LatentFormat)}
    for key in changes:
        if key not in known:
            raise UserError(
                f"a latent format has no field {key!r}{near_miss(key, known)} Fields: {', '.join(sorted(known))}."
            )
    return replace(PRESETS[name], **changes)


def choose_format(name: str | None, stored: LatentFormat | None, folder: str | Path, **changes: Any) -> LatentFormat:
    """The format to use with a checkpoint: its own (`stored`), else the preset `name`, with some fields changed.

    A checkpoint's own format keeps its k and length where `name` only repeats it. A format that disagrees with the
    checkpoint's is refused.
    """
    if stored is None:
        if name is None:
            raise UserError(
                f"{folder} does not say which latent format it was trained with: name one with --format, or as "
                f"latent_format in a recipe ({', '.join(PRESETS)})."
            )
        return get_format(name, **changes)
    chosen = replace(stored, **changes) if name in (None, stored.name) else get_format(name, **changes)
    chosen.check_against(stored, folder)
    return chosen
