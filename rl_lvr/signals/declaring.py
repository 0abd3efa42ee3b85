"""What a definition of a signal says of itself: the parts of a pass that it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from rl_lvr.errors import UserError
from rl_lvr.signals.probe import Reading
from rl_lvr.signals.regions import Queries

ATTRIBUTE = "signal_needs"
Definition = TypeVar("Definition", bound=Callable[..., Any])


@dataclass(frozen=True)
class Needs:
    """What a signal reads of a pass. Only this is measured for it, and its `Forward` holds nothing else.

    The regions, the spans and the final hidden states are always there.
    """

    readings: tuple[Reading, ...] = ()
    """What the probe reads."""
    queries: tuple[Queries, ...] = ()
    """Query sets at which the probe reads it."""
    vocabulary: bool = False
    """Next-token distributions: `Forward.vocabulary`."""
    inputs: bool = False
    """What enters the first layer at latents and image tokens: `Forward.vectors("input", ...)`."""
    end: bool = False
    """A latent format with an END token."""

    def __post_init__(self) -> None:
        wrong = [which for which in self.queries if which not in get_args(Queries)]
        if wrong:
            raise ValueError(f"no query set {wrong[0]!r}: choose {', '.join(get_args(Queries))}.")
        if bool(self.readings) != bool(self.queries):
            raise ValueError(f"readings {self.readings} at queries {self.queries}: give both, or neither.")


HIDDEN_STATES = Needs()


def signal(
    needs: Needs | Callable[[Mapping[str, Any]], Needs] = HIDDEN_STATES,
) -> Callable[[Definition], Definition]:
    """Declare a function to be the definition of a signal.

    The function takes a `Forward`, and parameters that a recipe may set. It returns `Values`. It is a pure function of
    them, and what it returns carries gradients where the pass does (`signal_tensors`).

    Args:
        needs: What it reads, or a function from its parameters (given and default) to what it reads.

    Example::

        @signal(Needs(vocabulary=True))
        def latent_certainty(f: Forward, *, k: int = 10) -> Values:
            rows, mass = f.at_latents(f.vocabulary(k).top1)
            return f.per_sequence(mass, rows)
    """

    def declare(function: Definition) -> Definition:
        setattr(function, ATTRIBUTE, needs)
        return function

    return declare


def declared(function: Callable[..., Any]) -> bool:
    """Whether `function` carries a declaration."""
    return hasattr(function, ATTRIBUTE)


def needs_of(what: str, function: Callable[..., Any], parameters: Mapping[str, Any]) -> Needs:
    """What `function` reads under all its `parameters`; `what` names it in messages."""
    needs = getattr(function, ATTRIBUTE, None)
    if callable(needs):
        try:
            needs = needs(parameters)
        except Exception as error:  # a function of others may fail in any way
            raise UserError(f"{what}: what it needs cannot be computed ({type(error).__name__}: {error}).") from error
    if not isinstance(needs, Needs):
        raise UserError(f"{what} declares {needs!r}; it must be Needs(...), or a function that returns it.")
    return needs
