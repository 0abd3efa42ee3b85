"""vLLM's asynchronous engine with one gate in front: whatever route a request came by, its latent part is checked here.

Its latents are fetched here as well, at its end or when its client is gone, so that workers keep nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.renderers.inputs.preprocess import parse_model_prompt
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from rl_lvr.errors import UserError
from rl_lvr.rollout.vllm import guards, wire
from rl_lvr.rollout.vllm.calls import Answer, answer_of, checked_args, named
from rl_lvr.rollout.vllm.settings import LatentSettings, settings_of
from rl_lvr.rollout.vllm.weights import Receipt, mismatch
from rl_lvr.serving.weights import REPAIR, Gate


@dataclass(frozen=True)
class Fetched:
    """The latents of one completion as the worker sends them (`history.Latents`)."""

    vectors: bytes
    marks: bytes
    uncut: bytes
    error: str | None


@dataclass(frozen=True)
class Finished:
    """A request that has ended, and the latents of each of its completions."""

    output: Any
    """vLLM's RequestOutput."""
    latents: list[Fetched]

    def answer(self, index: int, dtype: torch.dtype, width: int) -> Answer:
        fetched = self.latents[index]
        return answer_of(self.output, index, fetched.vectors, fetched.marks, fetched.uncut, dtype, width)


wanted: ContextVar[list[Finished] | None] = ContextVar("wanted", default=None)
"""Set by a handler that returns latents: the engine adds every request that ends within it."""


