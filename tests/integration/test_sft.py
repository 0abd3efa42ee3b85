"""Latent SFT on tiny real models: what is trained on what, exact resuming, and refusals."""

from __future__ import annotations

import copy
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
from lab_tools import PUZZLES, Bench, build_model, same, sft, weights, write_puzzles
from torch.nn import functional

from rl_lvr.data.puzzles import generate
from rl_lvr.data.records import Record
from rl_lvr.data.targets import target_vectors
from rl_lvr.data.writing import write_jsonl, write_parquet
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


def reference_loss(bench: Bench, batch: dict[str, Any], vectors: torch.Tensor) -> tuple[Any, Any, Any]:
    """Cross-entropy and predictions without any hook: the latents are tokens of their own in the embedding matrix."""
    model, family = copy.deepcopy(bench.model), bench.family
    ids, mask = batch["input_ids"].clone(), batch["attention_mask"]
    images = {key: batch[key] for key in family.image_keys if key in batch}
    old = model.get_input_embeddings().weight.shape[0]
    head = copy.deepcopy(model.lm_head)
    model.resize_token_embeddings(old + len(vectors), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[old:] = vectors
    slots = ids == bench.markers.slot
    positions = family.positions(model, ids, mask, images).prefill
    labels = ids.clone()
    labels[(mask == 0) | slots | (ids == bench.markers.end)] = -100
    for row, record in enumerate(bench.encoded):
        labels[row, : record.prompt_length] = -100
    kinds = (ids == family.placeholder_ids(bench.tokenizer)["image"]).int()
    ids[slots] = old + torch.arange(len(vectors))
    more = {"mm_token_type_ids": kinds} if positions.ndim == 3 else {}
    hidden = family.core(model)(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, **images, **more
    ).last_hidden_state
    logits = head(hidden).float()
    ce = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    return ce, hidden[slots.roll(-1, 1)], head.weight


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"])
def test_loss_and_gradients_equal_a_forward_without_hooks(tmp_path: Path, family: str) -> None:
    bench = Bench(build_model(tmp_path / "model", family))
    trainer = trainer_of(bench, tmp_path / "out", latent_weight=0.7, latent_objective="nmse:1,cosine:0.5")
    batch = bench.batch()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    gradient = bench.model.lm_head.weight.grad.clone()

    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    vectors, _ = target_vectors(bench.family, bench.model, images, batch["targets"])
    ce, predicted, head = reference_loss(bench, batch, vectors)
    nmse = ((predicted - vectors) ** 2).mean() / vectors.var()
    cosine = (1 - functional.cosine_similarity(predicted, vectors, dim=-1)).mean()
    expected = ce + 0.7 * (nmse + 0.5 * cosine)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-4)
    expected.backward()
    assert (head.grad - gradient).abs().max() < 1e-4

    wrong, _, _ = reference_loss(bench, batch, vectors.flip(0))
    assert abs(float(wrong.detach()) - float(ce.detach())) > 1e-3  # the latents reach the text


def test_contrast_takes_the_tokens_of_the_cell_as_positives(place: Path, tmp_path: Path) -> None:
    bench = Bench(place / "model")
    trainer = trainer_of(bench, tmp_path / "out", latent_objective="contrast")
    batch = bench.batch()
    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    targets = batch["targets"]
    vectors, tokens = target_vectors(bench.family, bench.model, images, targets)
    hidden = torch.randn(*batch["input_ids"].shape, 64)
    pairs = trainer._pairs(hidden, vectors, vectors, tokens, targets, batch["input_ids"])
    cells, hops = PUZZLES.rows * PUZZLES.cols, PUZZLES.hops
    for number in range(len(vectors)):
        row, hop = divmod(number, hops)
        path = bench.records[row].meta["cells"][:hops]
        mine = [row * cells + path[hop]]  # one token a cell
        others = [row * cells + cell for cell in range(cells) if cell not in path]
        assert pairs.positive[number].nonzero()[:, 0].tolist() == mine
        assert pairs.negative[number].nonzero()[:, 0].tolist() == others
        place_of_image = (batch["input_ids"][row] == trainer.image_id).nonzero()[path[hop], 0]
        assert torch.equal(pairs.image[mine[0]], hidden[row, place_of_image])


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
    trainer.args.own_latents_end = 0.6
    assert [trainer.args.own_share_at(p) for p in (0.5, 0.55, 0.7)] == pytest.approx([0, 0.335, 0.67])


