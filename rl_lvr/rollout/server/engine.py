"""Rollouts from a model that `rl-lvr serve` runs, behind the protocol of every engine. Docs: docs/serving.md."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx
import torch
from anyio.from_thread import start_blocking_portal
from torch import nn

from rl_lvr.errors import UserError
from rl_lvr.latents.format import LatentFormat
from rl_lvr.progress import task
from rl_lvr.rollout.server import protocol, weights
from rl_lvr.rollout.types import Capability, Request, Rollout, Sampling, request_seeds, with_start
from rl_lvr.rollout.vllm import calls
from rl_lvr.rollout.vllm.settings import LatentSettings
from rl_lvr.rollout.vllm.weights import mismatch
from rl_lvr.wrapping import unwrapped


class ServerRolloutEngine:
    """Generates on a server. The same rollouts as `VLLMRolloutEngine`, whose model, format and markers it checks."""

    def __init__(
        self,
        url: str,
        processor: Any,
        format: LatentFormat,  # noqa: A002
        *,
        api_key: str | None = None,
        concurrency: int = 64,
        timeout: float | None = None,
        weights_folder: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        """`timeout`: seconds for one completion; None waits as long as the server lives.

        `weights_folder`: where the server's --weights-folder is seen from here; without it the weights stay.
        """
        if weights_folder is not None and not Path(weights_folder).is_dir():
            raise UserError(
                f"there is no folder {weights_folder}: name the server's --weights-folder as seen from here."
            )
        if concurrency < 1:
            raise UserError(f"concurrency is {concurrency}; it must be at least 1.")
        self.url = url.rstrip("/")
        self.format = format
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.concurrency = concurrency
        self.progress = progress
        fixed = {Capability.WEIGHTS} if weights_folder is None else set()
        self.capabilities = frozenset(Capability) - {Capability.SPHERICAL_NOISE} - fixed
        self._shared = None if weights_folder is None else Path(weights_folder)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._timeout = httpx.Timeout(timeout, connect=10.0, pool=None)
        self._settings = self._handshake()
        self.markers = self._settings.markers
        self.max_latents = self._settings.max_latents
        """Room for the latents of one completion."""

    def _handshake(self) -> LatentSettings:
        (status,) = self._ask("GET", protocol.STATUS, [None])
        if status.get("version") != protocol.VERSION:
            raise UserError(
                f"{self.url} speaks version {status.get('version')} of the protocol, this rl-lvr version "
                f"{protocol.VERSION}: install the same rl-lvr on both sides."
            )
        settings = protocol.settings_from_json(status["settings"])
        takes: dict[str, str] | None = status.get("weights")
        self._takes = takes or {}
        if self._shared is not None and takes is None:
            raise UserError(f"{self.url} keeps its weights: restart it with --weights-folder DIR.")
        served = settings.markers.format
        if served != self.format:
            raise UserError(f"{self.url} serves latent format {served}, this engine was given {self.format}.")
        mine = self.format.bind(self.tokenizer)
        special = frozenset({*self.tokenizer.all_special_ids, *settings.eos})
        theirs = settings.markers
        if (mine.start, mine.slot, mine.end) != (theirs.start, theirs.slot, theirs.end) or (
            special != settings.limits.special_ids
        ):
            raise UserError(
                f"{self.url} serves {status['model']!r} with another tokenizer than this processor's: load the "
                "processor of the checkpoint that is served."
            )
        return settings

    # ---- rollouts

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Rollout]:
        """One rollout per request, in their order. If one fails, or the caller is interrupted, all are ended."""
        requests = with_start(requests, sampling)
        for index, request in enumerate(requests):
            calls.check(index, request, self._settings)
        seeds = request_seeds(requests, sampling)
        bodies = [self._body(i, r, seed, sampling) for i, (r, seed) in enumerate(zip(requests, seeds, strict=True))]
        answers = self._ask("POST", protocol.ROLLOUT, bodies)
        width = self._settings.limits.hidden_size
        return [
            calls.rollout_of(
                index, request, seed, sampling, self._settings, protocol.answer_from_json(answers[index], width)
            )
            for index, (request, seed) in enumerate(zip(requests, seeds, strict=True))
        ]

    def _body(self, index: int, request: Request, seed: int, sampling: Sampling) -> dict[str, Any]:
        prompt = calls.prompt_ids(index, request, self._settings)
        return protocol.call_to_json(
            prompt, request.pictures, calls.sampling_fields(request, seed, sampling, self._settings)
        )

    def _ask(self, method: str, path: str, bodies: Sequence[Mapping[str, Any] | None]) -> list[dict[str, Any]]:
        """In an event loop of its own, which can cut connections: a thread that waits for an answer cannot be woken."""
        with start_blocking_portal() as portal:
            answers: Future[list[dict[str, Any]]] = portal.start_task_soon(self._ask_all, method, path, bodies)
            try:
                return answers.result()
            except BaseException:
                answers.cancel()
                raise

    async def _ask_all(
        self, method: str, path: str, bodies: Sequence[Mapping[str, Any] | None]
    ) -> list[dict[str, Any]]:
        limits = httpx.Limits(max_connections=self.concurrency)
        async with httpx.AsyncClient(headers=self._headers, timeout=self._timeout, limits=limits) as client:
            tasks = [
                asyncio.create_task(self._ask_one(client, method, path, body, index))
                for index, body in enumerate(bodies)
            ]
            try:
                with task("generate", len(bodies), "requests", visible=self.progress) as bar:
                    for done in asyncio.as_completed(tasks):
                        await done
                        bar.advance()
            finally:
                for one in tasks:
                    one.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return [one.result() for one in tasks]

    async def _ask_one(
        self, client: httpx.AsyncClient, method: str, path: str, body: Mapping[str, Any] | None, index: int
    ) -> dict[str, Any]:
        who = f"request {index}: " if path == protocol.ROLLOUT else ""
        try:
            response = await client.request(method, self.url + path, json=body)
        except httpx.TimeoutException as error:
            raise UserError(f"{who}{self.url} did not answer in time: is it up, and is timeout long enough?") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(f"{who}{self.url} cannot be reached ({error}): is `rl-lvr serve` running there?") from error
        if response.status_code == 401:
            raise UserError(f"{self.url} wants another api_key.")
        try:
            data = response.json()
        except ValueError:
            data = None
        if not response.is_success or not isinstance(data, dict):
            raise UserError(f"{who}{self.url} answered {response.status_code}: {_words(data)}")
        return data

    # ---- weights and life

    def sync_weights(self, model: nn.Module) -> None:
        """Take over the weights of a trainer's model, through the folder that is shared with the server.

        All processes of a trainer call this at the same time, when no requests run. The first of them does it.
        """
        if self._shared is None:
            raise UserError(
                f"the weights of {self.url} cannot be changed without a folder that both sides see: give this engine a "
                "weights_folder and start the server with --weights-folder, or save a checkpoint and restart the "
                "server on it."
            )
        mine, theirs = unwrapped(model).config.model_type, self._takes["model_type"]
        if mine != theirs:
            raise UserError(f"a {mine} model's weights cannot go into {self.url}, which serves a {theirs} model.")
        dtype, shared = getattr(torch, self._takes["dtype"]), self._shared

        def send() -> None:
            with weights.written(model, dtype, shared) as (name, sent):
                (answer,) = self._ask("POST", protocol.WEIGHTS, [protocol.weights_to_json(name, sent)])
            if (fault := mismatch(sent, answer["workers"])) is not None:
                raise RuntimeError(f"{fault}.")

        weights.by_the_first(send, model)

    def close(self) -> None:
        """Nothing is held here, and the server goes on."""


def _words(data: Any) -> str:
    """The sentence in an error of vLLM's server."""
    error = data.get("error") if isinstance(data, dict) else None
    if isinstance(error, dict) and error.get("message"):
        return str(error["message"])
    return "that is no rl-lvr server." if error is None else str(error)
