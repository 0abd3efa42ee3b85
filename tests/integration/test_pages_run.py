"""The Python examples of docs/evaluation.md and docs/families.md run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from lab_tools import PUZZLES, write_puzzles
from smolvlm import installed

from rl_lvr.latents.format import get_format

DOCS = Path(__file__).resolve().parents[2] / "docs"


def example(page: str, word: str) -> str:
    """The one block of a page that holds `word`."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if word in block]
    return found


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_an_evaluation(tiny_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    source = tiny_folder("qwen2_5_vl", latent_formats=("lvr",), words=PUZZLES.words)
    shutil.copytree(source, tmp_path / "MODEL")
    get_format("lvr", k=3).save(tmp_path / "MODEL")
    write_puzzles(tmp_path, train=1, test=6)
    monkeypatch.chdir(tmp_path)
    found = run(example("evaluation.md", "Judge").replace("max_tokens=64", "max_tokens=8"))
    said = capsys.readouterr().out
    assert "own/forced" in said
    assert "6 records" in said
    assert len([row for row in found["rows"] if row.condition == "own/forced" and row.latents]) == 6
    assert found["file"].summary_path.is_file()


def test_a_check_of_a_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with installed(tmp_path / "packages"):
        found = run(example("families.md", "check_parity"))
    assert found["report"].latents >= 3
    assert found["family"].name == "SmolVLM"
