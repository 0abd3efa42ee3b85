"""The rooms of the package: imports point downwards and in no circle, generic rooms name no family of models, and
docs/architecture.md lists all rooms."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import rl_lvr
from rl_lvr.models.registry import KIND, family_class
from rl_lvr.plugins import installed

PACKAGE = Path(rl_lvr.__file__).parent
PAGE = PACKAGE.parent / "docs" / "architecture.md"
LEVELS = (
    ("latents", "ops", "answers"),
    ("models",),
    ("forward", "data"),
    ("signals", "rollout"),
    ("serving", "evaluation"),
    ("training",),
    ("lab", "commands"),
)
"""From the lowest."""
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
LONGEST = 400
OF_A_FAMILY = ("models", "lab", "commands")
"""Rooms that may name a family of models; the others know `rl_lvr.models.Family` alone."""
OTHER_FAMILIES = ("gemma", "idefics", "minicpm", "molmo", "pixtral", "smolvlm")
"""Backbones without an adapter here, or with one that a test brings."""


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    found = {}
    for path in package.rglob("*.py"):
        name = ".".join((package.name, *path.relative_to(package).with_suffix("").parts))
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, also within functions and for the sake of types."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and child.module is not None:
                names = (f"{child.module}.{alias.name}" for alias in child.names)
                found.update(name if name in known else child.module for name in names)
            elif isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found & known.keys()


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Arrows to a higher room; what lies in no room may import nothing that lies in one above `models`."""
    wrong = []
    for module, targets in graph.items():
        for target in targets:
            here, there = (name.split(".")[1] if name.count(".") else "" for name in (module, target))
            if there in LEVEL and here != "cli" and LEVEL[there] > LEVEL.get(here, 1):
                wrong.append(f"{module} -> {target}")
    return sorted(wrong)


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Modules that can be reached from themselves, together with all that they share this with."""
    reach = {module: set(targets) for module, targets in graph.items()}
    for middle in graph:
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    found: list[set[str]] = []
    for module in graph:
        if module in reach[module] and not any(module in circle for circle in found):
            found.append({other for other in reach[module] if module in reach[other]} | {module})
    return found


def family_words() -> set[str]:
    """`qwen` of `qwen2_5_vl`, `llava` and `onevision` of `llava_onevision`; and the first word of every name."""
    known = sorted(installed(KIND))
    spoken = [*known, *(family_class(model_type).name.split()[0] for model_type in known)]
    return {*OTHER_FAMILIES, *re.findall(r"[a-z]{4,}", " ".join(spoken).lower())}


def without_docstrings(source: str) -> str:
    """The source, comments included; every string that stands as a statement is blank, lines stay as they are."""
    lines = source.encode().split(b"\n")  # ast counts columns in bytes
    for node in ast.walk(ast.parse(source)):
        value = node.value if isinstance(node, ast.Expr) else None
        if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
            continue
        first, last = value.lineno - 1, (value.end_lineno or value.lineno) - 1
        for number in range(first, last + 1):
            line = lines[number]
            begin = value.col_offset if number == first else 0
            end = (value.end_col_offset or 0) if number == last else len(line)
            lines[number] = line[:begin] + b" " * (end - begin) + line[end:]
    return b"\n".join(lines).decode()


def named_families(source: str, words: set[str]) -> list[str]:
    """Lines that name a family outside of docstrings."""
    code = without_docstrings(source).splitlines()
    return [line.strip() for line in code if any(word in line.lower() for word in words)]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def test_imports_point_downwards(graph: dict[str, set[str]]) -> None:
    assert upward(graph) == []
    assert upward({"rl_lvr.latents.batch": {"rl_lvr.rollout.types"}}) == [
        "rl_lvr.latents.batch -> rl_lvr.rollout.types"
    ]
    assert upward({"rl_lvr.errors": {"rl_lvr.data.record"}}) == ["rl_lvr.errors -> rl_lvr.data.record"]


def test_nothing_imports_in_a_circle(graph: dict[str, set[str]]) -> None:
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]


def test_no_family_is_named_where_code_is_for_all() -> None:
    words = family_words()
    assert {"qwen", "internvl", "llava", "onevision", "gemma"} <= words
    assert words.isdisjoint({"text", "only", "vision", "model"})
    found = {}
    for name, path in modules().items():
        if name.partition(".")[2].split(".")[0] not in OF_A_FAMILY:
            found[name] = named_families(path.read_text(encoding="utf-8"), words)
    assert {"rl_lvr.wrapping", "rl_lvr.rollout.vllm.engine", "rl_lvr.evaluation.plan"} <= found.keys()
    assert {name: lines for name, lines in found.items() if lines} == {}


SNIPPET = '''
"""Qwen2.5-VL writes "é" here."""
def rope(model):
    """As in InternVL,
    and in LLaVA."""
    width: int = 3; """of Gemma"""; kind = "Qwen3VL"
    # M-RoPE of qwen
    if model.config.model_type == "llava_onevision":
        return f"SmolVLM {width}"
    return "any family"
'''


def test_a_family_that_is_named_is_found() -> None:
    assert named_families(SNIPPET, family_words()) == [
        'width: int = 3;               ; kind = "Qwen3VL"',
        "# M-RoPE of qwen",
        'if model.config.model_type == "llava_onevision":',
        'return f"SmolVLM {width}"',
    ]
    assert named_families(SNIPPET, {"any family"}) == ['return "any family"']


def test_the_package_of_rewards_is_never_imported() -> None:
    for path in modules().values():
        assert not re.search(r"^\s*(from|import) rewards\b", path.read_text(encoding="utf-8"), re.M), path


def test_no_file_of_training_is_too_long() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines()) for path in (PACKAGE / "training").rglob("*.py")
    }
    assert {path.name: length for path, length in lengths.items() if length > LONGEST} == {}


def test_the_page_names_every_room() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    rooms |= {f"training/{path.name}" for path in (PACKAGE / "training").iterdir() if (path / "__init__.py").is_file()}
    rooms.remove("training")
    assert {room for room in rooms if f"`{room}/`" not in text} == set()
    assert rooms - {room.split("/")[0] for room in rooms} >= {"training/runs", "training/grpo"}
    assert {room for room in rooms if "/" not in room} <= set(LEVEL)
