"""Signals of other packages and files: found, measured with the built-in ones, read by rewards, or refused clearly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo_cases import LVR, make_trainer, opening
from helpers import install
from signal_cases import by_hand, mean, plain_forward

from rl_lvr.errors import UserError
from rl_lvr.forward.batch import forward_hidden
from rl_lvr.latents.format import get_format
from rl_lvr.rollout.record import read_rollouts
from rl_lvr.rollout.replay import replay_batch
from rl_lvr.signals import measure, parse_signals, signal_tensors
from rl_lvr.training.rewards.load import load_rewards, signals_of

PAGE = Path(__file__).parents[2] / "docs" / "signals.md"
OWN = '''
"""Signals of another package."""
from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

import torch

from rl_lvr.signals import Needs, Reading, Values, signal

if TYPE_CHECKING:
    from rl_lvr.signals import Forward

MAP = Reading("image_map")

@signal(Needs((MAP,), ("latent",)))
def image_peak(f: Forward, *, reduce: Literal["max", "sum"] = "max", power: float = 1.0) -> Values:
    """The largest attention on one image token, mean over the latents."""
    rows, seen = f.attended(MAP, "latent")
    return f.per_sequence((seen.amax(1) if reduce == "max" else seen.sum(1)) ** power, rows)

@signal()
def answer_norms(f: Forward) -> Values:
    """Lengths of the hidden states of the answer, one per token."""
    after = f.regions.queries("after")
    return f.per_row(f.vectors("hidden", after).norm(dim=-1), after.flatten().nonzero()[:, 0])

def undeclared(f):
    return f.per_sequence(f.vectors("hidden", f.regions.spans.latent).norm(dim=-1), f.latents)

def given(value):
    @signal()
    def returns(f: Forward) -> Values:
        return value(f)
    return returns

def ones(f, *shape, **how):
    return torch.ones(*(shape or (f.count,)), **how)

def counts(f):
    return torch.ones(f.count, dtype=torch.long)

too_few = given(lambda f: Values(ones(f, f.count - 1), counts(f)))
lists = given(lambda f: Values(ones(f).tolist(), counts(f)))
bare = given(ones)
nothing = given(lambda f: None)
integers = given(lambda f: Values(ones(f, dtype=torch.long), counts(f)))
wrong_counts = given(lambda f: Values(ones(f), counts(f)[1:]))
real_counts = given(lambda f: Values(ones(f), ones(f)))
ragged = given(lambda f: Values(ones(f, 7), counts(f), counts(f)))
not_a_number = given(lambda f: Values(torch.tensor([1.0, float("nan"), 1.0]), counts(f)))
infinite_list = given(
    lambda f: Values(torch.tensor([1.0, 1.0, 2.0, -float("inf")]), counts(f), torch.tensor([1, 0, 3]))
)
leaves = given(lambda f: sys.exit(3))
raises = given(lambda f: 1 / 0)
attends = given(lambda f: f.attended(MAP, "latent"))
predicts = given(lambda f: f.vocabulary(0))
enters = given(lambda f: f.vectors("input", f.regions.spans.latent))

@signal(Needs((MAP,), ("latent",)))
def other_queries(f: Forward) -> Values:
    rows, seen = f.attended(MAP, "after")
    return f.per_sequence(seen.sum(1), rows)

@signal(Needs(inputs=True))
def other_tokens(f: Forward) -> Values:
    after = f.regions.queries("after")
    return f.per_sequence(f.vectors("input", after).norm(dim=-1), after.flatten().nonzero()[:, 0])

@signal()
def latent_norm(f: Forward) -> Values:
    return Values(torch.zeros(f.count), torch.zeros(f.count).long())

@signal()
def asks(f: Forward, flag: bool, *, count: int = 3, layers: tuple[int, ...] | None = None, word: str = "a") -> Values:
    return Values(torch.full((f.count,), float(count + flag)), counts(f))

@signal()
def no_annotation(f: Forward, k=3) -> Values:
    return None

@signal()
def odd_annotation(f: Forward, k: list[str] = ()) -> Values:
    return None

@signal()
def lost_annotation(f: Forward, k: Missing = 3) -> Values:
    return None

@signal()
def takes_all(f: Forward, **more: int) -> Values:
    return None

@signal()
def takes_none() -> Values:
    return None

@signal(lambda parameters: ["mass"])
def odd_needs(f: Forward) -> Values:
    return None

@signal(lambda parameters: Needs(inputs=parameters["spaec"] == "input"))
def failing_needs(f: Forward, space: str = "input") -> Values:
    return None
'''
REWARDS = """
def looks(image_peak, norms, **_):
    assert all(isinstance(row, list) for row in norms)
    return image_peak

looks.signals = ["own_signals.py:image_peak", {"own_signals.py:answer_norms": {"name": "norms"}}]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with a module, a file of rewards, and a package's entry points."""
    (tmp_path / "own_signals.py").write_text(OWN)
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    entries = ("image_peak = own_signals:image_peak", "latent_norm = own_signals:latent_norm")
    install(tmp_path, "peaks", "rl_lvr.signals", *entries, "two words = own_signals:image_peak")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_signals", raising=False)
    return tmp_path


