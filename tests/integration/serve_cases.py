"""What the tests of `rl-lvr serve` share: a real server of a tiny model, with room for 32 latents and spans of 3."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
from vllm_cases import LENGTH

from rl_lvr.latents.format import get_format
from rl_lvr.rollout.server import protocol
from rl_lvr.rollout.types import Sampling

LVR = get_format("lvr", k=3)
ROOM = 32
CLOSE = 1e-3
"""Untrained weights blow rounding up from latent to latent (docs/engines.md); the replay holds each step to 1e-4."""
GREEDY = Sampling(max_tokens=14, temperature=0.0)
FLAGS = {
    "max-model-len": LENGTH,
    "max-num-seqs": 8,
    "dtype": "float32",
    "num-gpu-blocks-override": 256,
    "limit-mm-per-prompt": '{"image": 2, "video": 0}',
}


class Server:
    """A process of `rl-lvr serve`."""

    def __init__(self, folder: Path, log: Path, *more: str) -> None:
        self.folder, self.log = folder, log
        flags = [word for name, value in FLAGS.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "rl_lvr.cli", "serve", str(folder), "--port", "0", "--enforce-eager", *flags]
        # As users have it: what the cache takes is for the server to find out.
        environment = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--format", "lvr", "--k", "3", "--max-latents", str(ROOM), *more],
                stdout=out,
                stderr=out,
                start_new_session=True,
                env=environment,
            )

    def wait_for(self, words: str, seconds: float = 300) -> re.Match[str]:
        """Until the server has said this."""
        end = time.monotonic() + seconds
        while (found := re.search(words, self.log.read_text())) is None:
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            assert time.monotonic() < end, f"not within {seconds} s: {words}\n{self.log.read_text()[-5000:]}"
            time.sleep(0.2)
        return found

    def ready(self) -> None:
        self.url = self.wait_for(r"ready after \d+ s at (http://127\.0\.0\.1:\d+) ")[1]

    def interrupt(self) -> int:
        """Ctrl-C, which a terminal sends to children too; the exit code, once no child is left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGINT)
        code = self.process.wait(60)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
        return code

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=120)

    def tables(self) -> dict[str, int]:
        (worker,) = httpx.get(self.url + protocol.STATUS, timeout=60).json()["workers"]
        return worker["tables"]


CURL = """#!{python}
import sys
import httpx

words, method, headers, body = iter(sys.argv[1:]), "GET", {{}}, None
for word in words:
    if word == "-H":
        name, _, value = next(words).partition(":")
        headers[name] = value.strip()
    elif word == "-d":
        method, body = "POST", next(words)
        body = sys.stdin.read() if body == "@-" else body
    elif word != "-sf":
        url = word
response = httpx.request(method, url, headers=headers, content=body, timeout=120)
sys.stdout.write(response.text)
sys.exit(0 if response.is_success else 22)
"""
"""What the documentation uses of curl, for machines that have none."""


def documented(words: str) -> list[str]:
    """The bash blocks of docs/serving.md that ask a server for `words`."""
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [block for block in blocks if "curl" in block and words in block]


def run_documented(block: str, server: Server, folder: Path) -> list[dict[str, Any]]:
    """What the lines of a block answer, in `folder`, with the address and the model of `server`."""
    if shutil.which("curl") is None:
        (folder / "curl").write_text(CURL.format(python=sys.executable))
        (folder / "curl").chmod(0o755)
    block = block.replace("http://127.0.0.1:8000", server.url).replace("runs/my-model", str(server.folder))
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-o", "pipefail", "-ec", block]
    done = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    answers, rest, decoder = [], done.stdout.strip(), json.JSONDecoder()
    while rest:
        answer, end = decoder.raw_decode(rest)
        answers.append(answer)
        rest = rest[end:].strip()
    return answers


def begin(server: Server, path: str, body: dict[str, Any]) -> socket.socket:
    """Send a request and do not wait for its answer."""
    url = httpx.URL(server.url)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection((url.host, url.port or 80))
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def within(seconds: float, happens: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def refusal(response: httpx.Response) -> str:
    assert 400 <= response.status_code < 500, response.text
    return response.json()["error"]["message"]
