"""Starts the server: vLLM's arguments, its engine with the plugin checked, its app with our routes, and a clean end."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_lvr.errors import UserError

if TYPE_CHECKING:
    from rl_lvr.latents.format import LatentFormat

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class ServeOptions:
    """What `rl-lvr serve` itself understands; the rest are vLLM's own flags."""

    model: str
    format: str | None = None
    k: int | None = None
    max_latents: int | None = None
    host: str = LOOPBACK
    port: int = 8000
    weights_folder: str | None = None
    """Whoever may use the server may also load weights that lie here."""


def serve(options: ServeOptions, flags: Sequence[str]) -> int:
    """Run until interrupted. What can be refused without vLLM is refused before it is imported."""
    shared = None if options.weights_folder is None else Path(options.weights_folder).resolve()
    if shared is not None and not shared.is_dir():
        raise UserError(f"there is no folder {shared}: make it, or name another with --weights-folder.")
    with bound_socket(options.host, options.port) as sock:
        arguments = vllm_arguments(options, flags, sock.getsockname()[1])
        try:
            return asyncio.run(_run(arguments, sock, shared))
        except _Interrupted:
            raise KeyboardInterrupt from None


def say(sentence: str) -> None:
    print(f"rl-lvr: {sentence}", file=sys.stderr, flush=True)


