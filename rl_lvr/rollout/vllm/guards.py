"""What latents cannot run with, refused at start with the cure, and the hooks of vLLM that they rest on.

vLLM's `ModelState` is an internal interface: `check_hooks` names what a release has taken away.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version

from rl_lvr.errors import UserError
from rl_lvr.hooks import Hook, Modules, find_hook, missing_hooks, name_of
from rl_lvr.latents.format import FormatIds
from rl_lvr.ops.backends import interpreted

OLDEST, BEYOND = Version("0.30"), Version("0.34")

_STATE = "vllm.v1.worker.gpu.model_states"
PLANNING = ("vllm.v1.core.kv_cache_planning", "vllm.v1.core.kv_cache_utils")
ARGUMENTS = ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args")
"""Both moved in 0.33."""

HOOKS: tuple[Hook, ...] = (
    (_STATE, "resolve_model_state_cls", ("vllm_config", "model")),
    (f"{_STATE}.default", "DefaultModelState.__init__", ("vllm_config", "model", "encoder_cache", "device")),
    (f"{_STATE}.default", "DefaultModelState.add_request", ("req_index", "new_req_data")),
    (f"{_STATE}.default", "DefaultModelState.remove_request", ("req_id",)),
    (
        f"{_STATE}.default",
        "DefaultModelState.prepare_inputs_embeds",
        ("scheduled_encoder_inputs", "input_batch", "req_states"),
    ),
    (f"{_STATE}.default", "DefaultModelState.custom_sampler", ("sampler",)),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.finish_requests", ("scheduler_output",)),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.reload_weights", ()),
    ("vllm.v1.worker.gpu.sample.sampler", "Sampler.__call__", ("logits", "input_batch")),
    ("vllm.v1.worker.gpu.sample.sampler", "Sampler.sample", ("logits",)),
    ("vllm.v1.core.kv_cache_utils", "_gen_prompt_embeds_extra_hash_keys", ("request",)),
    (PLANNING, "get_kv_cache_groups", ("vllm_config",)),
    ("vllm.entrypoints.llm", "LLM.enqueue", ("prompts",)),
    ("vllm.v1.engine.llm_engine", "LLMEngine.step", ()),
    ("vllm.v1.engine.llm_engine", "LLMEngine.reset_encoder_cache", ()),
    ("vllm.v1.engine.llm_engine", "LLMEngine.abort_request", ("request_ids", "internal")),
    ("vllm.entrypoints.llm", "LLM.collective_rpc", ("method",)),
)
"""Of every engine with latents."""

SERVER_HOOKS: tuple[Hook, ...] = (
    ("vllm.v1.engine.async_llm", "AsyncLLM.generate", ("prompt", "sampling_params", "request_id")),
    ("vllm.v1.engine.async_llm", "AsyncLLM.from_vllm_config", ("vllm_config", "usage_context")),
    ("vllm.v1.engine.async_llm", "AsyncLLM.collective_rpc", ("method", "args")),
    ("vllm.v1.engine.async_llm", "AsyncLLM.reset_mm_cache", ()),
    ("vllm.v1.engine.async_llm", "AsyncLLM.reset_prefix_cache", ()),
    ("vllm.v1.engine.async_llm", "AsyncLLM.reset_encoder_cache", ()),
    ("vllm.v1.engine.async_llm", "AsyncLLM.get_supported_tasks", ()),
    ("vllm.v1.engine.async_llm", "AsyncLLM.check_health", ()),
    ("vllm.v1.engine.async_llm", "AsyncLLM.shutdown", ()),
    ("vllm.v1.engine.exceptions", "EngineDeadError", ()),
    ("vllm.exceptions", "VLLMValidationError", ()),
    ("vllm.engine.arg_utils", "AsyncEngineArgs.from_cli_args", ("args",)),
    ("vllm.engine.arg_utils", "AsyncEngineArgs.create_engine_config", ("usage_context",)),
    ("vllm.renderers.inputs.preprocess", "parse_model_prompt", ("model_config", "prompt")),
    ("vllm.renderers.base", "BaseRenderer.render_cmpl_async", ("prompts",)),
    ("vllm.renderers.base", "BaseRenderer.render_chat_async", ("conversations", "chat_params")),
    ("vllm.utils.argparse_utils", "FlexibleArgumentParser", ()),
    (ARGUMENTS, "make_arg_parser", ("parser",)),
    (ARGUMENTS, "validate_parsed_serve_args", ("args",)),
    ("vllm.entrypoints.launchers.app", "build_app", ("args", "supported_tasks", "model_config")),
    ("vllm.entrypoints.launchers.api_server.app_state", "init_app_state", ("engine_client", "state", "args")),
    ("vllm.entrypoints.launchers.launcher", "serve_http", ("app", "sock", "enable_ssl_refresh")),
    ("vllm.entrypoints.launchers.launcher", "validate_api_server_args", ("args",)),
    ("vllm.entrypoints.launchers.utils.server_utils", "get_uvicorn_log_config", ("args",)),
    ("vllm.entrypoints.serve.utils.api_utils", "with_cancellation", ("handler_func",)),
    ("vllm.entrypoints.openai.completion.serving", "OpenAIServingCompletion.create_completion", ("request",)),
    ("vllm.entrypoints.openai.chat_completion.serving", "OpenAIServingChat.create_chat_completion", ("request",)),
)
"""Of `rl-lvr serve` besides. vLLM moves its server's modules from release to release."""


