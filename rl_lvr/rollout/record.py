"""Recorded rollouts on disk: `rollouts-RANK.jsonl`, one line each, and their latents in safetensors beside it.

Files are only appended to. A crash can cut off the last line, which reading drops with a warning; latents are written
before the line that names them. Reading needs no torch, and lines written by hand need only prompt and completion.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from rl_lvr.answers import text_of
from rl_lvr.errors import UserError, near_miss

if TYPE_CHECKING:
    from rl_lvr.latents.batch import LatentBatch
    from rl_lvr.latents.format import FormatIds
    from rl_lvr.rollout.types import Rollout

FOLDER = "rollouts"
"""Of a run."""


@dataclass(frozen=True)
class RecordedRollout:
    """One completion with everything that was known about it. Lists and numbers are those of JSON."""

    prompt: str | list[dict[str, Any]]
    """As rewards see it: text, or messages."""
    completion: str | list[dict[str, Any]]
    """Likewise."""
    text: str | None = None
    """The completion's plain text, where `completion` holds another."""
    marked: str | None = None
    """The completion's text with its spans marked, for people."""
    step: int = 0
    rank: int = 0
    index: int = 0
    """Within its step and rank."""
    group: int | None = None
    """Shared by the completions of one prompt."""
    prompt_ids: list[int] | None = None
    completion_ids: list[int] | None = None
    spans: list[dict[str, Any]] | None = None
    """Of `span_facts`."""
    log_kept_mass: list[float] | None = None
    """Of every token (`rollout.types.Uncut`); None where sampling cut nothing."""
    stop_reason: str | None = None
    seed: int | None = None
    sigma: float | None = None
    answer: str | None = None
    """The reference."""
    category: str | None = None
    images: list[str] = field(default_factory=list)
    """Paths."""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """None: not scored."""
    signals: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    """Whatever else a reward may read."""
    latents: dict[str, Any] | None = None
    """`file` beside this one, and `row` in it."""


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("prompt", "completion"), (str, list)),
    **dict.fromkeys(("text", "marked", "stop_reason", "answer", "category"), (str, type(None))),
    **dict.fromkeys(("step", "rank", "index"), (int,)),
    **dict.fromkeys(("group", "seed"), (int, type(None))),
    **dict.fromkeys(("prompt_ids", "completion_ids", "spans", "log_kept_mass"), (list, type(None))),
    "sigma": (int, float, type(None)),
    "images": (list,),
    **dict.fromkeys(("rewards", "signals", "columns"), (dict,)),
    "latents": (dict, type(None)),
}


def span_facts(rollout: Rollout, markers: FormatIds, tokenizer: Any = None) -> list[dict[str, Any]]:
    """Spans of a completion: `begin` and `stop` count its tokens, `latents` those that were fed, `status` is closed,
    broken or truncated (latents/spans.py); a marker that belongs to no span is one with status stray. With a
    `tokenizer` also `at`: how many characters of the completion's text stand before it."""
    from rl_lvr.latents.spans import find_spans
    from rl_lvr.latents.text import completion_text

    offset = len(rollout.prompt_ids)
    fed = set(rollout.latent_positions)
    found = find_spans(rollout.ids, markers)
    facts: list[dict[str, Any]] = [
        {
            "begin": max(span.begin - offset, 0),
            "stop": span.stop - offset,
            "latents": sum(position in fed for position in range(max(span.begin, offset), span.stop)),
            "status": span.status.value,
        }
        for span in found.spans
        if span.stop > offset
    ]
    facts += [
        {"begin": p - offset, "stop": p - offset + 1, "latents": 0, "status": "stray"}
        for p in found.stray
        if p >= offset
    ]
    if tokenizer is not None:
        for fact in facts:
            fact["at"] = len(completion_text(rollout.completion_ids[: fact["begin"]], tokenizer, markers))
    return sorted(facts, key=lambda fact: fact["begin"])


def recorded(rollout: Rollout, tokenizer: Any, markers: FormatIds, **known: Any) -> RecordedRollout:
    """What a rollout says by itself, and what else is known about it (any field of `RecordedRollout`)."""
    from rl_lvr.latents.text import completion_text
    from rl_lvr.rollout.readable import readable

    said: dict[str, Any] = {
        "marked": readable(rollout, tokenizer, markers),
        "prompt_ids": list(rollout.prompt_ids),
        "completion_ids": list(rollout.completion_ids),
        "spans": span_facts(rollout, markers, tokenizer),
        "log_kept_mass": None if rollout.uncut is None else [round(x, 6) for x in rollout.log_kept_mass.tolist()],
        "stop_reason": rollout.stop_reason.value,
        "seed": rollout.seed,
        "sigma": rollout.sigma,
    }
    for name, ids in (("prompt", rollout.prompt_ids), ("completion", rollout.completion_ids)):
        if name not in known:
            said[name] = completion_text(ids, tokenizer, markers)
    return RecordedRollout(**said | known)


