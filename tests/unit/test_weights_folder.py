"""What of new weights needs no server: which folders are read, who waits for whom, and that nothing stays behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rl_lvr import cli
from rl_lvr.errors import Fault, UserError
from rl_lvr.rollout.server.weights import by_the_first, written
from rl_lvr.serving.weights import Gate, sent_folder


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    made = tmp_path / "shared"
    (made / "good").mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, made / "good" / "0.safetensors")
    return made


# ---- which folders are read


def test_a_folder_of_safetensors_is_read(shared: Path) -> None:
    assert sent_folder(shared, "good") == shared / "good"


def test_no_other_folder_is_named(shared: Path) -> None:
    outside = shared.parent / "outside"
    (shared / "good").rename(outside)
    for name in ("", ".", "..", "../outside", str(outside), "a/../../outside", "a\\b", ".part", "good\n", "x" * 65):
        with pytest.raises(UserError, match="is no name of weights"):
            sent_folder(shared, name)
    (shared / "link").symlink_to(outside)
    for name in ("link", "missing"):
        with pytest.raises(UserError, match="finds no folder"):
            sent_folder(shared, name)
    with pytest.raises(UserError, match="restart it with --weights-folder"):
        sent_folder(None, "good")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "1.bin").write_bytes(b""),
        lambda folder: (folder / "1.safetensors").mkdir(),
        lambda folder: (folder / "1.safetensors").symlink_to(folder / "0.safetensors"),
    ],
    ids=["pickle", "folder", "link"],
)
def test_nothing_but_safetensors_is_read(shared: Path, spoil: Callable[[Path], Any]) -> None:
    spoil(shared / "good")
    with pytest.raises(UserError, match="is no safetensors file"):
        sent_folder(shared, "good")


def test_an_empty_folder_is_refused(shared: Path) -> None:
    (shared / "good" / "0.safetensors").unlink()
    with pytest.raises(UserError, match="holds no safetensors files"):
        sent_folder(shared, "good")


def test_a_server_needs_the_folder_to_be_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["serve", "no-such-model", "--weights_folder", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: make it, or name another with --weights-folder" in capsys.readouterr().err


# ---- who waits for whom


def test_weights_do_not_change_under_a_request() -> None:
    async def story() -> None:
        gate = Gate()
        async with gate.request(), gate.request():
            with pytest.raises(UserError, match="2 requests are running"):
                async with gate.change():
                    pass
        gate.check()
        async with gate.change():
            pass

    asyncio.run(story())


def test_a_request_waits_for_the_weights() -> None:
    async def story() -> list[str]:
        gate, said = Gate(), []

        async def ask() -> None:
            async with gate.request():
                said.append("request")

        async with gate.change():
            asking = asyncio.create_task(ask())
            for _ in range(5):
                await asyncio.sleep(0)
            with pytest.raises(UserError, match="other weights are being loaded"):
                async with gate.change():
                    pass
            said.append("weights")
        await asking
        return said

    assert asyncio.run(story()) == ["weights", "request"]


def test_after_a_failure_nothing_is_generated_until_weights_are_whole() -> None:
    async def story() -> None:
        gate = Gate()
        with pytest.raises(OSError, match="broken off"):
            async with gate.change():
                raise OSError("broken off")
        with pytest.raises(UserError, match="loaded only in part"):
            async with gate.request():
                pass
        async with gate.change():
            pass
        async with gate.request():
            assert gate.running == 1
        assert gate.running == 0

    asyncio.run(story())


# ---- what the trainer's side leaves


def test_weights_are_seen_whole_or_not_at_all(load_tiny: Any, tmp_path: Path) -> None:
    model, _ = load_tiny("qwen2_5_vl")
    with written(model, torch.float32, tmp_path) as (name, sent):
        assert [path.name for path in tmp_path.iterdir()] == [name]
        tensors = {k: v for path in sent_folder(tmp_path, name).iterdir() for k, v in load_file(path).items()}
    assert list(tmp_path.iterdir()) == []
    assert len(tensors) == sent.tensors > 10
    assert torch.equal(tensors["lm_head.weight"], model.state_dict()["lm_head.weight"])


def test_a_server_that_fails_leaves_nothing_behind(load_tiny: Any, tmp_path: Path) -> None:
    model, _ = load_tiny("qwen2_5_vl")

    def send() -> None:
        with written(model, torch.float32, tmp_path):
            raise OSError("the server died")

    with pytest.raises(OSError, match="the server died"):
        send()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tie", [False, True])
def test_weights_that_are_not_finite_are_not_sent(load_tiny: Any, tmp_path: Path, tie: bool) -> None:
    model, _ = load_tiny("qwen2_5_vl", tie=tie)
    with torch.no_grad():
        model.get_output_embeddings().weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="not all finite"), written(model, torch.float32, tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def _process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model, calls = torch.nn.Linear(1, 1), []
    model.get_input_embeddings = lambda: model
    by_the_first(lambda: calls.append(rank), model)
    assert calls == [0][rank:]

    def fail() -> None:
        raise RuntimeError("the disk is full")

    with pytest.raises(Fault, match="process 0: the disk is full"):
        by_the_first(fail, model)
    torch.distributed.barrier()  # gloo's threads abort a process whose partner is gone
    torch.distributed.destroy_process_group()
    Path(folder, str(rank)).touch()


def test_the_first_process_sends_and_all_hear_of_its_failure(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()
