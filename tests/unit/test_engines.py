"""The engine of a recipe: what its options may be, and what follows for those that are left out."""

from __future__ import annotations

import pytest
import torch

from rl_lvr.errors import UserError
from rl_lvr.rollout.sleeping import Sleeper
from rl_lvr.rollout.vllm import guards
from rl_lvr.training.grpo.config import LatentGRPOConfig
from rl_lvr.training.grpo.engines import check_engine, make_engine


def config(**changes):
    given = {"output_dir": "unused", "use_cpu": True, "report_to": "none", "max_completion_length": 50, **changes}
    return LatentGRPOConfig(**given)


def test_vllm_takes_its_rows_and_its_length_from_the_run():
    run = config(per_device_train_batch_size=4, num_generations=4, steps_per_generation=3, vllm_max_model_length=99)
    assert check_engine("vllm", None, run) == {"max_num_seqs": 12, "max_model_len": 99}
    assert check_engine("vllm", {"max_num_seqs": 5, "max_model_len": 80}, run) == {
        "max_num_seqs": 5,
        "max_model_len": 80,
    }
    large = config(per_device_train_batch_size=512, num_generations=4, vllm_max_model_length=99)
    assert check_engine("vllm", {}, large)["max_num_seqs"] == 256


@pytest.mark.parametrize(
    ("name", "options", "changes", "words"),
    [
        ("vlm", None, {}, "did you mean 'vllm'"),
        ("jax", None, {}, "choose from hf, vllm, server"),
        ("hf", {"batch_size": 3}, {}, "rollout_batch sets its rows"),
        ("hf", None, {"engine_sleep": True}, "engine_sleep is on, but the engine hf"),
        ("hf", None, {"vllm_max_model_length": 99}, "only the engine vllm reads it, not hf"),
        ("server", None, {"vllm_max_model_length": 99}, "only the engine vllm reads it, not server"),
        ("vllm", {"max_model_length": 9}, {}, "no 'max_model_length'; did you mean 'max_model_len'"),
        ("vllm", {"colour": 9}, {}, "choose from max_model_len"),
        ("vllm", None, {}, r"lacks max_model_len.*max_completion_length \(50\)"),
        ("vllm", {"max_model_len": 50}, {}, "no prompt has room"),
        (
            "vllm",
            {"max_model_len": 99, "engine_args": {"quantization": "fp8"}},
            {},
            "in fp8 .* leave quantization out",
        ),
        ("server", {"url": "http://127.0.0.1:1"}, {}, "keeps the weights .* started with, .* set weights_folder"),
        ("server", {"weights_folder": "w"}, {}, "lacks url"),
        ("server", {"weight_folder": "w"}, {}, "no 'weight_folder'; did you mean 'weights_folder'"),
        ("server", {"url": "u", "weights_folder": "w"}, {"engine_sleep": True}, "a server does not sleep"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_model(name, options, changes, words):
    with pytest.raises(UserError, match=words):
        check_engine(name, options, config(**changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU only")
def test_vllm_without_a_gpu_or_an_interpreter_is_refused_before_there_is_a_model(monkeypatch):
    options = {"max_model_len": 99, "engine_args": {"enforce_eager": True}}
    assert check_engine("vllm", options, config())["max_model_len"] == 99
    monkeypatch.setattr(guards, "interpreted", lambda: False)  # Triton decides that once, on import
    with pytest.raises(UserError, match="set TRITON_INTERPRET=1 in the environment before the start"):
        check_engine("vllm", options, config())
    assert check_engine("hf", None, config()) == {}


def test_hf_is_the_trainers_own(load_tiny):
    model, processor = load_tiny("qwen2_5_vl")
    given = {"folder": "unused", "model": model, "processor": processor, "latent_format": None, "config": config()}
    assert make_engine("hf", None, **given) is None


def test_vllm_needs_the_vocabulary_of_the_folder(load_tiny, tiny_folder):
    model, processor = load_tiny("qwen2_5_vl")
    model.resize_token_embeddings(len(processor.tokenizer) + 4)
    given = {"model": model, "processor": processor, "latent_format": None, "config": config()}
    with pytest.raises(UserError, match="save the model with its marker tokens"):
        make_engine("vllm", {"max_model_len": 99}, folder=tiny_folder("qwen2_5_vl"), **given)


class Diary:
    """An engine that notes what it is asked."""

    markers = None
    capabilities = frozenset()

    def __init__(self):
        self.pages = []

    def __getattr__(self, name):
        def note(*args):
            self.pages.append((name, *args) if name == "sleep" else (name,))
            if args[0:1] == ("fail",):
                raise OSError("broken")
            return [name]

        return note


def test_a_sleeper_is_awake_only_between_sync_and_rollouts():
    diary, model = Diary(), torch.nn.Linear(1, 1)
    engine = Sleeper(diary)
    assert diary.pages == [("sleep", 2)]
    with pytest.raises(RuntimeError, match="call sync_weights first"):
        engine.generate([], None)
    diary.pages.clear()
    engine.sync_weights(model)
    assert engine.generate([], None) == ["generate"]
    assert diary.pages == [("wake",), ("sync_weights",), ("generate",), ("sleep", 2)]
    diary.pages.clear()
    engine.generate([], None)  # its weights were dropped: they come again
    assert diary.pages == [("wake",), ("sync_weights",), ("generate",), ("sleep", 2)]
    diary.pages.clear()
    with pytest.raises(OSError, match="broken"):
        engine.generate("fail", None)
    assert diary.pages[-1] == ("sleep", 2)
    engine.close()
    assert diary.pages[-1] == ("close",)