@contextmanager
def bound_socket(host: str, port: int) -> Any:
    """A socket of this address, taken before minutes are spent on a model. Port 0: any that is free."""
    try:
        if not 0 <= port < 2**16:
            raise OverflowError("ports are 0 to 65535")
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, OverflowError) as error:
        raise UserError(f"{host!r}, port {port} is no address ({error}): see --host and --port.") from error
    with socket.socket(family, kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(address)
        except OSError as error:
            raise UserError(
                f"port {port} of {host} cannot be had ({error.strerror}): choose another with --port, or stop the "
                "program that holds it."
            ) from error
        yield sock


# ---- arguments


def vllm_arguments(options: ServeOptions, flags: Sequence[str], port: int) -> Any:
    """The arguments of `vllm serve` with those that latents need."""
    from rl_lvr.latents.format import LatentFormat, choose_format
    from rl_lvr.models.loading import checkpoint_folder
    from rl_lvr.models.registry import family_class
    from rl_lvr.rollout.vllm import guards
    from rl_lvr.rollout.vllm.settings import MAX_LATENTS, as_config
    from rl_lvr.rollout.vllm.worker import EXTENSION

    guards.check_version()
    guards.check_runtime()
    folder = checkpoint_folder(options.model)
    changes = {} if options.k is None else {"k": options.k}
    format_ = choose_format(options.format, LatentFormat.load(folder), folder, **changes)
    max_latents = MAX_LATENTS if options.max_latents is None else options.max_latents
    if max_latents < 1:
        raise UserError(f"max_latents is {max_latents}; it must be at least 1.")
    say(f"loading vLLM for {options.model} ...")
    arguments = _parse([str(folder), *flags])
    _refuse(arguments, options)
    from transformers import AutoConfig

    from rl_lvr.finite import require_finite_files

    require_finite_files(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    format_.require_room(int(config.get_text_config().max_position_embeddings))
    arguments.model = str(folder)
    arguments.served_model_name = arguments.served_model_name or [options.model]
    arguments.host, arguments.port = options.host, port
    arguments.logprobs_mode = "processed_logprobs"
    arguments.worker_extension_cls = EXTENSION
    arguments.additional_config = {**(arguments.additional_config or {}), **as_config(format_, max_latents)}
    if family_class(config.model_type).text_only:
        arguments.enable_prompt_embeds = True
    return arguments


def _parse(flags: Sequence[str]) -> Any:
    from rl_lvr.rollout.vllm import guards

    guards.check_hooks()
    guards.check_hooks(guards.SERVER_HOOKS)
    cli: Any = guards.home_of(guards.ARGUMENTS, "make_arg_parser")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = cli.make_arg_parser(FlexibleArgumentParser(prog="rl-lvr serve"))
    default = parser.get_default("gpu_memory_utilization")
    parser.set_defaults(gpu_memory_utilization=None)
    arguments = parser.parse_args(list(flags))
    arguments.sized_by_user = arguments.gpu_memory_utilization is not None
    if not arguments.sized_by_user:
        arguments.gpu_memory_utilization = default
    try:
        cli.validate_parsed_serve_args(arguments)
    except (TypeError, ValueError) as error:
        raise UserError(str(error).removeprefix("Error: ")) from error
    return arguments


def _refuse(arguments: Any, options: ServeOptions) -> None:
    import vllm.envs as envs

    for name, unset in (
        ("grpc", False),
        ("headless", False),
        ("uds", None),
        ("api_server_count", None),
        ("worker_extension_cls", ""),
    ):
        if getattr(arguments, name) != unset:
            raise UserError(f"--{name.replace('_', '-')} cannot be used here: leave it out.")
    if "latent" in (arguments.additional_config or {}):
        raise UserError("leave 'latent' out of --additional-config: use --format and --max-latents.")
    if envs.VLLM_SERVER_DEV_MODE and options.host != LOOPBACK:
        raise UserError(
            f"VLLM_SERVER_DEV_MODE is set and would let anybody who reaches {options.host} run code here: unset it, or "
            f"serve {LOOPBACK} only."
        )


# ---- life


async def _run(arguments: Any, sock: socket.socket, shared: Path | None) -> int:
    import vllm.envs as envs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.launcher import serve_http, validate_api_server_args
    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
    from vllm.utils.system_utils import set_ulimit

    from rl_lvr.rollout.vllm.starting import one_sentence
    from rl_lvr.serving.routes import attach

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    began = time.monotonic()
    validate_api_server_args(arguments)
    set_ulimit()
    engine = await _engine(arguments, takes_weights=shared is not None)
    try:
        with one_sentence(processes=False):
            tasks = await engine.get_supported_tasks()
            app = build_app(arguments, tasks, engine.model_config)
            await init_app_state(engine, app.state, arguments, tasks)
            attach(app, shared)
        sock.listen(2048)  # whoever connects from here on waits for uvicorn
        say(_ready(engine.settings.markers.format, arguments, time.monotonic() - began))
        log_config = get_uvicorn_log_config(arguments)
        ending = await serve_http(
            app,
            sock=sock,
            enable_ssl_refresh=arguments.enable_ssl_refresh,
            host=arguments.host,
            port=arguments.port,
            log_level=arguments.uvicorn_log_level,
            access_log=not arguments.disable_uvicorn_access_log,
            timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
            ssl_keyfile=arguments.ssl_keyfile,
            ssl_certfile=arguments.ssl_certfile,
            ssl_ca_certs=arguments.ssl_ca_certs,
            ssl_cert_reqs=arguments.ssl_cert_reqs,
            ssl_ciphers=arguments.ssl_ciphers,
            h11_max_incomplete_event_size=arguments.h11_max_incomplete_event_size,
            h11_max_header_count=arguments.h11_max_header_count,
            **({} if log_config is None else {"log_config": log_config}),
        )
    finally:
        engine.shutdown()
    ended_by_signal = ending.__name__ == "shutdown"  # else vLLM's watchdog did it, and nothing is left to await
    await ending
    if not ended_by_signal:
        raise UserError("vLLM has stopped working, its own message is above: start the server again.")
    say("ended.")
    return 0


def _ready(format_: LatentFormat, arguments: Any, seconds: float) -> str:
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    scheme = "https" if arguments.ssl_keyfile and arguments.ssl_certfile else "http"
    return (
        f"ready after {seconds:.0f} s at {scheme}://{host}:{arguments.port} (latent format {format_.name!r}, "
        f"k {format_.k}, {format_.length} length); Ctrl-C ends it."
    )


class _Interrupted(BaseException):
    """Ctrl-C while the model is loaded. asyncio would wait for the next await, and vLLM swallows KeyboardInterrupt."""


def _interrupt(number: int, frame: Any) -> None:
    raise _Interrupted


async def _engine(arguments: Any, *, takes_weights: bool) -> Any:
    """vLLM with latents that have been seen to work in every worker. `takes_weights`: of a trainer."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    from rl_lvr.rollout.vllm import guards, memory
    from rl_lvr.rollout.vllm.starting import one_sentence
    from rl_lvr.serving.engine import LatentAsyncLLM

    config = guards.engine_config(AsyncEngineArgs.from_cli_args(arguments), UsageContext.OPENAI_API_SERVER)
    if takes_weights:
        cure = "leave --weights-folder out, or serve the model unquantized"
        guards.refuse_quantized(config.model_config.quantization, cure)
    if not arguments.sized_by_user and (size := memory.cache_size(config)) is not None:
        config.cache_config.kv_cache_memory_bytes = size
        say(f"the key-value cache takes {size / memory.GIB:.2f} GiB; --kv-cache-memory-bytes sets another size.")
    say("starting the engine and reading the weights; this takes seconds to minutes ...")
    with one_sentence(processes=True):
        engine = LatentAsyncLLM.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=arguments.enable_log_requests,
            disable_log_stats=arguments.disable_log_stats,
        )
    try:
        with one_sentence(processes=False):
            await engine.reset_mm_cache()  # the dummy inputs of the start
            await engine.status()
            say("checking that latents reach the model ...")
            await asyncio.to_thread(_self_test, engine, asyncio.get_running_loop())
    except BaseException:
        engine.shutdown()
        raise
    return engine


class _Blocking:
    """What `selftest.run` needs of a vLLM, for a thread beside the engine's event loop."""

    def __init__(self, engine: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._loop = engine, loop

    def collective_rpc(self, method: str) -> list[Any]:
        return asyncio.run_coroutine_threadsafe(self._engine.collective_rpc(method), self._loop).result()

    def generate(self, prompts: list[Any], params: Any, use_tqdm: bool) -> None:
        asyncio.run_coroutine_threadsafe(self._generate(prompts, params), self._loop).result()

    async def _generate(self, prompts: list[Any], params: Any) -> None:
        for prompt in prompts:
            async for _ in self._engine.generate(await self._engine.rendered(prompt), params, str(uuid.uuid4())):
                pass


def _self_test(engine: Any, loop: asyncio.AbstractEventLoop) -> None:
    from rl_lvr.rollout.vllm import selftest

    selftest.run(_Blocking(engine, loop), engine.settings)
