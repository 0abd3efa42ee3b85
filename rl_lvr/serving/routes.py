"""What is added to vLLM's app: three routes of our own, and latents in vLLM's answers where they are asked for."""

from __future__ import annotations

import asyncio
import copy
import functools
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Body, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from vllm import SamplingParams
from vllm.entrypoints.serve.utils.api_utils import with_cancellation
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.exceptions import EngineDeadError

from rl_lvr.errors import UserError
from rl_lvr.latents.text import ControlTokens
from rl_lvr.rollout.server import protocol
from rl_lvr.rollout.vllm import wire
from rl_lvr.rollout.vllm.calls import Answer, check_seed
from rl_lvr.rollout.vllm.slots import FED
from rl_lvr.rollout.vllm.weights import Receipt
from rl_lvr.serving.engine import Finished, LatentAsyncLLM, wanted
from rl_lvr.serving.weights import sent_folder

RETURN = "return_latents"
"""Field of a completion or chat request."""

router = APIRouter()


def attach(app: FastAPI, shared: Path | None) -> None:
    """Add the routes; the state of `app` is ready. `shared`: where weights may be loaded from."""
    app.state.weights_folder = shared
    app.include_router(router)
    engine, state = app.state.engine_client, app.state
    # On the handler objects that vLLM made, because its routes look them up in the state and take no hook.
    refuse_control_tokens(engine)
    completion, chat = state.openai_serving_completion, state.openai_serving_chat
    completion.create_completion = returning(engine, completion.create_completion)
    chat.create_chat_completion = returning(engine, chat.create_chat_completion)


# ---- our own routes


@router.get(protocol.STATUS)
async def status(raw_request: Request) -> JSONResponse:
    """What is served, and whether latents work in every worker: 503 if not."""
    engine: LatentAsyncLLM = raw_request.app.state.engine_client
    try:
        await engine.check_health()
        workers = await engine.status()
    except (EngineDeadError, UserError) as error:
        message = str(error) or "vLLM has stopped working: start the server again."
        return JSONResponse({"ready": False, "error": {"message": message, "code": 503}}, status_code=503)
    about = {
        "ready": True,
        "version": protocol.VERSION,
        "model": raw_request.app.state.openai_serving_models.base_model_paths[0].name,
        "settings": protocol.settings_to_json(engine.settings),
        "weights": None if raw_request.app.state.weights_folder is None else engine.takes_weights_of(),
        "workers": [{name: worker[name] for name in ("tables", "counters")} for worker in workers],
    }
    return JSONResponse(about)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Parsed = TypeVar("Parsed", bound=_Body)


