"""Injection into real tiny models of all four families, against a reference without any hook.

The reference appends one row per latent to the embedding matrix and writes the new ids where the latents belong:
the model then looks the vectors up as ordinary tokens, with its own image features and positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MIXED_ROWS, make_batch, noise_image
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rl_lvr.forward.inject import inject
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.format import FormatIds, get_format
from rl_lvr.latents.spans import span_masks
from rl_lvr.wrapping import input_embeddings

TOLERANCE = 1e-4
CLEAR = 1e-2  # a difference that no rounding makes

LVR = get_format("lvr")
MONET = get_format("monet")
# Rows with two spans, none, and a truncated one after an empty pair.
REPLIES = [f"red{LVR.text(3)}green{LVR.text(2)} 2", "blue 1", f"1{LVR.text(0)}from {LVR.start}{LVR.slot * 2}"]


@dataclass
class Case:
    """A model, a batch with slots and latents for all of them."""

    model: Any
    batch: dict[str, Tensor]
    markers: FormatIds
    latents: LatentBatch

    def logits(self, latents: LatentBatch | None = None, model: nn.Module | None = None) -> Tensor:
        model = self.model if model is None else model
        with inject(model, self.latents if latents is None else latents, self.markers):
            return model(**self.batch).logits


def make_case(model: Any, processor: Any, side: str = "left", preset: str = "lvr") -> Case:
    replies = REPLIES
    if preset == "monet":
        replies = [f"red{MONET.text(3)}green{MONET.text(1)}", "blue 1", f"1{MONET.text(2)}"]
    markers = get_format(preset).bind(processor.tokenizer)
    batch = make_batch(processor, MIXED_ROWS, side, replies)
    masks = span_masks(batch["input_ids"], markers, batch["attention_mask"])
    positions = [torch.nonzero(row).flatten() for row in masks.latent]
    width = input_embeddings(model).embedding_dim
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(len(places), width, generator=generator) for places in positions]
    return Case(model, batch, markers, LatentBatch.from_rows(values, positions))


@pytest.fixture
def case(load_tiny: Callable[..., tuple[Any, Any]], family_name: str) -> Case:
    return make_case(*load_tiny(family_name))


def reference(model: Any, batch: dict[str, Tensor], latents: LatentBatch) -> Tensor:
    """The same forward with the latents as rows of the embedding matrix; no hook takes part."""
    return reference_model(model, batch, latents)[1]


def reference_model(model: Any, batch: dict[str, Tensor], latents: LatentBatch) -> tuple[Any, Tensor]:
    """The model with the longer embedding matrix, and its logits of the old tokens."""
    model = copy.deepcopy(model)
    vocabulary = input_embeddings(model).weight.shape[0]
    rows, columns = latents.mask.nonzero(as_tuple=True)
    model.resize_token_embeddings(vocabulary + len(rows), mean_resizing=False)
    with torch.no_grad():
        input_embeddings(model).weight[vocabulary:] = latents.values[rows, columns]
    ids = batch["input_ids"].clone()
    ids[rows, latents.positions[rows, columns]] = vocabulary + torch.arange(len(rows))
    return model, model(**{**batch, "input_ids": ids}).logits[..., :vocabulary]


def seen(batch: dict[str, Tensor], logits: Tensor) -> Tensor:
    """Logits of real tokens: what stands on padding has no meaning."""
    return logits[batch["attention_mask"].bool()]


def far(one: Tensor, two: Tensor) -> float:
    return float((one - two).detach().abs().max())


# ---- the same as without a hook


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_injection_equals_the_reference(load_tiny: Callable[..., tuple[Any, Any]], family_name: str, side: str) -> None:
    case = make_case(*load_tiny(family_name), side)
    assert case.latents.counts.tolist() == [5, 0, 2]
    fed = seen(case.batch, case.logits())
    assert far(fed, seen(case.batch, reference(case.model, case.batch, case.latents))) < TOLERANCE
    # Controls: the slots' own embeddings, and the latents of another row, give something else.
    assert far(fed, seen(case.batch, case.model(**case.batch).logits)) > CLEAR
    reversed_values = LatentBatch(case.latents.values.flip(1), case.latents.positions, case.latents.sigma)
    assert far(fed, seen(case.batch, case.logits(reversed_values))) > CLEAR


@torch.no_grad()
def test_a_latent_on_the_start_token(load_tiny: Callable[..., tuple[Any, Any]], family_name: str) -> None:
    case = make_case(*load_tiny(family_name, latent_formats=("monet",)), preset="monet")
    assert case.latents.counts.tolist() == [4, 0, 2]
    fed = seen(case.batch, case.logits())
    assert far(fed, seen(case.batch, reference(case.model, case.batch, case.latents))) < TOLERANCE
    at_start = get_format("monet", first="at_start")
    with (
        pytest.raises(ValueError, match="takes no latent"),
        inject(case.model, case.latents, FormatIds(at_start, case.markers.start, case.markers.slot, case.markers.end)),
    ):
        case.model(**case.batch)


@torch.no_grad()
def test_the_image_is_still_seen(case: Case, load_tiny: Callable[..., tuple[Any, Any]], family_name: str) -> None:
    other_rows = [([noise_image(90 + i, *image.size[::-1]) for i, image in enumerate(images)], text)
                  for images, text in MIXED_ROWS]  # fmt: skip
    other = make_batch(load_tiny(family_name)[1], other_rows, "left", REPLIES)
    fed = case.logits()
    with inject(case.model, case.latents, case.markers):
        blind = case.model(**other).logits
    assert far(fed[1], blind[1]) < TOLERANCE  # the row without images is the control
    assert far(fed[0, -1], blind[0, -1]) > CLEAR
    assert far(fed[2, -1], blind[2, -1]) > CLEAR


@torch.no_grad()
def test_only_what_follows_a_latent_changes(case: Case) -> None:
    fed, plain = case.logits(), case.model(**case.batch).logits
    first = int(case.latents.positions[0, 0])
    assert torch.equal(fed[0, :first], plain[0, :first])
    assert far(fed[0, first], plain[0, first]) > CLEAR
    assert torch.equal(fed[1], plain[1])


@torch.no_grad()
def test_without_latents_nothing_changes_and_nothing_is_left_behind(case: Case) -> None:
    plain = case.model(**case.batch).logits
    width = input_embeddings(case.model).embedding_dim
    assert torch.equal(case.logits(LatentBatch.empty(3, width)), plain)
    case.logits()
    assert not input_embeddings(case.model)._forward_hooks
    assert torch.equal(case.model(**case.batch).logits, plain)


@torch.no_grad()
def test_latents_enter_in_the_precision_of_the_model(load_tiny: Callable[..., tuple[Any, Any]]) -> None:
    case = make_case(*load_tiny("qwen2_5_vl"))
    case.model.bfloat16()
    rounded = case.latents.to(torch.bfloat16)
    assert torch.equal(case.logits(case.latents), case.logits(rounded))
    assert far(seen(case.batch, case.logits()), seen(case.batch, case.model(**case.batch).logits)) > CLEAR


# ---- under wrappers


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)",
        init_lora_weights=False,  # random: an adapter that starts at zero would prove nothing
        **more,
    )


@pytest.mark.parametrize("variant", ["lora", "embeddings saved", "tokens trained"])
@torch.no_grad()
def test_under_lora(case: Case, variant: str) -> None:
    more = {
        "lora": {},
        "embeddings saved": {"modules_to_save": ["embed_tokens"]},
        "tokens trained": {"trainable_token_indices": {"embed_tokens": [case.markers.start, case.markers.end]}},
    }[variant]
    plain = case.logits()
    torch.manual_seed(1)
    wrapped = get_peft_model(case.model, lora(**more)).eval()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "lora" not in name:  # the trained copies are to differ from the originals
            parameter.add_(torch.randn_like(parameter) * 0.1)
    fed = seen(case.batch, case.logits(model=wrapped))
    assert far(fed, seen(case.batch, plain)) > CLEAR  # the adapter does something
    merged = copy.deepcopy(wrapped).merge_and_unload()
    assert far(fed, seen(case.batch, reference(merged, case.batch, case.latents))) < TOLERANCE


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_under_ddp_with_lora_inside(case: Case, process_group: None) -> None:
    torch.manual_seed(1)
    peft = get_peft_model(case.model, lora()).eval()
    expected = case.logits(model=peft)
    wrapped = DistributedDataParallel(peft)
    fed = case.logits(model=wrapped)
    assert far(fed, expected) == 0.0
    fed.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in peft.parameters())


# ---- gradients


def latent_gradients(case: Case, model: nn.Module | None = None) -> Tensor:
    values = case.latents.values.clone().requires_grad_()
    latents = LatentBatch(values, case.latents.positions, case.latents.sigma)
    logits = seen(case.batch, case.logits(latents, model))
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    (logits * weights).mean().backward()
    assert values.grad is not None
    return values.grad


def test_gradients_to_latents_equal_finite_differences(case: Case) -> None:
    case.model.double()
    case.latents = case.latents.to(torch.float64)
    gradient = latent_gradients(case)
    assert (gradient[case.latents.mask].abs().amax(-1) > 0).all()
    assert (gradient[~case.latents.mask] == 0).all()

    weights = torch.randn(
        int(case.batch["attention_mask"].sum()),
        input_embeddings(case.model).num_embeddings,
        generator=torch.Generator().manual_seed(2),
        dtype=torch.float64,
    )

    @torch.no_grad()
    def loss(values: Tensor) -> float:
        latents = LatentBatch(values, case.latents.positions, case.latents.sigma)
        return float((seen(case.batch, case.logits(latents)) * weights).mean())

    torch.manual_seed(0)
    step = 1e-3  # not smaller: Qwen's RMSNorm rounds to float32 in a float64 model too
    for _ in range(3):
        direction = torch.randn_like(gradient) * case.latents.mask[..., None]
        slope = (loss(case.latents.values + step * direction) - loss(case.latents.values - step * direction)) / (
            2 * step
        )
        size = float(gradient.norm())  # of a slope in a common direction; one across the gradient is nearly zero
        assert slope == pytest.approx(float((gradient * direction).sum()), rel=0, abs=1e-3 * size)
        assert slope != pytest.approx(float((gradient.flip(1) * direction).sum()), rel=0, abs=1e-2 * size)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("with_lora", [False, True])
def test_gradients_under_checkpointing(case: Case, with_lora: bool, reentrant: bool) -> None:
    model = case.model
    if with_lora:
        torch.manual_seed(1)
        model = get_peft_model(model, lora())
    model.train()
    expected = latent_gradients(case, model)
    parameters = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert parameters
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    passes = count_passes(model)
    got = latent_gradients(case, model)
    assert passes[0] > 1  # the control: layers really ran twice
    assert torch.allclose(got, expected, atol=1e-6, rtol=1e-4)
    assert got.abs().max() > 0
    for name, parameter in model.named_parameters():
        if name in parameters:
            assert torch.allclose(parameter.grad, parameters[name], atol=1e-5, rtol=1e-3), name


def count_passes(model: nn.Module) -> list[int]:
    """How often the first text layer's MLP runs."""
    passes = [0]
    layer = next(module for name, module in model.named_modules() if name.endswith("language_model.layers.0.mlp"))

    def count(*_: Any) -> None:
        passes[0] += 1

    layer.register_forward_pre_hook(count)  # a recomputation stops before the last module of a layer returns
    return passes


