"""The reference engine against teacher forcing, against `generate`, and against itself in other batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_cases import FILTERED, FORMATS, GREEDY, SAMPLED, SIX_ROWS, Rig, same, span_counts
from helpers import make_batch

from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.rollout.replay import check_parity, teacher_force
from rl_lvr.rollout.types import Request, StopReason

VARIANTS = {
    "fixed": get_format("lvr", k=3),
    "free": get_format("lvr", k=5, length="free"),
    "before_start": get_format("monet", k=3, length="fixed"),
    "free_before_start": get_format("monet", k=5),
    "one_before_start": get_format("monet", k=1),
}


# ---- parity


@pytest.mark.parametrize("sampling", [SAMPLED, GREEDY, FILTERED], ids=["sampled", "greedy", "filtered"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_and_logprobs_equal_teacher_forcing(rig, variant, sampling):
    format_ = VARIANTS[variant]
    engine, requests = rig.engine(format_), rig.requests()
    assert len({len(r.prompt_ids) for r in requests}) > 2  # so that rows are padded on the left
    with rig.thinking(format_, end=2.0):
        rollouts = engine.generate(requests, sampling)
        report = check_parity(engine, rig.model, requests, sampling, rollouts=rollouts)
    assert max(span_counts(rollouts, engine.markers.start)) >= 2
    assert report.max_dh < 1e-4
    assert report.max_dlogp < 1e-4
    assert report.latents > 6
    # The control: SLOT's embedding where the latents belong. With k=1 the START embedding takes part in it too.
    assert report.control_dh > 1e-2
    assert report.control_dlogp > 1e-2
    assert report.passes()


def test_parity_sees_a_latent_moved_to_another_row(qwen):
    engine, requests = qwen.engine(), qwen.requests()
    with qwen.thinking():
        rollouts = engine.generate(requests, SAMPLED)
        moved = replace(rollouts[0], latents=rollouts[0].latents.roll(1, 0))
        report = check_parity(engine, qwen.model, requests[:1], SAMPLED, rollouts=[moved])
    assert report.max_dh > 1e-2
    assert not report.passes()


@pytest.mark.parametrize(("law", "other", "sigma"), [("gaussian", "spherical", 0.1), ("spherical", "gaussian", 0.01)])
def test_parity_draws_the_noise_again_by_its_law(qwen, law, other, sigma):
    engine, requests = qwen.engine(), qwen.requests()
    sampling = replace(SAMPLED, sigma=sigma, noise=law)
    with qwen.thinking():
        rollouts = engine.generate(requests, sampling)
        report, wrong = (
            check_parity(engine, qwen.model, requests, replace(sampling, noise=noise), rollouts=rollouts)
            for noise in (law, other)
        )
    assert report.max_dh < 1e-4
    assert report.passes()
    assert wrong.max_dh > 1e-2


def test_greedy_text_equals_generate(rig):
    """An independent check of images, padding, positions and cache: transformers' own loop, markers suppressed."""
    engine = rig.engine()
    markers = engine.markers
    for group in ([row for row in SIX_ROWS if not row[0]], [row for row in SIX_ROWS if row[0]]):
        batch = make_batch(rig.processor, group)
        out = rig.model.generate(
            **batch, max_new_tokens=12, do_sample=False, suppress_tokens=[*markers.never_sampled, markers.start]
        )
        requests = [replace(r, intervention=Intervention.NONE) for r in rig.requests(group)]
        rollouts = engine.generate(requests, replace(GREEDY, max_tokens=12))
        for row, rollout in enumerate(rollouts):
            theirs = out[row, batch["input_ids"].shape[1] :].tolist()[: len(rollout.completion_ids)]
            assert list(rollout.completion_ids) == theirs


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_projector_and_norm_are_applied(load_tiny, projector):
    rig = Rig(*load_tiny("qwen2_5_vl", latent_formats=FORMATS))
    format_ = get_format("lvr", k=3, projector=projector, norm="embedding")
    attach_feedback(rig.model, format_)
    for parameter in rig.model.latent_proj.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    engine, requests = rig.engine(format_), rig.requests()
    with rig.thinking(format_):
        rollouts = engine.generate(requests, SAMPLED)
        report = check_parity(engine, rig.model, requests, SAMPLED, rollouts=rollouts)
    assert report.passes()
    norms = torch.cat([r.latents for r in rollouts]).norm(dim=-1)
    assert torch.allclose(norms, rig.model.latent_proj.embedding_norm.expand_as(norms), rtol=1e-4)


