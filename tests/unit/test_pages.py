"""docs/evaluation.md names every option and field; the family of docs/families.md is the one that is tested."""

from __future__ import annotations

import argparse
import ast
import re
from dataclasses import fields
from pathlib import Path

from rl_lvr.commands import evaluate
from rl_lvr.evaluation.rows import Row
from rl_lvr.models import Family
from rl_lvr.models.registry import model_types, required_members

ROOT = Path(__file__).resolve().parents[2]
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
FAMILIES = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def test_every_option_and_field_of_an_evaluation_is_on_its_page() -> None:
    parser = argparse.ArgumentParser()
    evaluate.configure(parser)
    options = {action.option_strings[-1] for action in parser._actions if action.option_strings}
    assert {name for name in options - {"--help"} if not re.search(rf"`{name}[ `]", EVALUATION)} == set()
    rows = EVALUATION[EVALUATION.index("## Rows") :]
    assert {field.name for field in fields(Row) if f"| `{field.name}` |" not in rows} == set()


def test_every_family_and_every_member_is_on_the_page() -> None:
    assert {name for name in model_types() if f"`{name}`" not in FAMILIES} == set()
    members = {name for name, value in vars(Family).items() if not name.startswith("_")}
    assert set(required_members()) <= members | {"name", "model_types", "image_keys"}
    told = set(re.findall(r"`(\w+)[`(]", FAMILIES))
    assert members - told - {"bind", "hidden_size", "count_images"} == set()


class Bare(ast.NodeTransformer):
    """Code without docstrings and annotations."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        assert node.value is not None
        return ast.copy_location(ast.Assign([node.target], node.value), node)


def parts(code: str) -> dict[str, str]:
    """What a module defines, and its class: by name, as bare code."""
    tree = Bare().visit(ast.parse(code))
    (family,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    found = {}
    for node in [*tree.body, *family.body]:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.dump(node)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.dump(node.value)
    return found


def test_the_family_on_the_page_is_the_tested_one() -> None:
    (block,) = [text for text in re.findall(r"```python\n(.*?)```", FAMILIES, re.DOTALL) if "class " in text]
    shown = parts(block)
    tested = parts((ROOT / "tests" / "integration" / "smolvlm.py").read_text(encoding="utf-8"))
    assert set(required_members()) < set(shown)
    assert tested.keys() - shown.keys() == {"tiny", "tiny_tokens", "tiny_image", "installed"}
    assert {name for name, code in shown.items() if tested[name] != code} == set()
    other = parts(block.replace("[1] * int(real)", "[2] * int(real)"))
    assert {name for name, code in other.items() if tested[name] != code} == {"rows_per_image"}  # control