def test_gradients_to_the_model_equal_those_of_the_reference(case: Case) -> None:
    other, logits = reference_model(case.model, case.batch, case.latents)
    seen(case.batch, logits).square().mean().backward()
    seen(case.batch, case.logits()).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in other.named_parameters()}
    # The gradient of a key bias is zero in exact arithmetic: what rounding leaves is small next to the model's largest.
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, parameter in case.model.named_parameters():
        if parameter.grad is None:
            assert expected[name] is None, name
            continue
        wanted = expected[name][: len(parameter)]  # without the rows of the latents
        room = max(1e-4 * float(wanted.abs().max()), 1e-6 * largest)
        assert torch.allclose(parameter.grad, wanted, rtol=1e-3, atol=room), name
    gradient = input_embeddings(case.model).weight.grad
    assert gradient[case.markers.start].abs().max() > 0
    assert gradient[case.markers.slot].abs().max() == 0  # a latent stands on every slot


def test_no_gradient_where_none_is_asked_for(case: Case) -> None:
    with torch.no_grad():
        assert not case.logits().requires_grad
    case.logits().mean().backward()
    assert case.latents.values.grad is None


# ---- refusals: each is loud, and none leaves a hook


@pytest.fixture
def qwen(load_tiny: Callable[..., tuple[Any, Any]]) -> Iterator[Case]:
    case = make_case(*load_tiny("qwen2_5_vl"))
    yield case
    assert not input_embeddings(case.model)._forward_hooks
    with torch.no_grad():
        case.logits()  # and the next injection works


