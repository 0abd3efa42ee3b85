"""A family that rl_lvr does not know, from another package: engines `hf` and `vllm`, SFT, GRPO and evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import FORMATS, GREEDY, SAMPLED
from helpers import MIXED_ROWS, make_batch
from lab_tools import build_model, grpo, logged, sft, weights, write_puzzles
from smolvlm import SmolVLM, installed
from vllm_cases import VLLMRig, thinking_folder
from vllm_pairs import close

from rl_lvr.cli import main
from rl_lvr.latents.format import get_format
from rl_lvr.models import UnsupportedFamily, family_of, load_model
from rl_lvr.rollout.replay import check_parity, replay_batch
from rl_lvr.signals import measure, parse_signals

LVR = get_format("lvr", k=3)
KEEP = json.dumps({"unclosed": "keep", "empty": "keep"})


@pytest.fixture(scope="module", autouse=True)
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with installed(tmp_path_factory.mktemp("packages")):
        yield


@pytest.fixture(scope="module")
def rig(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory, family: None) -> VLLMRig:
    source = tiny_folder("smolvlm", latent_formats=FORMATS)
    return VLLMRig(thinking_folder(source, tmp_path_factory.mktemp("thinks") / "smolvlm"))


def test_it_is_found_by_its_entry_point_alone(rig: VLLMRig, monkeypatch: pytest.MonkeyPatch) -> None:
    from rl_lvr.models import registry

    assert type(family_of(rig.model)) is SmolVLM
    monkeypatch.setattr(registry, "_FAMILIES", {})
    assert type(family_of(rig.model)) is SmolVLM
    monkeypatch.setattr(registry, "_FAMILIES", {})
    ours = {name: points for name, points in registry.installed(registry.KIND).items() if name != "smolvlm"}
    monkeypatch.setattr(registry, "installed", lambda kind: ours)
    with pytest.raises(UnsupportedFamily, match="smolvlm"):
        family_of(rig.model)


def test_image_inputs_split_and_join(rig: VLLMRig) -> None:
    family = rig.family
    rows = [row for row in MIXED_ROWS if row[0]]
    batch = make_batch(rig.processor, rows)
    parts = family.split_images(batch, [len(images) for images, _ in rows])
    assert [part["pixel_values"].shape[1] for part in parts] == [1, 2]
    joined = family.join_images(parts)
    assert torch.equal(joined["pixel_values"], batch["pixel_values"])
    assert family.join_images([parts[0], {}, parts[1]])["pixel_values"].shape[0] == 3
    with torch.no_grad():
        whole = family.image_features(rig.model, batch)
        alone = [feature for part in parts for feature in family.image_features(rig.model, part)]
    assert len(whole) == len(alone) == 3
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, alone, strict=True))
    assert [grid.rows * grid.cols for grid in family.token_grid(batch)] == [len(feature) for feature in whole]


def test_the_engines_agree(rig: VLLMRig) -> None:
    requests = rig.requests()
    reference = rig.engine(LVR)
    engine = rig.vllm(LVR)
    try:
        for sampling in (GREEDY, SAMPLED):
            ours, theirs = engine.generate(requests, sampling), reference.generate(requests, sampling)
            assert sum(len(rollout.latents) for rollout in ours) > 6
            assert all(close(a, b) for a, b in zip(ours, theirs, strict=True))
        assert check_parity(engine, rig.model, requests, GREEDY).passes()
        engine.sync_weights(rig.model)
        again = engine.generate(requests, GREEDY)
        assert [rollout.ids for rollout in again] == [r.ids for r in reference.generate(requests, GREEDY)]
        with torch.no_grad():
            rig.family.text_layers(rig.model)[0].mlp.down_proj.weight.neg_()
        engine.sync_weights(rig.model)
        other = engine.generate(requests, GREEDY)
        assert [rollout.ids for rollout in other] == [r.ids for r in reference.generate(requests, GREEDY)]
        assert [rollout.ids for rollout in other] != [rollout.ids for rollout in again]  # control
    finally:
        engine.close()


def test_signals_are_measured(rig: VLLMRig) -> None:
    requests = rig.requests()
    rollouts = rig.engine(LVR).generate(requests, GREEDY)
    batch = replay_batch(rig.model, rollouts, [request.images for request in requests])
    signals = parse_signals([{"attention_mass": {"to": "image", "queries": "completion"}}, "latent_image_cosine"])
    found = measure(rig.model, batch, rig.engine(LVR).markers, signals).columns["attention_mass"]
    shown = [bool(request.images) for request in requests]
    assert [value > 0 for value in found.values] == shown


# ---- training and evaluation, by the command line


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, family: None) -> Path:
    place = tmp_path_factory.mktemp("lab")
    build_model(place / "model", "smolvlm")
    write_puzzles(place / "data", train=24, test=6)
    return place


def test_latent_sft_and_grpo_train_it(lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sft"
    assert sft(lab / "model", lab / "data", out, max_steps=3, learning_rate=1e-2) == 0
    rows = logged(out)
    assert rows[-1]["loss"] < rows[0]["loss"]
    before, after = weights(lab / "model"), weights(out)
    assert any(not torch.equal(before[name], value) for name, value in after.items())
    assert grpo(out, lab / "data", tmp_path / "grpo", rewards=["format"], on_rollout=KEEP) == 0
    rows = logged(tmp_path / "grpo")
    assert all(row["latent/replay_logp_diff"] < 1e-3 for row in rows)
    assert type(family_of(load_model(tmp_path / "grpo")[0])) is SmolVLM


def test_evaluation(rig: VLLMRig, tmp_path: Path) -> None:
    write_puzzles(tmp_path / "data", train=1, test=6)
    ask = ["evaluate", str(rig.folder), "--data", str(tmp_path / "data" / "test.parquet"), "--format", "lvr"]
    ask += ["--conditions", "own,noise,none", "--max-tokens", "12", "--out", str(tmp_path / "answers.jsonl")]
    assert main(ask) == 0
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(rows) == 18
    assert sum(row["latents"] for row in rows if row["condition"] == "own") > 0
    assert all(row["latents"] == 0 for row in rows if row["condition"] == "none")