def home_of(modules: Modules, name: str) -> ModuleType:
    """The module in which this vLLM has `name`."""
    found = find_hook(modules, name)
    if found is None:
        raise _lacks([name_of(modules, name)])
    return found[0]


def check_version(version: str | None = None) -> None:
    """Refuse a vLLM outside the window that was read and tested."""
    if version is None:
        try:
            version = importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:
            raise UserError("vLLM is not installed: pip install 'rl-lvr[vllm]'.") from None
    if not OLDEST <= Version(Version(version).base_version) < BEYOND:
        raise UserError(
            f"vLLM {version} is outside of {OLDEST} <= version < {BEYOND}, where latents are known to work: "
            "pip install 'rl-lvr[vllm]'."
        )


def check_hooks(hooks: Sequence[Hook] = HOOKS) -> None:
    missing = missing_hooks(hooks)
    if missing:
        raise _lacks(missing)


def _lacks(missing: list[str]) -> UserError:
    return UserError(f"this vLLM lacks {', '.join(missing)}, which latents need: pip install 'rl-lvr[vllm]'.")


def check_runtime() -> None:
    """Refuse a machine without a GPU that does not interpret vLLM's kernels either: their traceback says little."""
    if torch.cuda.is_available() or (find_spec("triton") is not None and interpreted()):
        return
    raise UserError(
        "vLLM with latents needs an NVIDIA GPU, or Triton's interpreter, which is slow and good for tests: set "
        "TRITON_INTERPRET=1 in the environment before the start (docs/setup.md), or use the engine hf."
    )


def engine_config(arguments: Any, usage: Any) -> Any:
    """vLLM's configuration from its EngineArgs, checked; UserError also for what vLLM itself refuses."""
    try:
        config = arguments.create_engine_config(usage)
    except ValueError as error:
        raise UserError(f"vLLM refuses these settings: {_sentence(error)}") from error
    check_config(config)
    return config


def _sentence(error: ValueError) -> str:
    """The words in a ValueError, which may be one of pydantic's with a list of everything that it was given."""
    from pydantic import ValidationError  # comes with vLLM

    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return str(error).strip()


def refuse_quantized(quantization: str | None, cure: str) -> None:
    """Weights of a trainer cannot take the place of a quantized model's, which are others."""
    if quantization is not None:
        raise UserError(f"a model in {quantization} cannot take a trainer's weights: {cure}.")


def check_config(vllm_config: Any) -> None:
    """Refuse settings of an engine under which latents would be lost or wrong. Runs before the start, and in every
    worker."""
    parallel = vllm_config.parallel_config

    def refuse(wrong: bool, what: str, cure: str) -> None:
        if wrong:
            raise UserError(f"latents do not work with {what}: {cure}.")

    refuse(vllm_config.speculative_config is not None, "speculative decoding", "leave speculative_config out")
    refuse(
        not vllm_config.use_v2_model_runner,
        "vLLM's old model runner, which ignores them without a word",
        "remove VLLM_USE_V2_MODEL_RUNNER=0, install Triton, and see vLLM's log for the setting that chose it",
    )
    refuse(parallel.pipeline_parallel_size > 1, "pipeline parallelism", "use tensor_parallel_size instead")
    refuse(
        getattr(parallel, "decode_context_parallel_size", 1) > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "context parallelism",
        "set decode_context_parallel_size and prefill_context_parallel_size to 1",
    )
    refuse(
        getattr(parallel, "enable_dbo", False) or getattr(parallel, "use_ubatching", False),
        "dual batch overlap",
        "set enable_dbo to false",
    )
    refuse(
        getattr(parallel, "enable_batch_sharded_sampling", False),
        "batch-sharded sampling",
        "set enable_batch_sharded_sampling to false",
    )
    refuse(
        vllm_config.model_config.runner_type != "generate", "pooling and embedding runs", "start the engine to generate"
    )


def check_embeddings(encoder_cache: Any, model_config: Any) -> None:
    """Without input embeddings vLLM would never ask for them, and latents would be ignored in silence."""
    if encoder_cache is None and not model_config.enable_prompt_embeds:
        raise UserError(
            "this engine takes token ids only, so latents could not be fed: set enable_prompt_embeds to true, or allow "
            "at least one image in limit_mm_per_prompt."
        )


def check_workers(rows: Sequence[Mapping[str, Any]], markers: FormatIds) -> None:
    """`rows` are the answers to `latent_status`. vLLM only logs it when a plugin fails in a worker."""
    for rank, row in enumerate(rows):
        if not row["ready"]:
            raise UserError(
                f"the rl-lvr plugin is not at work in vLLM's worker {rank}, which runs {row['model']}: reinstall "
                "rl-lvr so that its entry point is found, and see that VLLM_PLUGINS, if set, names rl_lvr."
            )
        if tuple(row["markers"]) != (markers.start, markers.slot, markers.end):
            raise UserError(
                f"worker {rank} reads the marker tokens as {row['markers']}, this process as "
                f"{[markers.start, markers.slot, markers.end]}: save the processor beside the model."
            )
