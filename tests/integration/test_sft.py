"""Latent SFT from the command line on tiny real models: what moves, what is logged, what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from lab_tools import Bench, logged, puzzles, same, sft, weights

from rl_lvr.data.writing import write_jsonl
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.types import Sampling


def test_frozen_parts_do_not_move_and_the_rest_does(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    moves = "nmse pulls latents towards vectors of the vision merger, which this run trains"
    assert sft(place / "model", place / "data", tmp_path / "frozen") == 0
    assert moves not in capsys.readouterr().err
    assert sft(place / "model", place / "data", tmp_path / "open", freeze_merger=False) == 0
    assert moves in capsys.readouterr().err
    before, frozen, opened = (weights(f) for f in (place / "model", tmp_path / "frozen", tmp_path / "open"))
    moved = {name for name in before if not torch.equal(before[name], frozen[name])}
    assert moved
    assert not any("visual" in name for name in moved)
    also = {name for name in before if not torch.equal(before[name], opened[name])} - moved
    assert also
    assert all("visual.merger" in name for name in also)


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


def test_adapters_train_alone_and_keep_off_the_vision_tower(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    assert sft(place / "model", place / "data", out, use_peft=True, latent_projector="linear", **saved) == 0
    names = set(weights(out))
    assert len({name.rpartition(".lora_A")[0] for name in names if "lora_A" in name}) == 14, "7 in each of 2 layers"
    assert all("lora_" in name or "latent_proj" in name for name in names)
    assert any("latent_proj" in name for name in names)
    assert not any("visual" in name for name in names)
    for folder, library in ((out, "peft"), (out / "checkpoint-1", "peft"), (out / "merged", "transformers")):
        assert_sound_card(folder, place, library)


def assert_sound_card(folder: Path, place: Path, library: str) -> None:
    """Of a model of `place`, without a path of this machine in it."""
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("model", library)
    assert {"rl-lvr", "trl", "sft"} <= set(card.data.tags)
    assert "`model`, trained on `data/train.parquet` with TRL's SFT on latents" in card.text
    assert "format `lvr`" in card.text
    assert "rl-lvr generate out" in card.text
    for words in ("None", str(place), str(folder.parent), "/tmp"):
        assert words not in card.content, words


def test_a_model_and_its_checkpoint_have_cards(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert sft(place / "model", place / "data", out, save_strategy="steps", save_steps=1, max_steps=1) == 0
    for folder in (out, out / "checkpoint-1"):
        assert_sound_card(folder, place, "transformers")


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
    from rl_lvr.evaluation.conditions import parse_conditions
    from rl_lvr.evaluation.evaluate import Judge
    from rl_lvr.evaluation.plan import Plan
    from rl_lvr.evaluation.questions import questions_of
    from rl_lvr.evaluation.rows import Rule

    bench = Bench(place / "model", count=24)
    word = bench.records[0].answer
    ids = [bench.tokenizer(word)["input_ids"][0], bench.tokenizer.eos_token_id]
    calls = iter(range(10_000))

    def say(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits).index_fill(-1, torch.tensor(ids[next(calls) % 2]), 9.0)

    handle = bench.model.lm_head.register_forward_hook(say)
    engine = HFRolloutEngine(bench.model, bench.processor, bench.markers.format, batch_size=24)
    questions = questions_of(bench.records, bench.encoder)
    plan = Plan(questions, parse_conditions("own,swap"), Sampling(max_tokens=4, temperature=0.0))
    judge = Judge(bench.tokenizer, bench.markers, Rule())
    rows = [judge.row(questions, one) for call in plan.run(engine) for one in call]
    handle.remove()
    assert set(plan.undefined) == {"swap"}  # it makes no latents, so there are none to swap: no reason to stop
    expected = [record.answer == word for record in bench.records]
    assert [row.right for row in rows] == expected
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


def test_records_of_all_kinds_train_together(place: Path, mixed: Path, tmp_path: Path) -> None:
    more = {"max_steps": 24, "per_device_train_batch_size": 1, "own_latents": 0.7, "own_latents_start": 0.0}
    assert sft(place / "model", mixed, tmp_path / "out", **more) == 0
    rows = logged(tmp_path / "out")
    assert len(rows) == 24
    assert all(row["loss"] == row["loss"] and row["loss"] > 0 for row in rows)
    assert sum("latent/nmse" in row for row in rows) == 8  # one epoch: a third of the records has targets


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
