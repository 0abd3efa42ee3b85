"""Rows of an evaluation and the figures over them. Neither needs torch."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rl_lvr.errors import UserError
from rl_lvr.evaluation.report import summarise, text_of
from rl_lvr.evaluation.rows import AnswerFile, Row, Rule, read_rows
from rl_lvr.evaluation.stamps import stamp_of_data, stamp_of_weights
from rl_lvr.evaluation.statistics import maj_at_k, paired, proportion

SETTINGS = {"model": "m", "seed": 0}


def row(number: int, condition: str = "own", right: bool = True, **more) -> Row:
    text = "red" if right else "blue"
    made = Row(
        id=f"r{number}",
        condition=condition,
        answer="red",
        text=text,
        extracted=text,
        right=right,
        rule="exact",
        latents=3,
        cluster=f"r{number}",
        category=None,
        seed=number,
    )
    return replace(made, **more)


def test_no_torch():
    code = "import sys; import rl_lvr.evaluation.report; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the file


def test_rows_come_back_as_they_were(tmp_path: Path):
    rows = [row(0, signals={"a": 0.5, "b": None}), row(1, "swap", donor="r0", text="ü\n"), row(2, extracted=None)]
    file = AnswerFile(tmp_path / "made" / "a.jsonl", SETTINGS)
    assert not (tmp_path / "made").exists()
    file.begin()
    file.add(rows)
    file.add([rows[0], row(3)])  # what is there is not written twice
    assert read_rows(file.path) == [*rows, row(3)]
    again = AnswerFile(file.path, SETTINGS)
    assert again.rows == [*rows, row(3)]
    again.close({"n": 4})
    assert json.loads(again.summary_path.read_text()) == {"settings": SETTINGS, "n": 4}


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_last_line_that_was_cut_off_is_dropped(tmp_path: Path, cut: int):
    file = AnswerFile(tmp_path / "a.jsonl", SETTINGS)
    file.begin()
    file.add([row(0), row(1)])
    data = file.path.read_bytes()
    file.path.write_bytes(data[:-cut])
    again = AnswerFile(file.path, SETTINGS)
    assert again.rows == read_rows(file.path) == [row(0)]
    assert file.path.read_bytes() == data[:-cut]
    again.begin()
    again.add([row(1)])
    assert file.path.read_bytes() == data


def test_other_settings_and_damage_are_refused(tmp_path: Path):
    file = AnswerFile(tmp_path / "a.jsonl", SETTINGS)
    file.begin()
    file.add([row(0), row(1)])
    with pytest.raises(UserError, match=r"holds answers with seed 0, and this evaluation has 1.*--overwrite"):
        AnswerFile(file.path, {**SETTINGS, "seed": 1})
    lines = file.path.read_text().splitlines(keepends=True)
    for damage in ("{}\n", "[]\n", "no json\n"):
        file.path.write_text(lines[0] + damage)
        with pytest.raises(UserError, match="line 2 is no answer"):
            AnswerFile(file.path, SETTINGS)
    file.path.write_text("".join(lines))
    file.summary_path.write_text("{")
    with pytest.raises(UserError, match="does not say what it was made with"):
        AnswerFile(file.path, SETTINGS)


def test_rules():
    assert Rule().judge("The answer is B.", "B") == ("The answer is B.", True, "choice")
    assert Rule(source="tags").judge("<answer>4</answer>", "5") == ("4", False, "numeric, tags")
    assert Rule().judge("", "red") == (None, False, "exact")
    with pytest.raises(UserError, match="no answer of kind numeric"):
        Rule("numeric").judge("4", "red")


def test_figures_stay_until_there_are_new_ones_and_nothing_is_deleted_before_it_begins(tmp_path: Path):
    file = AnswerFile(tmp_path / "a.jsonl", SETTINGS)
    file.begin()
    file.add([row(0)])
    file.close({"n": 1})
    again = AnswerFile(file.path, {"model": "m", "filler": "."})
    again.begin()
    again.add([row(1)])
    assert json.loads(file.summary_path.read_text())["n"] == 1
    again.close({"n": 2})
    assert json.loads(file.summary_path.read_text()) == {"settings": {**SETTINGS, "filler": "."}, "n": 2}
    anew = AnswerFile(file.path, {"model": "other"}, overwrite=True)
    assert len(read_rows(file.path)) == 2
    anew.begin()
    assert not file.path.exists()
    assert json.loads(file.summary_path.read_text()) == {"settings": {"model": "other"}}


def test_stamps(tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(range(256)) * 10_000)
        (tmp_path / name / "data.jsonl").write_text("{}\n")
    one, other = tmp_path / "a", tmp_path / "b"
    assert stamp_of_weights(one) == stamp_of_weights(other)
    assert stamp_of_data(one / "data.jsonl") == stamp_of_data(other / "data.jsonl")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    (other / "data.jsonl").write_text("{}\n{}\n")
    assert stamp_of_weights(one) != stamp_of_weights(other)
    assert stamp_of_data(one / "data.jsonl") != stamp_of_data(other / "data.jsonl")
    assert stamp_of_data(one) == stamp_of_data(tmp_path / "a:train") != stamp_of_data(other)


# ---- figures


def test_tables_are_those_of_the_statistics():
    right = {"own": [True] * 8 + [False] * 4, "noise": [True, False] * 6}
    rows = [
        row(number, name, value, cluster=f"c{number // 2}", category="odd" if number % 2 else "even")
        for name, values in right.items()
        for number, value in enumerate(values)
    ]
    rows[3] = replace(rows[3], latents=0, extracted=None)
    summary = summarise(rows, {"swap": "no latents"})
    clusters = [f"c{number // 2}" for number in range(12)]
    own, noise = summary["conditions"]["own"], summary["conditions"]["noise"]
    interval = proportion(right["own"], clusters)
    assert own["interval"] == [interval.low, interval.high]
    assert (own["accuracy"], own["unreadable"], own["trigger_rate"]) == (8 / 12, 1 / 12, 11 / 12)
    found = paired(right["noise"], right["own"], clusters)
    assert noise["minus_own"]["difference"] == found.difference == -2 / 12
    assert noise["minus_own"]["interval"] == [found.interval.low, found.interval.high]
    assert noise["minus_own"]["p"] == found.p
    assert "minus_own" not in own
    assert summary["categories"]["odd"]["noise"]["accuracy"] == 0
    assert (summary["records"], summary["clusters"], summary["samples"]) == (12, 6, 1)
    said = text_of(summary)
    for words in ("category odd", "swap: no latents", "12 records in 6 clusters", "-0.167"):
        assert words in said


def test_only_pairs_are_compared():
    rows = [row(0), row(1, right=False), row(0, "noise", right=False), row(5, "noise")]
    table = summarise(rows)["conditions"]["noise"]
    assert table["accuracy"] == 0.5
    assert (table["minus_own"]["n"], table["minus_own"]["difference"]) == (1, -1.0)


def test_differences_are_to_own_with_the_same_start():
    rows = [row(0), row(0, "own/forced", right=False), row(0, "noise/forced", right=False), row(0, "noise/free", False)]
    tables = summarise(rows)["conditions"]
    found = {name: table["minus_own"]["difference"] for name, table in tables.items() if "minus_own" in table}
    assert found == {"own/forced": -1.0, "noise/forced": 0.0}  # and no own latents with START free


def test_donors_of_the_same_answer_are_counted():
    answers = ["red", "red", "blue"]
    rows = [row(number, answer=answer) for number, answer in enumerate(answers)]
    rows += [replace(one, condition="swap", donor=f"r{(i + 1) % 3}") for i, one in enumerate(rows)]
    summary = summarise(rows)
    assert summary["conditions"]["swap"]["same_answer_donors"] == pytest.approx(1 / 3)
    assert "33.3% of the donors" in text_of(summary)
    assert "same_answer_donors" not in summary["conditions"]["own"]
    apart = [replace(one, category="ab"[number % 2]) for number, one in enumerate(rows)]
    tables = summarise(apart)["categories"]
    assert [tables[name]["swap"]["same_answer_donors"] for name in "ab"] == [0.0, 0.5]  # of donors in the other one too


def test_signals_are_of_a_condition_and_rates_of_one_that_feeds():
    rows = [row(0, signals={"a": 1.0}), row(1, signals={"a": None}), row(0, "own/forced", signals={"a": 3.0})]
    rows.append(row(0, "skip", latents=0))
    tables = summarise(rows)["conditions"]
    assert (tables["own"]["signals"], tables["own/forced"]["signals"]) == ({"a": 1.0}, {"a": 3.0})
    assert "signals" not in tables["skip"]
    assert (tables["own"]["trigger_rate"], tables["skip"]["trigger_rate"]) == (1.0, None)
    assert "own: a 1.0000" in text_of(summarise(rows))


def test_samples():
    said = [["a", "red", "b"], ["red", "red", "a"], ["a", "a", "red"]]
    rows = [
        row(question, right=text == "red", text=text, extracted=text, seed=100 * sample + question)
        for question, texts in enumerate(said)
        for sample, text in enumerate(texts)
    ]
    table = summarise(rows)["conditions"]["own"]
    assert table["avg"] == {"3": pytest.approx(4 / 9)}
    drawn = [any(text == "red" for text in pair) for texts in said for pair in itertools.combinations(texts, 2)]
    assert table["pass"]["2"] == pytest.approx(sum(drawn) / len(drawn))
    assert table["pass"]["3"] == 1
    assert table["maj"]["3"] == pytest.approx((1 / 3 + 1 + 0) / 3)
    assert "pass" not in summarise(rows[:-1])["conditions"]["own"]  # not all questions have as many


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["a", "b"], [True, False], 0.5),
        (["4", "4.0", "5", "5", "5"], [True, True, False, False, False], 0.0),
        (["4", "4.0", "5", "5"], [True, True, False, False], 0.5),
        (["A dog", "a  DOG", "cat"], [False, False, True], 0.0),
        ([None, None, "cat"], [False, False, True], 1.0),
        ([None], [False], 0.0),
    ],
)
def test_the_majority(answers, right, expected):
    assert maj_at_k(answers, right) == expected
