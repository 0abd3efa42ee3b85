"""What a server asks of new weights before it touches its own, and who must wait for whom meanwhile."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from rl_lvr.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
REPAIR = "send whole weights again, or restart the server."


def sent_folder(shared: Path | None, name: str) -> Path:
    """The folder of safetensors files that a trainer has put into the folder `shared`; UserError for anything else."""
    if shared is None:
        raise UserError("this server keeps its weights: restart it with --weights-folder DIR.")
    if NAME.fullmatch(name) is None:
        raise UserError(f"{name[:80]!r} is no name of weights: letters, digits, - and _ only.")
    folder = shared / name
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"the server finds no folder {name} in {shared}: is it the folder that the trainer writes to?")
    files = sorted(folder.iterdir())
    for path in files:
        if path.is_symlink() or not path.is_file() or path.suffix != ".safetensors":
            raise UserError(f"{path.name!r} in {name} is no safetensors file, and nothing else is read.")
    if not files:
        raise UserError(f"the folder {name} holds no safetensors files.")
    return folder


class Gate:
    """Either requests run or weights change. What comes during a change waits; what runs is not interrupted by one."""

    def __init__(self) -> None:
        self.running = 0
        self.whole = True
        """False once a change has failed, until another succeeds: nobody knows what the weights are then."""
        self._changing = asyncio.Lock()

    def check(self) -> None:
        if not self.whole:
            raise UserError(f"new weights were loaded only in part, and nothing is generated with them: {REPAIR}")

    @asynccontextmanager
    async def request(self) -> AsyncGenerator[None, None]:
        async with self._changing:
            pass
        self.check()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    @asynccontextmanager
    async def change(self) -> AsyncGenerator[None, None]:
        if self._changing.locked():
            raise UserError("other weights are being loaded: send these when that is done.")
        if self.running:
            raise UserError(f"{self.running} requests are running: send weights when they have ended.")
        async with self._changing:
            self.whole = False
            yield
            self.whole = True