def test_peft_model(load_tiny):
    from peft import LoraConfig, get_peft_model

    rig = Rig(*load_tiny("qwen2_5_vl", latent_formats=FORMATS))
    requests = rig.requests()
    with rig.thinking():
        plain = rig.engine().generate(requests, SAMPLED)
    rig.model = get_peft_model(rig.model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    engine = rig.engine()
    with rig.thinking():
        adapted = engine.generate(requests, SAMPLED)
        report = check_parity(engine, rig.model, requests, SAMPLED, rollouts=adapted)
    assert report.passes()
    assert any(not same(a, b) for a, b in zip(plain, adapted, strict=True))  # the adapter takes part


def test_bf16_returns_the_rounded_vectors_that_were_fed(load_tiny):
    model, processor = load_tiny("qwen2_5_vl", latent_formats=FORMATS)
    rig = Rig(model.to(torch.bfloat16), processor)
    engine, requests = rig.engine(), rig.requests()
    sampling = replace(SAMPLED, sigma=0.1)
    with rig.thinking():
        rollouts = engine.generate(requests, sampling)
        report = check_parity(engine, rig.model, requests, sampling, rollouts=rollouts)
    assert all(r.latents.dtype is torch.bfloat16 for r in rollouts)
    assert report.latents > 6
    # bf16 keeps 8 bits: the parallel forward rounds in another order.
    assert report.max_dh < 0.15 < 1 < report.control_dh
    assert report.max_dlogp < 0.15 < 1 < report.control_dlogp


# ---- rows do not influence each other


@pytest.mark.parametrize("variant", ["fixed", "free_before_start"])
def test_a_request_alone_equals_itself_in_a_batch(load_tiny, family_name, variant):
    # In float64: untrained weights blow up rounding from latent to latent, and fp32 would leave some 1e-4 after 20.
    model, processor = load_tiny(family_name, latent_formats=FORMATS)
    rig = Rig(model.double(), processor)
    format_ = VARIANTS[variant]
    sampling = replace(SAMPLED, sigma=0.05, max_tokens=32)
    requests = [replace(r, seed=100 + i) for i, r in enumerate(rig.requests())]
    with rig.bias({rig.engine(format_).markers.start: 6.5, rig.tokenizer.eos_token_id: 6.0}):
        together = rig.engine(format_).generate(requests, sampling)
        turned = rig.engine(format_, batch_size=4).generate(requests[::-1], sampling)[::-1]
        alone = [rig.engine(format_).generate([r], sampling)[0] for r in requests]
    lengths = sorted(len(r.completion_ids) for r in together)
    assert lengths[0] < lengths[-1]
    assert sum(span_counts(together, rig.engine(format_).markers.start)) >= 3
    for one, two, three in zip(together, turned, alone, strict=True):
        assert same(one, two)
        assert same(one, three)


def test_rows_of_different_k_leave_their_spans_and_the_batch_one_by_one(load_tiny, family_name):
    """Four of six rows end early, so that finished rows are dropped from cache, positions and state on the way."""
    model, processor = load_tiny(family_name, latent_formats=FORMATS)
    rig = Rig(model.double(), processor)  # float64, as in the test above
    engine = rig.engine()
    markers, eos = engine.markers, rig.tokenizer.eos_token_id
    sizes = (1, 9, 1, 2, 9, 1)
    requests = [
        replace(r, prompt_ids=[*r.prompt_ids, markers.start], k=k, seed=i)
        for i, (r, k) in enumerate(zip(rig.requests(), sizes, strict=True))
    ]
    with rig.bias({eos: 1e4}):
        together = engine.generate(requests, SAMPLED)
        alone = [engine.generate([r], SAMPLED)[0] for r in requests]
    for rollout, other, k in zip(together, alone, sizes, strict=True):
        assert rollout.completion_ids == (markers.slot,) * k + (markers.end, eos)
        assert same(rollout, other)


def test_seeds(qwen):
    engine, requests = qwen.engine(), qwen.requests()
    with qwen.thinking():
        first = engine.generate(requests, SAMPLED)
        again = engine.generate(requests, SAMPLED)
        other = engine.generate(requests, replace(SAMPLED, seed=8))
        shifted = engine.generate([replace(requests[0], seed=8)], SAMPLED)
    assert [r.seed for r in first] == [7, 8, 9, 10, 11, 12]
    assert all(same(a, b, 0.0) for a, b in zip(first, again, strict=True))
    assert not any(a.completion_ids == b.completion_ids for a, b in zip(first, other, strict=True))
    assert same(shifted[0], other[0], 1e-3)


def test_noise_explores_around_own_latents(qwen):
    engine, requests = qwen.engine(), qwen.requests()
    with qwen.thinking():
        plain = engine.generate(requests, SAMPLED)
        noisy = engine.generate(requests, replace(SAMPLED, sigma=0.5))
    assert {r.sigma for r in noisy} == {0.5}
    assert {r.sigma for r in plain} == {0.0}
    for a, b in zip(plain, noisy, strict=True):
        if a.latent_positions and b.latent_positions[:1] == a.latent_positions[:1]:
            spread = (a.latents[0] - b.latents[0]).std()  # the same context until then
            assert 0.3 < spread < 0.7


# ---- a completion can be taken up anywhere


@pytest.mark.parametrize("variant", ["fixed", "free", "before_start", "free_before_start"])
def test_any_prefix_with_its_latents_continues_the_same_way(load_tiny, variant):
    """Prompts with closed spans, with a span left open, ending in START: with the same seed the same tokens follow,
    because every draw is keyed by its absolute position."""
    model, processor = load_tiny("qwen2_5_vl", latent_formats=FORMATS)
    qwen = Rig(model.double(), processor)
    format_ = VARIANTS[variant]
    engine = qwen.engine(format_)
    sampling = replace(SAMPLED, sigma=0.05)
    request = replace(qwen.requests()[0], seed=5)
    with qwen.thinking(format_, end=2.0):
        whole = engine.generate([request], sampling)[0]
        assert whole.completion_ids.count(engine.markers.start) >= 2
        cuts = []
        for cut in range(1, len(whole.completion_ids)):
            length = len(whole.prompt_ids) + cut
            kept = [i for i, p in enumerate(whole.latent_positions) if p < length]
            if format_.first == "before_start" and whole.ids[length - 1] == engine.markers.start:
                kept = kept[:-1]  # not given: the engine makes the latent of the START that ends the prompt
            places = [whole.latent_positions[i] for i in kept]
            cuts.append(replace(request, prompt_ids=whole.ids[:length], prompt_latents=(whole.latents[kept], places)))
        for cut, rollout in enumerate(engine.generate(cuts, sampling), start=1):
            rest = len(whole.completion_ids) - cut
            assert rollout.completion_ids[:rest] == whole.completion_ids[cut:]
            assert torch.allclose(rollout.logprobs[:rest], whole.logprobs[cut:], atol=1e-5)
            shared = len(whole.latent_positions)
            assert rollout.latent_positions[:shared] == whole.latent_positions
            assert torch.allclose(rollout.latents[:shared], whole.latents, atol=1e-5)


def test_prompt_latents_matter(qwen):
    """The control of the test above: other vectors in the prompt lead elsewhere."""
    engine = qwen.engine()
    markers = engine.markers
    base = qwen.requests()[0]
    ids = [*base.prompt_ids, *markers.span(), *base.prompt_ids[-2:]]
    places = range(len(base.prompt_ids) + 1, len(base.prompt_ids) + 4)
    vectors = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    one, two = engine.generate(
        [replace(base, prompt_ids=ids, prompt_latents=(v, places), seed=1) for v in vectors], SAMPLED
    )
    assert not torch.allclose(one.logprobs[:1], two.logprobs[:1], atol=1e-3)
    assert torch.equal(one.latents[:3], vectors[0])
    assert one.latent_positions[:3] == tuple(places)


# ---- forced thinking, length, stopping


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompt_that_ends_in_start(rig, variant):
    format_ = VARIANTS[variant]
    engine = rig.engine(format_)
    markers = engine.markers
    requests = [replace(r, prompt_ids=[*r.prompt_ids, markers.start]) for r in rig.requests()]
    with rig.thinking(format_, start=0.0, end=-1e4):
        rollouts = engine.generate(requests, SAMPLED)
        report = check_parity(engine, rig.model, requests, SAMPLED, rollouts=rollouts)
    assert report.max_dlogp < 1e-4
    assert report.max_dh < 1e-4
    assert report.control_dlogp > 1e-2
    before = format_.first == "before_start"
    for rollout, request in zip(rollouts, requests, strict=True):
        slots = format_.k - 1 if before else format_.k
        assert rollout.completion_ids[: slots + 1] == (markers.slot,) * slots + (markers.end,)
        first = len(request.prompt_ids) - (1 if before else 0)
        assert rollout.latent_positions[: format_.k] == tuple(range(first, first + format_.k))
    # Under `before_start` this holds for the START in the prompt too, whose vector came from a forward of its own.
    replayed = teacher_force(rig.model, rollouts, [r.images for r in requests], markers, SAMPLED).latents
    for rollout, hidden in zip(rollouts, replayed, strict=True):
        assert torch.allclose(hidden, rollout.latents, atol=1e-4)


def test_max_tokens_inside_a_span(rig):
    engine = rig.engine(get_format("lvr", k=8))
    request = rig.requests()[0]
    request = replace(request, prompt_ids=[*request.prompt_ids, engine.markers.start])
    rollout = engine.generate([request], replace(SAMPLED, max_tokens=3))[0]
    assert rollout.stop_reason is StopReason.LENGTH
    assert rollout.completion_ids == (engine.markers.slot,) * 3
    assert len(rollout.latents) == 3
    assert check_parity(engine, rig.model, [request], replace(SAMPLED, max_tokens=3), rollouts=[rollout]).max_dh < 1e-4


def test_the_last_position_of_the_model_ends_a_row(load_tiny):
    rig = Rig(*load_tiny("qwen2_5_vl", max_positions=32))
    requests = rig.requests([([], "what"), ([], "from blue 2 hops what is next what is next")])
    lengths = [len(r.prompt_ids) for r in requests]
    with rig.bias({rig.tokenizer.eos_token_id: -1e4}):
        rollouts = rig.engine().generate(requests, replace(SAMPLED, max_tokens=100))
    assert [len(r.ids) for r in rollouts] == [32, 32]
    assert lengths[0] != lengths[1]
    assert {r.stop_reason for r in rollouts} == {StopReason.LENGTH}


def test_stop_tokens_and_stop_strings(qwen):
    engine, requests = qwen.engine(), qwen.requests(([[], "what"],))
    word = qwen.tokenizer.encode(" blue", add_special_tokens=False)
    assert len(word) == 1
    with qwen.bias({word[0]: 4.0, qwen.tokenizer.eos_token_id: -1e4}):
        free = engine.generate(requests, replace(SAMPLED, max_tokens=60))[0]
        at = free.completion_ids.index(word[0])
        token = engine.generate(requests, replace(SAMPLED, max_tokens=60, stop_token_ids=tuple(word)))[0]
        text = engine.generate(requests, replace(SAMPLED, max_tokens=60, stop=("zzz", "lue")))[0]
    assert 0 < at < 59
    assert free.stop_reason is StopReason.LENGTH
    assert token.completion_ids == free.completion_ids[: at + 1]
    assert token.stop_reason is StopReason.EOS
    assert text.completion_ids == free.completion_ids[: at + 1]
    assert text.stop_reason is StopReason.STOP


def test_a_stop_string_over_several_tokens(qwen):
    engine, requests = qwen.engine(), qwen.requests(([[], "what"],))
    with qwen.bias({qwen.tokenizer.eos_token_id: -1e4}):
        free = engine.generate(requests, replace(SAMPLED, max_tokens=30))[0]
        text = qwen.tokenizer.decode(free.completion_ids, skip_special_tokens=True)
        plain = [i for i in range(2, 28) if text[i : i + 3].isascii() and text.find(text[i : i + 3]) == i]
        string = text[plain[-1] : plain[-1] + 3]
        stopped = engine.generate(requests, replace(SAMPLED, max_tokens=30, stop=(string,)))[0]
    ours = qwen.tokenizer.decode(stopped.completion_ids, skip_special_tokens=True)
    assert stopped.stop_reason is StopReason.STOP
    assert string in ours
    assert string not in qwen.tokenizer.decode(stopped.completion_ids[:-1], skip_special_tokens=True)


# ---- what is never sampled


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_placeholders_slot_and_end_are_never_sampled(rig, temperature):
    engine, requests = rig.engine(), rig.requests()
    banned = engine.markers.never_sampled
    assert set(rig.family.placeholder_ids(rig.tokenizer).values()) < set(banned)
    wanted = dict.fromkeys(banned, 1e4) | {engine.markers.start: 6.0}
    with rig.bias(wanted):
        rollouts = engine.generate(requests, replace(SAMPLED, temperature=temperature))
        batch = make_batch(rig.processor, [([], "what")])
        assert int(rig.model(**batch).logits[0, -1].argmax()) in banned  # the bias does want them
    for rollout in rollouts:
        chosen = [t for t, f in zip(rollout.completion_ids, rollout.forced.tolist(), strict=True) if not f]
        assert not set(chosen) & set(banned)
        assert torch.isfinite(rollout.logprobs).all()


@pytest.mark.parametrize("variant", ["fixed", "free", "before_start"])
def test_eos_cannot_end_a_span(rig, variant):
    format_ = VARIANTS[variant]
    engine = rig.engine(format_)
    markers, eos = engine.markers, rig.tokenizer.eos_token_id
    requests = [replace(r, prompt_ids=[*r.prompt_ids, markers.start]) for r in rig.requests()]
    with rig.bias({eos: 1e4}):
        forced = engine.generate(requests, SAMPLED)
        plain = engine.generate(rig.requests(), SAMPLED)
    slots = format_.k - (format_.first == "before_start")
    for rollout in forced:
        assert rollout.completion_ids == (markers.slot,) * slots + (markers.end, eos)
    assert {r.completion_ids for r in plain} == {(eos,)}  # outside a span the bias has its way at once


# ---- free length


def test_free_length_is_a_decision_with_its_own_probability(qwen):
    format_ = VARIANTS["free"]
    engine = qwen.engine(format_)
    markers = engine.markers
    request = qwen.requests()[0]
    requests = [replace(request, prompt_ids=[*request.prompt_ids, markers.start], seed=i) for i in range(200)]
    raw: list[torch.Tensor] = []
    handle = qwen.family.head(qwen.model).register_forward_hook(lambda module, inputs, out: raw.append(out))
    with qwen.bias({markers.end: 5.0}):
        rollouts = engine.generate(requests, replace(SAMPLED, max_tokens=7))
    handle.remove()
    logits = raw[0][0].clone()  # all rows have the same prompt; taken before the bias is added
    logits[markers.end] += 5.0
    probability = logits.softmax(-1)[markers.end]
    stops = [r for r in rollouts if r.completion_ids[0] == markers.end]
    assert 0.05 < probability < 0.95
    assert abs(len(stops) / 200 - probability) < 0.12
    for rollout in rollouts:
        first = probability if rollout.completion_ids[0] == markers.end else 1 - probability
        assert not rollout.forced[0]
        assert torch.allclose(rollout.logprobs[0], first.log(), atol=1e-4)
    capped = [r for r in rollouts if r.completion_ids[:5] == (markers.slot,) * 5]
    assert capped
    for rollout in capped:
        assert rollout.completion_ids[5] == markers.end
        assert rollout.forced[5]
        assert rollout.logprobs[5] == 0.0


# ---- formats without feedback


def test_slots_format_generates_no_block_and_feeds_prompt_latents(qwen):
    engine = qwen.engine(get_format("slots"))
    markers = engine.markers
    base = qwen.requests()[0]
    ids = [*base.prompt_ids, *markers.span()]
    places = range(len(base.prompt_ids), len(ids))
    vectors = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    learned = replace(base, prompt_ids=ids, seed=1)  # SLOT's own embedding
    optimised = replace(learned, prompt_latents=(vectors, places))
    with qwen.bias({markers.slot: 1e4}):
        one, two = engine.generate([learned, optimised], SAMPLED)
    assert markers.slot not in one.completion_ids + two.completion_ids
    assert len(one.latents) == 0
    assert torch.equal(two.latents, vectors)
    assert not torch.allclose(one.logprobs[:1], two.logprobs[:1], atol=1e-3)
    with pytest.raises(Exception, match="generates no latents"):
        engine.generate([replace(base, intervention=Intervention.ZEROS)], SAMPLED)


# ---- the model is left as it was


def test_modes_weights_and_gradients_are_left_alone(load_tiny):
    rig = Rig(*load_tiny("qwen2_5_vl"))
    rig.model.train()
    rig.model.model.visual.eval()
    rig.model.gradient_checkpointing_enable()
    before = {name: module.training for name, module in rig.model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in rig.model.state_dict().items()}
    with rig.thinking():
        rollouts = rig.engine().generate(rig.requests(), SAMPLED)
        report = check_parity(rig.engine(), rig.model, rig.requests(), SAMPLED, rollouts=rollouts)
    assert report.passes()
    assert {name: module.training for name, module in rig.model.named_modules()} == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in rig.model.state_dict().items())
    assert not any(r.latents.requires_grad or r.latents.is_inference() for r in rollouts)


def test_sync_weights(load_tiny):
    one, two = (Rig(*load_tiny("qwen2_5_vl", seed=seed)) for seed in (0, 1))
    engine = one.engine()
    requests = one.requests()
    theirs = two.engine().generate(requests, SAMPLED)
    assert not same(engine.generate(requests, SAMPLED)[0], theirs[0])
    engine.sync_weights(two.model)
    assert all(same(a, b) for a, b in zip(engine.generate(requests, SAMPLED), theirs, strict=True))
    assert engine.generate([], SAMPLED) == []
    assert isinstance(requests[0], Request)