class SamplingFields(_Body):
    """Those of vLLM's SamplingParams that `calls.sampling_fields` makes."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    detokenize: bool = False
    logprobs: int = 0
    extra_args: dict[str, Any] = {}


class Weights(_Body):
    """The body of `protocol.weights_to_json`."""

    name: str
    tensors: int
    checksum: float
    rows: float
    head: float


class Call(_Body):
    """The body of a rollout call."""

    prompt_token_ids: list[int]
    pictures: list[str] = []
    sampling_params: SamplingFields


@router.post(protocol.ROLLOUT)
@with_cancellation
async def rollout(body: Annotated[Any, Body()], raw_request: Request) -> JSONResponse:
    """One completion with everything that a `Rollout` holds."""
    engine: LatentAsyncLLM = raw_request.app.state.engine_client
    call = _parsed(Call, body)
    try:
        if call.sampling_params.seed is not None:
            check_seed(call.sampling_params.seed)
        params = SamplingParams(**call.sampling_params.model_dump(), output_kind=RequestOutputKind.FINAL_ONLY)
        prompt: dict[str, Any] = {"prompt_token_ids": call.prompt_token_ids}
        if call.pictures:
            pictures = await asyncio.to_thread(protocol.pictures_from_json, call.pictures)
            prompt["multi_modal_data"] = {"image": pictures}
    except (UserError, ValueError) as error:
        raise VLLMValidationError(str(error)) from error
    rendered = await engine.rendered(prompt)
    found: list[Finished] = []
    wanted.set(found)
    async for _ in engine.generate(rendered, params, f"rollout-{uuid.uuid4().hex}"):
        pass
    return JSONResponse(protocol.answer_to_json(found[0].answer(0, engine.dtype, engine.width)))


@router.post(protocol.WEIGHTS)
async def weights(body: Annotated[Any, Body()], raw_request: Request) -> JSONResponse:
    """Take over the weights of a folder in --weights-folder; answers the receipt of every worker."""
    engine: LatentAsyncLLM = raw_request.app.state.engine_client
    new = _parsed(Weights, body)
    try:
        folder = sent_folder(raw_request.app.state.weights_folder, new.name)
        receipts = await engine.take_weights(folder, Receipt(new.tensors, new.checksum, new.rows, new.head))
    except UserError as error:
        raise VLLMValidationError(str(error)) from error
    return JSONResponse({"workers": [receipt.as_row() for receipt in receipts]})


def _parsed(kind: type[Parsed], body: Any) -> Parsed:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise VLLMValidationError(f"{where}: {first['msg'].lower()}.") from error


# ---- vLLM's routes


def refuse_control_tokens(engine: LatentAsyncLLM) -> None:
    """No text of a chat acts as a control token, and no marker of the format comes back as text.

    Every chat-like route renders its messages in one method of the renderer; a raw prompt of /v1/completions is the
    caller's own.
    """
    markers, renderer = engine.settings.markers, engine.renderer
    renderer.tokenizer.add_special_tokens(
        {"additional_special_tokens": list(markers.format.tokens)}, replace_extra_special_tokens=False
    )
    # Its own copy: vLLM's threads use the other one meanwhile.
    control = ControlTokens(copy.deepcopy(renderer.tokenizer), markers, markers.placeholders)
    render = renderer.render_chat_async

    @functools.wraps(render)
    async def checked(conversations: Any, chat_params: Any, *args: Any, **more: Any) -> Any:
        found = None
        for messages in conversations:
            found = found or control.in_messages(messages)
        found = found or control.in_value(chat_params.chat_template_kwargs, "chat_template_kwargs")
        if found is not None:
            raise VLLMValidationError(
                f"{found[0]} holds the control token {found[1]!r}, which would act as one: spell it differently."
            )
        return await render(conversations, chat_params, *args, **more)

    renderer.render_chat_async = checked


def returning(engine: LatentAsyncLLM, handler: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """`handler` of vLLM, which then puts `latents` into every choice of a request with `return_latents`."""

    @functools.wraps(handler)
    async def handle(request: Any, raw_request: Request | None = None) -> Any:
        asked = _asked(request)
        if not asked:
            return await handler(request, raw_request)
        found: list[Finished] = []
        token = wanted.set(found)
        try:
            response = await handler(request, raw_request)
        finally:
            wanted.reset(token)
        for choice in getattr(response, "choices", ()):
            choice.latents = _latents(found[0].answer(choice.index, engine.dtype, engine.width))
        return response

    return handle


def _asked(request: Any) -> bool:
    """Whether latents are to be returned; faults of the request that vLLM would overlook are refused."""
    extra = request.model_extra or {}
    for name in extra:
        if name in wire.KEYS:
            raise VLLMValidationError(f"{name} belongs into vllm_xargs, or it would be overlooked.")
    if request.use_beam_search:
        raise VLLMValidationError("beam search would drop what vllm_xargs say of latents: leave use_beam_search out.")
    asked = extra.get(RETURN, False)
    if not isinstance(asked, bool):
        raise VLLMValidationError(f"{RETURN} is {asked!r}; it must be true or false.")
    if asked and request.stream:
        raise VLLMValidationError(f"{RETURN} goes with whole answers: leave stream out.")
    prompt = getattr(request, "prompt", None)
    if asked and isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        raise VLLMValidationError(f"{RETURN} goes with one prompt per request: send the {len(prompt)} prompts singly.")
    return asked


def _latents(answer: Answer) -> dict[str, Any]:
    """What a client finds in a choice. Positions count from the first token of the prompt."""
    positions = (answer.marks & FED).nonzero()[:, 0].tolist()
    vectors = answer.vectors[: len(positions)]
    return {"vectors": wire.to_text(vectors), "width": vectors.shape[1], "positions": positions}