def with_positions(case: Case, positions: Tensor) -> LatentBatch:
    return LatentBatch(case.latents.values, positions, case.latents.sigma)


def test_another_number_of_rows_is_refused(qwen: Case) -> None:
    with pytest.raises(ValueError, match="latents of 2 rows"):
        qwen.logits(qwen.latents.select([0, 1]))


def test_a_position_out_of_range_is_refused(qwen: Case) -> None:
    beyond = torch.where(qwen.latents.mask, qwen.latents.positions + 10_000, -1)
    with pytest.raises(ValueError, match=r"sits at position \d+ of a row of \d+ tokens"):
        qwen.logits(with_positions(qwen, beyond))


@pytest.mark.parametrize("offset", [-1, 1])
def test_latents_beside_their_slots_are_refused(qwen: Case, offset: int) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        qwen.logits(qwen.latents.shifted(torch.tensor([offset, 0, 0])))


def test_rows_in_another_order_are_refused(qwen: Case) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        qwen.logits(qwen.latents.select([1, 0, 2]))


def test_latents_of_another_width_are_refused(qwen: Case) -> None:
    for width in (1, 63):  # a width of 1 would be broadcast
        narrow = LatentBatch(qwen.latents.values[..., :width], qwen.latents.positions, qwen.latents.sigma)
        with pytest.raises(ValueError, match=f"latents of width {width} cannot enter embeddings of width 64"):
            qwen.logits(narrow)


