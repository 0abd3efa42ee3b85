"""What the vLLM engine refuses at start, each with its cure, and the hooks of vLLM that it stands on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from rl_lvr.errors import UserError
from rl_lvr.latents.format import FormatIds, get_format
from rl_lvr.rollout.vllm import cpu, guards

MARKERS = FormatIds(get_format("lvr"), 7, 8, 9)


def config(**changes):
    parallel = {
        "pipeline_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "enable_dbo": False,
        "enable_batch_sharded_sampling": False,
    }
    plain = {"use_v2_model_runner": True, "speculative_config": None}
    model = SimpleNamespace(runner_type=changes.pop("runner_type", "generate"))
    own = {key: changes.pop(key) for key in list(changes) if key in plain}
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel | changes), model_config=model, **plain | own)


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"use_v2_model_runner": False}, "remove VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"pipeline_parallel_size": 2}, "use tensor_parallel_size"),
        ({"decode_context_parallel_size": 2}, "set decode_context_parallel_size"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size to 1"),
        ({"enable_dbo": True}, "set enable_dbo to false"),
        ({"enable_batch_sharded_sampling": True}, "set enable_batch_sharded_sampling to false"),
        ({"speculative_config": object()}, "leave speculative_config out"),
        ({"runner_type": "pooling"}, "start the engine to generate"),
    ],
)
def test_settings_that_lose_latents_are_refused(changes, cure):
    guards.check_config(config())
    with pytest.raises(UserError, match=f"latents do not work with.*{cure}"):
        guards.check_config(config(**changes))


def test_an_engine_without_input_embeddings_is_refused():
    for cache, embeds in ((object(), False), (None, True)):
        guards.check_embeddings(cache, SimpleNamespace(enable_prompt_embeds=embeds))
    with pytest.raises(UserError, match="set enable_prompt_embeds to true"):
        guards.check_embeddings(None, SimpleNamespace(enable_prompt_embeds=False))


@pytest.mark.parametrize("version", ["0.30.0", "0.31.0+cpu", "0.33.1"])
def test_versions_inside_the_window(version):
    guards.check_version(version)


@pytest.mark.parametrize("version", ["0.29.1", "0.34.0", "0.34.0rc1", "1.0"])
def test_versions_outside_the_window(version):
    with pytest.raises(UserError, match=f"vLLM {version} is outside"):
        guards.check_version(version)


def test_a_worker_without_the_plugin_is_noticed():
    ready = {"ready": True, "model": "LatentQwen2", "markers": [7, 8, 9]}
    guards.check_workers([ready, ready], MARKERS)
    with pytest.raises(UserError, match="not at work in vLLM's worker 1, which runs Qwen2ForCausalLM"):
        guards.check_workers([ready, {"ready": False, "model": "Qwen2ForCausalLM"}], MARKERS)
    with pytest.raises(UserError, match="save the processor beside the model"):
        guards.check_workers([ready | {"markers": [1, 2, 3]}], MARKERS)


ASK_FOR_RUNTIME = """
from rl_lvr.errors import UserError
from rl_lvr.rollout.vllm import guards
try:
    guards.check_runtime()
    print("runs")
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU only")
@pytest.mark.parametrize(("interpret", "words"), [("0", "set TRITON_INTERPRET=1 in the environment"), ("1", "runs")])
def test_a_machine_without_a_gpu_needs_tritons_interpreter(interpret, words):
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    told = subprocess.run(
        [sys.executable, "-c", ASK_FOR_RUNTIME], capture_output=True, text=True, env=environment, timeout=200
    )
    assert words in told.stdout, told.stderr
    assert told.stdout.count("\n") == 1


# ---- hooks


def test_a_hook_may_live_in_one_of_several_places():
    places = ("json.nowhere", "json.decoder", "json")
    assert guards.home_of(places, "JSONDecoder").__name__ == "json.decoder"
    assert guards.missing_hooks([(places, "JSONDecoder.decode", ("s",)), (places, "loads", ("s",))]) == []
    assert guards.missing_hooks([(places, "JSONDecoder.decode", ("text",))]) == [
        "json.decoder.JSONDecoder.decode(text)"
    ]
    assert guards.missing_hooks([(places, "JSONReader", ())]) == ["json.nowhere.JSONReader"]
    with pytest.raises(UserError, match=r"this vLLM lacks json\.nowhere\.JSONReader, which latents need: pip install"):
        guards.home_of(places, "JSONReader")


# ---- CPUs


@pytest.mark.parametrize(
    ("dtype", "tiles", "granted", "refused"),
    [
        (torch.bfloat16, True, False, True),
        (torch.bfloat16, True, True, False),
        (torch.bfloat16, False, False, False),
        (torch.float32, True, False, False),
    ],
)
def test_bf16_is_refused_where_the_system_withholds_amx(monkeypatch, dtype, tiles, granted, refused):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: granted)
    if refused:
        with pytest.raises(UserError, match=r"AMX registers.*choose dtype float32"):
            cpu.allow_tiles(dtype)
    else:
        cpu.allow_tiles(dtype)


ASK_FOR_TILES = """
import ctypes, torch
from rl_lvr.rollout.vllm.cpu import allow_tiles

def granted():
    features = ctypes.c_ulong(0)
    assert ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(features)) == 0  # arch_prctl, ARCH_GET_XCOMP_PERM
    return bool(features.value >> 18 & 1)

print(torch.cpu._is_amx_tile_supported(), granted(), allow_tiles(torch.float32), granted(), allow_tiles(torch.bfloat16),
      granted())
"""


def test_a_fresh_process_asks_linux_for_the_tile_registers():
    if platform.machine() != "x86_64" or not torch.cpu._is_amx_tile_supported():
        cpu.allow_tiles(torch.bfloat16)  # nothing to ask for
        return
    told = subprocess.run([sys.executable, "-c", ASK_FOR_TILES], capture_output=True, text=True, timeout=200)
    assert told.stdout.split() == ["True", "False", "None", "False", "None", "True"], told.stderr
