"""One alphabet and no markup: what a text says once full-width characters, Markdown and LaTeX wrappers are gone."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

NESTED = 5
"""Commands around an answer, one in another."""
LONGEST = 8000
"""Characters of a text that are read, from its end: an answer stands there, and no pattern may take long."""


def text_of(message: Any) -> str:
    """The text of a completion or prompt: a string, or TRL's conversational form, a list of messages."""
    if isinstance(message, str):
        return message
    if isinstance(message, Mapping):
        return text_of(message["content"]) if "content" in message else str(message.get("text", ""))
    return "\n".join(part for part in map(text_of, message or ()) if part)


_SIGNS = {
    "\u2212": "-", "\u2010": "-", "\u2011": "-", "\ufe63": "-",
    "\u3000": " ", "\u00a0": " ", "\u2007": " ", "\u2028": "\n", "\u2029": "\n", "\u0085": "\n",
    "\u2009": "\u202f",  # thin: it may separate thousands
    "\u3002": ". ", "\uff0e": ".", "\uff0c": ", ", "\u3001": ", ", "\uff1b": "; ", "\uff1a": ": ", "\uff01": "! ",
    "\uff1f": "? ", "\u201c": '"', "\u201d": '"', "\u300c": '"', "\u300d": '"', "\u300e": '"', "\u300f": '"',
    "\u3010": "[", "\u3011": "]", "\u2018": "'", "\u2019": "'", "\u2044": "/", "\u2215": "/", "\u00d7": "*",
    "\u00b7": "*", "\u22c5": "*", "\u2217": "*", "\u2715": "*", "\u00f7": "/", "\u2264": "\u2264", "\u2a7d": "\u2264",
    "\u2a7e": "\u2265", "\u21d2": "=>", "\u2192": "->", "\u00ba": "\u00b0", "\u2103": "\u00b0C", "\u2109": "\u00b0F",
}  # fmt: skip
_INVISIBLE = {"\u00ad", "\u200b", "\u200c", "\u200d", "\u200e", "\u200f", "\u2060", "\ufeff"}


class _Alphabet(dict[int, str]):
    """Computed for each character when it is first met."""

    def __missing__(self, code: int) -> str:
        self[code] = found = _plain_character(chr(code))
        return found


def _plain_character(char: str) -> str:
    if char in _SIGNS:
        return _SIGNS[char]
    if char in _INVISIBLE:
        return ""
    form = unicodedata.decomposition(char)
    compatible = unicodedata.normalize("NFKC", char)
    if form.startswith("<super>"):
        return "^{" + compatible.replace("\u2212", "-") + "}"
    if form.startswith("<fraction>"):
        return " " + compatible.replace("\u2044", "/")
    digit = unicodedata.decimal(char, None)
    if digit is not None:
        return str(digit)
    return compatible if form.startswith(("<wide>", "<narrow>", "<circle>", "<compat>", "<font>", "<square>")) else char


_ALPHABET = _Alphabet()
_SPECIAL = re.compile(r"<\|[^<>|\s]{1,60}\|>|</?s>|<(?:eos|bos|end_of_turn)>")
_POWERS = re.compile(r"\}\^\{")
_MINUS = re.compile(r"(?<![\w)\]%\u00b0\u2013])(?<![\w)\]%\u00b0]\s)\u2013(?=\d)")
"""An en dash before a number that begins no range."""
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_BORDER = re.compile(rf"(?<=[{_CJK}])(?=[A-Za-z0-9(*\\$\[+-])|(?<=[A-Za-z0-9)*%}}\]])(?=[{_CJK}])")


def plain(text: str) -> str:
    """`text` with full-width and typographic characters as their ASCII counterparts, superscripts as powers, a space
    between CJK and Latin characters, and without special tokens of a model such as <|im_end|>.
    """
    text = _SPECIAL.sub("", text)
    if text.isascii():
        return text
    text = unicodedata.normalize("NFC", text).translate(_ALPHABET)
    return _BORDER.sub(" ", _POWERS.sub("", _MINUS.sub("-", text)))


_WRAPPER = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|color\s*\{[^{}]*\})?|math(?:rm|bf|sf|it|tt|bb|cal|frak|scr)|mbox|hbox|boxed|fbox|emph|underline|"
    r"boldsymbol|bm|bf|rm|color\s*\{[^{}]*\}|operatorname)\s*\{([^{}]*)\}"
)
_DROPPED = re.compile(
    r"\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|textstyle|limits|bf|rm|it)(?![A-Za-z])|\\[\[\]()]"
)
_SPACES = re.compile(r"\\(?:quad|qquad|[;:> ])|(?<!\\)~(?!~)|\\\\(?![A-Za-z])")
_PAIRED = re.compile(r"(?<!\\)(\$\$?)(?=\S)([^$]{1,400}?)(?<=[^\s\\])\1(?!\d)")
_STRUCK = re.compile(r"~~[^~]{1,200}~~|<(s|del|strike)>[^<]{0,200}</\1>|\\(?:cancel|sout|xcancel)\s*\{[^{}]{0,200}\}")
_HTML = re.compile(r"</?(?:b|i|u|em|strong|span|p|div|code|mark|br|answer|think|thinking)\s*/?>", re.IGNORECASE)
_RAISED = re.compile(r"<sup>([^<]{1,20})</sup>", re.IGNORECASE)
_EMPHASIS = re.compile(r"(?<![A-Za-z0-9)*])(\*{1,3}|_{1,3})(?=[^\s*_])([^*\n]{1,400}?)(?<=[^\s*_])\1(?![A-Za-z0-9(*])")
_CODE = re.compile(r"`+([^`\n]{1,400})`+")


def bare(text: str, emphasis: tuple[str, str] = ("", "")) -> str:
    """`plain(text)` without markup: Markdown, HTML and LaTeX wrappers such as \\text{} and $...$ leave their content,
    what is struck out goes. `emphasis` is put around what was set bold.
    """
    text = _RAISED.sub(r"^{\1}", _STRUCK.sub("", plain(text)))
    text = _HTML.sub("", text)
    for _ in range(NESTED):
        text = _WRAPPER.sub(r"\1", text)
    text = _PAIRED.sub(r"\2", text)
    opening, closing = emphasis
    for _ in range(2):
        text = _EMPHASIS.sub(rf"{opening}\2{closing}", text)
    text = _CODE.sub(r"\1", text)
    return _SPACES.sub(" ", _DROPPED.sub("", text)).strip()
