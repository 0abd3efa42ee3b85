"""How much the text after the latents attends to them (paper B, 2605.18641)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rl_lvr.answers import Kind, Source, correct


@dataclass(frozen=True)
class Attention:
    """Attention mass on the latents from the text after the last span, in decoder layer 0, mean over heads.

    Sum over latent keys, mean over queries; wrong answers receive it too, and it is 0 without such text. Paper B's
    r_attn to the letter is `paper_b_attention`. The options vary it: other `layers` and `heads` (null: all), `relative`
    to the mass on the image, `per: token`, which sums over the queries as adding each one's mass at its own token does,
    and `gate: correct`, 0 for a wrong answer.
    """

    layers: Sequence[int] | None = (0,)
    heads: Sequence[int] | None = None
    relative: bool = False
    per: Literal["completion", "token"] = "completion"
    gate: Literal["none", "correct"] = "none"
    kind: Kind = "auto"
    source: Source = "any"

    def __post_init__(self) -> None:
        if self.relative and self.per == "token":
            raise ValueError("relative and per: token exclude each other; choose one.")

    @property
    def column(self) -> str:
        """A name for each way to measure it, so that several can be used at once."""
        name = "attention_relative" if self.relative else "attention_mass"
        for letter, chosen in (("layers", self.layers), ("heads", self.heads)):
            if chosen is not None:
                name += f"_{letter}_" + "_".join(map(str, chosen)).replace("-", "m")
        return name + ("_per_token" if self.per == "token" else "")

    @property
    def signals(self) -> list[dict[str, Any]]:
        signal = "attention_relative" if self.relative else "attention_mass"
        parameters: dict[str, Any] = {"to": "slot", "queries": "after", "name": self.column}
        if self.layers is not None:
            parameters["layers"] = list(self.layers)
        if self.heads is not None:
            parameters["heads"] = list(self.heads)
        if self.per == "token":
            parameters["per"] = "token"
        return [{signal: parameters}]

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        values: list[float | None] = [sum(v) if self.per == "token" else v for v in columns[self.column]]
        if self.gate == "none":
            return values
        if "answer" not in columns:
            raise ValueError("gate: correct needs the column 'answer', which the data lacks.")
        right = correct(completions, columns["answer"], self.kind, self.source)
        return [None if r is None else v if r else 0.0 for v, r in zip(values, right, strict=True)]
