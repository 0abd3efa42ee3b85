"""`rl-lvr serve`: vLLM's OpenAI-compatible server for a model that thinks in latents."""

from __future__ import annotations

import argparse

HELP = "serve a model over HTTP with vLLM: OpenAI's API, and latents for those who ask"
PASS_THROUGH = True
"""vLLM's own flags go to vLLM, whose parser takes seconds to import."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.usage = "rl-lvr serve MODEL [--format NAME] [--port N] [--KEY VALUE of vLLM ...]"
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint")
    parser.add_argument("--format", metavar="NAME", help="latent format (the one stored beside the checkpoint)")
    parser.add_argument("--k", type=int, metavar="K", help="latents per span (the format's)")
    parser.add_argument("--max-latents", type=int, metavar="N", help="room for latents of one request (128)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is open to all (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="(8000)")
    parser.add_argument(
        "--weights-folder",
        "--weights_folder",
        metavar="DIR",
        help="a folder that a trainer, which may then change the weights, shares with this server (none)",
    )
    parser.epilog = (
        "Every other flag is one of vllm serve, such as --max-model-len, --max-num-seqs, --dtype, "
        "--tensor-parallel-size, --gpu-memory-utilization or --api-key. How to send requests: docs/serving.md."
    )


def run(arguments: argparse.Namespace) -> int:
    from rl_lvr.serving.launch import ServeOptions, serve

    options = ServeOptions(
        model=arguments.model,
        format=arguments.format,
        k=arguments.k,
        max_latents=arguments.max_latents,
        host=arguments.host,
        port=arguments.port,
        weights_folder=arguments.weights_folder,
    )
    return serve(options, arguments.rest)
