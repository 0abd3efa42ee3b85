"""Parts of the vLLM engine that need no engine: decisions, prompts, tables, receipts, settings."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds, get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.starting import LatentStart
from rl_lvr.models import ImageFrame
from rl_lvr.rollout import sampling as draws
from rl_lvr.rollout.checks import Limits
from rl_lvr.rollout.types import Request, Sampling
from rl_lvr.rollout.vllm import settings as settings_module
from rl_lvr.rollout.vllm.decisions import uncut_pairs, warp_pairs
from rl_lvr.rollout.vllm.history import History, Live
from rl_lvr.rollout.vllm.prompts import collapse
from rl_lvr.rollout.vllm.sampler import LatentSampler
from rl_lvr.rollout.vllm.settings import LatentSettings, as_config
from rl_lvr.rollout.vllm.slots import END, FED, FORCED, SLOT, START, SlotTables
from rl_lvr.rollout.vllm.weights import Receipt, _buckets, checkpoint_weights, fingerprint, head_columns, head_inputs
from rl_lvr.rollout.vllm.wire import LatentArgs

MARKERS = FormatIds(get_format("lvr", k=3), 7, 8, 9)
LIMITS = Limits(4, 50, 40, -1, frozenset({0}))


def settings(markers=MARKERS):
    return LatentSettings(markers, LIMITS, (0,), 6, True, False, None)


def params(**more):
    return SimpleNamespace(**{"temperature": 1.0, "min_p": 0.0, "top_p": 1.0, "top_k": 0, **more})


# ---- the decision to end a span

logits = st.floats(-20, 20, width=32)
rules = st.tuples(
    st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    st.sampled_from([0.0, 0.1, 0.9]),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([0.3, 0.8, 1.0]),
)


@given(rows=st.lists(st.tuples(logits, logits, rules), min_size=1, max_size=6))
def test_pairs_are_warped_row_by_row_as_the_reference_warps_a_batch(rows):
    pairs = torch.tensor([row[:2] for row in rows])
    temperature, min_p, top_k, top_p = (torch.tensor(column) for column in zip(*(row[2] for row in rows), strict=True))
    ours = warp_pairs(pairs, temperature, min_p, top_k, top_p)
    index = ours.argmax(-1)
    scores = uncut_pairs(pairs, ours, temperature, index)
    for i, (*_, (t, m, k, p)) in enumerate(rows):
        theirs = draws.warp(pairs[i : i + 1], Sampling(temperature=t, min_p=m, top_k=k, top_p=p))[0]
        assert torch.equal(ours[i].isinf(), theirs.isinf()) or pairs[i, 0] == pairs[i, 1]
        kept = ~theirs.isinf() & ~ours[i].isinf()
        assert torch.allclose(ours[i][kept], theirs[kept], atol=1e-5)
        whole = draws.heat(pairs[i : i + 1], t)
        expected = torch.stack(draws.uncut(whole, ours[i : i + 1], index[i : i + 1]), -1)[0]
        assert torch.allclose(scores[i], expected, atol=1e-5)


# ---- prompts


def test_image_tokens_are_collapsed_to_one_per_picture():
    assert collapse(0, [1, 3, 6, 6, 4, 3, 6, 4, 2], 6, 2, None) == [1, 3, 6, 4, 3, 6, 4, 2]
    assert collapse(0, [1, 3, 6, 6, 4, 3, 6, 4, 2], 6, 2, ImageFrame(3, 4)) == [1, 6, 6, 2]
    assert collapse(0, [1, 3, 6, 4, 3, 6, 6, 4, 2, 3, 6, 4], 6, 3, ImageFrame(3, 4)) == [1, 6, 6, 2, 6]  # side by side
    # One token opens and closes, others stand inside; 9 is one of them, and text where it stands outside.
    tiles = [9, 3, 8, 6, 6, 3, 8, 6, 9, 3, 7, 6, 3, 3, 7, 6, 3, 9, 2]
    assert collapse(0, tiles, 6, 2, ImageFrame(3, 3, (7, 8, 9))) == [9, 6, 6, 9, 2]
    assert collapse(0, [1, 6, 6, 6, 6, 2], 6, 2, None) == [1, 6, 6, 2]  # pictures side by side
    with pytest.raises(UserError, match="request 5: its prompt has 2 groups of image tokens for 3 pictures"):
        collapse(5, [6, 1, 6], 6, 3, None)


# ---- tables and history


def test_a_slot_forgets_its_last_request():
    tables = SlotTables(settings(), 2, torch.float32, torch.device("cpu"))
    tables.marks[1] = FED
    tables.span.inside[1] = tables.feed[1] = tables.broken[1] = True
    tables.add(1, LatentArgs(Request([1, 2], seed=3)), params(), broken=False)
    assert not tables.marks[1].any()
    assert not any(bool(table[1]) for table in (tables.span.inside, tables.feed, tables.broken))
    tables.add(1, LatentArgs(Request([1, 7], k=2)), params(), broken=False)
    assert tables.span.inside[1]
    assert tables.span.k[1] == 2


HUGE = [
    ({}, {"top_p": 1e39}),
    ({"k": 2**63}, {}),
    ({"filler_id": 2**63}, {}),
    ({"seed": 2**63}, {}),
    ({"intervention": Intervention.OWN}, {"sigma": 1e39}),
]


@pytest.mark.parametrize(("fields", "more"), HUGE)
def test_a_number_that_does_not_fit_is_refused_before_anything_is_written(fields, more):
    tables = SlotTables(settings(), 2, torch.float32, torch.device("cpu"))
    sigma = more.pop("sigma", 0.0)
    before = {name: table.clone() for name, table in vars(tables).items() if torch.is_tensor(table)}
    with pytest.raises(UserError, match=r"the number (9223372036854775808|1e\+39), which is too large"):
        tables.add(1, LatentArgs(Request([1, 2], **fields), sigma), params(**more), broken=False)
    assert all(torch.equal(getattr(tables, name), table) for name, table in before.items())
    tables.add(1, LatentArgs(Request([1, 2], k=2**62, filler_id=2**62, seed=2**63 - 1)), params(), broken=False)


def test_any_top_k_beyond_the_vocabulary_means_all_tokens():
    tables = SlotTables(settings(), 2, torch.float32, torch.device("cpu"))
    for top_k, kept in ((2**63, 50), (2**64, 50), (7, 7), (0, 0), (-1, -1)):
        tables.add(0, LatentArgs(Request([1, 2])), params(top_k=top_k), broken=False)
        assert int(tables.top_k[0]) == kept


def test_the_memory_of_all_tables_is_counted():
    """Three requests: history and supplied vectors (6 x 4 float32 each), the next latent, a mark and two float32 for
    each of 41 positions."""
    tables = SlotTables(settings(), 3, torch.float32, torch.device("cpu"))
    vectors, positions = 2 * 3 * 6 * 4 * 4 + 3 * 4 * 4, 3 * 41 * (1 + 2 * 4)
    assert vectors + positions < tables.nbytes < vectors + positions + 3 * 200
    tables.add(
        0, LatentArgs(Request([1], vectors=torch.ones(2, 4), intervention=Intervention.GIVEN)), params(), broken=False
    )
    assert tables.nbytes < vectors + positions + 3 * 200, "nothing is allocated later"
    assert torch.equal(tables.vectors[0, :2], torch.ones(2, 4))


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_request_that_opens_with_start_still_does_when_taken_away_in_its_prompt(kept):
    """Under `before_start`: preempted in a chunked prefill nothing is written yet, later START is."""
    markers = FormatIds(get_format("monet", k=3), 7, 8, 9)
    tables = SlotTables(settings(markers), 2, torch.float32, torch.device("cpu"))
    marks = torch.zeros(40, dtype=torch.int8)
    marks[2], marks[3] = START | FORCED | FED, SLOT | FORCED | FED
    tables.add(0, LatentArgs(Request([1, 2]), opens=True), params(), broken=False)
    places = tables.resume(0, [1, 2, 7, 8][: 2 + kept], 2, marks, torch.ones(6, 4))
    assert bool(tables.opens[0]) == (kept == 0)
    assert bool(tables.span.inside[0]) == (kept > 0)
    assert len(places) == kept


@pytest.mark.parametrize(
    ("start", "prompt", "opens"),
    [("forced", [1, 2], True), ("forced", [1, 7], False), ("forced", [1, 7, 8], False), ("free", [1, 2], False)],
)
def test_a_slot_knows_what_becomes_of_start(start, prompt, opens):
    """A prompt that ends inside a span has its START already."""
    tables = SlotTables(settings(), 2, torch.float32, torch.device("cpu"))
    tables.add(0, LatentArgs(Request(prompt, latent_start=LatentStart.parse(start))), params(), broken=False)
    assert bool(tables.opens[0]) == opens
    assert not tables.no_start[0]
    assert tables.start_bias[0] == 0
    for text, banned, bias in (("forbidden", True, 0.0), ("bias -2.5", False, -2.5), ("free", False, 0.0)):
        tables.add(0, LatentArgs(Request(prompt, latent_start=LatentStart.parse(text))), params(), broken=False)
        assert (bool(tables.opens[0]), bool(tables.no_start[0]), float(tables.start_bias[0])) == (False, banned, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copies", [False, True], ids=["nothing to process", "a copy"])
def test_a_bias_stands_in_the_logits_while_vllm_draws_and_no_longer(copies, dtype):
    """vLLM draws from the logits themselves where no request changes them, and takes the log-probs from there."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, bias = logits.clone(), torch.tensor([2.5, 0.0, -1.25])
    biased = before.clone()
    biased[:, 7] += bias.to(dtype)
    seen = []

    def sample(given):
        seen.append(given.clone())
        return given.argmax(-1), given.float().clone() if copies else given

    state = SimpleNamespace(
        settings=settings(),
        start_bias=lambda: bias,
        after_filters=lambda given, processed, sampled: seen.append(given.clone()),
    )
    sampled, processed = LatentSampler(SimpleNamespace(sample=sample), state).sample(logits)
    assert torch.equal(seen[0], biased)
    assert torch.equal(seen[1], before), "the log-probs of the whole softmax are without the bias"
    assert torch.equal(sampled, biased.argmax(-1))
    assert torch.equal(processed, biased.to(processed.dtype)), "the log-probs of the draw are with it"
    assert torch.equal(logits, before) == copies


