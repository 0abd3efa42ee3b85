"""Every signal of real rollouts against its definition, spelled out on eager attention weights and full logits."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from engine_cases import FORMATS, SAMPLED, Rig
from signal_cases import Plain, by_hand, mean, plain_forward
from torch.nn.functional import cosine_similarity

from rl_lvr.errors import UserError
from rl_lvr.forward.batch import forward_hidden
from rl_lvr.latents.format import get_format
from rl_lvr.rollout.replay import replay_batch, teacher_force
from rl_lvr.signals import SIGNALS, measure, parse_signals

VARIANTS = {
    "lvr": get_format("lvr", k=3),
    "free": get_format("lvr", k=5, length="free"),
    "monet": get_format("monet", k=3, length="fixed"),
}
CLOSE = 2e-5
DRAWN = replace(SAMPLED, seed=1)


def expected(plain: Plain, end: int | None) -> dict[str, float]:
    """The definitions, with their default parameters."""
    latents, image = plain.latents, plain.image
    on_latents, on_image = plain.mean_mass(latents), plain.mean_mass(image)
    confidence = mean([plain.sharpness(i, 10) for i in latents])
    ratios = [math.log(plain.sharpness(b, 10) / plain.sharpness(a, 10)) for a, b in plain.pairs()]
    both = bool(latents and plain.after and image)
    cosines = cosine_similarity(plain.inputs[latents][:, None], plain.inputs[image][None], dim=-1) if image else None
    among = [
        float(cosine_similarity(plain.inputs[a], plain.inputs[b], dim=0)) for a, b in itertools.combinations(latents, 2)
    ]
    return {
        "attention_mass": on_latents,
        "attention_mass_paper_b": plain.paper_b(plain.paper_b_masks[1]),
        "attention_relative": on_latents / max(on_image, 1e-6) if on_image > 0 else 0.0,
        "attention_relative_paper_b": plain.paper_b(plain.paper_b_masks[1]) / (plain.paper_b(image) if image else 1.0),
        "attention_without_sink": on_latents / (1 - plain.mean_mass([0])),
        "image_attention_entropy_difference": mean([plain.image_entropy(i) for i in latents])
        - mean([plain.image_entropy(i) for i in plain.after])
        if both
        else 0.0,
        "latent_entropy": mean([plain.entropy(i) for i in latents]),
        "latent_top_k_mass": mean([float(plain.log_p(i).topk(10).values.exp().sum()) for i in latents]),
        "latent_confidence": confidence,
        "entropy_drop": mean([max(0.0, plain.entropy(a) - plain.entropy(b)) for a, b in plain.pairs()]),
        "confidence_progression": mean(ratios),
        "confidence_reward": confidence + 0.05 * mean(ratios),
        "end_at_first_slot": mean([float(plain.log_p(span[0])[end].exp()) for span in plain.spans]),
        "latent_norm": mean([float(plain.inputs[i].norm()) for i in latents]),
        "latent_image_cosine": float(cosines.amax(1).mean()) if cosines is not None and latents else 0.0,
        "latent_span_cosine": mean(among),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_signal_equals_its_definition(rig, variant):
    format_ = VARIANTS[variant]
    engine, requests = rig.engine(format_), 5 * rig.requests()
    with rig.thinking(format_, end=2.0):
        rollouts = engine.generate(requests, DRAWN)
    images = [request.images for request in requests]
    assert max(len(rollout.latent_positions) for rollout in rollouts) > 3
    plain = [plain_forward(rig, rollout, row, engine.markers) for rollout, row in zip(rollouts, images, strict=True)]
    truth = [expected(row, engine.markers.end) for row in plain]
    for side in ("left", "right"):
        batch = replay_batch(rig.model, rollouts, images, side=side)
        columns = measure(rig.model, batch, engine.markers, parse_signals(list(SIGNALS))).columns
        worst = {
            name: max(
                abs(value - row[name]) / max(1.0, abs(row[name]))
                for value, row in zip(columns[name].values, truth, strict=True)
            )
            for name in SIGNALS
        }
        assert columns["attention_mass"].counts == [len(row.after) for row in plain]
        assert columns["latent_entropy"].counts == [len(row.latents) for row in plain]
        assert columns["entropy_drop"].counts == [len(row.pairs()) for row in plain]
        assert columns["end_at_first_slot"].counts == [len(row.spans) for row in plain]
        assert max(worst.values()) < 2e-4, worst
        assert all(worst[name] < CLOSE for name in worst if name.startswith("attention")), worst
    for name in SIGNALS:
        assert max(abs(row[name]) for row in truth) > 0, name  # every signal was seen at work


def test_wrong_latents_give_other_values(qwen):
    """The control: without the latents, or with another row's, the signals that look at them change."""
    engine, requests = qwen.engine(), qwen.requests()
    with qwen.thinking():
        rollouts = engine.generate(requests, DRAWN)
    batch = replay_batch(qwen.model, rollouts, [request.images for request in requests])
    signals = parse_signals(["attention_mass", "latent_entropy", "latent_norm"])
    fed = measure(qwen.model, batch, engine.markers, signals)
    unfed = measure(qwen.model, batch, engine.markers, signals, feed=False)
    for spec in signals:
        assert fed.columns[spec.name].counts == unfed.columns[spec.name].counts
        pairs = zip(fed.columns[spec.name].values, unfed.columns[spec.name].values, strict=True)
        assert max(abs(a - b) for a, b in pairs) > 1e-2


