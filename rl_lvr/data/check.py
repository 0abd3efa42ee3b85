"""check_records: every finding in a data file, with place and cure; require_valid: the same as one error.

Structure is judged by schema.py. Here: what needs the disk (images), the whole file (ids) or marker tokens.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl_lvr.data.images import MAX_PIXELS, ImageError, ImageRef
from rl_lvr.data.record import Record, box_outside
from rl_lvr.data.schema import Problem, content_text, structure_problems
from rl_lvr.data.sources import RowError, RowSource, open_source
from rl_lvr.errors import UserError
from rl_lvr.latents.format import PRESETS, LatentFormat
from rl_lvr.progress import task

Judge = Callable[[Record], None]
"""Raises RowError for a record that is valid and yet of no use to a run. Called from several threads."""

_CHUNK = 32
_THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes outside the interpreter's lock


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one record (or, with an empty id, with a line or the file)."""

    place: str
    id: str
    field: str
    what: str
    cure: str

    def __str__(self) -> str:
        name = f" (id {self.id!r})" if self.id else ""
        return f"{self.place}{name}: {self.field}: {self.what}; {self.cure}."


@dataclass
class Report:
    """What is in a data file and what is wrong with it."""

    path: str
    kept: int = 1000
    records: int = 0
    bad_records: int = 0
    total_findings: int = 0
    findings: list[Finding] = field(default_factory=list)
    """The first `kept` ones, in the order of the file; the rest is only counted."""
    images: int = 0
    spans: int = 0
    targets: int = 0
    """Spans that have targets."""
    prompt_only: int = 0
    categories: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Width and height of the images."""
    shown: Counter[str] = field(default_factory=Counter)
    """How many records have images in the `prompt`, only as `targets`, or `none`."""
    image_files: str = ""
    """A digest of name, size and time of all image files, in the order of the file."""
    hint: bool = True
    """Whether `rl-lvr data check` finds the same: False if a run's own judge found something."""

    @property
    def ok(self) -> bool:
        return not self.total_findings

    def add(self, findings: Sequence[Finding]) -> None:
        self.total_findings += len(findings)
        self.findings.extend(findings[: max(0, self.kept - len(self.findings))])

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "ok": self.ok,
            "records": self.records,
            "bad_records": self.bad_records,
            "total_findings": self.total_findings,
            "findings": [vars(f) for f in self.findings],
            "images": self.images,
            "spans": self.spans,
            "targets": self.targets,
            "prompt_only": self.prompt_only,
            "categories": dict(self.categories.most_common()),
            "sizes": [{"width": w, "height": h, "images": n} for (w, h), n in self.sizes.most_common()],
        }


@dataclass
class _Checked:
    """What one row contributes to the report."""

    place: str
    id: str = ""
    findings: list[Finding] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    image_files: list[str] = field(default_factory=list)
    shown: str = "none"
    spans: int = 0
    targets: int = 0
    prompt_only: bool = False
    category: str | None = None
    judged: bool = False


class Markers:
    """The literal marker tokens of latent formats, and how they may stand in a text."""

    def __init__(self, formats: Iterable[LatentFormat]) -> None:
        self._slots: dict[tuple[str, str], set[str]] = {}  # formats may share their START and END
        self._loose: set[str] = set()
        for one in formats:
            if one.start is not None and one.end is not None:
                self._slots.setdefault((one.start, one.end), set()).add(one.slot)
            else:
                self._loose.add(one.slot)
        tokens = {t for (start, end), slots in self._slots.items() for t in (start, end, *slots)} | self._loose
        self._any = re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or "(?!)")

    def problems(self, text: str, role: str, where: str) -> Iterator[Problem]:
        found = self._any.findall(text)
        if not found:
            return
        if role != "assistant":
            yield Problem(where, f"holds the marker {found[0]}", "latent markers belong to the assistant's text")
            return
        for (start, end), slots in self._slots.items():
            yield from self._pair(found, start, end, slots, where)

    @staticmethod
    def _pair(found: list[str], start: str, end: str, slots: set[str], where: str) -> Iterator[Problem]:
        cure = f"write each span as <latent>, or as {start} ... {end}"
        inside = False
        for token in found:
            if token == start:
                if inside:
                    yield Problem(where, f"opens {start} inside an open {start}", cure)
                    return
                inside = True
            elif token == end:
                if not inside:
                    yield Problem(where, f"has {end} without {start}", cure)
                    return
                inside = False
            elif token in slots and not inside:
                yield Problem(where, f"has {token} outside {start} ... {end}", cure)
                return
        if inside:
            yield Problem(where, f"has {start} without {end}", cure)


