"""Stop strings: text is looked at only if there are any, because it costs a transfer and a decode per step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor


class StopStrings:
    """Watches the end of each completion's text, special tokens left out, as vLLM does.

    The tail that is decoded is as many tokens as the longest stop string has bytes, since a token of text is at least
    one byte; what lies before it was looked at in an earlier step.
    """

    def __init__(self, tokenizer: Any, strings: tuple[str, ...], rows: int) -> None:
        self._tokenizer = tokenizer
        self._strings = strings
        self._special = frozenset(tokenizer.all_special_ids)
        longest = max((len(text.encode()) for text in strings), default=0)
        self._tails: list[deque[int]] = [deque(maxlen=longest) for _ in range(rows)]

    def update(self, index: Tensor, token: Tensor, done: Tensor) -> Iterable[int]:
        """Take the step's tokens of batch rows `index`; yields the places in `index` where a stop string now stands."""
        if not self._strings:
            return ()
        hits = []
        for place, (row, new, over) in enumerate(zip(index.tolist(), token.tolist(), done.tolist(), strict=True)):
            if over or new in self._special:
                continue
            self._tails[row].append(new)
            text = self._tokenizer.decode(list(self._tails[row]))
            if any(string in text for string in self._strings):
                hits.append(place)
        return hits
