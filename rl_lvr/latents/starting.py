"""Control of START in a completion: one type for engines, wire, command line and trainers. No torch in here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from rl_lvr.errors import UserError, near_miss

MOST_BIAS = 1000.0
"""Far more than any logit needs; a half-precision logit still holds the sum."""


class StartKind(StrEnum):
    """What is done to START."""

    FREE = "free"
    """Nothing: START is drawn like any other token."""
    FORCED = "forced"
    """The first token of the completion is START, written and not drawn. Later ones are drawn."""
    FORBIDDEN = "forbidden"
    """START cannot be drawn, and its probability is shared out."""
    BIAS = "bias"
    """A number is added to START's logit wherever START can be drawn."""


@dataclass(frozen=True)
class LatentStart:
    """How the START of latent spans comes about in one completion."""

    kind: StartKind = StartKind.FREE
    bias: float = 0.0
    """Added to START's logit; 0 unless `kind` is `BIAS`. A bias of 0 is the same as `FREE`."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.bias) and abs(self.bias) <= MOST_BIAS):
            raise UserError(
                f"latent_start has the bias {self.bias!r}; it must be from {-MOST_BIAS:g} to {MOST_BIAS:g}."
            )
        if self.bias and self.kind is not StartKind.BIAS:
            raise UserError(f"latent_start {self.kind.value!r} takes no number, and {self.bias!r} is given.")

    @classmethod
    def parse(cls, text: object) -> LatentStart:
        """Return what `free`, `forced`, `forbidden`, `bias X` or `bias=X` stands for."""
        words = text.replace("=", " ").split() if isinstance(text, str) else []
        if words[:1] == [StartKind.BIAS]:
            try:
                (number,) = words[1:]
                bias = float(number)
            except ValueError:
                raise UserError(f"latent_start is {text!r}; write bias and a number, as in 'bias 2.5'.") from None
            return cls(StartKind.BIAS, bias)
        known = [kind.value for kind in StartKind]
        if len(words) == 1 and words[0] in known:
            return cls(StartKind(words[0]))
        hint = near_miss(text, known, ": choose free, forced, forbidden or bias X.")
        raise UserError(f"latent_start is {text!r}{hint}")

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return self.kind.value if self.kind is not StartKind.BIAS else f"bias {self.bias!r}".removesuffix(".0")

    @property
    def forced(self) -> bool:
        return self.kind is StartKind.FORCED

    @property
    def forbidden(self) -> bool:
        return self.kind is StartKind.FORBIDDEN

    @property
    def biased(self) -> bool:
        """Whether tokens are drawn from another distribution than the model's."""
        return self.bias != 0.0


FREE = LatentStart()