def test_a_forward_from_embeddings_is_refused(qwen: Case) -> None:
    embeds = input_embeddings(qwen.model)(qwen.batch["input_ids"]).detach()
    text_only = {"inputs_embeds": embeds, "attention_mask": qwen.batch["attention_mask"]}
    with (
        pytest.raises(RuntimeError, match="Pass input_ids, not inputs_embeds"),
        inject(qwen.model, qwen.latents, qwen.markers),
    ):
        qwen.model.model.language_model(**text_only)


def test_no_forward_at_all_is_refused(qwen: Case) -> None:
    with pytest.raises(RuntimeError, match="were not fed"), inject(qwen.model, qwen.latents):
        pass


def test_a_second_forward_is_refused(qwen: Case) -> None:
    with inject(qwen.model, qwen.latents, qwen.markers):
        qwen.model(**qwen.batch)
        with pytest.raises(RuntimeError, match="a second time"):
            qwen.model(**qwen.batch)


def test_generation_inside_an_injection_is_refused(qwen: Case) -> None:
    with pytest.raises(RuntimeError, match="a second time"), inject(qwen.model, qwen.latents, qwen.markers):
        qwen.model.generate(**qwen.batch, max_new_tokens=3, do_sample=False)


def test_an_error_inside_passes_unchanged(qwen: Case) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        inject(qwen.model, qwen.latents, qwen.markers),
    ):
        qwen.model(**qwen.batch, labels=1 // 0)