class _Checker:
    """Checks one row after another; called from several threads."""

    def __init__(
        self,
        source: RowSource,
        root: Path,
        markers: Markers,
        max_pixels: int,
        targets_per_span: int | None,
        judge: Judge | None,
    ) -> None:
        self.source, self.root, self.markers = source, root, markers
        self.max_pixels, self.targets_per_span, self.judge = max_pixels, targets_per_span, judge
        self._seen: dict[str, tuple[int, int] | ImageError] = {}  # image files that several records show

    def rows(self, indices: range) -> list[_Checked]:
        return [self.row(index) for index in indices]

    def row(self, index: int) -> _Checked:
        checked = _Checked(self.source.label(index))
        try:
            row = self.source.row(index)
        except RowError as error:
            self._note(checked, [error.problem])
            return checked
        name = row.get("id") if isinstance(row, Mapping) else None
        checked.id = name if isinstance(name, str) else ""
        problems = structure_problems(row)
        if problems:
            self._note(checked, problems)
            return checked
        record = Record.from_row(row, self.root)
        checked.spans = record.spans
        checked.targets = len(record.latents or ())
        checked.prompt_only = record.is_prompt_only
        checked.category = record.category
        if record.images:
            checked.shown = "prompt"
        elif any(spec.images for spec in record.latents or ()):
            checked.shown = "targets"
        self._note(checked, self._texts(record))
        self._note(checked, self._images(record, checked))
        if self.judge is not None and not checked.findings:
            try:
                self.judge(record)
            except RowError as error:
                checked.judged = True
                self._note(checked, [error.problem])
        return checked

    @staticmethod
    def _note(checked: _Checked, problems: Iterable[Problem]) -> None:
        checked.findings.extend(Finding(checked.place, checked.id, *problem) for problem in problems)

    def _texts(self, record: Record) -> Iterator[Problem]:
        for index, message in enumerate(record.messages):
            text = content_text(message["content"])
            yield from self.markers.problems(text, message["role"], f"messages[{index}].content")
        for index, spec in enumerate(record.latents or ()):
            if self.targets_per_span is not None and len(spec) not in (1, self.targets_per_span):
                yield Problem(
                    f"latents[{index}]",
                    f"has {len(spec)} targets for a span of {self.targets_per_span} latents",
                    f"give 1 or {self.targets_per_span} targets, or set the format's k to {len(spec)}",
                )

    def _images(self, record: Record, checked: _Checked) -> Iterator[Problem]:
        sizes: list[tuple[int, int] | None] = []
        for index, image in enumerate(record.images):
            size = self._look(image)
            if isinstance(size, ImageError):
                yield Problem(f"images[{index}]", size.what, size.cure)
                sizes.append(None)
            else:
                checked.sizes.append(size)
                checked.image_files += _file_state(image)
                sizes.append(size)
        for number, spec in enumerate(record.latents or ()):
            for index, image in enumerate(spec.images or ()):
                size = self._look(image)
                if isinstance(size, ImageError):
                    yield Problem(f"latents[{number}].images[{index}]", size.what, size.cure)
                else:
                    checked.image_files += _file_state(image)
            shown = sizes[spec.image] if spec.boxes else None
            for index, box in enumerate(spec.boxes or ()):
                if shown is not None and (problem := box_outside(box, *shown, f"latents[{number}].boxes[{index}]")):
                    yield problem

    def _look(self, image: ImageRef) -> tuple[int, int] | ImageError:
        """The size of an image that decodes, or what is wrong with it."""
        if image.data is None and image.name in self._seen:
            return self._seen[image.name]
        result: tuple[int, int] | ImageError
        try:
            result = image.open(self.max_pixels).size
        except ImageError as error:
            result = error.with_traceback(None)  # the traceback would keep the decoded image alive
        if image.data is None:
            self._seen[image.name] = result
        return result


