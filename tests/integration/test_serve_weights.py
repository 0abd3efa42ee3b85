"""A trainer's weights into a real server of a tiny model, through a folder that both see."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from engine_cases import same
from grpo_cases import logged, make_trainer
from safetensors.torch import save_file
from serve_cases import CLOSE, GREEDY, LVR, Server, begin, documented, refusal, run_documented, within
from vllm_cases import VLLMRig, opened, thinking

from rl_lvr.errors import UserError
from rl_lvr.rollout.hf import HFRolloutEngine
from rl_lvr.rollout.server import protocol
from rl_lvr.rollout.server.engine import ServerRolloutEngine
from rl_lvr.rollout.types import Capability, Rollout
from rl_lvr.rollout.vllm.weights import Receipt, checkpoint_weights, write_files
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.engines import make_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def rig(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> VLLMRig:
    return VLLMRig(thinking(tiny_folder, tmp_path_factory.mktemp("serve"), "qwen2_5_vl"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def server(rig: VLLMRig, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(rig.folder, tmp_path_factory.mktemp("log") / "server.log", "--weights-folder", str(shared))
    try:
        server.ready()
        yield server
    finally:
        server.interrupt()


@pytest.fixture(scope="module")
def engine(server: Server, rig: VLLMRig, shared: Path) -> Any:
    """As `rl-lvr grpo` makes it."""
    config = LatentGRPOConfig(output_dir="unused", use_cpu=True, report_to="none")
    options = {"url": server.url, "weights_folder": str(shared)}
    given = {"folder": rig.folder, "model": rig.model, "processor": rig.processor, "latent_format": LVR}
    return make_engine("server", options, **given, config=config)


@pytest.fixture
def rollouts(rig: VLLMRig, engine: ServerRolloutEngine) -> Callable[..., list[Rollout]]:
    """Greedy ones of the server, or of the reference engine with a model."""
    requests = opened(rig.requests(), engine.markers.start or 0)[:3]

    def made(model: Any = None) -> list[Rollout]:
        runs = engine if model is None else HFRolloutEngine(model, rig.processor, LVR)
        return runs.generate(requests, GREEDY)

    return made


def changed(rig: VLLMRig) -> Any:
    model = VLLMRig(rig.folder).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return model


def equal(ours: list[Rollout], theirs: list[Rollout]) -> bool:
    return all(same(a, b, CLOSE) for a, b in zip(ours, theirs, strict=True))


def test_a_synced_server_generates_as_the_trainers_model(rig, engine, shared, rollouts):
    model = changed(rig)
    before, wanted = rollouts(), rollouts(model)
    assert equal(before, rollouts(rig.model))
    assert not equal(rollouts(), wanted), "the control: not synced yet"
    engine.sync_weights(model)
    assert equal(rollouts(), wanted), "also no prefix and no picture of the old weights"
    assert list(shared.iterdir()) == [], "what was sent is gone"
    engine.sync_weights(rig.model)
    assert equal(rollouts(), before)


def test_grpo_learns_on_a_server(rig, engine, tmp_path, monkeypatch):
    """The control, weights that arrive at the first step only, stops."""

    def trained(folder: Path, **changes: Any) -> Any:
        folder.mkdir()
        mine = VLLMRig(rig.folder)
        trainer = make_trainer(mine.model, mine.processor, folder, LVR, engine=engine, **changes)
        trainer.train()
        return trainer

    trainer = trained(tmp_path / "synced", max_steps=2)
    assert len(logged(trainer, "loss")) == 2
    for metric in ("replay_logp_diff", "replay_latent_diff"):
        assert max(logged(trainer, f"latent/{metric}")) < 1e-3
    real, calls = engine.sync_weights, []

    def once(model: Any) -> None:
        if not calls:
            real(model)
        calls.append(model)

    monkeypatch.setattr(engine, "sync_weights", once)
    with pytest.raises(UserError, match="do not agree with their replay"):
        trained(tmp_path / "stale", max_steps=3, learning_rate=1e-2)
    assert len(calls) > 1


# ---- what is refused before a weight is touched


def test_only_safetensors_inside_the_folder_are_read(rig, engine, server, shared, tmp_path, rollouts):
    engine.sync_weights(rig.model)
    outside = tmp_path / "outside"
    outside.mkdir()
    save_file({"weight": torch.zeros(2)}, outside / "0.safetensors")
    (shared / "link").symlink_to(outside)
    for name, file in (("linked", "0.safetensors"), ("pickled", "0.bin"), ("nested", "0.safetensors")):
        (shared / name).mkdir()
        if name == "nested":
            (shared / name / file).mkdir()
        elif name == "linked":
            (shared / name / file).symlink_to(outside / file)
        else:
            (shared / name / file).write_bytes(b"")
    (shared / "empty").mkdir()
    before = rollouts()
    cases = {
        "no name of weights": ["", ".", "..", "../outside", str(outside), "a/b", "a\\b", ".part", "link\n", "x" * 65],
        "finds no folder": ["missing", "link"],
        "no safetensors file,": ["linked", "pickled", "nested"],
        "holds no safetensors files": ["empty"],
    }
    for words, names in cases.items():
        for name in names:
            told = refusal(server.post(protocol.WEIGHTS, protocol.weights_to_json(name, Receipt(1, 0.0, 0.0))))
            assert words in told, (name, told)
    assert "tensors" in refusal(server.post(protocol.WEIGHTS, {"name": "missing"}))
    assert equal(rollouts(), before)


def test_weights_wait_for_running_requests_to_end(rig, engine, server):
    connection = begin(server, "/v1/completions", {"prompt": "red", "max_tokens": 200, "ignore_eos": True})
    within(30, lambda: server.tables()["live"] == 1)
    with pytest.raises(UserError, match="1 requests are running: send weights when they have ended"):
        engine.sync_weights(rig.model)
    connection.close()
    within(5, lambda: not any(server.tables().values()))
    engine.sync_weights(rig.model)


def test_weights_that_do_not_fit_are_refused_here(rig, engine, load_tiny):
    other, _ = load_tiny("qwen3_vl")
    with pytest.raises(UserError, match=r"a qwen3_vl model's weights cannot go into .* a qwen2_5_vl model"):
        engine.sync_weights(other)
    sick = changed(rig)
    with torch.no_grad():
        sick.get_output_embeddings().weight[0] = float("nan")
    with pytest.raises(UserError, match="not all finite"):
        engine.sync_weights(sick)


# ---- weights that came in part


def wrong_shape(named: Iterator[Any]) -> Iterator[Any]:
    for name, value in named:
        yield name, value[:, :3] if name.endswith("q_proj.weight") else value


def wrong_name(named: Iterator[Any]) -> Iterator[Any]:
    for name, value in named:
        yield name.replace("o_proj", "p_proj"), value


def without_the_last(named: Iterator[Any]) -> Iterator[Any]:
    yield from list(named)[:-1]


def test_a_head_that_computes_something_else_is_refused(rig, server, shared, tmp_path):
    """Weights that all came, and an output head that does not compute with them, as far as the server can see."""
    sent = Receipt()
    folder = shared / "other_head"
    folder.mkdir()
    write_files(checkpoint_weights(rig.model, torch.float32, sent), folder)
    wrong = protocol.weights_to_json(folder.name, replace(sent, head=sent.head * 1.001))
    assert "its output head computes other logits than the trainer's" in refusal(server.post(protocol.WEIGHTS, wrong))

    folder.rename(shared / "step-100")
    (line,) = documented(protocol.WEIGHTS)
    for name, value in asdict(sent).items():
        line, count = re.subn(rf'"{name}": [\d.]+', f'"{name}": {value!r}', line)
        assert count == 1
    (answer,) = run_documented(line, server, tmp_path)
    assert sent.agrees(Receipt(*answer["workers"][0]))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (wrong_shape, "do not fit this server's model"),
        (wrong_name, "do not fit this server's model"),
        (without_the_last, "did not take over the weights"),
    ],
)
def test_nothing_is_generated_with_half_of_the_weights(rig, engine, server, shared, tmp_path, rollouts, spoil, words):
    """Until others have come whole."""
    sent = Receipt()
    folder = shared / spoil.__name__
    folder.mkdir()
    write_files(spoil(checkpoint_weights(changed(rig), torch.float32, sent)), folder)
    assert words in refusal(server.post(protocol.WEIGHTS, protocol.weights_to_json(folder.name, sent)))
    with pytest.raises(UserError, match=r"loaded only in part.*send whole weights again, or restart"):
        rollouts()
    status = httpx.get(server.url + protocol.STATUS, timeout=60)
    assert status.status_code == 503
    assert "loaded only in part" in status.json()["error"]["message"]
    engine.sync_weights(rig.model)
    assert equal(rollouts(), rollouts(rig.model))
    assert Capability.WEIGHTS in engine.capabilities