def test_noise_is_on_what_is_fed_and_not_on_what_is_predicted(place: Path, tmp_path: Path) -> None:
    bench = Bench(place / "model", count=24)
    batch = bench.batch()
    targets = batch.pop("targets")
    images = {key: batch[key] for key in bench.family.image_keys if key in batch}
    clean, _ = target_vectors(bench.family, bench.model, images, targets)
    trainer = trainer_of(bench, tmp_path / "out", latent_noise=0.25)
    trainer.model.train()
    latents, vectors, _ = trainer._latents(batch, bench.markers, images, targets)
    assert torch.equal(vectors, clean)
    noise = latents.values[latents.mask] - clean
    assert float(noise.std() / clean.std()) == pytest.approx(0.25, rel=0.05)
    trainer.model.eval()
    latents, _, _ = trainer._latents(batch, bench.markers, images, targets)
    assert torch.equal(latents.values[latents.mask], clean)


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
        ({"packing": True}, "packing has no effect here"),
        ({"max_length": 64}, "max_length has no effect here"),
        ({"load_in_4bit": True}, "load_in_4bit has no effect here"),
        ({"use_peft": True, "lora_target_modules": "lm_head"}, "lm_head"),
        ({"use_peft": True, "freeze_merger": False}, "vision parts frozen"),
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
    assert not all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())
    inside = out / "data"
    shutil.copytree(place / "data", inside)
    assert sft(place / "model", inside, out, overwrite=True) == 2
    assert "would delete" in capsys.readouterr().err
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


def test_accuracy_under_interventions_is_logged_in_the_row_of_its_step(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = sft(
        place / "model",
        place / "data",
        out,
        eval_file=place / "data" / "test.parquet",
        latent_eval_steps=2,
        latent_eval_samples=8,
        latent_eval_conditions=["oracle", "own", "zeros", "noise", "swap"],
        latent_eval_max_tokens=8,
    )
    assert code == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = {f"latent/accuracy_{c}" for c in ("oracle", "own", "zeros", "noise")} | {"latent/rate", "loss"}
    assert [row["step"] for row in rows if names <= row.keys()] == [2]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]


def test_accuracy_is_right_where_the_answer_is_known(place: Path) -> None:
    """A model with a head that can only say one colour is right exactly as often as that colour is the answer."""
    from rl_lvr.evaluation.accuracy import AnswerSet
    from rl_lvr.latents.interventions import Intervention

    bench = Bench(place / "model", count=24)
    word = bench.records[0].answer
    ids = [bench.tokenizer(word)["input_ids"][0], bench.tokenizer.eos_token_id]
    calls = iter(range(10_000))

    def say(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits).index_fill(-1, torch.tensor(ids[next(calls) % 2]), 9.0)

    handle = bench.model.lm_head.register_forward_hook(say)
    engine = HFRolloutEngine(bench.model, bench.processor, bench.markers.format, batch_size=24)
    questions = AnswerSet(bench.encoded, [r.answer for r in bench.records], bench.family, bench.tokenizer)
    conditions = [Intervention.OWN, Intervention.SWAP]
    found = questions.answer(engine, bench.model, conditions, Sampling(max_tokens=4, temperature=0.0))
    handle.remove()
    assert set(found.undefined) == {"swap"}  # it makes no latents, so there are none to swap: no reason to stop
    expected = [record.answer == word for record in bench.records]
    assert found.scored["own"].right == expected
    assert 0 < sum(expected) < 24


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


def puzzles(count: int) -> list[Record]:
    return generate(PUZZLES, count, "train")


