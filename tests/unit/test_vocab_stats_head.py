"""head_weights gives what the head's own forward applies: plain, tied, LoRA, modules_to_save; the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.ops.vocab_stats import head_weights, vocab_stats

HIDDEN = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    def __init__(self, *, tied: bool = False, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(40, 8)
        self.lm_head = nn.Linear(8, 40, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight


def with_adapter(name: str = "default", **changes: Any) -> Any:
    model = get_peft_model(Model(), LoraConfig(r=4, lora_alpha=12, **{"target_modules": ["lm_head"], **changes}), name)
    return randomised(model)


def randomised(model: Any) -> Any:
    """Adapters that do something: PEFT starts them at zero."""
    random = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=random)
    return model


def entropy(head: nn.Module) -> Tensor:
    with head_weights(head) as (weight, bias, lora):
        return vocab_stats(HIDDEN, weight, bias=bias, lora=lora).entropy


def assert_reads(head: nn.Module) -> Tensor:
    logp = head(HIDDEN).log_softmax(-1).detach()
    result = entropy(head)
    torch.testing.assert_close(result, -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-6)
    return result


@pytest.mark.parametrize("model", [Model(), Model(bias=True), Model(tied=True)], ids=["plain", "bias", "tied"])
def test_linear(model: Model) -> None:
    assert_reads(model.lm_head)


def test_lora() -> None:
    model = with_adapter()
    adapted = assert_reads(model.model.lm_head)
    with model.disable_adapter():
        without = assert_reads(model.model.lm_head)
    assert not torch.allclose(adapted, without, atol=1e-3)  # control: the adapter matters
    model.merge_adapter()
    torch.testing.assert_close(assert_reads(model.model.lm_head), adapted, rtol=1e-4, atol=1e-5)


def test_several_adapters_at_once() -> None:
    model = with_adapter()
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])
    both = assert_reads(randomised(model).model.lm_head)
    model.set_adapter("other")
    assert not torch.allclose(assert_reads(model.model.lm_head), both, atol=1e-3)


def test_modules_to_save() -> None:
    model = with_adapter(target_modules=["embed"], modules_to_save=["lm_head"])
    head = model.model.lm_head
    trained = assert_reads(head)
    assert not torch.allclose(trained, entropy(head.original_module), atol=1e-3)
    with model.disable_adapter():
        assert_reads(head)


def test_gradient_through_an_adapted_head_reaches_the_hidden_states_alone() -> None:
    head = with_adapter().model.lm_head
    hidden = HIDDEN.clone().requires_grad_()
    with head_weights(head) as (weight, bias, lora):
        stats = vocab_stats(hidden, weight, bias=bias, lora=lora)
    stats.entropy.sum().backward()
    logp = head(direct := HIDDEN.clone().requires_grad_()).log_softmax(-1)
    (-(logp.exp() * logp).sum()).backward()
    torch.testing.assert_close(hidden.grad, direct.grad, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(UserError, match=r"not plain LoRA"):
        entropy(with_adapter(use_dora=True).model.lm_head)
    with pytest.raises(UserError, match=r"not plain LoRA"):
        entropy(with_adapter(lora_bias=True).model.lm_head)
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.container\.Sequential.*plain, with LoRA or in"):
        entropy(nn.Sequential(nn.Linear(8, 40)))
