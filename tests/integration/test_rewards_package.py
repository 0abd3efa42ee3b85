"""A package of somebody else, installed from a folder: its reward is found by its entry point and used by a recipe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lab_tools import grpo_command, logged

from rl_lvr.errors import UserError
from rl_lvr.training.rewards.load import load_rewards, signals_of

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "their-rewards"
version = "2.1"

[project.entry-points."rl_lvr.rewards"]
brevity = "their_rewards.text:brevity"
sharp = "their_rewards.text:Sharp"

[tool.setuptools]
packages = ["their_rewards"]
"""
CODE = '''
class Sharp:
    """Low entropy at latents."""

    signals = ["latent_entropy"]

    def __init__(self, scale: float = 1.0):
        self.scale = scale

    def __call__(self, latent_entropy, **_):
        return [-self.scale * value for value in latent_entropy]


def brevity(texts, *, best: int = 5, **_):
    """1 for the wanted number of characters, falling to 0."""
    return [max(0.0, 1 - abs(len(text) - best) / best) for text in texts]
'''
RECIPE = """
rewards:
  - {name: brevity, weight: 0.5, options: {best: 4}}
  - sharp
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package."""
    source = tmp_path_factory.mktemp("source")
    (source / "their_rewards").mkdir()
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "their_rewards" / "__init__.py").touch()
    (source / "their_rewards" / "text.py").write_text(CODE)
    target = tmp_path_factory.mktemp("site")
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(target), str(source)]
    subprocess.run(command, check=True, timeout=240)
    return target


def test_a_recipe_uses_it(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(site))
    brevity, sharp = specs = load_rewards(yaml.safe_load(RECIPE)["rewards"])
    assert brevity.where == "their_rewards.text:brevity (their-rewards 2.1)"
    assert (brevity.weight, brevity.doc) == (0.5, "1 for the wanted number of characters, falling to 0.")
    assert brevity.function(completions=["a", "b"], texts=["four", "eleven char"]) == [1, 0]
    assert signals_of(specs) == ["latent_entropy"]
    assert sharp.function(completions=["a", "b"], latent_entropy=[0.5, 2.0]) == [-0.5, -2]
    with pytest.raises(UserError, match="has no option 'bset'; did you mean 'best'"):
        load_rewards([{"name": "brevity", "options": {"bset": 1}}])


def test_the_commands_see_it(site: Path, tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text('{"prompt": "q", "completion": "fives"}\n')
    with_it = {**os.environ, "PYTHONPATH": str(site)}
    for arguments in (["list", "--json"], ["test", "brevity", "--data", str(data), "--json"]):
        command = [sys.executable, "-m", "rl_lvr.cli", "rewards", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=with_it)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        if arguments[0] == "list":
            assert {"brevity", "sharp", "accuracy"} <= {row["name"] for row in found}
        else:
            assert found["scores"] == [1.0]


def test_a_run_uses_it_and_without_it_does_not_begin(site: Path, opener: Path, place: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    out = tmp_path / "run"
    words = grpo_command(opener, place / "data", out, max_steps=1, config=tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "rl_lvr.cli", *words]
    without = subprocess.run(command, capture_output=True, text=True, check=False)
    assert without.returncode == 2
    assert "rl-lvr: no reward 'brevity'" in without.stderr.splitlines()[-1]
    assert not out.exists()

    with_it = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=with_it)
    assert done.returncode == 0, done.stderr
    (row,) = logged(out)
    weighed = 0.5 * row["rewards/brevity/mean"] + row["rewards/sharp/mean"]
    assert row["reward"] == pytest.approx(weighed, abs=1e-4)
    seen = row["signal/latent_entropy"] * row["latent/rate"]  # the signal's mean is over rows with latents
    assert row["rewards/sharp/mean"] == pytest.approx(-seen, abs=1e-4) != 0


def test_without_the_package_it_is_not_there() -> None:
    with pytest.raises(UserError, match="no reward 'brevity'"):
        load_rewards(["brevity"])