@pytest.mark.parametrize("kept", range(8))
def test_a_request_resumes_where_its_tokens_leave_it(kept):
    """Prompt of 2, then text, START, SLOT x 3, END, text; plain tokens stand as filler."""
    kinds = [0, START, SLOT, SLOT, SLOT, END, 0]
    for kind, fed in ((Intervention.OWN, True), (Intervention.PLAIN_TOKENS, False)):
        tables = SlotTables(settings(), 2, torch.float32, torch.device("cpu"))
        tables.add(0, LatentArgs(Request([1, 2], intervention=kind, filler_id=5)), params(), broken=False)
        ids = [1, 2, 4, *([7, 8, 8, 8, 9] if fed else [5] * 5), 4][: 2 + kept]
        marks = torch.zeros(40, dtype=torch.int8)
        for i, mark in enumerate(kinds):
            marks[2 + i] = mark | (FED if fed and mark == SLOT else 0) | (FORCED if mark in (SLOT, END) else 0)
        vectors = torch.arange(24.0).reshape(6, 4)
        places = tables.resume(0, ids, 2, marks, vectors)
        slots = kinds[:kept].count(SLOT)
        assert int(tables.span.total[0]) == slots
        assert bool(tables.span.inside[0]) == (kept > 1 and kept < 6)
        assert int(tables.span.fed[0]) == (slots if 1 < kept < 6 else 0)
        assert places.tolist() == ([4 + i for i in range(slots)] if fed else [])
        assert torch.equal(tables.history[0, :slots], vectors[:slots] if fed else tables.history[0, :slots])
        assert torch.equal(tables.marks[0, 2 : 2 + kept], marks[2 : 2 + kept])