@pytest.fixture
def given_batch(qwen) -> Any:
    markers = qwen.engine(get_format("lvr", k=3)).markers
    start, slot, end, word = markers.start, markers.slot, markers.end, qwen.tokenizer.convert_tokens_to_ids("red")
    completions = [[word, start, slot, slot, end, word, word], [start, slot, end, word], [word]]
    rollouts, images = by_hand(qwen, markers, completions)
    return markers, replay_batch(qwen.model, rollouts, images), rollouts, images


@pytest.mark.parametrize("reference", ["image_peak", "own_signals:image_peak", "FOLDER/own_signals.py:image_peak"])
def test_it_is_measured_beside_the_built_in_ones(qwen, own, given_batch, reference):
    markers, batch, rollouts, images = given_batch
    reference = reference.replace("FOLDER", str(own))
    entries = [reference, {reference: {"reduce": "sum", "power": 2, "name": "squares"}}, "attention_mass"]
    specs = parse_signals(entries)
    assert [spec.name for spec in specs] == ["image_peak", "squares", "attention_mass"]
    assert "own_signals" in specs[0].where
    columns = measure(qwen.model, batch, markers, specs).columns
    truth: dict[str, list[float]] = {"image_peak": [], "squares": []}
    for rollout, row in zip(rollouts, images, strict=True):
        plain = plain_forward(qwen, rollout, row, markers)
        seen = plain.weights.mean((0, 1))[plain.latents][:, plain.image]
        whole = seen if plain.image else seen.new_zeros(len(plain.latents), 1)
        truth["image_peak"].append(mean(whole.amax(1).tolist()))
        truth["squares"].append(mean((whole.sum(1) ** 2).tolist()))
    assert truth["image_peak"][0] > 0
    for name, values in truth.items():
        assert columns[name].values == pytest.approx(values, abs=2e-5), name
    assert columns["image_peak"].counts == [2, 1, 0]
    alone = measure(qwen.model, batch, markers, specs[2:]).columns["attention_mass"]
    assert columns["attention_mass"].values == pytest.approx(alone.values, abs=1e-6)