class RolloutLog:
    """Appends to the record of one rank."""

    def __init__(self, folder: str | Path, rank: int = 0) -> None:
        self._folder, self._rank = Path(folder), rank
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / f"rollouts-{rank:05d}.jsonl"
        self._step, self._next = -1, 0
        if self._path.is_file():
            _mend_tail(self._path)

    def append(self, step: int, rollouts: Sequence[RecordedRollout], latents: LatentBatch | None = None) -> None:
        """Write rollouts of a step, and the latents of each; step, rank, index and `latents` are set here.

        After a resumption a step is recorded again; what was written last is what will be read.
        """
        if latents is not None and len(latents) != len(rollouts):
            raise ValueError(f"{len(rollouts)} rollouts with latents of {len(latents)}.")
        if step != self._step:
            self._step, self._next = step, 0
        name = self._save(latents, step) if latents is not None and rollouts else None
        lines = []
        for row, rollout in enumerate(rollouts):
            where = None if name is None else {"file": name, "row": row}
            placed = replace(rollout, step=step, rank=self._rank, index=self._next + row, latents=where)
            lines.append(json.dumps({k: v for k, v in vars(placed).items() if v is not None}) + "\n")
        self._next += len(rollouts)
        with self._path.open("ab") as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def _save(self, latents: LatentBatch, step: int) -> str:
        """A file of its own, whole or not there."""
        number = 0
        while (path := self._folder / f"latents-{self._rank:05d}-{step:08d}-{number}.safetensors").exists():
            number += 1
        partial = path.with_suffix(".partial")
        latents.trimmed().save(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
        return path.name


def drop_from(folder: Path, rank: int, step: int) -> None:
    """Remove what a rank recorded at `step` and later: a run that is resumed there makes these steps again."""
    path = folder / f"rollouts-{rank:05d}.jsonl"
    if not path.is_file():
        return
    _mend_tail(path)
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if json.loads(line)["step"] < step]
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(kept))
    partial.replace(path)
    for latents in folder.glob(f"latents-{rank:05d}-*.safetensors"):
        if int(latents.name.split("-")[2]) >= step:
            latents.unlink()


def _mend_tail(path: Path) -> None:
    """What a crash left behind the last whole line goes, or the next line would be glued to it."""
    with path.open("r+b") as file:
        at = file.seek(0, os.SEEK_END)
        tail = b""
        while at and b"\n" not in tail:
            begin = max(0, at - 65536)
            file.seek(begin)
            tail, at = file.read(at - begin) + tail, begin
        tail = tail[tail.rfind(b"\n") + 1 :]
        if tail and _whole(tail):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        elif tail:
            file.truncate(file.seek(-len(tail), os.SEEK_END))


class Rollouts(Sequence[RecordedRollout]):
    """The record of a run, by step, rank and index. Lines are read when they are asked for."""

    def __init__(self, places: Sequence[tuple[Path, int, int, int]]) -> None:
        self._places = places
        """File, offset, line number and step."""

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> RecordedRollout: ...
    @overload
    def __getitem__(self, index: slice) -> Rollouts: ...
    def __getitem__(self, index: int | slice) -> RecordedRollout | Rollouts:
        if isinstance(index, slice):
            return Rollouts(self._places[index])
        path, offset, number, _ = self._places[index]
        with path.open("rb") as file:
            file.seek(offset)
            return RecordedRollout(**_parse(file.readline(), path, number))

    def of_step(self, step: int) -> Rollouts:
        return Rollouts([place for place in self._places if place[3] == step])

    @property
    def steps(self) -> list[int]:
        return sorted({place[3] for place in self._places})

    def latents(self, index: int) -> LatentBatch | None:
        """The latents of one rollout, a batch of one row; None if none were recorded."""
        from rl_lvr.latents.batch import LatentBatch

        entry, path = self[index].latents, self._places[index][0]
        if entry is None:
            return None
        name, row = entry.get("file"), entry.get("row")
        if not isinstance(name, str) or Path(name).name != name or type(row) is not int or row < 0:
            raise UserError(f"{path}: latents are {entry!r}; they must name a file beside it and a row.")
        batch = LatentBatch.load(path.parent / name)
        if row >= len(batch):
            raise UserError(f"{path.parent / name} has {len(batch)} rows, and row {row} is asked for.")
        return batch.select([row]).trimmed()


