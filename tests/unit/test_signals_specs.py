"""Signals as a recipe writes them: names, parameters, and refusals that name the nearest valid one."""

from __future__ import annotations

import inspect
import re

import pytest

from rl_lvr.errors import UserError
from rl_lvr.signals import SIGNALS, Needs, Reading, parse_signals


def test_names_and_parameters():
    plain, layers, paper, relative = parse_signals(
        [
            "attention_mass",
            {"attention_mass": {"layers": [0, -1], "to": "image", "name": "first"}},
            "attention_mass_paper_b",
            "attention_relative_paper_b",
        ]
    )
    assert (plain.name, plain.parameters) == ("attention_mass", {})
    assert plain.needs == Needs((Reading("mass"),), ("after",))
    assert (layers.name, layers.parameters) == ("first", {"layers": (0, -1), "to": "image"})
    assert layers.needs == Needs((Reading("mass", (0, -1)),), ("after",))
    assert paper.needs == relative.needs == Needs((Reading("mass", (0,)),), ("paper_b",))  # the paper's layer, not all


def test_what_a_signal_needs_may_depend_on_its_parameters():
    text, hidden = parse_signals(
        [{"attention_mass": {"queries": "text", "heads": [1]}}, {"latent_norm": {"space": "hidden"}}]
    )
    assert text.needs == Needs((Reading("mass", None, (1,)),), ("text",))
    assert hidden.needs == Needs()
    (norm, end) = parse_signals(["latent_norm", "end_at_first_slot"])
    assert norm.needs == Needs(inputs=True)
    assert end.needs == Needs(vocabulary=True, end=True)


def test_parameters_of_numbers():
    (reward,) = parse_signals([{"confidence_reward": {"k": 5, "weight": 1}}])
    assert reward.parameters == {"k": 5, "weight": 1.0}
    assert reward.needs == Needs(vocabulary=True)


def test_every_signal_says_what_it_is():
    for name, function in SIGNALS.items():
        assert parse_signals([name])[0].function is function
        assert re.search(r"[Pp]aper [A-D]|\d{4}\.\d{5}", inspect.getdoc(function) or ""), name
        (spec,) = parse_signals([name])
        assert bool(spec.needs.readings) == (name.startswith("attention") or "attention_entropy" in name)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("atention_mass", "did you mean 'attention_mass'"),
        ("nothing like it", "Signals: attention_mass"),
        ({"attention_mass": {"layer": [0]}}, "did you mean 'layers'"),
        ({"attention_mass": {"xyzzy": 1}}, "Parameters: to, queries, layers, heads, per, name"),
        ({"attention_mass": {"to": "text"}}, "choose latent, slot, image, markers, sink"),
        ({"attention_mass": {"layers": 0}}, "list of whole numbers"),
        ({"attention_mass": {"layers": []}}, "list of whole numbers"),
        ({"attention_mass": {"heads": [True]}}, "list of whole numbers"),
        ({"attention_mass": {"heads": ["1"]}}, "list of whole numbers"),
        ({"attention_mass": {"name": "two words"}}, "argument of that name"),
        ({"attention_mass": [0]}, "name: value"),
        ({"attention_mass": {}, "latent_norm": {}}, "not {"),
        ({"latent_confidence": {"k": 0}}, "from 1 to 64"),
        ({"latent_confidence": {"k": 65}}, "from 1 to 64"),
        ({"latent_confidence": {"k": 2.5}}, "whole number"),
        ({"confidence_reward": {"weight": "big"}}, "must be a number"),
        (7, "a signal is a name"),
    ],
)
def test_refusals(entry, says):
    with pytest.raises(UserError) as refusal:
        parse_signals([entry])
    assert says in str(refusal.value)


def test_two_columns_of_one_name_are_refused():
    with pytest.raises(UserError, match="two signals are called 'attention_mass'"):
        parse_signals(["attention_mass", {"attention_mass": {"layers": [0]}}])
    with pytest.raises(UserError, match="two signals are called 'latent_norm'"):
        parse_signals(["latent_norm", {"latent_span_cosine": {"name": "latent_norm"}}])


def test_null_means_all():
    (spec,) = parse_signals([{"attention_mass": {"layers": None}}])
    assert spec.needs.readings == (Reading("mass"),)


def test_needs_that_measure_nothing_are_refused():
    with pytest.raises(ValueError, match="no query set 'a': choose after, text"):
        Needs((Reading("mass"),), "after")
    with pytest.raises(ValueError, match="give both, or neither"):
        Needs((Reading("mass"),))
    with pytest.raises(ValueError, match="give both, or neither"):
        Needs(queries=("after",))