def test_hidden_states_are_those_of_the_replay(rig):
    engine, requests = rig.engine(), rig.requests()
    with rig.thinking():
        rollouts = engine.generate(requests, DRAWN)
        images = [request.images for request in requests]
        batch = replay_batch(rig.model, rollouts, images)
        measured = measure(rig.model, batch, engine.markers, parse_signals(list(SIGNALS)))
        with torch.no_grad():
            assert torch.equal(measured.hidden, forward_hidden(rig.model, batch, engine.markers))
        replayed = teacher_force(rig.model, rollouts, images, engine.markers, DRAWN)
        logits = rig.family.head(rig.model)(measured.hidden).float()
    logits[..., list(engine.markers.never_sampled)] = -torch.inf
    for row, rollout in enumerate(rollouts):
        prompt = len(rollout.prompt_ids)
        for place in (~rollout.forced).nonzero()[:, 0].tolist():
            log_p = logits[row, prompt + place - 1].log_softmax(-1)[rollout.completion_ids[place]]
            assert abs(log_p - replayed.logprobs[row, place]) < 1e-4
    assert measured.kernels == ("aten::_scaled_dot_product_flash_attention_for_cpu",)


def test_absent_empty_and_truncated_spans(qwen):
    """Nothing, an empty pair, a span without an end, a broken one, text in between, and no completion at all."""
    markers = qwen.engine(VARIANTS["lvr"]).markers
    start, slot, end, word = markers.start, markers.slot, markers.end, qwen.tokenizer.convert_tokens_to_ids("red")
    completions = [
        [word, word],
        [start, end, word],
        [word, start, slot, slot],
        [start, slot, word, word],
        [start, slot, end, word, start, slot, slot, end, word, word],
        [],
    ]
    rollouts, images = by_hand(qwen, markers, completions)
    specs = parse_signals(
        [
            *SIGNALS,
            {"attention_mass": {"per": "token", "name": "tokens"}},
            {"latent_entropy": {"per": "latent", "name": "each"}},
        ]
    )
    measured = measure(qwen.model, replay_batch(qwen.model, rollouts, images), markers, specs)
    for name in SIGNALS:
        assert all(math.isfinite(value) for value in measured.columns[name].values), name
    mass, entropy = measured.columns["attention_mass"], measured.columns["latent_entropy"]
    assert mass.counts == [0, 1, 0, 2, 2, 0]
    assert [value > 0 for value in mass.values] == [False, False, False, True, True, False]
    assert entropy.counts == [0, 0, 2, 1, 3, 0]
    assert [value > 0 for value in entropy.values] == [count > 0 for count in entropy.counts]
    assert measured.columns["entropy_drop"].counts == [0, 0, 1, 0, 1, 0]
    assert measured.columns["end_at_first_slot"].counts == [0, 0, 1, 1, 2, 0]
    assert measured.columns["latent_span_cosine"].counts == [0, 0, 1, 0, 3, 0]
    assert measured.columns["image_attention_entropy_difference"].counts[1] == 0  # no latent
    assert measured.columns["attention_mass_paper_b"].values[2] == 0.0
    tokens, each = measured.columns["tokens"], measured.columns["each"]
    assert [len(row) for row in tokens.values] == [len(row) for row in completions]
    assert [[value > 0 for value in row] for row in tokens.values[3:5]] == [
        [False, False, True, True],
        [False] * 8 + [True, True],
    ]
    assert mass.values[4] == pytest.approx(sum(tokens.values[4]) / 2)
    assert [len(row) for row in each.values] == entropy.counts