def history():
    tables = SlotTables(settings(), 2, torch.float32, torch.device("cpu"))
    tables.history.copy_(torch.arange(48.0).reshape(2, 6, 4))
    tables.marks[:, 3:5] = SLOT | FED
    return History(tables, "too many")


def live(slot, uid):
    return Live(slot, uid, prompt=2, tokens=10, latents=6)


def test_latents_are_given_out_once_and_nothing_stays():
    table = history()
    table.live["r"] = live(1, "u")
    (row,) = table.pop(["u"])["u"]
    vectors = torch.frombuffer(bytearray(row.vectors), dtype=torch.float32).reshape(2, 4)
    assert torch.equal(vectors, table._tables.history[1, :2])
    assert list(row.marks[2:5]) == [0, SLOT | FED, SLOT | FED]
    assert table.pop(["u"]) == {"u": []}
    table.remove("r", preempted=False)  # the worker learns of the end only now
    assert table.pop(["u"]) == {"u": []}
    assert table.live == table.finished == table.preempted == {}


def test_a_finished_request_waits_for_its_pop_only_if_it_has_a_uid():
    table = history()
    table.live |= {"named": live(0, "u"), "bare": live(1, None)}
    table.remove("named", preempted=False)
    table.remove("bare", preempted=False)
    assert list(table.finished) == ["named"]
    table.remove("other", preempted=False)
    assert len(table.finished["named"].vectors) == 2  # trimmed to what there is
    assert len(table.pop(["u"])["u"]) == 1
    assert table.counts() == {"live": 0, "preempted": 0, "finished": 0}