def without_latents(record: Record) -> Record:
    plain = [{"type": "text", "text": record.answer}]
    return replace(record, messages=(*record.messages[:-1], {"role": "assistant", "content": plain}), latents=None)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records in blocks with targets, with spans but no targets, and without any span: whole batches of each kind."""
    folder = tmp_path_factory.mktemp("mixed")
    records = puzzles(24)
    records[8:16] = [replace(record, latents=None) for record in records[8:16]]
    records[16:] = [without_latents(record) for record in records[16:]]
    write_parquet(records, folder / "train.parquet")
    return folder


def test_records_of_all_kinds_train_together(place: Path, mixed: Path, tmp_path: Path) -> None:
    more = {"max_steps": 24, "per_device_train_batch_size": 1, "own_latents": 0.7, "own_latents_start": 0.0}
    assert sft(place / "model", mixed, tmp_path / "out", **more) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == 24
    assert all(row["loss"] == row["loss"] and row["loss"] > 0 for row in rows)
    assert sum("latent/nmse" in row for row in rows) == 8  # one epoch: a third of the records has targets


def test_two_processes_with_different_kinds_of_records_do_not_wait_for_each_other(
    place: Path, mixed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "rl_lvr.cli"]
    flags = {"model_name_or_path": place / "model", "train_file": mixed / "train.parquet", "output_dir": out}
    flags |= {"latent_format": "lvr", "latent_k": 3, "per_device_train_batch_size": 1, "max_steps": 12, "threads": 1}
    flags |= {"save_strategy": "no", "report_to": "none", "use_cpu": True, "ddp_backend": "gloo", "logging_steps": 1}
    command += ["sft", *(f"--{key}={value}" for key, value in flags.items())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: replace(r, messages=r.messages[:-1], latents=None), "no answer to learn from"),
        (
            lambda r: replace(
                r,
                messages=(
                    *r.messages[:-1],
                    {"role": "assistant", "content": [{"type": "text", "text": "<|image_pad|>"}]},
                ),
                latents=None,
            ),
            "stands for an image",
        ),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_records_that_cannot_be_learned_from_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: Any, words: str, cached: bool
) -> None:
    records = puzzles(8)
    records[5] = change(records[5])
    write_parquet(records, tmp_path / "train.parquet")
    assert sft(place / "model", tmp_path, tmp_path / "out", processed_cache=cached) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert words in error
    assert records[5].id in error
    assert not (tmp_path / "out").exists()


def test_the_cache_changes_nothing_and_notices_a_changed_image(place: Path, tmp_path: Path) -> None:
    write_jsonl(puzzles(12), tmp_path / "train.jsonl")
    settings = {"train_file": tmp_path / "train.jsonl", "save_strategy": "no"}
    assert sft(place / "model", tmp_path, tmp_path / "lazy", **settings) == 0
    for name in ("first", "second"):
        assert sft(place / "model", tmp_path, tmp_path / name, processed_cache=True, **settings) == 0
        assert same(tmp_path / "lazy", tmp_path / name)
    assert len(list((tmp_path / "processed").iterdir())) == 1
    from PIL import Image

    for path in tmp_path.rglob("*.png"):
        Image.open(path).rotate(180).save(path)
    assert sft(place / "model", tmp_path, tmp_path / "third", processed_cache=True, **settings) == 0
    assert len(list((tmp_path / "processed").iterdir())) == 2
    assert not same(tmp_path / "third", tmp_path / "lazy")


def test_accumulation_and_checkpointing_change_nothing_but_rounding(place: Path, tmp_path: Path) -> None:
    settings = {"optim": "sgd", "learning_rate": 1e-2, "max_grad_norm": 0, "max_steps": 2, "latent_objective": "cosine"}
    whole = {"per_device_train_batch_size": 4}
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert sft(place / "model", place / "data", tmp_path / "whole", **settings, **whole) == 0
    assert sft(place / "model", place / "data", tmp_path / "halves", **settings, **halves) == 0
    assert (
        sft(place / "model", place / "data", tmp_path / "kept", gradient_checkpointing=True, **settings, **whole) == 0
    )
    start, one = weights(place / "model"), weights(tmp_path / "whole")
    for other in ("halves", "kept"):
        two = weights(tmp_path / other)
        for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
            moved, apart = (one[name] - start[name]).abs().max(), (one[name] - two[name]).abs().max()
            assert apart < 0.01 * moved, (other, name)


def test_resuming_with_another_format_or_over_another_run_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    saved = {"save_strategy": "steps", "save_steps": 1}
    assert sft(place / "model", place / "data", out, **saved) == 0
    capsys.readouterr()
    before = weights(out)
    resume = {"resume_from_checkpoint": "latest", "max_steps": 3}
    assert sft(place / "model", place / "data", out, latent_format="lantern", **resume) == 2
    assert "resume with the settings that it was started with" in capsys.readouterr().err
    assert sft(place / "model", place / "data", tmp_path / "other") == 0
    kept = weights(tmp_path / "other")
    code = sft(place / "model", place / "data", tmp_path / "other", resume_from_checkpoint=out / "checkpoint-1")
    assert code == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(tmp_path / "other").items())
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(out).items())

    (out / "checkpoint-9").mkdir()  # cut off in the middle of writing
    assert sft(place / "model", place / "data", out, **resume) == 0
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3


def test_the_best_model_is_loaded_whole(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = sft(
        place / "model",
        place / "data",
        out,
        eval_file=place / "data" / "test.parquet",
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        max_steps=3,
        learning_rate=0.3,  # far too large: the first step is the best
        lr_scheduler_type="constant",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    assert code == 0
    best = Path(json.loads((out / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert best.name != "checkpoint-3"
    assert same(out, best)
    assert not same(out, out / "checkpoint-3")


def test_the_merged_model_of_an_adapter_answers_like_the_adapter(place: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    from rl_lvr.latents.feedback import attach_feedback
    from rl_lvr.latents.format import LatentFormat

    out = tmp_path / "out"
    settings = {"use_peft": True, "lora_target_modules": "all-linear", "latent_projector": "mlp", "learning_rate": 0.05}
    assert sft(place / "model", place / "data", out, **settings) == 0
    merged = Bench(out / "merged")
    stored = LatentFormat.load(out / "merged")
    attach_feedback(merged.model, stored, out / "merged")
    plain = Bench(place / "model")
    attach_feedback(plain.model, stored)
    adapted = PeftModel.from_pretrained(plain.model, str(out)).eval()
    batch = plain.batch()
    batch.pop("targets")
    labels = batch.pop("labels")
    assert labels.shape == batch["input_ids"].shape
    with torch.no_grad():
        one, two = merged.model(**batch).logits, adapted(**batch).logits
        base = Bench(place / "model").model(**batch).logits
    assert (one - two).abs().max() < 1e-4
    assert (one - base).abs().max() > 1e-2
    assert torch.equal(merged.model.latent_proj.down.weight, adapted.base_model.model.latent_proj.down.weight)
