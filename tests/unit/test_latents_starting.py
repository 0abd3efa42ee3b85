"""The text of `latent_start`: what goes in comes out, and anything else is refused in a sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_lvr.errors import UserError
from rl_lvr.latents.starting import FREE, MOST_BIAS, LatentStart, StartKind

biases = st.floats(-MOST_BIAS, MOST_BIAS)
plain = st.sampled_from([LatentStart(kind) for kind in StartKind])


@given(start=plain | biases.map(lambda bias: LatentStart(StartKind.BIAS, bias)))
def test_text_and_back(start: LatentStart) -> None:
    assert LatentStart.parse(str(start)) == start
    assert LatentStart.parse(str(start).replace(" ", "=")) == start


@pytest.mark.parametrize(
    ("text", "kind", "bias", "shown"),
    [
        ("free", "free", 0.0, "free"),
        (" forced ", "forced", 0.0, "forced"),
        ("forbidden", "forbidden", 0.0, "forbidden"),
        ("bias 2.5", "bias", 2.5, "bias 2.5"),
        ("bias = -3", "bias", -3.0, "bias -3"),
        ("bias 0", "bias", 0.0, "bias 0"),
    ],
)
def test_what_the_words_say(text: str, kind: str, bias: float, shown: str) -> None:
    start = LatentStart.parse(text)
    assert (start.kind.value, start.bias, str(start)) == (kind, bias, shown)
    assert (start.forced, start.forbidden, start.biased) == (kind == "forced", kind == "forbidden", bias != 0)
    assert LatentStart.parse("free") == FREE


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("force", "latent_start is 'force'; did you mean 'forced'?"),
        ("always", "latent_start is 'always': choose free, forced, forbidden or bias X."),
        ("", "latent_start is '': choose"),
        ("forced 3", "did you mean 'forced'"),
        ("bias", "latent_start is 'bias'; write bias and a number, as in 'bias 2.5'."),
        ("bias much", "latent_start is 'bias much'; write bias and a number"),
        ("bias 1 2", "write bias and a number"),
        ("bias nan", "latent_start has the bias nan; it must be from -1000 to 1000."),
        ("bias inf", "latent_start has the bias inf; it must be"),
        ("bias -1001", "latent_start has the bias -1001.0; it must be"),
        (3, "latent_start is 3: choose"),
        (None, "latent_start is None: choose"),
    ],
)
def test_other_words_are_refused(text: Any, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        LatentStart.parse(text)


def test_only_a_bias_takes_a_number() -> None:
    with pytest.raises(UserError, match=r"latent_start 'forced' takes no number, and 1\.0 is given"):
        LatentStart(StartKind.FORCED, 1.0)


def test_it_needs_no_torch() -> None:
    code = "import sys, rl_lvr.latents.starting; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