def test_a_preempted_request_keeps_its_latents_until_it_ends():
    table = history()
    table.live |= {"named": live(0, "u"), "bare": live(1, None)}
    for name in ("named", "bare"):
        table.remove(name, preempted=True)
    assert table.counts()["preempted"] == 2
    for name in ("named", "bare"):
        table.remove(name, preempted=False)  # aborted before they ran again
    assert (list(table.preempted), list(table.finished)) == ([], ["named"])


def test_completions_of_one_request_are_in_order():
    table = history()
    for i in (10, 2, 0):
        table.live[f"{i}_9-abc"] = live(0, "u")
    assert [row.request_id for row in table.pop(["u"])["u"]] == ["0_9-abc", "2_9-abc", "10_9-abc"]


def test_overflow_is_told_with_the_setting_to_raise():
    table = history()
    table.live["r"] = live(0, "u")
    table._tables.broken[0] = True
    assert table.pop(["u"])["u"][0].error == "too many"


# ---- weights and settings


def test_weights_of_an_adapted_model_are_those_of_the_merged_one(load_tiny):
    from peft import LoraConfig, get_peft_model

    model, _ = load_tiny("qwen2_5_vl")
    plain = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    sent = Receipt()
    weights = dict(checkpoint_weights(adapted, torch.float32, sent))
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())
    assert set(weights) == set(plain)
    changed = {name for name in weights if not torch.equal(weights[name], plain[name])}
    assert changed
    assert all("q_proj" in name for name in changed)
    whole, merged = Receipt(), adapted.merge_and_unload()
    assert all(torch.equal(value, weights[name]) for name, value in checkpoint_weights(merged, torch.float32, whole))
    assert whole.agrees(sent)
    assert not Receipt(sent.tensors - 1, sent.checksum, sent.rows).agrees(sent)
    assert not Receipt(sent.tensors, sent.checksum * 1.001, sent.rows).agrees(sent)
    assert not Receipt(sent.tensors, sent.checksum, sent.rows * 1.001, sent.head).agrees(sent)
    assert sent.differences(Receipt(sent.tensors, sent.checksum, sent.rows, sent.head * 1.001)) == ["head"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_heads_fingerprint_is_that_of_its_products(load_tiny, dtype):
    """Exactly, so that a step of 1e-6 shows in float32, and the smallest one that bfloat16 takes."""
    model, _ = load_tiny("qwen2_5_vl", tie=True)
    head, sent = model.get_output_embeddings(), Receipt()
    for _ in checkpoint_weights(model, dtype, sent):
        pass
    weight = head.weight.detach().to(dtype)
    assert fingerprint(torch.nn.functional.linear(head_inputs(64).to(dtype), weight)) == pytest.approx(sent.head, 1e-9)
    signs = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).sign()
    changed = weight + 1e-6 * signs if dtype is torch.float32 else weight * (1 + signs / 128)
    assert sent.differences(replace(sent, head=fingerprint(changed.T[head_columns(64)]))) == ["head"]


