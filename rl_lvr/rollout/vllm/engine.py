"""Rollouts on vLLM behind the protocol of every engine. Docs: docs/engines.md."""

from __future__ import annotations

import itertools
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.latents.format import LatentFormat
from rl_lvr.latents.inject import unwrapped
from rl_lvr.models.loading import checkpoint_folder
from rl_lvr.progress import task
from rl_lvr.rollout.checks import check_request, starts_with_own
from rl_lvr.rollout.types import Capability, Request, Rollout, Sampling, StopReason, request_seeds
from rl_lvr.rollout.vllm import guards, selftest, wire
from rl_lvr.rollout.vllm.prompts import collapse
from rl_lvr.rollout.vllm.settings import MAX_LATENTS, as_config, check_room, settings_for_folder
from rl_lvr.rollout.vllm.slots import FED, FORCED
from rl_lvr.rollout.vllm.weights import Receipt, checkpoint_weights
from rl_lvr.rollout.vllm.worker import EXTENSION


class VLLMRolloutEngine:
    """Generates with a vLLM that this object starts. Tokens at temperature above 0 are vLLM's own draws."""

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
        progress: bool = False,
        engine_args: dict[str, Any] | None = None,
    ) -> None:
        guards.check_version()
        guards.check_hooks()
        folder = checkpoint_folder(model)
        self.format = format
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.progress = progress
        self.capabilities = frozenset(Capability)
        self._settings = settings_for_folder(
            folder, format, self.tokenizer, max_latents=max_latents, max_positions=max_model_len
        )
        self.markers = self._settings.markers
        self._names = (f"{uuid.uuid4().hex[:8]}-{i}" for i in itertools.count())

        from vllm import LLM

        arguments: dict[str, Any] = {
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel_size,
            "seed": seed,
            "logprobs_mode": "processed_logprobs",
            "disable_log_stats": True,
            **({"enable_prompt_embeds": True} if self._settings.text_only else {}),
            **({} if gpu_memory_utilization is None else {"gpu_memory_utilization": gpu_memory_utilization}),
            **(engine_args or {}),
        }
        arguments["additional_config"] = {
            **(arguments.get("additional_config") or {}),
            **as_config(format, max_latents),
        }
        self.llm = LLM(model=str(folder), worker_extension_cls=EXTENSION, **arguments)
        guards.check_workers(self.llm.collective_rpc("latent_status"), self.markers)
        selftest.run(self.llm, self._settings)

    # ---- rollouts

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """One rollout per request, in their order."""
        for index, request in enumerate(requests):
            self._check(index, request)
        if not requests:
            return []
        seeds = request_seeds(requests, sampling)
        uids = [next(self._names) for _ in requests]
        pairs = list(zip(requests, seeds, uids, strict=True))
        prompts = [self._prompt(index, request) for index, request in enumerate(requests)]
        params = [self._params(request, seed, uid, sampling) for request, seed, uid in pairs]
        ids: list[str] = []
        try:
            ids = self.llm.enqueue(prompts, params, use_tqdm=False)
            outputs = self._run(len(ids))
            found = self.llm.collective_rpc("latent_pop", args=(uids,))[0]
        except BaseException:
            self._discard(ids, uids)
            raise
        return [
            self._rollout(index, request, seed, sampling, output, found[uid])
            for index, ((request, seed, uid), output) in enumerate(zip(pairs, outputs, strict=True))
        ]

    def _run(self, count: int) -> list[Any]:
        """Step until everything is done; outputs in the order in which the requests were added."""
        engine, outputs = self.llm.llm_engine, []
        with task("generate", count, "requests", visible=self.progress) as bar:
            while engine.has_unfinished_requests():
                done = [output for output in engine.step() if output.finished]
                outputs += done
                bar.advance(len(done))
        return sorted(outputs, key=lambda output: int(output.request_id))

    def _check(self, index: int, request: Request) -> None:
        check_request(index, request, self.markers, self._settings.limits)
        try:
            check_room(request, self._settings)
        except UserError as error:
            raise UserError(f"request {index}: {error}") from error
        if request.images and not request.pictures:
            raise UserError(
                f"request {index} has images but no pictures: vLLM runs the image processor itself, so give the "
                "original images too (Request.pictures)."
            )
        if len(request.pictures) > 1 and self._settings.single_picture:
            raise UserError(
                f"request {index} has {len(request.pictures)} pictures: vLLM processes several images of this family "
                "differently from transformers, so give one per request."
            )
        if request.pictures and not request.images:
            raise UserError(f"request {index} has pictures but no images: give what the processor made of them too.")

    def _prompt(self, index: int, request: Request) -> dict[str, Any]:
        ids = list(request.prompt_ids)
        if starts_with_own(request, self.markers):
            ids.pop()
        if not request.pictures:
            return {"prompt_token_ids": ids}
        image = self._settings.limits.image_token
        return {
            "prompt_token_ids": collapse(index, ids, image, len(request.pictures), self._settings.frame),
            "multi_modal_data": {"image": list(request.pictures)},
        }

    def _params(self, request: Request, seed: int, uid: str, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        opens = starts_with_own(request, self.markers)
        args = wire.LatentArgs(request, sampling.sigma, uid, opens)
        return SamplingParams(
            max_tokens=sampling.max_tokens + opens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=seed,
            stop=list(sampling.stop),
            stop_token_ids=sorted({*self._settings.eos, *sampling.stop_token_ids}),
            detokenize=bool(sampling.stop),
            logprobs=0,
            extra_args=wire.encode(args),
        )

    def _rollout(
        self, index: int, request: Request, seed: int, sampling: Sampling, output: Any, rows: list[list[Any]]
    ) -> Rollout:
        if len(rows) != 1:
            raise RuntimeError(f"request {index}: {len(rows)} latent histories came back, expected 1.")
        _, _, data, marks_data, error = rows[0]
        if error is not None:
            raise UserError(f"request {index}: {error}")
        opens = int(starts_with_own(request, self.markers))
        prompt = list(request.prompt_ids)
        if list(output.prompt_token_ids) != prompt[: len(prompt) - opens]:
            raise UserError(
                f"request {index}: vLLM's image processor makes {len(output.prompt_token_ids)} prompt tokens of its "
                f"pictures, the request has {len(prompt)}: build prompt_ids and images with the checkpoint's own "
                "processor from these pictures, one row at a time."
            )
        completion = output.outputs[0]
        tokens = list(completion.token_ids)
        logprobs = [entry[token].logprob for entry, token in zip(completion.logprobs, tokens, strict=True)]
        first = len(prompt) - opens
        marks = torch.from_numpy(np.frombuffer(marks_data, np.int8).copy())[: first + len(tokens)]
        places = (marks & FED).nonzero()[:, 0].tolist()
        vectors = self._vectors(data)[: len(places)]
        if request.prompt_latents is not None:
            given, where = request.prompt_latents
            vectors = torch.cat([given.to("cpu", vectors.dtype), vectors])
            places = [*(int(place) for place in where), *places]
        own = self._settings.thinks and request.intervention.value == "own"
        return Rollout(
            prompt_ids=tuple(prompt),
            completion_ids=tuple(tokens[opens:]),
            logprobs=torch.tensor(logprobs[opens:], dtype=torch.float32),
            forced=(marks[len(prompt) :] & FORCED) > 0,
            latents=vectors,
            latent_positions=tuple(places),
            stop_reason=_stop_reason(completion),
            seed=seed,
            sigma=sampling.sigma if own else 0.0,
            intervention=request.intervention,
        )

    def _vectors(self, data: bytes) -> Tensor:
        flat = torch.frombuffer(bytearray(data), dtype=self.dtype) if data else torch.empty(0, dtype=self.dtype)
        return flat.reshape(-1, self._settings.limits.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.llm_engine.vllm_config.model_config.dtype

    def _discard(self, ids: list[str], uids: list[str]) -> None:
        """Leave nothing of a call that failed."""
        self.llm.llm_engine.abort_request(ids, internal=True)
        self.llm.collective_rpc("latent_pop", args=(uids,))

    # ---- weights and life

    def sync_weights(self, model: nn.Module) -> None:
        """Take over the weights of a trainer's model in this process; adapters are merged in for the copy."""
        mine, theirs = self.llm.llm_engine.vllm_config.model_config.hf_config, unwrapped(model).config
        if mine.model_type != theirs.model_type:
            raise UserError(f"a {theirs.model_type} model's weights cannot go into a {mine.model_type} engine.")
        with checkpoint_weights(model, self.dtype) as (named, sent):
            if _in_process(self.llm):
                rows = self.llm.collective_rpc("latent_load", args=(named,))
            else:
                with tempfile.TemporaryDirectory() as folder:
                    path = str(Path(folder) / "weights.safetensors")
                    save_file({name: value.cpu().contiguous() for name, value in named}, path)
                    rows = self.llm.collective_rpc("latent_load_file", args=(path,))
        self.llm.reset_prefix_cache()
        for rank, row in enumerate(rows):
            got = Receipt(*row)
            if not sent.agrees(got):
                raise RuntimeError(f"worker {rank} did not take over the weights: sent {sent}, it has {got}.")

    def sleep(self, level: int = 1) -> None:
        """Give memory back until `wake`; level 2 drops the weights, so sync them after waking."""
        self.llm.sleep(level)

    def wake(self) -> None:
        self.llm.wake_up()

    def close(self) -> None:
        """Stop vLLM and free its memory."""
        self.llm.llm_engine.engine_core.shutdown()


def _in_process(llm: Any) -> bool:
    """Whether the worker lives here, so that tensors need not travel."""
    return hasattr(llm.llm_engine.engine_core, "engine_core") and llm.get_world_size() == 1


def _stop_reason(completion: Any) -> StopReason:
    if completion.finish_reason == "length":
        return StopReason.LENGTH
    if completion.finish_reason == "stop":
        return StopReason.STOP if isinstance(completion.stop_reason, str) else StopReason.EOS
    raise RuntimeError(f"vLLM ended a request with {completion.finish_reason!r}.")
