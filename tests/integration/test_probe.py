"""The Probe against eager attention weights, on the four families, however a forward pass is run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import MIXED_ROWS, make_batch
from probe_cases import LAYERS, Case, eager_masses, make_case, measured_masses, packed
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rl_lvr.errors import UserError
from rl_lvr.signals import Probe, Reading
from rl_lvr.signals import kernels as kernels_module

CLOSE = 1e-5
ALL = Reading("mass")


@pytest.fixture
def model_and_processor(load_tiny, family_name) -> tuple[Any, Any]:
    return load_tiny(family_name, layers=LAYERS)


@pytest.fixture
def qwen(load_tiny) -> tuple[Any, Any]:
    return load_tiny("qwen2_5_vl", layers=LAYERS)


def agrees(case: Case, **how: Any) -> set[str]:
    """Per layer and head, and on average, the probe says what eager attention's weights say; wrong regions do not."""
    expected = eager_masses(case)
    got, kernels = measured_masses(case, **how)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < CLOSE
    assert expected[..., 0].max() > 1e-2  # there is attention on latents
    control, _ = measured_masses(case.wrong, **how)
    assert (control - expected).abs().max() > 1e-3
    return kernels


@pytest.mark.parametrize("side", ["left", "right"])
def test_masses_equal_eager_attention(model_and_processor, side):
    kernels = agrees(make_case(*model_and_processor, side))
    assert kernels == {"aten::_scaled_dot_product_flash_attention_for_cpu"}


def test_masses_without_padding(model_and_processor):
    agrees(make_case(*model_and_processor, "right", rows=MIXED_ROWS[:1]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_masses_with_the_denominator_computed_anew(qwen, side):
    assert agrees(make_case(*qwen, side), recompute=True) == {"recomputed"}


def test_masses_of_packed_sequences(model_and_processor):
    case = make_case(*model_and_processor, "right")
    alone, _ = measured_masses(case)
    together = packed(case)
    agrees(together)
    # The packed row holds the same tokens in the same order, and none looks into its neighbour.
    assert (measured_masses(together)[0] - alone).abs().max() < CLOSE


def test_masses_under_peft(model_and_processor):
    from peft import LoraConfig, get_peft_model

    model, processor = model_and_processor
    plain, _ = measured_masses(make_case(model, processor, "left"))
    lora = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    case = make_case(get_peft_model(model, lora), processor, "left")
    agrees(case)
    assert (measured_masses(case)[0] - plain).abs().max() > 1e-3  # the adapter takes part


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_measured_once(model_and_processor, reentrant):
    model, processor = model_and_processor
    case = make_case(model, processor, "right")
    expected = eager_masses(case)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()

    def gradients(probe: Probe | None) -> list[torch.Tensor]:
        model.zero_grad()
        if probe is None:
            case.forward().float().pow(2).mean().backward()
        else:
            with probe:
                case.forward().float().pow(2).mean().backward()
        return [p.grad.clone() for p in model.model.language_model.parameters() if p.grad is not None]

    plain = gradients(None)
    probe = case.probe([ALL])
    armed = gradients(probe)
    assert len(plain) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, armed, strict=True))
    mean = expected.mean((0, 1))
    assert (probe[ALL] - mean).abs().max() < CLOSE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_logits_are_bitwise_the_same(model_and_processor, side, mode, dtype):
    model, processor = model_and_processor
    case = make_case(model.to(dtype), processor, side)
    with mode():
        plain = case.forward()
        with case.probe([ALL]) as probe:
            armed = case.forward()
        again = case.forward()
    assert torch.equal(plain, armed)
    assert torch.equal(plain, again)
    assert bool((probe[ALL] > 0).any())


def test_bf16_masses_are_those_of_the_rounded_queries_and_keys(model_and_processor):
    model, processor = model_and_processor
    case = make_case(model.to(torch.bfloat16), processor, "left")
    taken, kernels = measured_masses(case)
    anew, _ = measured_masses(case, recompute=True)
    assert kernels == {"aten::_scaled_dot_product_flash_attention_for_cpu"}
    assert (taken - anew).abs().max() < 5e-4  # the CPU's kernel takes exponents of bf16 roughly


def test_autocast_measures_the_precision_of_the_kernel(model_and_processor):
    case = make_case(*model_and_processor, "left")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        taken, _ = measured_masses(case)
        anew, _ = measured_masses(case, recompute=True)
    assert taken.dtype is torch.float32
    assert (taken - anew).abs().max() < 1e-4