def test_a_batch_without_any_latent(qwen):
    markers = qwen.engine(VARIANTS["lvr"]).markers
    word = qwen.tokenizer.convert_tokens_to_ids("red")
    rollouts, images = by_hand(qwen, markers, [[word], [word, word]])
    measured = measure(qwen.model, replay_batch(qwen.model, rollouts, images), markers, parse_signals(list(SIGNALS)))
    assert all(column.values == [0.0, 0.0] and column.counts == [0, 0] for column in measured.columns.values())


def test_slots_in_the_prompt_and_a_format_without_end(qwen):
    format_ = get_format("slots", k=2)
    markers = qwen.engine(format_).markers
    word = qwen.tokenizer.convert_tokens_to_ids("red")
    rollouts, images = by_hand(qwen, markers, [[markers.slot, markers.slot, word, word]])
    batch = replay_batch(qwen.model, rollouts, images)
    measured = measure(qwen.model, batch, markers, parse_signals(["attention_mass", "confidence_reward"]))
    assert measured.columns["attention_mass"].counts == [2]
    assert measured.columns["confidence_reward"].counts == [2]
    with pytest.raises(UserError, match="end token"):
        measure(qwen.model, batch, markers, parse_signals(["end_at_first_slot"]))


def test_parameters_are_passed_on(qwen):
    markers = qwen.engine(VARIANTS["lvr"]).markers
    start, slot, end, word = markers.start, markers.slot, markers.end, qwen.tokenizer.convert_tokens_to_ids("red")
    rollouts, images = by_hand(qwen, markers, [[word, start, slot, slot, end, word]])
    plain = plain_forward(qwen, rollouts[0], images[0], markers)
    specs = parse_signals(
        [
            {"attention_mass": {"layers": [-1], "heads": [1], "name": "last"}},
            {"attention_mass": {"to": "image", "queries": "latent", "name": "looking"}},
            {"attention_mass": {"to": "markers", "queries": "text", "name": "markers"}},
            {"attention_mass": {"to": "sink", "queries": "completion", "name": "sink"}},
            {"latent_confidence": {"k": 3}},
            {"end_at_first_slot": {"state": "before"}},
            {"latent_norm": {"space": "hidden"}},
            {"latent_image_cosine": {"space": "hidden", "reduce": "mean"}},
        ]
    )
    columns = measure(qwen.model, replay_batch(qwen.model, rollouts, images), markers, specs).columns
    first, word_before = plain.completion[0], plain.completion[1]
    cosines = cosine_similarity(plain.hidden[plain.latents][:, None], plain.hidden[plain.image][None], dim=-1)
    wanted = {
        "last": mean([float(plain.weights[-1, 1, i, plain.latents].sum()) for i in plain.after]),
        "looking": mean([plain.mass(i, plain.image) for i in plain.latents]),
        "markers": mean([plain.mass(i, plain.markers) for i in (first, plain.after[0])]),
        "sink": mean([plain.mass(i, [0]) for i in plain.completion]),
        "latent_confidence": mean([plain.sharpness(i, 3) for i in plain.latents]),
        "end_at_first_slot": float(plain.log_p(word_before)[end].exp()),
        "latent_norm": mean([float(plain.hidden[i].norm()) for i in plain.latents]),
        "latent_image_cosine": float(cosines.mean()),
    }
    for name, value in wanted.items():
        assert columns[name].values[0] == pytest.approx(value, abs=1e-4), name


def test_shares_per_token(qwen):
    """Each text token's own ratio at its place, 0 elsewhere, nothing without an image; not the ratio of the means."""
    markers = qwen.engine(VARIANTS["lvr"]).markers
    start, slot, end, word = markers.start, markers.slot, markers.end, qwen.tokenizer.convert_tokens_to_ids("red")
    rollouts, images = by_hand(qwen, markers, [[word, start, slot, slot, end, word, start, end, word, word]] * 5)
    specs = parse_signals(
        [{name: {"per": "token", "queries": "text"}} for name in ("attention_relative", "attention_without_sink")]
    )
    columns = measure(qwen.model, replay_batch(qwen.model, rollouts, images), markers, specs).columns
    relative, share = columns["attention_relative"], columns["attention_without_sink"]
    with_image = [bool(image) for image in images]
    assert set(with_image) == {True, False}
    for row, (rollout, image) in enumerate(zip(rollouts, images, strict=True)):
        plain = plain_forward(qwen, rollout, image, markers)
        wanted: list[list[float]] = [[0.0] * 10, [0.0] * 10]
        for place in (0, 5, 8, 9):
            query = plain.completion[place]
            on_latents = plain.mass(query, plain.latents)
            wanted[0][place] = on_latents / plain.mass(query, plain.image) if image else 0.0
            wanted[1][place] = on_latents / (1 - plain.mass(query, [0]))
        assert relative.values[row] == pytest.approx(wanted[0], abs=CLOSE)
        assert share.values[row] == pytest.approx(wanted[1], abs=CLOSE)
        assert max(wanted[1]) > 1e-2
    assert relative.counts == [4 if image else 0 for image in with_image]
    assert share.counts == [4] * 5
    means = measure(
        qwen.model, replay_batch(qwen.model, rollouts, images), markers, parse_signals(["attention_relative"])
    ).columns["attention_relative"]
    per_token = [sum(values) / 3 for values in (row[5:] for row in relative.values)]
    apart = [abs(a - b) for a, b, image in zip(means.values, per_token, with_image, strict=True) if image]
    assert max(apart) > 1e-5  # control: a mean of ratios is another number


