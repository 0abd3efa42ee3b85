"""What tells a checkpoint or a data file from another, wherever they lie. Free of torch."""

from __future__ import annotations

import hashlib
from pathlib import Path

PIECE = 1 << 20
PIECES = 16


def stamp_of_data(path: Path) -> str:
    """SHA-256 of a file, or of the files in a folder that `datasets` saved."""
    digest = hashlib.sha256()
    place = path if path.exists() else Path(str(path).rpartition(":")[0])  # folder:split
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as data:
                while piece := data.read(PIECE):
                    digest.update(piece)
    return digest.hexdigest()


def stamp_of_weights(folder: Path) -> str:
    """SHA-256 of the names and sizes of the weights and of pieces from all over them: quick for any size."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as data:
            for number in range(PIECES):
                data.seek(number * max(size - PIECE, 0) // (PIECES - 1))
                digest.update(data.read(PIECE))
    return digest.hexdigest()
