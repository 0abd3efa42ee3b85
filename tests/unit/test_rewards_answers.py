"""Which text is the answer, and what counts as right; each rule beside a text that it must not accept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.accuracy import accuracy
from rl_lvr.answers.matching import boxed, correct, extract, formula, kind_of, normalise, number, text_of
from rl_lvr.evaluation import matching


@pytest.mark.parametrize(
    ("text", "source", "found"),
    [
        ("<answer>A</answer> no, <answer> B </answer>", "any", "B"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", "any", r"\frac{1}{2}"),
        (r"<answer>A</answer> \boxed{B}", "boxed", "B"),
        (r"<answer>A</answer> \boxed{B}", "any", "A"),
        ("first\n last \n\n", "any", "last"),
        ("first\nlast", "tags", None),
        (r"\boxed{never closed", "boxed", None),
        ("", "any", None),
    ],
)
def test_the_answer_is_taken_from_where_it_was_asked_for(text: str, source: str, found: str | None) -> None:
    assert extract(text, source) == found


@given(st.text(alphabet=st.sampled_from("abAB <>/\\n{}answerboxed\n.,"), max_size=40))
def test_the_default_rule_is_that_of_the_evaluation(text: str) -> None:
    for whole in (text, f"<answer>{text}</answer>", f"\\boxed{{{text.replace('{', '').replace('}', '')}}}"):
        assert (extract(whole) or "") == matching.extract_answer(whole)
        assert normalise(whole) == matching.normalise(whole)


@given(st.recursive(st.just("x"), lambda inner: st.lists(inner, max_size=3).map(lambda p: "{" + "".join(p) + "}")))
def test_boxed_finds_any_balanced_content(content: str) -> None:
    assert boxed(f"a {{ \\boxed{{{content}}} }}") == [content]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,234.5", 1234.5),
        ("3/4", 0.75),
        ("1e-3", 0.001),
        ("x = 5 cm^2", 5),
        ("-.5", -0.5),
        ("3 + 4 = 7", 7),
        ("50%", 50),
        ("The answer is **42**.", 42),
        ("So it is \u22123.", -3),
        ("1{,}000 cells", 1000),
        (r"That makes \$5.", 5),
    ],
)
def test_a_number_is_read(text: str, expected: float) -> None:
    assert float(number(text)) == expected


@pytest.mark.parametrize("text", ["none", "", "1/0", "9" * 5000, "x2", "1.2.3"])
def test_no_number_is_read_where_there_is_none(text: str) -> None:
    assert number(text) is None


@given(st.fractions(-(10**20), 10**20, max_denominator=10**6))
def test_every_fraction_is_read_exactly(value) -> None:
    assert number(f"so it is {value}") == value


def test_auto_looks_at_the_reference() -> None:
    kinds = {"B": "choice", "(C)": "choice", "7": "numeric", "1,000": "numeric", r"\frac{1}{2}": "math", "red": "exact"}
    assert {gold: kind_of(gold) for gold in kinds} == kinds


def test_accuracy_of_each_kind() -> None:
    texts = ["<answer>B</answer>", "B. red", "<answer>C</answer>"]
    assert accuracy(texts, ["B"] * 3) == [1, 1, 0]
    assert accuracy(["7.0", "7.1", "seven"], ["7"] * 3, wrong=-1.0) == [1, -1, -1]
    assert accuracy(["7.1"], ["7"], tolerance=0.02) == [1]
    assert accuracy(["Red.", "red cell"], ["red"] * 2) == [1, 0]
    assert accuracy([r"\boxed{7}", "7"], ["7"] * 2, source="boxed") == [1, 0]


def test_what_has_no_reference_is_not_scored() -> None:
    assert accuracy(["B", "B"], [None, "not a letter"], kind="choice") == [None, None]


def test_conversations_are_read_as_their_text() -> None:
    message = [{"role": "assistant", "content": [{"type": "text", "text": "<answer>B</answer>"}]}]
    assert text_of(message) == "<answer>B</answer>"
    assert text_of([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}]) == "what"
    assert accuracy([message, [{"role": "assistant", "content": "C"}]], ["B", "B"]) == [1, 0]


@pytest.mark.parametrize(
    ("gold", "given_", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"x^2+2x+1", r"$(x+1)^2$", True),
        (r"x^2", "x^3", False),
        (r"\{1, 2\}", "2, 1", True),
        ("$$", "x", None),
        ("x" * 3000, "x", None),
        (r"\pi", "\\" * 3000, False),
        (r"\pi", "__import__('os')", False),
    ],
)
def test_mathematics(gold: str, given_: str, same: bool | None) -> None:
    assert correct([f"<answer>{given_}</answer>"], [gold], "math") == [same]
    assert correct([r"\boxed{\frac{3}{4}}", r"\boxed{75\%}"], ["0.75", "75"], "numeric") == [True, True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"The answer is $\frac{1}{2}$.", r"\frac{1}{2}"),
        (r"Thus, **\(x = 3\)**.", "x = 3"),
        (r"Not $\frac{1}{2}$ but \[\frac{1}{3}\]", r"\frac{1}{3}"),
        ("So the function is x^2+1.", "x^2+1"),
        (r"Answer: \sqrt{2}.", r"\sqrt{2}"),
        ("x**2+y**2", "x**2+y**2"),
        (r"\sin x", r"\sin x"),
        (r"\text{It is } 2\sqrt{3}", r"\text{It is } 2\sqrt{3}"),
        ("is " * 1000, ("is " * 1000).strip()),
    ],
)
def test_a_formula_is_taken_from_its_sentence(text: str, expected: str) -> None:
    assert formula(text) == expected


@pytest.mark.parametrize(
    ("gold", "text", "same"),
    [
        (r"\frac{1}{2}", "It follows.\nThe answer is 1/2.", True),
        (r"\frac{1}{2}", r"It is not $\frac{1}{2}$ but $\frac{1}{3}$.", False),
        (r"2\pi", r"Answer: **$2\pi$**", True),
        (r"\pi", r"The answer is $2\pi$.", False),
        ("x^2+1", "So the function is x^2+1.", True),
        ("0.5", r"The answer is $\frac{1}{2}$.", True),
        ("42", r"So the area is $42\text{ cm}^2$.", True),
        ("4", "The answer is 42.", False),
        ("42", "There are **42** cells.", True),
    ],
)
def test_an_answer_in_a_sentence(gold: str, text: str, same: bool) -> None:
    assert correct([text], [gold]) == [same]


def test_an_expression_that_never_ends_is_wrong_and_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from rl_lvr.answers import mathematics

    mathematics.same_mathematics.cache_clear()
    assert mathematics.same_mathematics(r"\sqrt{4}", "2") is True
    monkeypatch.setattr(mathematics, "SECONDS", 0.5)
    assert mathematics.same_mathematics("x", "9^{9^{9^9}}") is False
    monkeypatch.undo()
    mathematics.same_mathematics.cache_clear()
    assert mathematics.same_mathematics(r"\sqrt{4}", "2") is True
