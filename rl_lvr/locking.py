"""One process at a time writes into a folder: a lock file in it, which the operating system holds, says who does.

The lock is `flock`'s: it ends with its process, however that ends. File systems that several hosts share may keep it to
one host, or have none, so what the file says is judged as well (docs/sft.md). Needs no torch.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from rl_lvr.errors import UserError

LOCK = ".lock"
_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK)
_held: dict[Path, int] = {}
"""File descriptors of the locks that this process holds."""


@dataclass(frozen=True)
class Holder:
    """What a lock file says."""

    host: str
    pid: int
    born: str
    """When the process started: the id of the boot, and ticks since then. Process ids are used again."""
    since: str
    """When it took the lock, in local time."""
    what: str

    @classmethod
    def this_process(cls, what: str) -> Holder:
        now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z")
        return cls(socket.gethostname(), os.getpid(), _born(os.getpid()) or "", now, what)

    @classmethod
    def of(cls, text: str) -> Holder | None:
        """None if the text says nothing, as where its writer was killed in between."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None

    @property
    def here(self) -> bool:
        """Whether it is or was a process of this host."""
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """Of a process of this host: whether it still runs. This one does not hold what it does not know of."""
        return self.pid != os.getpid() and _born(self.pid) == self.born

    def __str__(self) -> str:
        return f"{self.what}, process {self.pid} on {self.host} since {self.since}"


@contextmanager
def folder_held(folder: Path, what: str, setting: str = "output_dir") -> Iterator[None]:
    """Hold a folder, which is made if it is not there, and taken away if nothing was written into it.

    Args:
        folder: Symlinks to one folder are one folder.
        what: Who holds it, for the message that others get.
        setting: How the user named the folder.

    Raises:
        UserError: Another process holds it, or one on another host did not release it.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{setting} {folder} is a file: choose another.")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with file_held(folder / LOCK, what, f"{setting} {folder}"):
            yield
    finally:
        with suppress(OSError):  # what is not empty stays, and so do those above it
            for place in made:
                place.rmdir()


@contextmanager
def file_held(file: Path, what: str, place: str) -> Iterator[None]:
    """Hold a lock file, and remove it in the end. Nested in one process, the outermost counts."""
    key = file.parent.resolve() / file.name
    if key in _held:
        yield
        return
    owner = os.getpid()
    _held[key] = _taken(file, Holder.this_process(what), place)
    try:
        with _sigterm_unwinds():
            yield
    finally:
        if os.getpid() == owner:  # else this is a forked child that leaves by the same way
            _release(key)


def _taken(file: Path, me: Holder, place: str) -> int:
    """The descriptor of the lock file, once it is ours."""
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # its holder has just taken the folder away
            continue
        try:
            known = _lock(descriptor, place)
            said = Holder.of(os.pread(descriptor, 4096, 0).decode(errors="replace"))
            if known and not _same(descriptor, file):
                os.close(descriptor)  # its holder has just removed it
                continue
            _judge(said, known, file, place)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(asdict(me)).encode(), 0)
            os.fsync(descriptor)
        except BaseException:
            with suppress(OSError):
                os.close(descriptor)
            raise
        return descriptor


def _lock(descriptor: int, place: str) -> bool:
    """Whether the lock could be had."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        print(f"rl-lvr: {place}: its file system has no locks, so the lock file's text decides alone", file=sys.stderr)
    return True


def _judge(said: Holder | None, had: bool, file: Path, place: str) -> None:
    """Refuse what another process holds, or may hold."""
    if not had or (said is not None and said.here and said.alive):
        raise UserError(
            f"{place} is in use ({said or 'another process'}): wait until that has ended, stop it, or choose another."
        )
    if said is None:
        return
    if not said.here:
        raise UserError(
            f"{place} was taken by {said}, and this host cannot tell whether that still runs. If it has ended, delete "
            f"{file} and start again; if not, choose another."
        )
    print(f"rl-lvr: {place}: taken over from a run that was killed ({said})", file=sys.stderr)


def _release(key: Path) -> None:
    descriptor = _held.pop(key)
    if _same(descriptor, key):  # removed while it is held: nobody else can hold it meanwhile
        key.unlink()
    os.close(descriptor)


def _same(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _born(pid: int) -> str | None:
    """When a process of this host started; None if there is none of this id."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return f"{boot} {ticks}"


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Where nothing else listens to SIGTERM, let it end the process by an exception, so that the lock is released."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _leave:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _forget() -> None:
    """A forked child would keep the lock of its parent beyond that one's end."""
    if signal.getsignal(signal.SIGTERM) is _leave:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