def test_layers_and_heads(model_and_processor):
    case = make_case(*model_and_processor, "left")
    expected = eager_masses(case)
    readings = {
        Reading("mass", (-1,)): expected[-1:].mean((0, 1)),
        Reading("mass", (0, 2), (1,)): expected[[0, 2], 1].mean(0),
        Reading("mass", None, (0,)): expected[:, 0].mean(0),
    }
    with case.probe(list(readings)) as probe, torch.no_grad():
        case.forward()
    for reading, mean in readings.items():
        assert (probe[reading] - mean).abs().max() < CLOSE


def test_image_entropy_equals_eager_attention(model_and_processor):
    case = make_case(*model_and_processor, "left")
    weights = case.eager_weights().double()  # [L, H, N, T]
    image = (case.regions.labels == 2)[:, None].expand(-1, case.width, -1).flatten(0, 1)
    on_image = weights * image
    p = on_image / on_image.sum(-1, keepdim=True).clamp_min(1e-30)
    expected = -(p * p.clamp_min(1e-30).log()).sum(-1)[:, :, case.rows.flatten()].mean((0, 1))
    reading = Reading("image_entropy")
    with case.probe([reading]) as probe, torch.no_grad():
        case.forward()
    assert expected.max() > 0.1
    assert (probe[reading] - expected).abs().max() < CLOSE
    with case.wrong.probe([reading]) as control, torch.no_grad():
        case.forward()
    assert (control[reading] - expected).abs().max() > 1e-3


def test_sliding_window(load_tiny):
    """Layers that look back a few tokens only."""
    model, processor = load_tiny("qwen2_5_vl", layers=LAYERS)
    for layer in range(1, LAYERS):
        model.config.text_config.layer_types[layer] = "sliding_attention"
        model.model.language_model.layers[layer].self_attn.sliding_window = 4
    model.config.text_config.sliding_window = 4
    model.model.language_model.has_sliding_layers = True
    case = make_case(model, processor, "left")
    agrees(case)
    agrees(case, recompute=True)


# ---- scope


def test_everything_is_restored(qwen):
    case = make_case(*qwen, "left")
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    broken = {**case.inputs, "input_ids": case.inputs["input_ids"] + 10**6}
    with pytest.raises(IndexError), case.probe([ALL]):
        case.model(**broken)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping
    with case.probe([ALL]), torch.no_grad():
        case.forward()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before


def test_an_error_inside_an_armed_layer_restores_everything(qwen, monkeypatch):
    """In the attention itself, and in what the probe does after it; then the same model is measured as ever."""
    case = make_case(*qwen, "left")
    expected, _ = measured_masses(case)
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    second = id(case.model.model.language_model.layers[1].self_attn)

    def out_of_memory(module: Any, *args: Any, **kwargs: Any) -> Any:
        if id(module) == second:
            raise torch.OutOfMemoryError("in the second layer")
        return before(module, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError, match="second layer"), case.probe([ALL]), torch.no_grad():
            case.forward()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is out_of_memory
    with monkeypatch.context() as patch:
        patch.setattr("rl_lvr.signals.probe.attention_mass_reduced", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError), case.probe([ALL]), torch.no_grad():
            case.forward()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping
    assert torch.equal(measured_masses(case)[0], expected)


def test_an_override_of_someone_else_is_kept(qwen):
    case = make_case(*qwen, "left")
    original, calls = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def other(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = other
    try:
        with case.probe([ALL]), torch.no_grad():
            case.forward()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other
        assert len(calls) >= LAYERS
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_probes_do_not_nest(qwen):
    case = make_case(*qwen, "left")
    with case.probe([ALL]), torch.no_grad():
        with pytest.raises(RuntimeError, match="armed already"), case.probe([ALL]):
            pass
        case.forward()
    with case.probe([ALL]), torch.no_grad():  # and the refusal left nothing behind
        case.forward()


def test_another_model_is_not_measured(qwen, load_tiny):
    case, other = make_case(*qwen, "left"), make_case(*load_tiny("internvl"), "left")
    expected, _ = measured_masses(case)
    with case.probe([ALL]) as probe, torch.no_grad():
        other.forward()
        case.forward()
    assert torch.equal(probe[ALL], expected.mean((0, 1))) or (probe[ALL] - expected.mean((0, 1))).abs().max() < 1e-6


def test_one_forward_and_no_less(qwen):
    case = make_case(*qwen, "left")
    with pytest.raises(RuntimeError, match="saw no attention in layers"), case.probe([ALL]):
        pass
    with case.probe([ALL]), torch.no_grad():
        case.forward()
        with pytest.raises(RuntimeError, match="second time"):
            case.forward()


def test_a_batch_of_another_shape_is_refused(qwen):
    model, processor = qwen
    case = make_case(model, processor, "left")
    other = make_batch(processor, MIXED_ROWS[:1])
    with pytest.raises(ValueError, match="made for tokens"), case.probe([ALL]), torch.no_grad():
        model(**other)


def test_wrong_layers_and_eager_attention_are_refused(qwen):
    case = make_case(*qwen, "left")
    with pytest.raises(UserError, match="no layer"):
        case.probe([Reading("mass", (LAYERS,))])
    with pytest.raises(UserError, match="no head"):
        case.probe([Reading("mass", None, (7,))])
    case.model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="sdpa"), case.probe([ALL]):
        pass


