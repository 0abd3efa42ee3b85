"""NaN and infinity end a run, wherever they arise, and no verb takes a model that holds them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_tools import grpo, sft
from PIL import Image
from safetensors.torch import load_file, save_file

from rl_lvr import cli
from rl_lvr.errors import UserError
from rl_lvr.finite import require_finite_files
from rl_lvr.latents.feedback import attach_feedback
from rl_lvr.latents.format import get_format
from rl_lvr.models import load_model, load_weights

LORA = {"use_peft": True, "lora_target_modules": "all-linear", "latent_projector": "mlp"}
NAN, INFINITY = float("nan"), float("inf")


def spoilt(model: Path, out: Path, name: str = "lm_head.weight", value: float = NAN) -> Path:
    """A copy of a model with one bad entry, and with weights of a projector if that is meant."""
    shutil.copytree(model, out)
    weights = load_file(out / "model.safetensors")
    if name.startswith("latent_proj"):
        width = weights["lm_head.weight"].shape[1]
        weights |= {"latent_proj.linear.weight": torch.eye(width), "latent_proj.linear.bias": torch.zeros(width)}
    weights[name].view(-1)[-1] = value
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("more", [{}, LORA, {"bf16": True, "use_cpu": True}], ids=["plain", "lora", "bf16"])
def test_weights_that_the_last_update_ruins_are_no_result(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any]
) -> None:
    """The loss and the gradient are finite, and no later loss sees the weights."""
    out = tmp_path / "out"
    ruin = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 1, **more}
    assert sft(place / "model", place / "data", out, learning_rate=1e39, max_steps=1, **ruin) == 1
    said = capsys.readouterr().err
    assert re.search(r"parameter \S+ is not finite after the update of step 1 of 1", said)
    assert "model in" not in said
    assert not list(out.rglob("*.safetensors"))


def test_grpo_checks_what_its_last_update_made(
    opener: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 1, "learning_rate": 1e39, "lr_scheduler_type": "constant", "weight_decay": 0.1}
    settings |= {"rewards": "random_reward", "max_completion_length": 8, "temperature": 1.0, "max_idle_steps": None}
    path = tmp_path / "random_reward.py"
    path.write_text("def random_reward(completions, **_):\n    return [float(i) for i in range(len(completions))]\n")
    settings["rewards"] = f"{path}:random_reward"
    code = grpo(opener, place / "data", tmp_path / "out", **settings)
    said = capsys.readouterr().err
    assert code == 1, said
    assert re.search(r"parameter \S+ is not finite after the update of step 1 of 1", said)


@pytest.mark.parametrize("value", [NAN, -INFINITY])
def test_no_verb_takes_a_model_that_is_not_finite(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    model = spoilt(place / "model", tmp_path / "model", value=value)
    Image.new("RGB", (24, 24)).save(tmp_path / "image.png")
    data = str(place / "data" / "test.parquet")
    latent = ["--format", "lvr"]
    question = ["--question", "from red", "--image", f"{tmp_path}/image.png"]
    verbs = {
        "generate": lambda: cli.main(["generate", str(model), *question, *latent]),
        "evaluate": lambda: cli.main(["evaluate", str(model), "--data", data, "--limit", "2", *latent]),
        "sft": lambda: sft(model, place / "data", tmp_path / "sft"),
        "grpo": lambda: grpo(model, place / "data", tmp_path / "grpo", rewards="accuracy"),
    }
    for verb, run in verbs.items():
        assert run() == 2, verb
        assert "lm_head.weight of the model in" in capsys.readouterr().err, verb
    with pytest.raises(UserError, match=r"lm_head.weight in .*model.safetensors is not finite"):
        require_finite_files(model)
    require_finite_files(place / "model")


def test_a_projector_is_looked_at_too(place: Path, tmp_path: Path) -> None:
    folder = spoilt(place / "model", tmp_path / "model", "latent_proj.linear.bias")
    format_ = get_format("lvr", projector="linear")
    format_.save(folder)
    model, _ = load_model(place / "model")
    with pytest.raises(UserError, match=r"latent_proj.linear.bias in .* is not finite"):
        attach_feedback(model, format_, folder)
    with pytest.raises(UserError, match=r"latent_proj.linear.bias in .*model.safetensors is not finite"):
        require_finite_files(folder)


def test_a_precision_in_which_weights_overflow_is_refused(place: Path, tmp_path: Path) -> None:
    folder = spoilt(place / "model", tmp_path / "model", value=1e5)
    load_weights(folder, dtype=torch.float32)
    with pytest.raises(UserError, match="loaded in float16, is not finite"):
        load_weights(folder, dtype=torch.float16)
