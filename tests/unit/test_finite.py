"""Which tensors are finite, which weight is named, and which settings may be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from trl import ModelConfig

from rl_lvr import finite as module
from rl_lvr.errors import UserError
from rl_lvr.finite import finite, first_not_finite, require_finite, require_finite_files
from rl_lvr.training.grpo.config import GRPORecipe
from rl_lvr.training.runs.recipe import parse_recipe
from rl_lvr.training.runs.settings import require_finite_settings
from rl_lvr.training.sft.config import SFTRecipe

BAD = (float("nan"), float("inf"), float("-inf"))
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 17, 1000, -1])
def test_one_bad_entry_is_found(dtype: torch.dtype, bad: float, place: int) -> None:
    tensor = torch.randn(1031).to(dtype)
    assert finite([tensor, tensor * 0])
    tensor[place] = bad
    assert not finite([torch.ones(3), tensor])
    assert not finite([tensor.view(1, 1, -1).expand(2, 3, -1)])


def test_what_holds_no_floats_is_finite() -> None:
    assert finite([torch.tensor([2**62]), torch.empty(0), torch.empty(3, device="meta"), torch.tensor(True)])
    limits = torch.finfo(torch.float64)
    assert finite([torch.tensor([limits.max, limits.min], dtype=torch.float64)])
    assert finite([torch.ones(3).to(torch.float8_e4m3fn)])
    assert not finite([torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)])


def test_the_first_bad_weight_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    model.register_buffer("mask", torch.tensor([float("-inf")]), persistent=False)
    require_finite(model, "it")
    model[1].running_var[0] = float("nan")
    assert first_not_finite(model) == "1.running_var"
    assert first_not_finite(model, trained=True) is None
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    model[2].weight.requires_grad_(False)
    assert first_not_finite(model, trained=True) is None
    assert first_not_finite(model) == "2.weight"


def test_files_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 7)
    shapes = {"a": (9, 3), "b": (5,), "c": (), "d": (0, 4), "e": (2, 9)}
    tensors = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    require_finite_files(tmp_path)
    for name in "abce":
        spoilt = {key: tensor.clone() for key, tensor in tensors.items()}
        spoilt[name].view(-1)[-1] = float("nan")
        save_file(spoilt, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=f"^{name} in "):
            require_finite_files(tmp_path)
    index = {"weight_map": {"a": "model.safetensors", "b": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names '\.\./elsewhere.safetensors', which is not a file beside it"):
        require_finite_files(tmp_path)


def test_every_setting_of_every_config_must_be_finite() -> None:
    """None of them has a default that is not; each one is refused by name."""
    given = {"output_dir": "out", "train_file": "train.jsonl", "use_cpu": True, "report_to": "none"}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    count = 0
    for recipe, more in ((SFTRecipe, []), (GRPORecipe, ["--rewards", "accuracy"])):
        for cls in (recipe, ModelConfig):
            for setting in dataclasses.fields(cls):
                if "float" not in str(setting.type) or not setting.init:
                    continue
                count += 1
                for value in ("nan", "inf", "-inf"):
                    with pytest.raises(UserError, match=setting.name):
                        parse_recipe([recipe, ModelConfig], [*words, *more, f"--{setting.name}={value}"])
    assert count > 60


def test_settings_in_lists_and_mappings_must_be_finite(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for text, name in (
        ("lr_scheduler_kwargs: {min_lr: .nan}", "lr_scheduler_kwargs.min_lr"),
        ("learning_rate: .inf", "learning_rate"),
        ("learning_rate: 1e400", "learning_rate"),
    ):
        recipe.write_text(f"output_dir: out\ntrain_file: train.jsonl\nuse_cpu: true\nreport_to: none\n{text}\n")
        with pytest.raises(UserError, match=f"{name} is .*; it must be a finite number"):
            parse_recipe([SFTRecipe, ModelConfig], ["--config", str(recipe)])

    @dataclasses.dataclass
    class Settings:
        weights: list[float]

    require_finite_settings(Settings([1.0, 2.0]))
    with pytest.raises(UserError, match=r"weights\[1\] is nan"):
        require_finite_settings(Settings([1.0, float("nan")]))
