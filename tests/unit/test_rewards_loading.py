"""From a recipe's entry to a reward: where it is found, its options, weight, schedule and signals; and refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl_lvr import plugins
from rl_lvr.errors import UserError
from rl_lvr.training.rewards.load import Schedule, load_rewards, require_whole_groups, signals_of, weights_at

OWN = '''
"""A user's file."""
import dataclasses
from typing import Literal

LIMIT = 3

def short(completions, limit: int = 10, *, mode: Literal["hard", "soft"] = "hard", factor: float = 1.0, **_):
    """Short is good.

    More here.
    """
    return [factor * (len(c) <= limit) for c in completions]

def looks(completions, attention_mass):
    return attention_mass

looks.signals = ["attention_mass"]

@dataclasses.dataclass
class Scale:
    """Times something."""
    by: float
    def __post_init__(self):
        if self.by <= 0:
            raise ValueError(f"by is {self.by}; it must be above 0.")
    def __call__(self, completions, **_):
        return [self.by] * len(completions)

class Mute:
    pass
'''


@pytest.fixture
def own(tmp_path: Path) -> str:
    path = tmp_path / "own_rewards.py"
    path.write_text(OWN)
    return str(path)


def test_loading_needs_no_torch() -> None:
    code = (
        "import sys\nfrom rl_lvr.training.rewards.load import load_rewards\n"
        "assert load_rewards(['accuracy', {'name': 'attention', 'weight': 2}])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_reward_is_found_by_name_module_or_file(own: str) -> None:
    specs = load_rewards(["accuracy", {"name": "rewards.accuracy:accuracy", "label": "again"}, f"{own}:short"])
    assert [spec.name for spec in specs] == ["accuracy", "again", "short"]
    assert [spec.function.__name__ for spec in specs] == ["accuracy", "again", "short"]
    assert specs[0].where.startswith("rewards.accuracy:accuracy (rl-lvr ")
    assert specs[1].where == "rewards.accuracy:accuracy"
    assert specs[2].doc == "Short is good."
    columns = {"completions": ["B", "C"], "answer": ["B", "B"]}
    assert specs[0].function(**columns) == specs[1].function(**columns) == [1, 0]
    assert specs[2].function(**columns) == [1, 1]
    assert load_rewards([f"{own}:short"])[0].function(**columns) == [1, 1]  # the module is loaded once


def test_options_reach_functions_and_classes(own: str) -> None:
    entries = [
        {"name": f"{own}:short", "options": {"limit": 1, "factor": 2}},
        {"name": f"{own}:Scale", "options": {"by": 3}},
    ]
    texts = {"completions": ["B", "BB"]}
    assert [spec.function(**texts) for spec in load_rewards(entries)] == [[2, 0], [3, 3]]


@pytest.mark.parametrize("options", [{}, {"weight": 2.0}])
def test_an_option_that_is_set_hides_no_column_behind_it(tmp_path: Path, options: dict[str, float]) -> None:
    """functools.partial calls every parameter after a bound one keyword-only, as options are."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def mine(completions, weight=1.0, answer=None, *, spans, scale=1.0, **_):\n"
        "    return [weight * scale * (a == c) + len(s) for c, a, s in zip(completions, answer, spans)]\n"
    )
    (spec,) = load_rewards([{"name": f"{file}:mine", "options": options}])
    assert {"answer", "spans"} <= spec.takes
    assert "scale" not in spec.takes
    columns = {"completions": ["B"], "answer": ["B"], "spans": [[1, 2]], "scale": [100.0]}
    assert spec.function(**columns) == [options.get("weight", 1.0) + 2]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("acuracy", "no reward 'acuracy'; did you mean 'accuracy'"),
        ("accuracy.py", "no reward 'accuracy.py'"),
        ("rewards.accuracy:acuracy", "there is no 'acuracy' in it; did you mean 'accuracy'"),
        ("rewards.acc:accuracy", "there is no module 'rewards.acc'"),
        ("no_such_package.module:f", "there is no module 'no_such_package'"),
        (":f", "is not of the form"),
        ("a:b c", "is not of the form"),
        ("missing.py:f", "there is no file missing.py"),
        ("OWN:LIMIT", "LIMIT is a int, not a function"),
        ("OWN:Mute", "objects cannot be called"),
        ("OWN:Scale", "needs the option 'by'"),
        ({"name": "OWN:Scale", "options": {"by": -1}}, "by is -1.0; it must be above 0"),
        ({"name": "OWN:short", "options": {"limt": 1}}, "no option 'limt'; did you mean 'limit'? Options: limit, mode"),
        ({"name": "OWN:short", "options": {"completions": []}}, "no option 'completions'"),
        ({"name": "OWN:looks", "options": {"attention_mass": []}}, "no option 'attention_mass'"),
        ({"name": "OWN:short", "options": {"limit": "x"}}, "limit is 'x'; it must be a whole number"),
        ({"name": "OWN:short", "options": {"limit": True}}, "limit is True; it must be a whole number"),
        ({"name": "OWN:short", "options": {"mode": "sof"}}, "mode is 'sof'; did you mean 'soft'"),
        ({"name": "OWN:short", "options": [1]}, "write them as name: value"),
        ({"name": "accuracy", "wieght": 1}, "unknown key 'wieght'; did you mean 'weight'"),
        ({"name": "accuracy", "kind": "math"}, "options of the reward itself stand below options"),
        ({"name": "accuracy", "weight": "1"}, "weight is '1'"),
        ({"name": "accuracy", "weight": float("nan")}, "weight is nan"),
        ({"name": "accuracy", "timeout": 0}, "timeout is 0"),
        ({"name": "accuracy", "on_error": "ignore"}, "choose stop or exclude"),
        ({"name": "accuracy", "label": "two words"}, "it must be a word"),
        ({"name": "accuracy", "schedule": "linear"}, "write constant, or from, to and steps"),
        ({"name": "accuracy", "schedule": {"from": 0, "to": 1}}, "needs steps"),
        ({"name": "accuracy", "schedule": {"until": 1}}, "has no 'until'"),
        ({"name": "accuracy", "schedule": {"from": "a", "steps": 1}}, "both must be numbers"),
        ({"name": "accuracy", "signals": "entropy_drop"}, "write a list of names"),
        ({"name": "accuracy", "signals": [3]}, "a signal is a name"),
        ({"weight": 1}, "a mapping with a name"),
        (3, "a mapping with a name"),
        ('{"name": ', "no valid JSON"),
    ],
)
def test_refusals(own: str, entry: object, problem: str) -> None:
    if isinstance(entry, str):
        entry = entry.replace("OWN", own)
    elif isinstance(entry, dict) and "name" in entry:
        entry = {**entry, "name": entry["name"].replace("OWN", own)}
    with pytest.raises(UserError, match=None) as caught:
        load_rewards([entry])  # type: ignore[list-item]
    assert problem in str(caught.value)


def test_a_module_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one.py").write_text("import no_such_thing\n")
    (tmp_path / "broken_two.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for reference, problem in [
        ("broken_one:f", "needs the module 'no_such_thing': install it"),
        ("broken_two:f", "importing broken_two failed \\(ZeroDivisionError"),
        (f"{tmp_path}/broken_two.py:f", "failed \\(ZeroDivisionError"),
    ]:
        with pytest.raises(UserError, match=problem):
            load_rewards([reference])


LEAVES = """
import sys

class Leaves(BaseException):
    pass

def how():
    HOW

if WHERE == "import":
    how()

class Reward:
    def __init__(self):
        if WHERE == "constructor":
            how()
    def __call__(self, completions, **_):
        return [0.0 for _ in completions]

def __getattr__(name):
    how()
"""


@pytest.mark.parametrize("how", ["sys.exit(0)", "sys.exit()", "raise Leaves", "raise GeneratorExit"])
@pytest.mark.parametrize("where", ["import", "constructor", "attribute"])
def test_code_that_leaves_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, where: str) -> None:
    name = f"leaves_{where}_{how[-3:-1].strip('()') or 'x'}_{len(how)}"
    (tmp_path / f"{name}.py").write_text(LEAVES.replace("HOW", how).replace("WHERE", repr(where)))
    monkeypatch.syspath_prepend(str(tmp_path))
    attribute = "other" if where == "attribute" else "Reward"
    for reference in (f"{tmp_path}/{name}.py:{attribute}", f"{name}:{attribute}"):
        with pytest.raises(UserError, match=r"reward '.*' asked to exit \("):
            load_rewards([reference])


def test_ctrl_c_at_import_stays_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load_rewards([f"{tmp_path}/interrupted.py:f"])


def test_a_list_is_a_list() -> None:
    with pytest.raises(UserError, match="rewards must be a list"):
        load_rewards("accuracy")
    assert load_rewards([]) == []


def test_labels_are_unique() -> None:
    with pytest.raises(UserError, match="two rewards are called 'accuracy'"):
        load_rewards(["accuracy", {"name": "accuracy", "options": {"kind": "exact"}}])


def test_an_entry_may_be_json_as_flags_need_it() -> None:
    entry = {"name": "accuracy", "weight": 2, "schedule": {"from": 0, "steps": 10}}
    (from_json,) = load_rewards([json.dumps(entry)])
    (plain,) = load_rewards([entry])
    assert (from_json.weight, from_json.schedule) == (plain.weight, plain.schedule) == (2.0, Schedule(0.0, 1.0, 0, 10))


def test_entries_come_through_a_recipe_file(tmp_path: Path) -> None:
    from rl_lvr.training.runs.recipe import parse_recipe

    @dataclass
    class Config:
        rewards: list[str] = field(default_factory=list)

    path = tmp_path / "recipe.yaml"
    path.write_text(
        "rewards:\n  - presence\n  - {name: accuracy, weight: 0.9, options: {kind: math, tolerance: 1.0e-3}}\n"
    )
    (config,), _ = parse_recipe([Config], ["--config", str(path)])
    specs = load_rewards(config.rewards)
    assert [(spec.name, spec.weight) for spec in specs] == [("presence", 1.0), ("accuracy", 0.9)]


def test_two_packages_with_one_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    points = [EntryPoint("same", f"rewards.{m}", "rl_lvr.rewards") for m in ("accuracy:accuracy", "presence:presence")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*points, points[0]])
    with pytest.raises(UserError, match=r"2 installed packages have a reward 'same': write rewards.accuracy:acc.* or"):
        load_rewards(["same"])
    monkeypatch.setattr(plugins, "entry_points", lambda group: [points[0], points[0]])
    assert load_rewards(["same"])[0].where == "rewards.accuracy:accuracy (an unknown package)"


MINE = "def mine(completions, **_):\n    return [2.0] * len(completions)\n"


@pytest.mark.parametrize(
    ("place", "reference"),
    [
        ("rewards.py", "rewards:mine"),
        ("rewards.py", "rewards.py:mine"),
        ("rewards/__init__.py", "rewards:mine"),
        ("rewards/other.py", "rewards/other.py:mine"),
    ],
)
def test_a_users_own_rewards_does_not_hide_the_package(tmp_path: Path, place: str, reference: str) -> None:
    """`python -m` and `accelerate launch` put the working directory first on the path."""
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(MINE)
    program = (
        "from rl_lvr.training.rewards import load_rewards\n"
        f"mine, accuracy = load_rewards(['{reference}', 'accuracy'])\n"
        "print(mine.function(completions=['a']), accuracy.function(completions=['<answer>b</answer>'], answer=['b']))\n"
    )
    for words in (["-c", program], ["-m", "rl_lvr.cli", "rewards", "list"]):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        said = done.stdout.splitlines()
        if words[0] == "-c":
            assert said == ["[2.0] [1.0]"]
        else:
            assert any(line.split()[:1] == ["judge"] for line in said), done.stdout
            assert "there is no module" not in done.stdout


def test_signals_of_the_function_and_of_the_recipe() -> None:
    def signals(*entries):
        return signals_of(load_rewards(list(entries)))

    layer_0 = {"attention_mass": {"to": "slot", "queries": "after", "name": "attention_mass_layers_0", "layers": [0]}}
    assert signals("accuracy") == []
    assert signals("attention", "confidence_text") == [layer_0, "entropy_drop"]
    assert signals("attention", {"name": "attention", "label": "other", "options": {"gate": "correct"}}) == [layer_0]
    own = {"entropy_drop": {"name": "entropy_drop"}}
    assert signals({"name": "confidence_text", "signals": [own, "latent_norm"]}) == [own, "latent_norm"]
    with pytest.raises(UserError, match="both call a signal 'entropy_drop' but measure it differently"):
        signals("confidence_text", {"name": "confidence_text", "label": "b", "signals": [own]})


def test_a_spec_knows_what_it_takes(own: str) -> None:
    takes = {spec.name: spec.takes for spec in load_rewards(["necessity", "length_excess", f"{own}:looks"])}
    assert takes["necessity"] == {"completions", "answer", "necessity_completions"}
    assert takes["length_excess"] == {"completions", "completion_ids", "answer", "group"}
    assert takes["looks"] == {"completions", "attention_mass"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"num_generations": 8},
            "holds 4 completions (per_device_train_batch_size x steps_per_generation), no whole groups",
        ),
        ({"num_generations": 8, "gradient_accumulation_steps": 2}, None),
        ({"num_generations": 4}, None),
        ({"num_generations": 2, "eval_strategy": "epoch", "num_generations_eval": 4}, "2 completions (per_device_eval"),
        ({"num_generations": 2, "eval_strategy": "no", "num_generations_eval": 4}, None),
        ({"num_generations": 2, "eval_strategy": "epoch"}, None),
        ({"num_generations": 4, "processes": 1, "eval_strategy": "epoch", "per_device_eval_batch_size": 4}, None),
        ({"num_generations": 8, "names": ["accuracy", "format"]}, None),
    ],
)
def test_a_reward_of_groups_needs_whole_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, problem: str | None
) -> None:
    """On TRL's own arguments: what it accepts is not refused for rewards that look at each completion alone."""
    from trl import GRPOConfig

    changes = dict(changes)
    processes, names = changes.pop("processes", 2), changes.pop("names", ["accuracy", "length_excess"])
    monkeypatch.setattr(GRPOConfig, "world_size", processes)
    given = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "use_cpu": True, "report_to": "none"}
    args = GRPOConfig(output_dir=str(tmp_path), **given | changes)
    if problem is None:
        require_whole_groups(load_rewards(names), args)
        return
    with pytest.raises(UserError, match=re.escape(problem)) as caught:
        require_whole_groups(load_rewards(names), args)
    assert str(caught.value).startswith("reward 'length_excess' compares the completions of a group, but each of the 2")


def test_weights_follow_their_schedules() -> None:
    specs = load_rewards(
        [
            {"name": "accuracy", "weight": 0.9},
            {"name": "attention", "weight": 2, "schedule": {"from": 1, "to": 0, "begin": 100, "steps": 100}},
            {"name": "presence", "schedule": {"from": 0, "to": 1, "steps": 1}},
        ]
    )
    assert weights_at(specs, 0) == [0.9, 2, 0]
    assert weights_at(specs, 1) == [0.9, 2, 1]
    assert weights_at(specs, 150) == [0.9, 1, 1]
    assert weights_at(specs, 10**6) == [0.9, 0, 1]


@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(0, 50), st.integers(1, 50), st.integers(0, 200))
def test_a_schedule_stays_between_its_ends(first: float, last: float, begin: int, steps: int, step: int) -> None:
    schedule = Schedule(first, last, begin, steps)
    assert min(first, last) - 1e-9 <= schedule.at(step) <= max(first, last) + 1e-9
    assert schedule.at(begin) == first
    assert schedule.at(begin + steps) == pytest.approx(last)
    assert Schedule().at(step) == 1
