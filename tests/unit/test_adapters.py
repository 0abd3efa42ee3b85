"""`use_peft: true` alone: adapters on the text model's linear layers, whatever the family."""

from __future__ import annotations

import pytest
from helpers import FAMILIES
from peft import get_peft_model
from trl import ModelConfig

from rl_lvr.models.registry import family_class
from rl_lvr.training.runs.prepare import adapter_of

LINEAR = {f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")}


def adapted(model, **settings):
    """Names of the modules that get an adapter."""
    family = family_class(model.config.model_type)(model.config)
    config = adapter_of(ModelConfig(use_peft=True, **settings), model, family)
    layers = {id(module) for layer in family.text_layers(model) for module in layer.modules()}
    peft = get_peft_model(model, config)
    names = {name.rpartition(".lora_A")[0] for name, _ in peft.named_parameters() if ".lora_A." in name}
    return names, all(id(peft.get_submodule(name).base_layer) in layers for name in names), family


@pytest.mark.parametrize("name", [*FAMILIES, "qwen2", "qwen3"])
def test_adapters_are_on_the_linear_layers_of_the_text_model(load_tiny, name, capsys):
    model = load_tiny(name)[0]
    names, inside, family = adapted(model)
    assert inside
    assert len(names) == 7 * len(family.text_layers(model))
    assert {name.rpartition(".")[2] for name in names} == LINEAR
    said = capsys.readouterr().err
    assert (
        "adapters of rank 16 on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj of 2 text layers" in said
    )


def test_target_modules_of_the_recipe_win(load_tiny, capsys):
    names, _, _ = adapted(load_tiny("llava_onevision")[0], lora_target_modules=["q_proj", "v_proj"])
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}
    assert not any("vision" in name for name in names), "where SigLIP has layers of the same names"
    assert "adapters of rank" not in capsys.readouterr().err