def read_rollouts(path: str | Path, warn: Callable[[str], None] | None = None) -> Rollouts:
    """The record in a run's folder, in a folder of records, or in one .jsonl file.

    `warn` gets a sentence for every line that a crash cut off; it prints on stderr unless given.
    """
    warn = warn or (lambda sentence: print(f"rl-lvr: {sentence}", file=sys.stderr))
    places: dict[tuple[int, int, int], tuple[Path, int, int, int]] = {}
    for file in _files(Path(path)):
        for offset, number, line in _lines(file, warn):
            entry = _parse(line, file, number)
            step = entry.get("step", 0)
            # Lines written by hand need no index: they stand in their order.
            places[step, entry.get("rank", 0), entry.get("index", number)] = (file, offset, number, step)
    return Rollouts([places[key] for key in sorted(places)])


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    files = sorted(folder.glob("rollouts-*.jsonl"))
    if not files:
        raise UserError(f"no recorded rollouts in {path}: name a run's folder, or a .jsonl file of rollouts.")
    return files


def _lines(path: Path, warn: Callable[[str], None]) -> Iterator[tuple[int, int, bytes]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") or _whole(line):
                if line.strip():
                    yield offset, number, line
            else:
                warn(f"{path}: its last line, {number}, was cut off and is left out.")
            offset += len(line)


def _whole(line: bytes) -> bool:
    """A file that somebody wrote by hand may lack its last newline."""
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    where = f"{path}, line {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}): remove it.") from error
    if not isinstance(entry, dict):
        raise UserError(f"{where} is no JSON object.")
    known = [f.name for f in fields(RecordedRollout)]
    for name, value in entry.items():
        if name not in known:
            hint = near_miss(name, known, "; what is your own goes into columns.")
            raise UserError(f"{where}: unknown field {name!r}{hint}")
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise UserError(f"{where}: {name} is {value!r:.60}, which is not of its type.")
    for name in ("prompt", "completion"):
        if name not in entry:
            raise UserError(f"{where}: {name} is missing.")
    return entry


def reward_columns(rollouts: Sequence[RecordedRollout], *, conversational: bool = False) -> dict[str, Any]:
    """What TRL would call a reward with: a list per column. A column that a rollout lacks holds None there.

    Columns that all lack are not there. Signals and own columns stand beside the rest under their names. Prompts and
    completions have the shape that they were recorded in. `conversational` makes messages of the text of a line that
    was written by hand, as `rl-lvr grpo` hands them over; such a line has no `prompt_ids`.
    """

    def shaped(said: Any, role: str, by_hand: bool) -> Any:
        as_message = conversational and by_hand and isinstance(said, str)
        return [{"role": role, "content": said}] if as_message else said

    by_hand = [r.prompt_ids is None for r in rollouts]
    columns: dict[str, Any] = {
        "prompts": [shaped(r.prompt, "user", hand) for r, hand in zip(rollouts, by_hand, strict=True)],
        "completions": [shaped(r.completion, "assistant", hand) for r, hand in zip(rollouts, by_hand, strict=True)],
        "texts": [text_of(r.completion) if r.text is None else r.text for r in rollouts],
    }
    for name in ("completion_ids", "spans", "group", "stop_reason", "answer", "category", "images"):
        values = [getattr(r, name) for r in rollouts]
        if any(value is not None and (value != [] or name == "spans") for value in values):
            columns[name] = values
    for name in {name: None for r in rollouts for name in (*r.columns, *r.signals)}:
        columns.setdefault(name, [(r.columns | r.signals).get(name) for r in rollouts])
    return columns


def plain_text(message: str | list[dict[str, Any]]) -> str:
    """A prompt or completion for people: its text, with [image] where one stands."""
    if isinstance(message, str):
        return message
    parts = []
    for turn in message:
        content = turn.get("content", "")
        if isinstance(content, list):
            content = "".join(str(part.get("text", f"[{part.get('type')}] ")) for part in content)
        parts.append(f"{turn.get('role')}: {content}" if len(message) > 1 else str(content))
    return "\n".join(parts)
