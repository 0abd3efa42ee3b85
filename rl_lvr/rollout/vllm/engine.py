"""Rollouts on vLLM behind the protocol of every engine. Docs: docs/engines.md."""

from __future__ import annotations

import itertools
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rl_lvr.errors import UserError
from rl_lvr.finite import require_finite_files
from rl_lvr.latents.format import LatentFormat
from rl_lvr.models.loading import checkpoint_folder
from rl_lvr.progress import task
from rl_lvr.rollout.types import Capability, Request, Rollout, Sampling, request_seeds, with_start
from rl_lvr.rollout.vllm import calls, guards, memory, plugin, selftest
from rl_lvr.rollout.vllm.colocated import beside_a_trainer, leave
from rl_lvr.rollout.vllm.settings import MAX_LATENTS, as_config, settings_for_folder
from rl_lvr.rollout.vllm.starting import one_sentence
from rl_lvr.rollout.vllm.weights import Receipt, checkpoint_weights, mismatch, write_files
from rl_lvr.rollout.vllm.worker import EXTENSION
from rl_lvr.wrapping import unwrapped


class VLLMRolloutEngine:
    """Generates with a vLLM that this object starts."""

    def __init__(
        self,
        model: str | Path,
        processor: Any,
        format: LatentFormat,  # noqa: A002
        *,
        max_model_len: int,
        max_num_seqs: int = 16,
        max_latents: int = MAX_LATENTS,
        dtype: str = "auto",
        gpu_memory_utilization: float | None = None,
        tensor_parallel_size: int = 1,
        seed: int = 0,
        colocated: bool = False,
        progress: bool = False,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        """`colocated`: in this process, beside a trainer, whose weights then need not travel. See `colocated.py`."""
        guards.check_version()
        guards.check_runtime()
        guards.check_hooks()
        plugin.register()  # vLLM has loaded its plugins before, if a family has joined since
        folder = checkpoint_folder(model)
        require_finite_files(folder)
        self.format = format
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.progress = progress
        self.capabilities = frozenset(Capability) - {Capability.SPHERICAL_NOISE}
        self.settings = settings_for_folder(
            folder, format, self.tokenizer, max_latents=max_latents, max_positions=max_model_len
        )
        self.markers = self.settings.markers
        self._fault: str | None = None
        """Why nothing can be generated, and what to do about it."""
        self._names = (f"{uuid.uuid4().hex[:8]}-{i}" for i in itertools.count())

        from vllm import LLM
        from vllm.usage.usage_lib import UsageContext

        arguments: dict[str, Any] = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel_size,
            "seed": seed,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            **({"enable_prompt_embeds": True} if self.settings.text_only else {}),
            **({} if gpu_memory_utilization is None else {"gpu_memory_utilization": gpu_memory_utilization}),
            **(engine_args or {}),
        }
        arguments["additional_config"] = {
            **(arguments.get("additional_config") or {}),
            **as_config(format, max_latents),
        }
        self._guest = torch.distributed.is_initialized()
        arguments |= {"model": str(folder), "worker_extension_cls": EXTENSION}
        with beside_a_trainer(arguments) if colocated else nullcontext():
            config = guards.engine_config(_engine_args(arguments), UsageContext.LLM_CLASS)
            if config.model_config.quantization is not None:
                self.capabilities -= {Capability.WEIGHTS}
            if not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & arguments.keys():
                arguments["kv_cache_memory_bytes"] = memory.cache_size(config)
            with one_sentence(processes=not colocated):
                self.llm = LLM(**arguments)
        guards.check_workers(self.llm.collective_rpc("latent_status"), self.markers)
        selftest.run(self.llm, self.settings)

    # ---- rollouts

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """One rollout per request, in their order."""
        if self._fault is not None:
            raise UserError(self._fault)
        requests = with_start(requests, sampling)
        for index, request in enumerate(requests):
            calls.check(index, request, self.settings)
        if not requests:
            return []
        seeds = request_seeds(requests, sampling)
        uids = [next(self._names) for _ in requests]
        prompts = [self._prompt(index, request) for index, request in enumerate(requests)]
        params = [self._params(*row, sampling) for row in zip(requests, seeds, uids, strict=True)]
        try:
            self.llm.enqueue(prompts, params, use_tqdm=False)
            outputs = self._run(len(uids))
            found = self.llm.collective_rpc("latent_pop", args=(uids,))[0]
        except BaseException:
            self._discard(uids)
            raise
        answers = [
            self.answer(i, output, _only(i, found[uid]))
            for i, (output, uid) in enumerate(zip(outputs, uids, strict=True))
        ]
        return [
            calls.rollout_of(i, request, seed, sampling, self.settings, answer)
            for i, (request, seed, answer) in enumerate(zip(requests, seeds, answers, strict=True))
        ]

    def _run(self, count: int) -> list[Any]:
        """Step until everything is done, in the engine's own precision whatever a trainer around it has switched on."""
        with torch.autocast(self.llm.llm_engine.vllm_config.device_config.device_type, enabled=False):
            return self._finished(count)

    def _finished(self, count: int) -> list[Any]:
        """Outputs in the order in which the requests were added."""
        engine, outputs = self.llm.llm_engine, []
        with task("generate", count, "requests", visible=self.progress) as bar:
            while engine.has_unfinished_requests():
                done = [output for output in engine.step() if output.finished]
                outputs += done
                bar.advance(len(done))
        return sorted(outputs, key=lambda output: int(output.request_id))

    def _prompt(self, index: int, request: Request) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": calls.prompt_ids(index, request, self.settings)}
        if request.pictures:
            prompt["multi_modal_data"] = {"image": list(request.pictures)}
        return prompt

    def _params(self, request: Request, seed: int, uid: str, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(**calls.sampling_fields(request, seed, sampling, self.settings, uid))

    def answer(self, index: int, output: Any, row: list[Any], which: int = 0) -> calls.Answer:
        """Completion number `which` of vLLM's `output` for request `index`, with its latents (`history.Latents`)."""
        _, _, vectors, marks, uncut, error = row
        if error is not None:
            raise UserError(calls.named(index, error))
        return calls.answer_of(output, which, vectors, marks, uncut, self.dtype, self.settings.limits.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.llm_engine.vllm_config.model_config.dtype

    def _discard(self, uids: list[str]) -> None:
        """Leave nothing of a call that failed or was interrupted: whatever this vLLM still works on is its own."""
        engine = self.llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        self.llm.collective_rpc("latent_pop", args=(uids,))

    # ---- weights and life

    def sync_weights(self, model: nn.Module) -> None:
        """Take over the weights of a trainer's model in this process; adapters are merged in for the copy.

        If this fails nothing is generated until it has succeeded: nobody knows what the weights are then.
        """
        config = self.llm.llm_engine.vllm_config.model_config
        cure = "leave quantization out of engine_args, and start from an unquantized checkpoint"
        guards.refuse_quantized(config.quantization, cure)
        mine, theirs = config.hf_config, unwrapped(model).config
        if mine.model_type != theirs.model_type:
            raise UserError(f"a {theirs.model_type} model's weights cannot go into a {mine.model_type} engine.")
        sent = Receipt()
        named = checkpoint_weights(model, self.dtype, sent)
        self._fault = (
            "the last sync_weights failed, so nobody knows which weights this engine has: call sync_weights again, or "
            "start another engine."
        )
        try:
            if _in_process(self.llm):
                rows = self.llm.collective_rpc("latent_load", args=(named,))
            else:
                with tempfile.TemporaryDirectory() as folder:
                    write_files(named, Path(folder))
                    rows = self.llm.collective_rpc("latent_load_files", args=(folder,))
        finally:
            for _ in named:  # what was not loaded counts as sent, and under ZeRO-3 other ranks wait for this one
                pass
            emptied = self.llm.reset_prefix_cache()
            self.llm.llm_engine.reset_encoder_cache()
        if not emptied:
            raise RuntimeError("vLLM kept prefixes of the old weights: requests are still running.")
        if (fault := mismatch(sent, rows)) is not None:
            raise RuntimeError(f"{fault}.")
        self._fault = None

    def sleep(self, level: int = 1) -> None:
        """Give memory back until `wake`; level 2 drops the weights, so sync them after waking."""
        self.llm.sleep(level)
        if level > 1:
            self._fault = (
                f"the engine has slept at level {level}, which drops its weights: call sync_weights after wake, or "
                "sleep at level 1."
            )

    def wake(self) -> None:
        self.llm.wake_up()

    def close(self) -> None:
        """Stop vLLM and free its memory."""
        if self._guest and _in_process(self.llm):
            leave(self.llm.llm_engine.engine_core)
        else:
            self.llm.llm_engine.engine_core.shutdown()


def _engine_args(arguments: dict[str, Any]) -> Any:
    """What `LLM(**arguments)` makes of its arguments, as far as they are the engine's."""
    from vllm.engine.arg_utils import EngineArgs

    names = {field.name for field in fields(EngineArgs)}
    known = {name: value for name, value in arguments.items() if name in names and value is not None}
    if isinstance(known.get("compilation_config"), int):  # LLM's short form
        known["compilation_config"] = {"mode": known["compilation_config"]}
    return EngineArgs(**known)


def _only(index: int, rows: list[list[Any]]) -> list[Any]:
    if len(rows) != 1:
        raise RuntimeError(f"request {index}: {len(rows)} latent histories came back, expected 1.")
    return rows[0]


def _in_process(llm: Any) -> bool:
    """Whether the worker lives here, so that tensors need not travel."""
    return hasattr(llm.llm_engine.engine_core, "engine_core") and llm.get_world_size() == 1
