"""Whether two LaTeX expressions are equal, by math-verify in a process of its own.

An expression such as 9^{9^{9^9}} can occupy a computer algebra system forever, and no thread can be stopped. So the
checker is a child process (math_worker.py) that is ended and started anew when it takes too long.
"""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

from rl_lvr.answers.denial import REFUSED, denied
from rl_lvr.answers.extraction import STATED
from rl_lvr.answers.numbers import read_quantity, same_quantity, tidy
from rl_lvr.answers.plain import bare
from rl_lvr.answers.verdict import Verdict

START_SECONDS = 120.0
"""Importing sympy on a busy machine."""
SECONDS = 5.0
"""For one comparison."""
LONGEST = 2000
"""Characters of an expression; a longer one is no answer."""
_COMMANDS = ("infty", "pi", "le", "ge", "ne", "pm", "theta", "cup", "cap")
_FORMULA = re.compile(r"(?<!\\)\$\$?(.+?)(?<!\\)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_STRONG = re.compile(r"(?<![A-Za-z0-9_)])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![A-Za-z0-9_(])")
"""Not the power of Python."""
_IS = re.compile(r".*\b(?:is|are|be|equals?|answer\s*:)(?:\s*:)?\s+(?=\S)", re.DOTALL | re.IGNORECASE)
_WORDS = re.compile(r"(?<![\\{A-Za-z])[A-Za-z]{2,}[:,]?\s")
_MATHEMATICS = re.compile(r"[\d\\^=<>+*/\u2264\u2265\u221e\u221a]|(?<![A-Za-z'])[b-zB-HJ-Z](?![A-Za-z'])")
_NAMES = str.maketrans(
    {
        char: f"\\{name} "
        for char, name in zip("\u221e\u03c0\u2264\u2265\u2260\u00b1\u03b8\u222a\u2229", _COMMANDS, strict=True)
    }
)
_OR = re.compile(r"[\s,]*(?:or|and|,)[\s,]*", re.IGNORECASE)
_TUPLE = re.compile(r"([(\[])(.*)([)\]])", re.DOTALL)
_ASSIGNED = re.compile(r"[^=<>]{1,40}=\s*(?=[(\[])")


def formula(text: str) -> str | None:
    """The mathematics in an answer that may be a sentence: what it announces as its answer, else the last formula
    between dollars or the like, or what follows "is" or a colon. A text without words is one formula.
    None where what is found is denied.
    """
    text = text.strip()
    if len(text) > LONGEST or not _WORDS.search(text):
        return text
    text = _STRONG.sub(r"\1", text)
    cues = list(STATED.finditer(text))
    if cues and cues[-1].end() < len(text):
        text = text[cues[-1].end() :].strip()
        formulas = list(_FORMULA.finditer(text))[:1]
        if not formulas and not _WORDS.search(f"{text} "):
            return text.rstrip(" .")
        if re.match(r"not\b", text, re.IGNORECASE) and " but " not in text:
            return None
    else:
        formulas = list(_FORMULA.finditer(text))
    if formulas:
        last = formulas[-1]
        if denied(text, last.start(), last.end()):
            return None
        content = next(filter(None, last.groups())).strip(" .")
        before = formulas[-2] if len(formulas) > 1 else None
        if before and _OR.fullmatch(text[before.end() : last.start()]):
            return f"{next(filter(None, before.groups())).strip(' .')}, {content}"
        return content
    stated = _IS.match(text)
    piece = text[stated.end() :] if stated else text
    if re.match(r"not\b", piece, re.IGNORECASE):
        return None
    return piece.rstrip(" .") if piece.count("{") == piece.count("}") else text


def mathematics_is(text: str, gold: str, tolerance: float) -> Verdict:
    """Whether `text`, which may be a sentence, gives the mathematics `gold`."""
    given = None if REFUSED.fullmatch(bare(text).strip(" .!")) else formula(text)
    if given is None or len(given) > LONGEST or not _MATHEMATICS.search(given):
        return Verdict.UNREADABLE if gold.strip().strip("$") else Verdict.UNSCORED
    return _same(gold, given, tolerance)


def _same(gold: str, given: str, tolerance: float) -> Verdict:
    wanted, found = tidy(gold), tidy(given)
    if wanted and _squeezed(wanted) == _squeezed(found):
        return Verdict.RIGHT
    one, other = read_quantity(gold), read_quantity(given)
    if one is not None and other is not None:
        return Verdict.of(same_quantity(one, other, tolerance))
    parts = _parts(wanted)
    if parts is None:
        return same_mathematics(_latex(gold), _latex(given))
    theirs = _parts(found) or _parts(_ASSIGNED.sub("", found)) or _parts(f"{wanted[0]}{found}{wanted[-1]}")
    if theirs is None or len(parts) != len(theirs) or parts[0] != theirs[0] or parts[-1] != theirs[-1]:
        return Verdict.WRONG
    for part, their in zip(parts[1:-1], theirs[1:-1], strict=True):
        verdict = _same(part, their, tolerance)
        if verdict is not Verdict.RIGHT:
            return verdict
    return Verdict.RIGHT


def _latex(text: str) -> str:
    """`text` with the characters that only Unicode has as LaTeX."""
    text = re.sub(r"\u221a\s*(\d+|[a-z]|\{[^{}]*\}|\([^()]*\))", r"\\sqrt{\1}", text)
    return text.translate(_NAMES)


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text).rstrip(".")


def _parts(text: str) -> list[str] | None:
    """Bracket, elements and bracket of a tuple or interval; None if `text` is neither."""
    found = _TUPLE.fullmatch(text.strip().rstrip("."))
    if found is None:
        return None
    depth, parts = 0, [""]
    for char in found[2]:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return None
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [found[1], *(part.strip() for part in parts), found[3]] if len(parts) > 1 and all(parts) else None


class _Checker:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, gold: str, given: str) -> Verdict:
        """An answer that takes too long, or ends the process, is wrong."""
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            process.stdin.write(json.dumps([gold, given]).encode() + b"\n")
            process.stdin.flush()
            line = _line(process, SECONDS)
            if not line:
                self._end()
                return Verdict.WRONG
            return Verdict(json.loads(line))

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        worker = Path(__file__).with_name("math_worker.py")
        # -P: this folder must not shadow modules of the same names.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # of an expression that it dies of; why it did not start comes as an answer
            bufsize=0,
        )
        ready = _line(self._process, START_SECONDS)
        if ready.strip() != b'"ready"':
            self._end()
            raise RuntimeError(
                "the checker of kind 'math' did not start: install math-verify, or choose kind numeric or exact"
                + (f" ({json.loads(ready)})" if ready else "")
            )
        return self._process

    def _end(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.communicate()
        self._process = None


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The next line; empty if the process takes longer, or has ended. It writes whole lines, one per question."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline() if ready else b""


_checker = _Checker()


@lru_cache(maxsize=65536)
def same_mathematics(gold: str, given: str) -> Verdict:
    """Whether `given` equals `gold`: unscored if `gold` cannot be read, unreadable if `given` cannot."""
    if len(gold) > LONGEST:
        return Verdict.UNSCORED
    return Verdict.UNREADABLE if len(given) > LONGEST else _checker.ask(gold, given)
