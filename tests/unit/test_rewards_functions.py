"""The rewards that need no judge, by hand; what each must not reward stands beside it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.attention import Attention
from rewards.confidence import ConfidenceCode, confidence_text
from rewards.format import well_formed
from rewards.length_excess import length_excess
from rewards.necessity import necessity
from rewards.presence import presence
from rewards.repetition import repetition
from rl_lvr.signals import parse_signals


def span(status: str = "closed", latents: int = 4) -> dict:
    return {"begin": 1, "stop": 7, "latents": latents, "status": status}


def test_rewards_need_no_torch_and_of_rl_lvr_only_answers() -> None:
    code = (
        "import pkgutil, importlib, sys, rewards\n"
        "for m in pkgutil.iter_modules(rewards.__path__, 'rewards.'): importlib.import_module(m.name)\n"
        "assert not {'torch', 'transformers', 'sympy'} & set(sys.modules)\n"
        "ours = {name.split('.')[1] for name in sys.modules if name.startswith('rl_lvr.')}\n"
        "assert ours <= {'answers', 'errors'}, ours"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_format_of_spans() -> None:
    rows = [[span()], [span(), span()], [], [span("broken")], [span("truncated")], [span(), span("stray", 0)]]
    assert well_formed(["red"] * 6, rows) == [1, 1, 1, 0, 0, 0]
    assert well_formed(["red"] * 6, rows, without=0.5, wrong=-1.0) == [1, 1, 0.5, -1, -1, -1]


@pytest.mark.parametrize(
    ("text", "options", "good"),
    [
        ("<answer>B</answer>", {}, True),
        ("<answer> </answer>", {}, False),
        ("<answer>B", {}, False),
        ("B</answer>", {}, False),
        ("<answer>A</answer><answer>B</answer>", {}, False),
        (r"\boxed{B}", {}, True),
        (r"\boxed{}", {}, False),
        ("red", {}, True),
        (" \n ", {}, False),
        ("red", {"answer_in": "tags"}, False),
        (r"\boxed{B}", {"answer_in": "tags"}, False),
        ("red", {"answer_in": "boxed"}, False),
        ("<think>so</think><answer>B</answer>", {"blocks": ["think"]}, True),
        ("<answer>B</answer><think>so</think>", {"blocks": ["think"]}, False),
        ("<think></think><answer>B</answer>", {"blocks": ["think"]}, False),
        ("<answer>B</answer>", {"blocks": ["think"]}, False),
        ("</think>so<think><answer>B</answer>", {"blocks": ["think"]}, False),
        ("<a>1</a><b>2</b> red", {"blocks": ["a", "b"]}, True),
        ("<b>2</b><a>1</a> red", {"blocks": ["a", "b"]}, False),
        ("<a>1<b>2</a></b> red", {"blocks": ["a", "b"]}, False),
        (r"\boxed{A} \boxed{B}", {}, False),
        (r"\boxed{A} so \boxed{A}", {"answer_in": "boxed"}, False),
        (r"\boxed{B} \boxed{", {}, False),
        (r"\boxed{B", {}, False),
        (r"\boxed{\boxed{B}}", {}, True),
        (r"\boxed{\frac{1}{2}} is it", {}, True),
        (r"<think>so</think>\boxed{B}", {"blocks": ["think"]}, True),
        (r"\boxed{B}<think>so</think>", {"blocks": ["think"]}, False),
        (r"\boxed{B}<think>so</think>\boxed{B}", {"blocks": ["think"]}, False),
        (r"<think>\boxed{B}</think>", {"blocks": ["think"]}, False),
        (r"<think>\boxed{B}</think>red", {"blocks": ["think"]}, False),
        ("<think>so</think>", {"blocks": ["think"]}, False),
        ("red<think>so</think>", {"blocks": ["think"]}, False),
        ("<think>so</think>red", {"blocks": ["think"]}, True),
    ],
)
def test_format_of_text(text: str, options: dict, good: bool) -> None:
    assert well_formed([text], [[span()]], **options) == [float(good)]


def test_latents_fill_a_block() -> None:
    text, options = "<think> </think><answer>B</answer>", {"blocks": ["think"]}
    places = {7: 1, 8: 1, 0: 0, 6: 0, 9: 0, 30: 0}
    for at, score in places.items():
        assert well_formed([text], [[span() | {"at": at}]], **options) == [score], at
    assert well_formed([text], [[span(latents=0) | {"at": 7}]], **options) == [0]
    assert well_formed([text], [[span()]], **options) == [0]
    assert well_formed([text], [[]], **options) == [0]


def test_presence_wants_a_closed_span_with_latents() -> None:
    assert presence([[span()], [], [span(latents=0)], [span("broken")]]) == [0.5, 0, 0, 0]
    assert presence([[span()]], value=2.0) == [2.0]


def test_length_is_priced_beyond_the_shortest_correct_of_its_group() -> None:
    texts = ["B", "B", "C", "B", "C", "C"]
    ids = [[0] * n for n in (10, 14, 4, 30, 5, 9)]
    groups = [1, 1, 1, 2, 3, 3]
    expected = [0, -0.004, 0, 0, 0, 0]
    assert length_excess(texts, ids, ["B"] * 6, groups) == pytest.approx(expected)
    # one group for all: the same completions are then measured against the shortest correct one, of 10 tokens
    assert length_excess(texts, ids, ["B"] * 6, [1] * 6) == pytest.approx([0, -0.004, 0, -0.02, 0, 0])
    wrong_is_long = length_excess(["B", "C"], [[0], [0] * 11], ["B"] * 2, [1, 1])
    assert wrong_is_long == pytest.approx([0, -0.01])


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.sampled_from("BC")), max_size=12), st.randoms())
def test_length_does_not_depend_on_the_order_of_the_batch(rows, random) -> None:
    def price(rows):
        return length_excess([r[2] for r in rows], [[0] * r[1] for r in rows], ["B"] * len(rows), [r[0] for r in rows])

    before = dict(zip(rows, price(rows), strict=True))
    shuffled = rows[:]
    random.shuffle(shuffled)
    assert dict(zip(shuffled, price(shuffled), strict=True)) == before
    assert all(value <= 0 for value in before.values())


def test_repetition() -> None:
    assert repetition(["a b c d e", "a b c"]) == [0, 0]
    assert repetition(["a b c d a b c d"]) == [pytest.approx(-0.2)]  # 5 four-grams, 4 of them distinct
    assert repetition(["go on " * 100])[0] < -0.95
    assert repetition(["啊" * 100])[0] == 0
    assert repetition(["啊" * 100], unit="characters", weight=-2.0)[0] < -1.9
    with pytest.raises(ValueError, match="n is 0"):
        repetition(["a"], n=0)


def test_necessity_has_the_weights_of_paper_b() -> None:
    right_with, right_without = ["B", "B", "C", "C"], ["C", "B", "B", "C"]
    assert necessity(right_with, ["B"] * 4, right_without) == [1, -0.5, -0.5, 0]
    assert necessity(right_with, ["B"] * 4, right_without, value=2.0) == [2, -1, -1, 0]
    assert necessity(["B", "B"], ["B", None], [None, "C"]) == [0, None]  # no span; no reference


def test_attention_asks_for_the_signal_of_its_options() -> None:
    def spec(**options):
        (entry,) = parse_signals(Attention(**options).signals)
        return entry.name, entry.function.__name__, dict(entry.parameters)

    paper = {"to": "slot", "queries": "after"}
    assert spec() == ("attention_mass_layers_0", "attention_mass", {**paper, "layers": (0,)})
    assert spec(layers=None) == ("attention_mass", "attention_mass", paper)
    assert spec(relative=True)[1] == "attention_relative"
    assert spec(layers=[1, 2], heads=[3], per="token") == (
        "attention_mass_layers_1_2_heads_3_per_token",
        "attention_mass",
        {**paper, "layers": (1, 2), "heads": (3,), "per": "token"},
    )
    with pytest.raises(ValueError, match="exclude each other"):
        Attention(relative=True, per="token")


def test_attention_gives_what_was_measured() -> None:
    plain, gated, tokens = Attention(), Attention(gate="correct"), Attention(per="token")
    columns = {"completions": ["B", "C"], "answer": ["B", "B"]}
    assert plain(**columns, **{plain.column: [0.3, 0.4]}) == [0.3, 0.4]
    assert gated(**columns, **{gated.column: [0.3, 0.4]}) == [0.3, 0]
    assert tokens(**columns, **{tokens.column: [[0.1, 0.2], []]}) == [pytest.approx(0.3), 0]
    with pytest.raises(ValueError, match="column 'answer'"):
        gated(completions=["B"], **{gated.column: [0.3]})


def test_confidence_has_two_forms() -> None:
    assert confidence_text(entropy_drop=[0.1, 0.0], completions=[]) == [0.1, 0.0]
    code = ConfidenceCode()
    assert parse_signals(code.signals)[0].parameters == {"k": 10, "weight": 0.05}
    assert code(confidence_reward=[3.0]) == [3.0]
    other = ConfidenceCode(k=5, progression=1e-3)
    assert other.column != code.column
    assert parse_signals([*code.signals, *other.signals])  # both at once
    assert parse_signals(confidence_text.signals)[0].name == "entropy_drop"