def _file_state(image: ImageRef) -> list[str]:
    if image.data is not None:
        return []
    state = image.path.stat()
    return [f"{image.name} {state.st_size} {state.st_mtime_ns}\n"]


def check_records(
    path: str | Path,
    *,
    latent_formats: Iterable[LatentFormat] | None = None,
    max_pixels: int = MAX_PIXELS,
    targets_per_span: int | None = None,
    limit: int | None = None,
    max_findings: int = 1000,
    judge: Judge | None = None,
) -> Report:
    """Check every record of a data file, images included. Raises UserError only if the file cannot be opened.

    `latent_formats`: whose literal markers must be balanced (default: all presets). `targets_per_span`: the K
    of the run, if each span must have one target or K. `limit`: only the first so many records.
    `max_findings`: so many are kept, the rest is counted. `judge`: refuses what a run cannot use.
    """
    source, root = open_source(path)
    report = Report(str(path), max_findings)
    for problem in source.file_problems():
        report.add([Finding(source.name, "", *problem)])
    count = len(source) if limit is None else min(limit, len(source))
    if count == 0:
        report.add([Finding(source.name, "", "file", "holds no records", "write at least one")])
        return report
    markers = Markers(PRESETS.values() if latent_formats is None else latent_formats)
    checker = _Checker(source, root, markers, max_pixels, targets_per_span, judge)
    places: dict[str, str] = {}
    files = hashlib.sha256()
    with task(f"checking {source.name}", count, "records") as bar:
        for checked in _in_order(checker, count):
            _collect(report, checked, places)
            files.update("".join(checked.image_files).encode())
            bar.advance(findings=report.total_findings)
    report.image_files = files.hexdigest()
    return report


def _in_order(checker: _Checker, count: int) -> Iterator[_Checked]:
    """The rows' results in the order of the file, checked by a few threads that run a little ahead."""
    chunks = iter(range(begin, min(begin + _CHUNK, count)) for begin in range(0, count, _CHUNK))
    pending: deque[Future[list[_Checked]]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for chunk in chunks:
                pending.append(pool.submit(checker.rows, chunk))
                if len(pending) > 2 * _THREADS:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:  # Ctrl-C: do not wait for what nobody will read
                future.cancel()


def _collect(report: Report, checked: _Checked, places: dict[str, str]) -> None:
    if checked.id and checked.id in places:
        what = f"is the id of {places[checked.id]} too"
        checked.findings.append(Finding(checked.place, checked.id, "id", what, "give every record its own"))
    elif checked.id:
        places[checked.id] = checked.place
    report.records += 1
    report.bad_records += bool(checked.findings)
    report.hint &= not checked.judged
    report.add(checked.findings)
    report.images += len(checked.sizes)
    report.sizes.update(checked.sizes)
    report.shown[checked.shown] += 1
    report.spans += checked.spans
    report.targets += checked.targets
    report.prompt_only += checked.prompt_only
    if checked.category is not None:
        report.categories[checked.category] += 1


def require_valid(
    path: str | Path,
    *,
    latent_formats: Iterable[LatentFormat] | None = None,
    max_pixels: int = MAX_PIXELS,
    targets_per_span: int | None = None,
    limit: int | None = None,
    judge: Judge | None = None,
) -> Report:
    """The report of a data file without findings; else a UserError with the first of them."""
    report = check_records(
        path,
        latent_formats=latent_formats,
        max_pixels=max_pixels,
        targets_per_span=targets_per_span,
        limit=limit,
        judge=judge,
    )
    if report.ok:
        return report
    first = " ".join(str(finding) for finding in report.findings[:3])
    more = "" if report.total_findings <= 3 else f" And {report.total_findings - 3} more."
    hint = f" All of them: rl-lvr data check {path}" if report.hint else ""
    raise UserError(f"{path} cannot be used: {first}{more}{hint}")