def test_a_reward_reads_it_as_a_column(qwen, own, given_batch, tmp_path_factory, monkeypatch):
    """Its file is named as it lies beside the recipe, wherever the run is started."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    markers, batch, _, _ = given_batch
    (reward,) = load_rewards(["own_rewards.py:looks"], beside=own)
    assert {"image_peak", "norms"} <= reward.takes
    specs = parse_signals(signals_of([reward]))
    columns = measure(qwen.model, batch, markers, specs).columns
    assert [len(row) for row in columns["norms"].values] == [2, 1, 0]
    named = {name: column.values for name, column in columns.items()}
    assert reward.function(completions=["a", "b", "c"], **named) == columns["image_peak"].values
    with pytest.raises(UserError, match="needs the signal 'image_peak', which was not measured"):
        reward.function(completions=["a", "b", "c"], norms=named["norms"])


def test_a_run_of_grpo_measures_it(load_tiny, own, monkeypatch):
    monkeypatch.chdir(own)
    model, processor = opening(load_tiny)
    trainer = make_trainer(model, processor, own, LVR, reward_funcs=load_rewards(["own_rewards.py:looks"]), max_steps=1)
    trainer.train()
    records = list(read_rollouts(own / "run"))
    peaks = [record.signals["image_peak"] for record in records]
    assert max(peaks) > 0
    assert peaks == pytest.approx([record.rewards["looks"] for record in records])


# ---- refusals


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("own_signals:undeclared", "is not declared to be one: write @signal(Needs(...))"),
        ("own_signals:image_pek", "there is no 'image_pek' in it; did you mean 'image_peak'"),
        ("image_pek", "no signal 'image_pek'; did you mean 'image_peak'"),
        ("image_pek", "path/file.py:function"),
        ("latent_norm", "has a signal 'latent_norm' too: write rl_lvr.signals.vectors:latent_norm or own_signals:l"),
        ("two words", "its name is 'two words'"),
        ("own_signals:MAP", "is a Reading, not a function"),
        ("missing.py:f", "there is no file missing.py"),
        ({"image_peak": {"powr": 2}}, "has no parameter 'powr'; did you mean 'power'? Parameters: reduce, power, name"),
        ({"image_peak": {"power": "2"}}, "power is '2'; it must be a number"),
        ({"image_peak": {"power": float("nan")}}, "power is nan; it must be a number"),
        ({"image_peak": {"reduce": "mean"}}, "choose max, sum"),
        ("own_signals:asks", "needs the parameter 'flag'"),
        ({"own_signals:asks": {"flag": 1}}, "flag is 1; it must be true or false"),
        ({"own_signals:asks": {"flag": True, "count": True}}, "count is True; it must be a whole number"),
        ({"own_signals:asks": {"flag": True, "word": 3}}, "word is 3; it must be a text"),
        ({"own_signals:asks": {"flag": True, "layers": 3}}, "layers is 3; it must be a list of whole numbers"),
        ("own_signals:no_annotation", "its parameter 'k' has no annotation; write float, int"),
        ("own_signals:odd_annotation", "its parameter 'k' is annotated list[str]; use float, int"),
        ("own_signals:lost_annotation", "the annotation of 'k' cannot be read (name 'Missing' is not defined)"),
        ("own_signals:takes_all", "takes **more, which a recipe cannot name"),
        ("own_signals:takes_none", "takes no pass"),
        ("own_signals:odd_needs", "declares ['mass']; it must be Needs(...)"),
        ("own_signals:failing_needs", "what it needs cannot be computed (KeyError: 'spaec')"),
    ],
)
def test_refusals_of_a_recipe(own: Path, entry: Any, problem: str) -> None:
    with pytest.raises(UserError, match=re.escape(problem)):
        parse_signals([entry])


def test_the_built_in_one_of_a_clash_has_its_own_name(own: Path) -> None:
    ours, theirs = parse_signals(
        [
            "rl_lvr.signals.vectors:latent_norm",
            {
                "own_signals:latent_norm": {
                    "name": "theirs",
                }
            },
        ]
    )
    assert ours.function.__module__ == "rl_lvr.signals.vectors"
    assert theirs.function.__module__ == "own_signals"
    (asked,) = parse_signals([{"own_signals:asks": {"flag": True, "count": -5, "layers": [1, 2], "word": "b"}}])
    assert asked.parameters == {"flag": True, "count": -5, "layers": (1, 2), "word": "b"}


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("too_few", "returned values (2,) for 3 rollouts: return one each"),
        ("lists", "returned values of type list: return tensors"),
        ("bare", "returned a Tensor: return Values"),
        ("nothing", "returned a NoneType: return Values"),
        ("integers", "returned values of torch.int64: return floating-point numbers"),
        ("wrong_counts", "returned counts (2,) torch.int64 for 3 rollouts"),
        ("real_counts", "returned counts (3,) torch.float32 for 3 rollouts"),
        ("ragged", "returned values (7,) for 3 rollouts: lengths must sum up to them"),
        ("not_a_number", "is nan for rollout 1 of the batch"),
        ("infinite_list", "is -inf for rollout 2 of the batch"),
        ("leaves", "asked to exit (SystemExit(3))"),
        ("attends", "at 'latent' without declaring it"),
        ("other_queries", "at 'after' without declaring it"),
        ("predicts", "reads next-token distributions without declaring them"),
        ("enters", "reads what enters the first layer without declaring it"),
        ("other_tokens", "is kept at latents and image tokens alone"),
    ],
)
def test_refusals_of_a_measurement(qwen, own, given_batch, name, problem):
    """Also where another signal has what this one did not ask for."""
    markers, batch, _, _ = given_batch
    others = ["image_peak", "latent_entropy", "attention_mass", "rl_lvr.signals.vectors:latent_span_cosine"]
    entry = {f"own_signals:{name}": {"name": "mine"}}
    for entries in ([entry], [*others, entry]):
        with pytest.raises(UserError, match=re.escape(problem)):
            measure(qwen.model, batch, markers, parse_signals(entries))
    with pytest.raises(UserError, match=re.escape(problem)):
        signal_tensors(qwen.model, batch, markers, parse_signals([entry]))


def test_an_error_of_a_definition_says_whose_it_is(qwen, own, given_batch):
    markers, batch, _, _ = given_batch
    with pytest.raises(ZeroDivisionError) as caught:
        measure(qwen.model, batch, markers, parse_signals([{"own_signals:raises": {"name": "mine"}}]))
    assert caught.value.__notes__ == ["in the signal 'mine' (own_signals:raises)"]


def test_a_model_that_is_not_finite_is_no_fault_of_a_signal(qwen, own, given_batch):
    markers, batch, _, _ = given_batch
    specs = parse_signals([{"latent_span_cosine": {"space": "hidden"}}])

    def run() -> torch.Tensor:
        return forward_hidden(qwen.model, batch, markers) * float("nan")

    values = measure(qwen.model, batch, markers, specs, run=run).columns["latent_span_cosine"].values
    assert values[0] != values[0]


def test_the_example_of_the_page_runs(qwen, tmp_path, given_batch):
    text = PAGE.read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(\"\"\"Signals of mine.*?)```", text, re.S)
    (tmp_path / "my_signals.py").write_text(block)
    markers, batch, _, _ = given_batch
    (name,) = re.findall(r"my_signals\.py:(\w+)", text.split(block)[1])[:1]
    specs = parse_signals([f"{tmp_path}/my_signals.py:{name}", {f"{tmp_path}/my_signals.py:{name}": {"name": "b"}}])
    column = measure(qwen.model, batch, markers, specs).columns[name]
    assert column.counts[:2] == [2, 1]
    assert column.values[0] > 0
