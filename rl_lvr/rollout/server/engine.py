"""Rollouts from a model that `rl-lvr serve` runs, behind the protocol of every engine. Docs: docs/serving.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any

import httpx
from torch import nn

from rl_lvr.errors import UserError
from rl_lvr.latents.format import LatentFormat
from rl_lvr.progress import task
from rl_lvr.rollout.server import protocol
from rl_lvr.rollout.types import Capability, Request, Rollout, Sampling, request_seeds
from rl_lvr.rollout.vllm import calls
from rl_lvr.rollout.vllm.settings import LatentSettings


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
        progress: bool = False,
    ) -> None:
        """`timeout`: seconds for one completion; None waits as long as the server lives."""
        if concurrency < 1:
            raise UserError(f"concurrency is {concurrency}; it must be at least 1.")
        self.url = url.rstrip("/")
        self.format = format
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.concurrency = concurrency
        self.progress = progress
        self.capabilities = frozenset(Capability)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._timeout = httpx.Timeout(timeout, connect=10.0)
        self._client = self._connect()
        self._settings = self._handshake()
        self.markers = self._settings.markers

    def _connect(self) -> httpx.Client:
        limits = httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
        try:
            return httpx.Client(base_url=self.url, headers=self._headers, timeout=self._timeout, limits=limits)
        except httpx.InvalidURL as error:
            raise UserError(f"{self.url!r} is no address ({error}): write http://HOST:PORT.") from error

    def _handshake(self) -> LatentSettings:
        status = self._ask("GET", protocol.STATUS)
        if status.get("version") != protocol.VERSION:
            raise UserError(
                f"{self.url} speaks version {status.get('version')} of the protocol, this rl-lvr version "
                f"{protocol.VERSION}: install the same rl-lvr on both sides."
            )
        settings = protocol.settings_from_json(status["settings"])
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
        for index, request in enumerate(requests):
            calls.check(index, request, self._settings)
        seeds = request_seeds(requests, sampling)
        bodies = [self._body(i, r, seed, sampling) for i, (r, seed) in enumerate(zip(requests, seeds, strict=True))]
        answers = self._answers(bodies)
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

    def _answers(self, bodies: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        pool = ThreadPoolExecutor(min(self.concurrency, len(bodies) or 1))
        try:
            futures = [pool.submit(self._call, index, body) for index, body in enumerate(bodies)]
            with task("generate", len(bodies), "requests", visible=self.progress) as bar:
                pending = set(futures)
                while pending:
                    done, pending = wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
                    bar.advance(len(done))
                    for future in done:
                        future.result()
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            self._client.close()  # what is under way ends here, and with it on the server
            self._client = self._connect()
            raise
        finally:
            pool.shutdown()

    def _call(self, index: int, body: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._ask("POST", protocol.ROLLOUT, body)
        except UserError as error:
            raise UserError(f"request {index}: {error}") from error

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            response = self._client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise UserError(
                f"{self.url} did not answer in time: is the server up and is timeout long enough?"
            ) from error
        except (httpx.HTTPError, httpx.UnsupportedProtocol) as error:
            raise UserError(f"{self.url} cannot be reached ({error}): is `rl-lvr serve` running there?") from error
        if response.status_code == 401:
            raise UserError(f"{self.url} wants another api_key.")
        try:
            data = response.json()
        except ValueError:
            data = None
        if not response.is_success or not isinstance(data, dict):
            raise UserError(f"{self.url}{path} answered {response.status_code}: {_words(data)}")
        return data

    # ---- weights and life

    def sync_weights(self, model: nn.Module) -> None:
        """Refused: a server keeps the weights that it was started with."""
        raise UserError(
            f"the weights of {self.url} cannot be changed from here: save a checkpoint and restart the server on it "
            "(rl-lvr serve FOLDER), or train with the engine 'vllm' or 'hf'."
        )

    def close(self) -> None:
        """The server goes on."""
        self._client.close()


def _words(data: Any) -> str:
    """The sentence in an error of vLLM's server."""
    error = data.get("error") if isinstance(data, dict) else None
    if isinstance(error, dict) and error.get("message"):
        return str(error["message"])
    return "that is no rl-lvr server." if error is None else str(error)