def test_compiled_models_are_refused(qwen):
    case = make_case(*qwen, "left")
    with pytest.raises(UserError, match="uncompiled"):
        replace(case, model=torch.compile(case.model)).probe([ALL])
    case.model.model.language_model.layers[1].compile()
    with pytest.raises(UserError, match="uncompiled"):
        case.probe([ALL])


# ---- the kernel's log-sum-exp


def test_a_log_sum_exp_in_other_units_is_refused(qwen, monkeypatch):
    case = make_case(*qwen, "left")
    monkeypatch.setattr(kernels_module, "_checked", set())
    real = kernels_module.dense_lse
    monkeypatch.setattr("rl_lvr.signals.probe.dense_lse", lambda *args: real(*args) * 1.4426950408889634)  # base 2
    with pytest.raises(RuntimeError, match="differs from ours"), case.probe([ALL]), torch.no_grad():
        case.forward()


def test_a_kernel_without_log_sum_exp_is_measured_anew(qwen):
    case = make_case(*qwen, "left")
    with sdpa_kernel([SDPBackend.MATH]):
        assert agrees(case) == {"recomputed"}


def test_layouts_of_log_sum_exps():
    lse = torch.randn(2, 3, 5)
    valid = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()

    def dense(tensor: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        kernel = kernels_module.Kernel("test", torch.float32, tensor)
        return kernels_module.dense_lse(kernel, (2, 3, 5), mask)

    assert torch.equal(dense(lse), lse)
    assert torch.equal(dense(torch.nn.functional.pad(lse, (0, 27))), lse)  # rounded up to 32
    assert torch.equal(dense(lse[..., None]), lse)
    flat = lse.transpose(0, 1)  # [H, B, T]
    assert torch.equal(dense(flat.reshape(3, 10)), lse)
    unpadded = dense(flat[:, valid], valid)
    assert torch.equal(unpadded.transpose(1, 2)[valid], lse.transpose(1, 2)[valid])


@torch.library.custom_op("rl_lvr_tests::varlen", mutates_args=())
def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What FlashAttention's kernel does, on the CPU: tokens of all sequences behind each other, lse [H, total]."""
    outs, lses = [], []
    for queries, keys, values in zip(*(x.transpose(0, 1).split(lengths, 1) for x in (q, k, v)), strict=True):
        keys, values = (x.repeat_interleave(len(queries) // len(x), 0) for x in (keys, values))
        future = torch.ones(queries.shape[1], queries.shape[1]).triu(1).bool()
        scores = (scale * queries @ keys.transpose(1, 2)).masked_fill(future, -torch.inf)
        outs.append(scores.softmax(-1) @ values)
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs, 1).transpose(0, 1).contiguous(), torch.cat(lses, 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_unpadding_attention(qwen, side, monkeypatch):
    """An attention that takes the padding out, with a kernel that lays its log-sum-exp out as FlashAttention's does."""
    monkeypatch.setattr(kernels_module, "LSE_KERNELS", ("rl_lvr_tests::varlen",))
    case = make_case(*qwen, side)
    text = {id(layer.self_attn) for layer in case.model.model.language_model.layers}
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def unpadding(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if id(module) not in text:
            return sdpa(module, query, key, value, attention_mask, **kwargs)
        tokens = [x.transpose(1, 2)[case.rows] for x in (query, key, value)]
        lengths = case.rows.sum(1).tolist()
        out, _ = varlen(*tokens, lengths, kwargs["scaling"])
        padded = torch.zeros_like(query.transpose(1, 2))
        padded[case.rows] = out
        return padded, None

    ALL_ATTENTION_FUNCTIONS["sdpa"] = unpadding
    try:
        assert agrees(case) == {"rl_lvr_tests::varlen"}
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
)
def test_kernels_of_a_gpu(load_tiny, family_name, kernel):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model, processor = load_tiny(family_name, layers=LAYERS)
    case = make_case(model.to("cuda", torch.bfloat16), processor, "right", rows=MIXED_ROWS[:1])
    with sdpa_kernel([kernel, SDPBackend.MATH]), torch.no_grad():
        plain = case.forward()
        with case.probe([ALL]) as probe:
            armed = case.forward()
        anew, _ = measured_masses(case, recompute=True)
    assert torch.equal(plain, armed)
    assert (probe[ALL] - anew.mean((0, 1))).abs().max() < 1e-4
