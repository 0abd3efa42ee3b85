"""Latent SFT on tiny real models: what is trained on what, exact resuming, and refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lab_tools import Bench, build_model, same, sft, weights, write_puzzles
from torch.nn import functional

from rl_lvr.latents.format import FORMAT_FILE
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.types import Request, Sampling
from rl_lvr.training.config import LatentSFTConfig
from rl_lvr.training.sft import LatentSFTTrainer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    build_model(folder / "model")
    write_puzzles(folder / "data")
    return folder


def trainer_of(bench: Bench, out: Path, encoded: list[Any] | None = None, **settings: Any) -> LatentSFTTrainer:
    config = LatentSFTConfig(
        output_dir=str(out),
        train_file="unused",
        latent_format="lvr",
        max_steps=10,
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        **settings,
    )
    return LatentSFTTrainer(
        bench.model,
        config,
        family=bench.family,
        markers=bench.markers,
        processor=bench.processor,
        train=encoded or bench.encoded,
    )


def reference_loss(bench: Bench, batch: dict[str, Any], latents: dict[int, torch.Tensor]) -> tuple[Any, Any]:
    """Cross-entropy and pairs (predicted, target) from a forward on hand-made input embeddings."""
    model, family = bench.model, bench.family
    ids, mask = batch["input_ids"], batch["attention_mask"]
    images = {key: batch[key] for key in family.image_keys if key in batch}
    embeds = model.get_input_embeddings()(ids).clone()
    features = torch.cat(family.image_features(model, images))
    embeds[ids == family.placeholder_ids(bench.tokenizer)["image"]] = features.detach()
    slots = ids == bench.markers.slot
    for row, vectors in latents.items():
        embeds[row, slots[row]] = vectors
    positions = family.positions(model, ids, mask, images).prefill
    hidden = (
        family.core(model)
        .language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        .last_hidden_state
    )
    logits = model.lm_head(hidden).float()
    labels = ids.clone()
    end = bench.markers.end
    labels[(mask == 0) | slots | (ids == end)] = -100
    for row, record in enumerate(bench.encoded):
        labels[row, : record.prompt_length] = -100
    ce = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    before = slots.roll(-1, 1)
    return ce, hidden[before]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"])
def test_loss_and_gradients_equal_a_hand_made_forward(tmp_path: Path, family: str) -> None:
    if family == "qwen3_vl":
        settings = {"tie": False}
    else:
        settings = {}
    bench = Bench(build_model(tmp_path / "model", family, **settings))
    trainer = trainer_of(bench, tmp_path / "out", latent_weight=0.7, latent_objective="nmse:1,cosine:0.5")
    batch = bench.batch()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradient = bench.model.lm_head.weight.grad.clone()
    bench.model.zero_grad()

    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    from rl_lvr.data.targets import target_vectors

    vectors, _ = target_vectors(bench.family, bench.model, images, batch["targets"])
    rows = {b: vectors.view(len(bench.records), -1, vectors.shape[-1])[b] for b in range(len(bench.records))}
    if family == "qwen3_vl":  # deepstack adds image features inside the text model: its own forward is the reference
        assert torch.isfinite(loss)
        return
    ce, predicted = reference_loss(bench, batch, rows)
    nmse = ((predicted - vectors) ** 2).mean() / vectors.var()
    cosine = (1 - functional.cosine_similarity(predicted, vectors, dim=-1)).mean()
    expected = ce + 0.7 * (nmse + 0.5 * cosine)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-4)
    expected.backward()
    assert (bench.model.lm_head.weight.grad - gradient).abs().max() < 1e-4

    wrong, _ = reference_loss(bench, batch, {b: v.flip(0) for b, v in rows.items()})
    assert abs(float(wrong.detach()) - float(ce.detach())) > 1e-3  # the latents reach the text


def test_spans_without_targets_get_exactly_what_the_engine_feeds(place: Path, tmp_path: Path) -> None:
    bench = Bench(place / "model")
    encoded = [replace(row, targets=()) for row in bench.encoded]
    trainer = trainer_of(bench, tmp_path / "out", encoded)
    bench.encoded = encoded
    batch = bench.batch()
    targets = batch.pop("targets")
    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    batch["position_ids"] = bench.family.positions(
        bench.model, batch["input_ids"], batch["attention_mask"], images
    ).prefill
    latents, _, _ = trainer._latents(batch, bench.markers, images, targets)

    engine = HFRolloutEngine(bench.model, bench.processor, bench.markers.format)
    start = bench.markers.start
    requests = [
        Request(prompt_ids=[*row.input_ids[: row.prompt_length].tolist(), start], images=row.images) for row in encoded
    ]
    rollouts = engine.generate(requests, Sampling(max_tokens=4, temperature=0.0))
    for b, rollout in enumerate(rollouts):
        assert (latents.row(b)[0] - rollout.latents).abs().max() < 1e-4
        assert latents.row(b)[1].tolist() == list(rollout.latent_positions)
    assert (latents.values[0] - latents.values[1]).abs().max() > 1e-2


def test_scheduled_own_latents_replace_the_end_of_a_span(place: Path, tmp_path: Path) -> None:
    bench = Bench(place / "model")
    trainer = trainer_of(bench, tmp_path / "out", own_latents=0.67, own_latents_start=0.5)
    batch = bench.batch()
    targets = batch.pop("targets")
    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    batch["position_ids"] = bench.family.positions(
        bench.model, batch["input_ids"], batch["attention_mask"], images
    ).prefill
    trainer.model.train()
    trainer.state.max_steps = 10
    trainer.state.global_step = 5  # the ramp begins behind this step
    forced, _, _ = trainer._latents(batch, bench.markers, images, targets)
    trainer.state.global_step = 10
    mixed, _, _ = trainer._latents(batch, bench.markers, images, targets)
    changed = (forced.values - mixed.values).abs().amax(-1) > 1e-6
    assert changed.tolist() == [[False, True, True]] * 4  # round(0.67 * 3) = 2 of 3
    assert trainer.args.own_share_at(0.75) == pytest.approx(0.335)


def test_frozen_parts_do_not_move_and_the_rest_does(place: Path, tmp_path: Path) -> None:
    assert sft(place / "model", place / "data", tmp_path / "frozen") == 0
    assert sft(place / "model", place / "data", tmp_path / "open", freeze_merger=False) == 0
    before, frozen, opened = (weights(f) for f in (place / "model", tmp_path / "frozen", tmp_path / "open"))
    moved = {name for name in before if not torch.equal(before[name], frozen[name])}
    assert moved
    assert not any("visual" in name for name in moved)
    also = {name for name in before if not torch.equal(before[name], opened[name])} - moved
    assert also
    assert all("visual.merger" in name for name in also)


def test_the_format_goes_with_the_checkpoint_and_disagreement_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert sft(place / "model", place / "data", tmp_path / "first") == 0
    stored = json.loads((tmp_path / "first" / FORMAT_FILE).read_text())
    assert (stored["name"], stored["k"]) == ("lvr", 3)
    capsys.readouterr()
    assert sft(tmp_path / "first", place / "data", tmp_path / "second", latent_format="lantern") == 2
    assert "was trained with latent format 'lvr'" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()
    assert sft(tmp_path / "first", place / "data", tmp_path / "third", latent_format=None) == 0  # its own format


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"latent_format": "lvx"}, "did you mean 'lvr'"),
        ({"latent_format": "monet"}, "set add_marker_tokens to true"),
        ({"latent_k": 0}, "k is 0"),
        ({"latent_k": 4}, "cannot share 3 targets evenly"),
        ({"latent_format": "none"}, "latent_k is set"),
        ({"model_name_or_path": "nowhere"}, "nowhere"),
        ({"train_file": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"stop_at": "loss"}, "stop_at"),
        ({"resume_from_checkpoint": "latest"}, "nothing to resume"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing_behind(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, settings: dict[str, Any], words: str
) -> None:
    out = tmp_path / "out"
    assert sft(place / "model", place / "data", out, **settings) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rl-lvr: ")
    assert words in last
    assert not out.exists()


def test_marker_tokens_are_added_on_request(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sft(place / "model", place / "data", out, latent_format="mirage", add_marker_tokens=True) == 0
    from transformers import AutoProcessor

    tokenizer = AutoProcessor.from_pretrained(out).tokenizer
    assert tokenizer.encode("<|latent_pad|>", add_special_tokens=False) == [
        tokenizer.convert_tokens_to_ids("<|latent_pad|>")
    ]
    assert "<|latent_pad|>" in tokenizer.all_special_tokens
    assert "<|lvr|>" in tokenizer.all_special_tokens  # what was there stays


def test_an_earlier_run_is_not_overwritten(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert sft(place / "model", place / "data", out) == 0
    before = weights(out)
    assert sft(place / "model", place / "data", out) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())
    assert sft(place / "model", place / "data", out, overwrite=True, seed=5) == 0
    assert not same(out, place / "model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert sft(place / "model", place / "data", tmp_path / "mine", overwrite=True) == 2
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_adapters_train_alone_and_keep_off_the_vision_tower(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = sft(
        place / "model", place / "data", out, use_peft=True, lora_target_modules="all-linear", latent_projector="linear"
    )
    assert code == 0
    names = set(weights(out))
    assert names
    assert all("lora_" in name or "latent_proj" in name for name in names)
    assert any("latent_proj" in name for name in names)
    assert not any("visual" in name for name in names)


def test_accuracy_under_interventions_is_logged(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = sft(
        place / "model",
        place / "data",
        out,
        eval_file=place / "data" / "test.parquet",
        latent_eval_steps=2,
        latent_eval_samples=8,
        latent_eval_conditions=["oracle", "own", "zeros", "noise"],
        latent_eval_max_tokens=8,
    )
    assert code == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = {f"latent/accuracy_{c}" for c in ("oracle", "own", "zeros", "noise")} | {"latent/rate"}
    found = [row for row in rows if names <= row.keys()]
    assert [row["step"] for row in found] == [2]
    assert all(0 <= found[0][name] <= 1 for name in names)


def test_metrics_and_the_record_of_a_run(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sft(place / "model", place / "data", out, stop_at="loss<1000", max_steps=9) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1
    assert {"loss", "latent/nmse", "latent/weight", "mean_token_accuracy"} <= rows[0].keys()
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 1  # stop_at ended it
    start = json.loads((out / "run.json").read_text())["starts"][0]
    assert start["given"]["latent_k"] == "3"
    assert start["resolved"]["training"]["seed"] == 42
    assert start["versions"]["transformers"]


def test_an_interrupted_run_resumes_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    """Ctrl-C in the middle of a real process; then the same command with --resume_from_checkpoint latest."""
    settings = {"max_steps": 40, "own_latents": 0.7, "own_latents_start": 0.0, "latent_projector": "mlp"}
    assert sft(place / "model", place / "data", tmp_path / "whole", **settings) == 0

    out = tmp_path / "cut"
    flags = {"model_name_or_path": place / "model", "train_file": place / "data" / "train.parquet", "output_dir": out}
    flags |= {"latent_format": "lvr", "latent_k": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    flags |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "threads": 1} | settings
    command = [sys.executable, "-m", "rl_lvr.cli", "sft", *(f"--{key}={value}" for key, value in flags.items())]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= 3:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 130, error
    assert "--resume_from_checkpoint latest" in error
    assert "Traceback" not in error
    steps = [int(folder.name.split("-")[1]) for folder in out.glob("checkpoint-*")]
    assert len(steps) == 1
    assert 3 <= steps[0] < 40
    assert not same(out / f"checkpoint-{steps[0]}", tmp_path / "whole")

    assert sft(place / "model", place / "data", out, resume_from_checkpoint="latest", **settings) == 0
    assert same(out, tmp_path / "whole")
    logged = [json.loads(line) for line in metrics.read_text().splitlines()]
    losses = [row["step"] for row in logged if "loss" in row]
    assert losses == list(range(1, 41))  # no row lost, none twice

    assert sft(place / "model", place / "data", tmp_path / "other", seed=7, **settings) == 0
    assert not same(tmp_path / "other", tmp_path / "whole")


def test_adapters_resume_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    settings = {"use_peft": True, "lora_target_modules": "all-linear", "latent_projector": "mlp", "max_steps": 4}
    saved = {"save_strategy": "steps", "save_steps": 2}
    assert sft(place / "model", place / "data", tmp_path / "whole", **settings, **saved) == 0
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "run.json", tmp_path / "cut")
    assert sft(place / "model", place / "data", tmp_path / "cut", resume_from_checkpoint="latest", **settings) == 0
    assert same(tmp_path / "cut", tmp_path / "whole")
    assert not same(tmp_path / "cut" / "checkpoint-2", tmp_path / "whole")


def test_a_checkpoint_of_another_model_is_not_resumed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """transformers' own loading would go on from the model's first weights and only warn."""
    build_model(tmp_path / "wide", hidden=96, heads=3)
    assert sft(tmp_path / "wide", place / "data", tmp_path / "out", save_strategy="steps", save_steps=1) == 0
    capsys.readouterr()
    shutil.copytree(tmp_path / "out" / "checkpoint-1", tmp_path / "checkpoint-1")
    code = sft(place / "model", place / "data", tmp_path / "new", resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert code == 2
    assert "does not belong to this model" in capsys.readouterr().err


def test_two_processes_train_a_projector_as_one_does(place: Path, tmp_path: Path) -> None:
    """DDP over gloo: half the batch each, the same weights as one process within rounding."""
    flags = {
        "model_name_or_path": place / "model",
        "train_file": place / "data" / "train.parquet",
        "latent_format": "lvr",
        "latent_k": 3,
        "latent_projector": "mlp",
        "latent_objective": "cosine",  # a mean over latents: the mean of two halves is the mean of the whole
        "max_steps": 3,
        "learning_rate": 1e-4,
        "optim": "sgd",
        "max_grad_norm": 0,
        "warmup_steps": 0,
        "save_strategy": "no",
        "report_to": "none",
        "threads": 1,
        "use_cpu": True,
        "ddp_backend": "gloo",
    }

    def train(processes: int, batch: int) -> Path:
        out = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "rl_lvr.cli", "sft"]
        command += [f"--{k}={v}" for k, v in flags.items()]
        command += [f"--output_dir={out}", f"--per_device_train_batch_size={batch}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        row = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["epoch"] == 0.5  # 3 steps of 8 records out of 48, however many processes share them
        return out

    one, two = weights(train(1, 8)), weights(train(2, 4))
    start = weights(place / "model")
    start["latent_proj.down.weight"] = torch.zeros_like(one["latent_proj.down.weight"])
    for name in ("latent_proj.down.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        moved, apart = (one[name] - start[name]).abs().max(), (one[name] - two[name]).abs().max()
        assert moved > 0
        assert apart < 0.01 * moved, name
