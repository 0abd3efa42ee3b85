"""Every intervention changes what it says and nothing else; what cannot be run is refused in one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_cases import FORMATS, SAMPLED, Rig, same

from rl_lvr.errors import UserError
from rl_lvr.latents.format import get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.noise import keyed_normal
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.replay import teacher_force
from rl_lvr.rollout.types import Request, Rollout, StopReason

FORMS = {"at_start": get_format("lvr", k=3), "before_start": get_format("monet", k=4, length="fixed")}
FED = [kind for kind in Intervention if kind.feeds_vectors]


@pytest.fixture(scope="module")
def rig(load_tiny) -> Rig:
    return Rig(*load_tiny("qwen2_5_vl", latent_formats=FORMATS))


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def some_vectors(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 64, generator=torch.Generator().manual_seed(9))


def under(request: Request, kind: Intervention, engine: HFRolloutEngine) -> Request:
    vectors = some_vectors() if kind.needs_vectors else None
    filler = engine.tokenizer.encode(" red", add_special_tokens=False)[0]
    return replace(request, intervention=kind, vectors=vectors, filler_id=filler)


def run_pair(rig: Rig, form, kind: Intervention) -> tuple[HFRolloutEngine, list[Rollout], list[Rollout]]:
    """The same six prompts, all OWN, and with row 2 alone under `kind`."""
    engine = rig.engine(form)
    requests = [replace(r, seed=40 + i) for i, r in enumerate(rig.requests())]
    changed = [under(r, kind, engine) if i == 2 else r for i, r in enumerate(requests)]
    with rig.thinking(form):
        own = engine.generate(requests, SAMPLED)
        other = engine.generate(changed, SAMPLED)
    assert own[2].completion_ids.count(engine.markers.start) >= 1
    return engine, own, other


@pytest.mark.parametrize("kind", [k for k in Intervention if k is not Intervention.OWN])
def test_only_its_row_changes_and_only_from_the_span_on(rig, form, kind):
    engine, own, other = run_pair(rig, form, kind)
    assert [r.intervention for r in other] == [kind if i == 2 else Intervention.OWN for i in range(6)]
    for row in (0, 1, 3, 4, 5):
        assert same(own[row], other[row])
    mine, theirs = own[2], other[2]
    start = mine.completion_ids.index(engine.markers.start)
    if kind is not Intervention.NONE:  # there START's probability is shared out, which may move an earlier draw
        assert theirs.completion_ids[:start] == mine.completion_ids[:start]
        assert torch.allclose(theirs.logprobs[:start], mine.logprobs[:start], atol=1e-5)
    assert (theirs.completion_ids, theirs.logprobs.tolist()) != (mine.completion_ids, mine.logprobs.tolist())


@pytest.mark.parametrize("kind", FED)
def test_what_is_fed_is_what_the_intervention_says(rig, form, kind):
    engine, own, other = run_pair(rig, form, kind)
    rollout, markers = other[2], engine.markers
    start = len(rollout.prompt_ids) + rollout.completion_ids.index(markers.start)
    slots = form.slots
    assert rollout.ids[start : start + slots + 2] == (markers.start, *[markers.slot] * slots, markers.end)
    assert len(rollout.latents) == len(rollout.latent_positions) >= form.k
    first = start if form.first == "before_start" else start + 1
    assert rollout.latent_positions[: form.k] == tuple(range(first, first + form.k))
    assert rollout.latent_positions[: form.k] == own[2].latent_positions[: form.k]

    images = [r.images for r in rig.requests()]
    with rig.thinking(form):
        replay = teacher_force(rig.model, [rollout], images[2:3], markers, SAMPLED)
    positions = torch.tensor(rollout.latent_positions)
    normal = keyed_normal(torch.full_like(positions, rollout.seed), positions, 64)
    hidden = replay.latents[0]  # own f(h) in the context that was really fed
    expected = {
        Intervention.OWN: hidden,
        Intervention.ZEROS: torch.zeros_like(hidden),
        Intervention.NOISE: normal * (hidden.norm(dim=-1, keepdim=True) / normal.norm(dim=-1, keepdim=True)),
        Intervention.UNIT_NOISE: normal,
    }
    supplied = some_vectors()[torch.arange(len(positions)) % 2]
    assert torch.allclose(rollout.latents, expected.get(kind, supplied), atol=1e-3)
    # It was fed, not only returned: the tokens after it have the probabilities of a forward that holds it.
    assert torch.allclose(rollout.logprobs, replay.logprobs[0], atol=1e-4)


def test_noise_has_the_norm_of_the_latent_it_replaces(rig, form):
    _, own, other = run_pair(rig, form, Intervention.NOISE)
    assert torch.allclose(own[2].latents[0].norm(), other[2].latents[0].norm(), rtol=1e-4)
    cosine = torch.cosine_similarity(own[2].latents[0], other[2].latents[0], dim=0)
    assert abs(cosine) < 0.5


def test_skip_writes_an_empty_pair(rig, form):
    engine, _, other = run_pair(rig, form, Intervention.SKIP)
    rollout, markers = other[2], engine.markers
    start = rollout.completion_ids.index(markers.start)
    assert rollout.completion_ids[start : start + 2] == (markers.start, markers.end)
    assert rollout.forced[start : start + 2].tolist() == [False, True]
    assert markers.slot not in rollout.completion_ids
    assert len(rollout.latents) == 0
    check_replay(rig, form, engine, rollout)


def test_none_opens_no_block(rig, form):
    engine, _, other = run_pair(rig, form, Intervention.NONE)
    rollout = other[2]
    assert engine.markers.start not in rollout.completion_ids
    assert len(rollout.latents) == 0
    assert not rollout.forced.any()
    check_replay(rig, form, engine, rollout)


def test_markers_only_keeps_the_slots_and_feeds_their_own_embedding(rig, form):
    engine, _, other = run_pair(rig, form, Intervention.MARKERS_ONLY)
    rollout, markers = other[2], engine.markers
    start = rollout.completion_ids.index(markers.start)
    block = (markers.start, *[markers.slot] * form.slots, markers.end)
    assert rollout.completion_ids[start : start + len(block)] == block
    assert len(rollout.latents) == 0
    check_replay(rig, form, engine, rollout)


@pytest.mark.parametrize("length", ["fixed", "free"])
def test_plain_tokens_replaces_the_block_by_as_many_fillers(rig, form, length):
    form = replace(form, length=length)
    engine, own, other = run_pair(rig, form, Intervention.PLAIN_TOKENS)
    rollout, markers = other[2], engine.markers
    filler = engine.tokenizer.encode(" red", add_special_tokens=False)[0]
    start = own[2].completion_ids.index(markers.start)
    size = form.slots + 2
    assert rollout.completion_ids[start : start + size] == (filler,) * size
    assert rollout.forced[start : start + size].all()
    assert not rollout.logprobs[start : start + size].any()
    assert not {markers.start, markers.slot, markers.end} & set(rollout.completion_ids)
    assert len(rollout.latents) == 0
    check_replay(rig, form, engine, rollout)


def check_replay(rig: Rig, form, engine, rollout: Rollout) -> None:
    """A rollout without latents is an ordinary text: its probabilities are those of an ordinary forward."""
    with rig.thinking(form):
        replay = teacher_force(rig.model, [rollout], [rig.requests()[2].images], engine.markers, SAMPLED)
    assert torch.allclose(rollout.logprobs, replay.logprobs[0], atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in Intervention if k not in (Intervention.NONE, Intervention.PLAIN_TOKENS)])
def test_interventions_act_on_a_prompt_that_ends_in_start(rig, form, kind):
    engine = rig.engine(form)
    markers = engine.markers
    request = under(rig.requests()[0], kind, engine)
    request = replace(request, prompt_ids=[*request.prompt_ids, markers.start])
    rollout = engine.generate([request], replace(SAMPLED, max_tokens=5))[0]
    slots = 0 if kind is Intervention.SKIP else form.slots
    assert rollout.completion_ids[: slots + 1] == (*[markers.slot] * slots, markers.end)
    assert len(rollout.latents) == (form.k if kind.feeds_vectors else 0)
    if kind.needs_vectors:
        assert torch.equal(rollout.latents, some_vectors()[torch.arange(form.k) % 2])
    replay = teacher_force(rig.model, [rollout], [request.images], markers, SAMPLED)
    assert torch.allclose(rollout.logprobs, replay.logprobs[0], atol=1e-4)


def test_interventions_k_and_seeds_mix_in_one_batch(rig):
    engine = rig.engine()
    base = rig.requests()[0]
    requests = [replace(under(base, kind, engine), seed=i, k=1 + i % 4) for i, kind in enumerate(Intervention)]
    with rig.thinking():
        together = engine.generate(requests, SAMPLED)
        alone = [engine.generate([r], SAMPLED)[0] for r in requests]
    assert all(same(a, b, 2e-4) for a, b in zip(together, alone, strict=True))
    assert all(r.stop_reason in (StopReason.LENGTH, StopReason.EOS) for r in together)


# ---- bad input


def bad_requests(rig: Rig) -> dict[str, tuple[dict, str]]:
    engine = rig.engine()
    ids = rig.requests()[1].prompt_ids
    markers = engine.markers
    span = markers.span()
    at = len(ids) + 1
    places = range(at, at + 3)
    vocabulary = rig.model.config.get_text_config().vocab_size
    given = {"intervention": Intervention.GIVEN}
    return {
        "empty prompt": ({"prompt_ids": []}, "prompt is empty"),
        "long prompt": ({"prompt_ids": [*ids] * 1000}, "prompt has 8000 tokens, the model takes 4096"),
        "foreign token": ({"prompt_ids": [*ids, vocabulary]}, "not in the model's vocabulary"),
        "k": ({"k": 0}, "k is 0"),
        "no vectors": (given, "needs vectors"),
        "no vector": ({**given, "vectors": torch.zeros(0, 64)}, "needs vectors"),
        "wrong width": ({**given, "vectors": torch.zeros(1, 63)}, "63 wide, the model is 64"),
        "nan": ({**given, "vectors": torch.full((1, 64), torch.nan)}, "not finite"),
        "vectors for own": ({"vectors": torch.zeros(1, 64)}, "takes no vectors"),
        "none in a span": ({"intervention": Intervention.NONE, "prompt_ids": [*ids, markers.start]}, "ends inside"),
        "plain in a span": (
            {"intervention": Intervention.PLAIN_TOKENS, "filler_id": 300, "prompt_ids": [*ids, markers.start]},
            "ends inside",
        ),
        "no filler": ({"intervention": Intervention.PLAIN_TOKENS}, "needs filler_id"),
        "special filler": (
            {"intervention": Intervention.PLAIN_TOKENS, "filler_id": rig.tokenizer.eos_token_id},
            "no ordinary token",
        ),
        "slot filler": ({"intervention": Intervention.PLAIN_TOKENS, "filler_id": markers.slot}, "no ordinary token"),
        "latents missing": ({"prompt_ids": [*ids, *span]}, f"a latent at position {at} "),
        "latent too few": (
            {"prompt_ids": [*ids, *span], "prompt_latents": (torch.zeros(2, 64), places)},
            "vectors of shape",
        ),
        "latent elsewhere": (
            {"prompt_ids": [*ids, *span], "prompt_latents": (torch.zeros(3, 64), range(3))},
            "position 0, where the prompt has no latent",
        ),
        "latent order": (
            {"prompt_ids": [*ids, *span], "prompt_latents": (torch.zeros(3, 64), places[::-1])},
            "must increase",
        ),
        "latent width": (
            {"prompt_ids": [*ids, *span], "prompt_latents": (torch.zeros(3, 8), places)},
            "prompt_latents are 8 wide",
        ),
        "stray slot": ({"prompt_ids": [*ids, markers.slot]}, "outside a latent span"),
        "images without places": ({"images": rig.requests()[0].images}, "has images but its prompt has no image token"),
        "places without images": ({"prompt_ids": rig.requests()[0].prompt_ids}, "6 image tokens but no image"),
    }


BAD = (
    *("empty prompt", "long prompt", "foreign token", "k", "no vectors", "no vector", "wrong width", "nan"),
    *("vectors for own", "none in a span", "plain in a span", "no filler", "special filler", "slot filler"),
    *("latents missing", "latent too few", "latent elsewhere", "latent order", "latent width", "stray slot"),
    *("images without places", "places without images"),
)


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_refused_by_number(rig, case):
    changes, message = bad_requests(rig)[case]
    good = rig.requests()[1]
    with pytest.raises(UserError, match=f"request 1: .*{message}"):
        rig.engine().generate([good, replace(good, **changes)], SAMPLED)
    rig.engine().generate([good], SAMPLED)


def test_all_bad_cases_are_listed(rig):
    assert set(bad_requests(rig)) == set(BAD)


def test_too_few_image_tokens(load_tiny, family_name):
    rig = Rig(*load_tiny(family_name))
    request = rig.requests()[0]
    image = rig.family.placeholder_ids(rig.tokenizer)["image"]
    ids = list(request.prompt_ids)
    ids.remove(image)
    good = rig.requests()[1]
    with pytest.raises(
        UserError,
        match=f"request 1: the prompt has {ids.count(image)} image tokens, its images take {ids.count(image) + 1}",
    ):
        rig.engine().generate([good, replace(request, prompt_ids=ids)], SAMPLED)


def test_engine_refuses_a_format_that_the_model_cannot_serve(rig):
    with pytest.raises(UserError, match="attach_feedback"):
        rig.engine(get_format("lvr", projector="linear"))
    with pytest.raises(UserError, match="no token"):
        rig.engine(get_format("skila"))
    with pytest.raises(UserError, match="batch_size"):
        rig.engine(batch_size=0)