@pytest.mark.parametrize("both", [False, True])
def test_adapters_may_not_part_a_head_from_the_embedding_that_it_is_tied_to(load_tiny, both):
    from peft import LoraConfig, get_peft_model

    model, _ = load_tiny("qwen2_5_vl", tie=True)
    untied, _ = load_tiny("qwen2_5_vl", tie=False)
    config = {"r": 2, "init_lora_weights": False, "ensure_weight_tying": both, "target_modules": ["embed_tokens"]}
    assert list(checkpoint_weights(get_peft_model(untied, LoraConfig(**config)), torch.float32, Receipt()))
    named = checkpoint_weights(get_peft_model(model, LoraConfig(**config)), torch.float32, Receipt())
    if both:
        assert "lm_head.weight" not in dict(named)
    else:
        with pytest.raises(UserError, match="adapters change only one of the two"):
            list(named)


def test_an_altered_weight_or_one_that_did_not_come_is_noticed(load_tiny):
    model, _ = load_tiny("qwen2_5_vl")
    sent, got = Receipt(), Receipt()
    for _, value in checkpoint_weights(model, torch.float32, sent):
        got.count(value)
    got.rows, got.head = sent.rows, sent.head
    assert got.agrees(sent)
    for name in ("model.language_model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
        altered = Receipt(rows=sent.rows, head=sent.head)
        for found, value in checkpoint_weights(model, torch.float32, Receipt()):
            altered.count(value * 1.01 if found == name else value)
        assert altered.tensors == sent.tensors
        assert not altered.agrees(sent)


@pytest.mark.parametrize("bucket", [1, 30_000, 1 << 40])
def test_weights_travel_in_buckets_of_a_bounded_size(load_tiny, bucket):
    model, _ = load_tiny("qwen2_5_vl")
    expected = dict(model.state_dict())
    found = list(_buckets(model, bucket))
    assert [name for units in found for unit in units for name in unit.names] == list(expected)
    for units in found:
        assert len(units) == 1 or sum(unit.size for unit in units) <= bucket
    assert (len(found) == 1) == (bucket > 1 << 30)
    sent, whole = Receipt(), Receipt()
    weights = dict(checkpoint_weights(model, torch.float32, sent, bucket=bucket))
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert list(checkpoint_weights(model, torch.float32, whole))
    assert whole.agrees(sent)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"max_latents": 3}, "must be an object with the key format"),
        ({"format": "lvr", "max_latent": 3}, "did you mean 'max_latents'"),
        ({"format": {"nam": "x"}}, "is no latent format"),
        ({"format": "lvrr"}, "did you mean 'lvr'"),
    ],
)
def test_faulty_additional_config_is_refused(value, words):
    with pytest.raises(UserError, match=words):
        settings_module._given(value)


def test_settings_travel_as_plain_values(tiny_folder):
    import json

    format_ = get_format("lvr", k=5, length="free")
    sent = json.loads(json.dumps(as_config(format_, 9)))["latent"]
    assert settings_module._given(sent) == (format_, 9)


def test_without_a_format_the_plugin_stays_out_of_the_way(tiny_folder):
    for name in (str(tiny_folder("qwen2_5_vl")), "nobody/has-this-model"):
        config = SimpleNamespace(additional_config={}, model_config=SimpleNamespace(model=name))
        assert settings_module.settings_of(config) is None


def test_a_format_beside_the_checkpoint_is_used_and_not_contradicted(tiny_folder, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_folder("qwen2_5_vl"), tmp_path / "model")
    get_format("lvr", k=5).save(folder)
    from transformers import AutoConfig

    model = SimpleNamespace(
        model=str(folder),
        tokenizer=str(folder),
        trust_remote_code=False,
        hf_config=AutoConfig.from_pretrained(folder),
        max_model_len=64,
        try_get_generation_config=lambda: {"eos_token_id": [1, 2]},
    )
    found = settings_module.settings_of(SimpleNamespace(additional_config=None, model_config=model))
    assert found.markers.format == get_format("lvr", k=5)
    assert {1, 2} <= set(found.eos)
    other = as_config(get_format("lvr", first="before_start"), 4)
    with pytest.raises(UserError, match="was trained with latent format 'lvr' \\(first: 'at_start'\\)"):
        settings_module.settings_of(SimpleNamespace(additional_config=other, model_config=model))