def test_a_trainers_padding(qwen):
    """Prompts padded on the left, completions on the right, as TRL has them."""
    markers = qwen.engine(VARIANTS["lvr"]).markers
    start, slot, end, word = markers.start, markers.slot, markers.end, qwen.tokenizer.convert_tokens_to_ids("red")
    completions = [[word, start, slot, end, word, word], [start, slot, slot, end, word], [word]]
    rollouts, images = by_hand(qwen, markers, completions)
    batch = replay_batch(qwen.model, rollouts, images)
    prompts, width = [len(rollout.prompt_ids) for rollout in rollouts], max(map(len, completions))
    longest = max(prompts)
    shift = [longest - prompt for prompt in prompts]
    ids, mask = torch.zeros(3, longest + width).long(), torch.zeros(3, longest + width).long()
    for row, rollout in enumerate(rollouts):
        here = slice(shift[row], shift[row] + len(rollout.ids))
        ids[row, here], mask[row, here] = torch.tensor(rollout.ids), 1
    mixed = replace(
        batch,
        ids=ids,
        mask=mask,
        completion=mask.bool() & (torch.arange(longest + width) >= longest),
        latents=batch.latents.shifted(torch.tensor(shift)),
    )
    specs = parse_signals([*SIGNALS, {"attention_mass": {"per": "token", "name": "tokens"}}])
    theirs, ours = (measure(qwen.model, b, markers, specs).columns for b in (mixed, batch))
    for name in SIGNALS:
        assert theirs[name].counts == ours[name].counts
        assert theirs[name].values == pytest.approx(ours[name].values, abs=1e-4), name
    for row in range(3):
        assert theirs["tokens"].values[row] == pytest.approx(ours["tokens"].values[row], abs=1e-5)


def test_peft_head(load_tiny):
    """A LoRA adapter on the head takes part in every next-token distribution."""
    from peft import LoraConfig, get_peft_model

    rig = Rig(*load_tiny("qwen2_5_vl", latent_formats=FORMATS))
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "lm_head"], init_lora_weights=False)
    markers = rig.engine(VARIANTS["lvr"]).markers
    word = rig.tokenizer.convert_tokens_to_ids("red")
    rollouts, images = by_hand(rig, markers, [[markers.start, markers.slot, markers.slot, markers.end, word]])
    specs = parse_signals(["latent_entropy", "attention_mass"])
    before = measure(rig.model, replay_batch(rig.model, rollouts, images), markers, specs).columns
    rig.model = get_peft_model(rig.model, lora)
    columns = measure(rig.model, replay_batch(rig.model, rollouts, images), markers, specs).columns
    plain = plain_forward(rig, rollouts[0], images[0], markers)
    entropy = mean([plain.entropy(i) for i in plain.latents])
    assert columns["latent_entropy"].values[0] == pytest.approx(entropy, abs=1e-4)
    assert columns["attention_mass"].values[0] == pytest.approx(plain.mean_mass(plain.latents), abs=1e-5)
    assert abs(columns["latent_entropy"].values[0] - before["latent_entropy"].values[0]) > 1e-3


def test_the_models_modes_are_given_back(qwen):
    markers = qwen.engine(VARIANTS["lvr"]).markers
    word = qwen.tokenizer.convert_tokens_to_ids("red")
    rollouts, images = by_hand(qwen, markers, [[markers.start, markers.slot, markers.end, word]])
    qwen.model.train()
    try:
        measured = measure(
            qwen.model, replay_batch(qwen.model, rollouts, images), markers, parse_signals(["attention_mass"])
        )
        assert qwen.model.training
        assert not measured.hidden.requires_grad
    finally:
        qwen.model.eval()
