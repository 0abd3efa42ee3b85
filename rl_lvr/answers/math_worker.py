"""Runs as a script: pairs of LaTeX expressions come in as JSON lines, and a verdict on each goes out."""

from __future__ import annotations

import json
import logging
import resource
import signal
import sys

MEMORY = 4 * 2**30
ALARM = 60
"""Seconds after which one comparison ends this process, should nobody be left to end it."""


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # a library that prints must not answer
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        print(json.dumps(str(error)), file=answers, flush=True)
        return
    logging.disable()  # that its own timeouts, which need signals, are off
    # Only LaTeX: the parser of plain expressions hands them to Python's eval.
    targets = [LatexExtractionConfig()]

    def read(text: str) -> list[object]:
        inner = text.strip().strip("$")
        return parse(f"${inner}$", targets, parsing_timeout=None)

    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        signal.alarm(ALARM)
        gold, given = map(read, json.loads(line))
        if gold and given:
            verdict = "right" if verify(gold, given, timeout_seconds=None) else "wrong"
        else:
            verdict = "unreadable" if gold else "unscored"
        signal.alarm(0)
        print(json.dumps(verdict), file=answers, flush=True)


if __name__ == "__main__":
    main()