class LatentAsyncLLM(AsyncLLM):
    """AsyncLLM of a model with latents."""

    def __init__(self, vllm_config: Any, *args: Any, **more: Any) -> None:
        settings = settings_of(vllm_config)
        if settings is None:
            raise UserError(
                f"{vllm_config.model_config.model} does not say which latent format it was trained with: name one "
                "with --format."
            )
        guards.check_config(vllm_config)
        if vllm_config.parallel_config.data_parallel_size > 1:
            raise UserError("one server cannot hold latents of several replicas: start a server for each instead.")
        self.settings: LatentSettings = settings
        self.gate = Gate()
        super().__init__(vllm_config, *args, **more)

    @property
    def dtype(self) -> torch.dtype:
        return self.vllm_config.model_config.dtype

    @property
    def width(self) -> int:
        return self.settings.limits.hidden_size

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **more: Any
    ) -> AsyncGenerator[Any, None]:
        """A latent request that cannot be run, or needs more room than there is, is a VLLMValidationError (400)."""
        args = self._checked(prompt, sampling_params, request_id)
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(self.gate.request())
            except UserError as error:
                raise VLLMValidationError(str(error)) from error
            outputs = self._generated(args, prompt, sampling_params, request_id, **more)
            async for output in await stack.enter_async_context(aclosing(outputs)):
                yield output

    async def _generated(
        self, args: wire.LatentArgs, prompt: Any, sampling_params: Any, request_id: str, **more: Any
    ) -> AsyncGenerator[Any, None]:
        kept = wanted.get()
        if kept is None and not self._may_overflow(args, sampling_params):
            async with aclosing(super().generate(prompt, sampling_params, request_id, **more)) as outputs:
                async for output in outputs:
                    yield output
            return
        uid = uuid.uuid4().hex
        params = sampling_params.clone()
        params.extra_args = {**(params.extra_args or {}), wire.UID: uid}
        fetched = False
        try:
            async with aclosing(super().generate(prompt, params, request_id, **more)) as outputs:
                async for output in outputs:
                    if output.finished:
                        fetched = True
                        rows = await self.fetch(uid)
                        if kept is not None:
                            kept.append(Finished(output, rows))
                        for row in rows:
                            if row.error is not None:
                                raise VLLMValidationError(named(request_id, row.error))
                    yield output
        finally:
            if not fetched:
                await self.fetch(uid)

    async def rendered(self, prompt: dict[str, Any]) -> Any:
        """A prompt of token ids and images as vLLM's own routes hand it on: expanded and checked."""
        (rendered,) = await self.renderer.render_cmpl_async([parse_model_prompt(self.model_config, prompt)])
        return rendered

    def _checked(self, prompt: Any, params: Any, request_id: str) -> wire.LatentArgs:
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        if ids is None:
            raise VLLMValidationError("latents need a prompt of tokens: send text, messages or token ids.")
        extra = params.extra_args or {}
        self._check_numbers(params)
        if wire.UID in extra:
            raise VLLMValidationError(f"{wire.UID} is the server's own: ask for latents with return_latents instead.")
        try:
            return checked_args(
                request_id,
                extra,
                ids,
                params.seed or 0,
                self.settings,
                structured=params.structured_outputs is not None,
            )
        except UserError as error:
            raise VLLMValidationError(str(error)) from error

    def _check_numbers(self, params: Any) -> None:
        """What neither vLLM's tables nor ours can hold would end the engine, and with it everybody's requests."""
        vocabulary = self.settings.limits.vocabulary
        numbers = {"max_tokens": params.max_tokens, "min_tokens": params.min_tokens, "top_k": params.top_k}
        for name, value in numbers.items():
            if value is not None and value > wire.MOST:
                raise VLLMValidationError(f"{name} is {value}; it must be {wire.MOST} at most.")
        if params.seed is not None and not -wire.SEEDS <= params.seed < wire.SEEDS:
            raise VLLMValidationError(f"seed is {params.seed}; it must have 64 bits at most.")
        for token in params.stop_token_ids or ():
            if not 0 <= token < vocabulary:
                raise VLLMValidationError(f"stop_token_ids holds {token}; ids are 0 to {vocabulary - 1}.")

    def _may_overflow(self, args: wire.LatentArgs, params: Any) -> bool:
        """Whether a worker might have to cut this request off for want of room, which only a fetch can tell."""
        if not self.settings.thinks or not args.request.intervention.feeds_vectors:
            return False
        return params.max_tokens is None or params.max_tokens > self.settings.max_latents

    async def fetch(self, uid: str) -> list[Fetched]:
        """The latents of a uid, once, in the order of its completions; what is still running has no uid afterwards."""
        rows = (await self.collective_rpc("latent_pop", args=([uid],)))[0][uid]
        return [Fetched(vectors, marks, uncut, error) for _, _, vectors, marks, uncut, error in rows]

    async def status(self) -> list[dict[str, Any]]:
        """Of every worker; UserError if the plugin is not at work in one, or the weights are not whole."""
        self.gate.check()
        rows = await self.collective_rpc("latent_status")
        guards.check_workers(rows, self.settings.markers)
        return rows

    # ---- weights

    def takes_weights_of(self) -> dict[str, str]:
        """Which trainer's weights fit in."""
        return {"model_type": self.model_config.hf_config.model_type, "dtype": str(self.dtype).removeprefix("torch.")}

    async def take_weights(self, folder: Path, sent: Receipt) -> list[Receipt]:
        """Load the safetensors files of a folder into all workers; what each of them has afterwards.

        UserError if that is not what was sent; then nothing is generated until other weights have come whole.
        """
        async with self.gate.change():
            try:
                rows = await self.collective_rpc("latent_load_files", args=(str(folder),))
            except EngineDeadError:
                raise
            except Exception as error:  # vLLM passes on nothing of a worker's error but its words
                words = (str(error).strip().splitlines() or ["no reason given"])[0][:300]
                raise UserError(f"the weights do not fit this server's model ({words}): {REPAIR}") from error
            if not await self.reset_prefix_cache():
                raise UserError(f"vLLM kept prefixes of the old weights: {REPAIR}")
            await self.reset_encoder_cache()
            if (fault := mismatch(sent, rows)) is not None:
                raise UserError(f"{fault}; {REPAIR}")
        return [Receipt(*row) for row in rows]
