"""The feedback map f: hidden state -> latent, and its way through checkpoints and adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageTextToText

from rl_lvr.errors import UserError
from rl_lvr.latents.feedback import NAME, LatentFeedback, attach_feedback, feedback
from rl_lvr.latents.format import LatentFormat, get_format
from rl_lvr.wrapping import input_embeddings

H = 64  # of the tiny models
KINDS = [(projector, norm) for projector in ("none", "linear", "mlp") for norm in ("none", "embedding")][
    1:
]  # all but the format that needs no module


@pytest.fixture
def model(load_tiny: Callable[..., tuple[Any, Any]]) -> Any:
    return load_tiny("qwen2_5_vl")[0]


@pytest.fixture
def hidden() -> torch.Tensor:
    return 3 * torch.randn(2, 5, H, generator=torch.Generator().manual_seed(0))


def scramble(module: nn.Module) -> None:
    """Other weights than at the start, as after training."""
    torch.manual_seed(7)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.rand_like(tensor) + 0.5)


# ---- the map


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projector", ["none", "linear", "mlp"])
def test_it_starts_as_the_identity(projector: str, dtype: torch.dtype, hidden: torch.Tensor) -> None:
    module, hidden = LatentFeedback(H, projector).to(dtype), hidden.to(dtype)
    assert torch.equal(module(hidden), hidden)
    if projector != "none":
        scramble(module)
        assert not torch.allclose(module(hidden), hidden, atol=0.1)  # the control: it can be something else


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_the_projector_learns_from_its_start(projector: str, hidden: torch.Tensor) -> None:
    """The identity must not be a dead point: one step down the gradient changes the map."""
    module = LatentFeedback(H, projector)
    module(hidden).square().mean().backward()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.step()
    assert not torch.allclose(module(hidden), hidden, atol=1e-3)


@pytest.mark.parametrize("projector", ["none", "linear", "mlp"])
def test_the_norm_of_the_embeddings(projector: str, model: Any, hidden: torch.Tensor) -> None:
    attach_feedback(model, get_format("lvr", projector=projector, norm="embedding"))
    expected = input_embeddings(model).weight.norm(dim=-1).mean()
    latents = feedback(model, hidden)
    assert torch.allclose(latents.norm(dim=-1), expected, rtol=1e-5)
    assert (hidden.norm(dim=-1) - expected).abs().min() > 1  # the control: it had to be rescaled
    assert torch.allclose(nn.functional.cosine_similarity(latents, hidden, dim=-1), torch.ones(2, 5), atol=1e-5)
    assert torch.isfinite(feedback(model, torch.zeros(1, H))).all()


def test_without_projector_and_norm_there_is_no_module(model: Any, hidden: torch.Tensor) -> None:
    attach_feedback(model, get_format("lvr"))
    assert not hasattr(model, NAME)
    assert feedback(model, hidden) is hidden


def test_it_is_found_inside_wrappers(model: Any, hidden: torch.Tensor) -> None:
    attach_feedback(model, get_format("lvr", projector="linear"))
    scramble(model.latent_proj)
    expected = model.latent_proj(hidden)
    assert torch.equal(feedback(nn.DataParallel(model), hidden), expected)
    lora = get_peft_model(model, LoraConfig(target_modules="all-linear", exclude_modules=[NAME], r=2))
    assert torch.equal(feedback(lora, hidden), expected)


# ---- through checkpoints


@pytest.mark.parametrize(("projector", "norm"), KINDS)
def test_a_checkpoint_gives_the_map_back(
    projector: str, norm: str, model: Any, hidden: torch.Tensor, tmp_path: Path
) -> None:
    latent_format = get_format("lvr", projector=projector, norm=norm)
    attach_feedback(model, latent_format)
    at_the_start = feedback(model, hidden)
    scramble(model.latent_proj)
    model.save_pretrained(tmp_path, max_shard_size="150KB")  # the map's weights end up in one of several files
    latent_format.save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1

    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    attach_feedback(again, LatentFormat.load(tmp_path), tmp_path)
    assert torch.equal(feedback(again, hidden), feedback(model, hidden))
    assert not torch.allclose(feedback(again, hidden), at_the_start, atol=0.1)  # the control
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_base_model_without_a_format_starts_from_the_identity(
    model: Any, tiny_folder: Callable[..., Path], hidden: torch.Tensor
) -> None:
    attach_feedback(model, get_format("lvr", projector="mlp"), tiny_folder("qwen2_5_vl"))
    assert torch.equal(feedback(model, hidden), hidden)


def test_a_checkpoint_that_lost_the_weights_is_refused(model: Any, tmp_path: Path) -> None:
    latent_format = get_format("lvr", projector="linear")
    model.save_pretrained(tmp_path)
    latent_format.save(tmp_path)
    with pytest.raises(UserError, match=r"has no weights latent_proj\.\*"):
        attach_feedback(model, latent_format, tmp_path)
    assert not hasattr(model, NAME)


@pytest.mark.parametrize("other", [{"projector": "mlp"}, {"projector": "linear", "norm": "embedding"}])
def test_weights_of_another_map_are_refused(other: dict[str, Any], model: Any, tmp_path: Path) -> None:
    latent_format = get_format("lvr", projector="linear")
    attach_feedback(model, latent_format)
    model.save_pretrained(tmp_path)
    latent_format.save(tmp_path)
    fresh = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="do not fit the latent format") as refusal:
        attach_feedback(fresh, get_format("lvr", **other), tmp_path)
    assert "\n" not in str(refusal.value)


# ---- through adapters


def test_an_adapter_gives_the_map_back(
    model: Any, load_tiny: Callable[..., tuple[Any, Any]], hidden: torch.Tensor, tmp_path: Path
) -> None:
    latent_format = get_format("lvr", projector="mlp", norm="embedding")
    attach_feedback(model, latent_format)
    config = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=[NAME])
    lora = get_peft_model(model, config)
    scramble(lora.base_model.model.latent_proj.modules_to_save["default"])
    expected = feedback(lora, hidden)
    assert not torch.allclose(expected, model.latent_proj.original_module(hidden), atol=0.1)  # the control
    lora.save_pretrained(tmp_path)
    latent_format.save(tmp_path)

    through_peft = load_tiny("qwen2_5_vl")[0]
    attach_feedback(through_peft, latent_format)
    assert torch.equal(feedback(PeftModel.from_pretrained(through_peft, tmp_path), hidden), expected)

    by_folder = load_tiny("qwen2_5_vl")[0]
    attach_feedback(by_folder, latent_format, tmp_path)
    assert torch.equal(feedback(by_folder, hidden), expected)


def test_an_adapter_without_the_map_is_refused(model: Any, tmp_path: Path) -> None:
    latent_format = get_format("lvr", projector="linear")
    attach_feedback(model, latent_format)
    get_peft_model(model, LoraConfig(target_modules="all-linear", r=2)).save_pretrained(tmp_path)
    latent_format.save(tmp_path)
    with pytest.raises(UserError):
        attach_feedback(model, latent_format, tmp_path)


def test_attaching_after_peft_is_refused(model: Any) -> None:
    """PEFT would neither train nor save it."""
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    with pytest.raises(ValueError, match="before PEFT wraps the model"):
        attach_feedback(lora, get_format("lvr", projector="linear"))
