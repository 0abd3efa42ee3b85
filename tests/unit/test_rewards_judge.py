"""The judge against a real HTTP server on this machine that behaves as badly as is asked of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest

from rewards.judge import Judge, JudgeError
from rl_lvr.errors import UserError
from rl_lvr.training.rewards import load
from rl_lvr.training.rewards.load import load_rewards

ROWS = {"prompts": ["q1", "q2"], "completions": ["right", "wrong"], "answer": ["right", "right"]}


class Reply(NamedTuple):
    status: int
    text: str
    headers: dict[str, str] = {}  # noqa: RUF012, of a tuple
    pause: float = 0
    """Seconds before it begins."""
    drip: float = 0
    """Seconds after every byte."""


class Endpoint:
    """`reply(number, body)` is what it answers."""

    def __init__(self) -> None:
        self.requests: list[tuple[dict, dict]] = []
        self.reply: Callable[[int, dict], tuple] = lambda number, body: (200, self.score(body))
        self.redirected = 0
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                if self.path != "/v1/chat/completions":
                    endpoint.redirected += 1
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                endpoint.requests.append((dict(self.headers), body))
                reply = Reply(*endpoint.reply(len(endpoint.requests), body))
                time.sleep(reply.pause)
                data = reply.text.encode()
                self.send_response(reply.status)
                for name, value in {"content-length": str(len(data)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                for byte in data:
                    self.wfile.write(bytes([byte]))
                    time.sleep(reply.drip)

            def handle(self) -> None:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client went away
                    super().handle()

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    @staticmethod
    def text(content: str | None, tokens: int = 10) -> str:
        return json.dumps({"choices": [{"message": {"content": content}}], "usage": {"total_tokens": tokens}})

    def score(self, body: dict) -> str:
        response = body["messages"][0]["content"].split("Response:\n")[1].split("\n")[0]
        return self.text("1" if response == "right" else "0")


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def ask(judge: Judge, **rows: object) -> list[float | None]:
    return asyncio.run(judge(**{**ROWS, **rows}))


def judge(endpoint: Endpoint, **options: object) -> Judge:
    return Judge(**{"url": endpoint.url, "model": "m", "backoff": 0.01, "timeout": 20.0, **options})  # type: ignore[arg-type]


def test_it_scores(endpoint: Endpoint) -> None:
    metrics: dict[str, float] = {}
    assert ask(judge(endpoint), log_metric=metrics.__setitem__) == [1, 0]
    assert metrics == {"judge/calls": 2, "judge/failed": 0}
    headers, body = endpoint.requests[0]
    assert (body["model"], body["temperature"]) == ("m", 0.0)
    assert "Authorization" not in headers


def test_braces_in_a_response_are_text(endpoint: Endpoint) -> None:
    assert ask(judge(endpoint), completions=["{answer}", "{}"]) == [0, 0]
    assert any("{answer}" in body["messages"][0]["content"] for _, body in endpoint.requests)


def test_without_a_reference_it_is_not_asked(endpoint: Endpoint) -> None:
    assert ask(judge(endpoint), answer=["right", None]) == [1, None]
    assert len(endpoint.requests) == 1
    with pytest.raises(ValueError, match="lacks the column 'answer'"):
        ask(judge(endpoint), answer=None)
    assert ask(judge(endpoint, instruction="Grade.\nResponse:\n{response}\n"), answer=None) == [1, 0]


def test_the_key_is_sent_and_never_shown(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    monkeypatch.setenv("MY_JUDGE_KEY", "s3cret")
    endpoint.reply = lambda number, body: (401, "no")
    for options in ({"key_file": str(tmp_path / "key")}, {"key_env": "MY_JUDGE_KEY"}):
        asked = judge(endpoint, cache=str(tmp_path / "cache.jsonl"), **options)
        with pytest.raises(JudgeError, match="status 401: 'no'") as caught:
            ask(asked)
        assert endpoint.requests[-1][0]["Authorization"] == "Bearer s3cret"
        assert "s3cret" not in f"{caught.value!r} {asked!r}"
    for options, problem in [
        ({"key_file": str(tmp_path / "none")}, "holds no key"),
        ({"key_env": "NO_SUCH_VARIABLE"}, "environment variable NO_SUCH_VARIABLE holds no key"),
        ({"key_env": "A", "key_file": "b"}, "both given"),
    ]:
        with pytest.raises(ValueError, match=problem):
            judge(endpoint, **options)


@pytest.mark.parametrize("key", ["s3cret", "a/b+c==", "q'uo\\te"])
@pytest.mark.parametrize(
    "echo",
    [
        lambda key, body: (401, f"Incorrect API key provided: {key}."),
        lambda key, body: (401, json.dumps({"error": {"message": f"{'x' * 170} {key} is no key"}})),
        lambda key, body: (401, json.dumps({"error": key}).replace("/", r"\/")),
        lambda key, body: (401, "at /?key=" + quote(key, "")),
        lambda key, body: (200, Endpoint.text(f"your key is {key}")),
        lambda key, body: (200, Endpoint.text("1").replace("10", json.dumps(key + "x"))),
        lambda key, body: (200, "\xff" + key),
        lambda key, body: (200, json.dumps({"choices": {"key": key}})),
    ],
    ids=["text", "cut", "slashes", "url", "reply", "usage", "bytes", "shape"],
)
def test_an_endpoint_that_echoes_the_key_does_not_leak_it(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, key: str, echo: Callable[[str, dict], tuple]
) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", key)

    def reply(number: int, body: dict) -> tuple:
        sent = endpoint.requests[-1][0]["Authorization"]
        return echo(sent.removeprefix("Bearer "), body)

    endpoint.reply = reply
    options = {"url": endpoint.url, "model": "m", "key_env": "MY_JUDGE_KEY", "retries": 0, "budget_tokens": 100}
    (spec,) = load_rewards([{"name": "judge", "options": options}])
    with pytest.raises(UserError) as caught:
        asyncio.run(spec.function(**ROWS))
    assert "the judge" in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    assert endpoint.requests[-1][0]["Authorization"] == f"Bearer {key}"
    for form in (key, json.dumps(key)[1:-1], quote(key, ""), key.replace("/", r"\/"), repr(key)[1:-1]):
        assert form not in shown
    # Cut off within the key, a message would show its beginning.
    assert key[:5] not in shown


def test_it_tries_again_and_gives_up(endpoint: Endpoint) -> None:
    endpoint.reply = lambda number, body: (503, "busy") if number <= 2 else (200, endpoint.score(body))
    assert ask(judge(endpoint, concurrency=1)) == [1, 0]
    assert len(endpoint.requests) == 4

    endpoint.requests.clear()
    endpoint.reply = lambda number, body: (503, "busy")
    with pytest.raises(JudgeError, match="status 503, at 3 attempts"):
        ask(judge(endpoint, retries=2, concurrency=1))
    assert len(endpoint.requests) == 3  # the second completion is not asked for once the first has failed


def test_waits_grow_unless_the_endpoint_says_how_long(endpoint: Endpoint) -> None:
    stamps: list[float] = []

    def reply(number: int, body: dict) -> tuple:
        stamps.append(time.perf_counter())
        return 429, "slow down", {"retry-after": "0"} if after else {}

    endpoint.reply = reply
    row = {"prompts": ["q"], "completions": ["c"], "answer": ["a"]}
    waits = {}
    for after in (False, True):
        stamps.clear()
        with pytest.raises(JudgeError, match="429"):
            asyncio.run(judge(endpoint, retries=2, backoff=0.4)(**row))
        waits[after] = [b - a for a, b in itertools.pairwise(stamps)]
    assert waits[False][0] >= 0.4
    assert waits[False][1] >= 0.8
    assert sum(waits[True]) < sum(waits[False])


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ((200, "no json"), "not that of an OpenAI-compatible endpoint"),
        ((200, "{}"), "not that of an OpenAI-compatible endpoint"),
        ((200, Endpoint.text("yes")), "which is no number from 0 to 1"),
        ((200, Endpoint.text("7")), "which is no number from 0 to 1"),
        ((200, Endpoint.text(None)), "which is no number from 0 to 1"),
        ((200, Endpoint.text("1"), {}, 5), "did not answer within 0.3 s"),
        ((200, Endpoint.text("1"), {}, 0, 0.1), "did not answer within 0.3 s"),
        ((307, "", {"location": "/v1/elsewhere"}), "status 307"),
    ],
    ids=["text", "empty", "word", "range", "null", "hangs", "drips", "redirects"],
)
def test_bad_endpoints(endpoint: Endpoint, reply: tuple, problem: str) -> None:
    endpoint.reply = lambda number, body: reply
    short = judge(endpoint, retries=1, timeout=0.3 if "0.3" in problem else 20.0)
    began = time.perf_counter()
    with pytest.raises(JudgeError, match=problem):
        ask(short)
    assert time.perf_counter() - began < 15
    assert ask(judge(endpoint, retries=0, timeout=short.timeout, on_failure="exclude")) == [None, None]
    assert endpoint.redirected == 0


def test_one_that_is_not_there(endpoint: Endpoint) -> None:
    endpoint.server.shutdown()
    endpoint.server.server_close()
    with pytest.raises(JudgeError, match="cannot be reached"):
        ask(judge(endpoint, retries=1))


def test_the_cache_outlives_the_process_and_a_crash(endpoint: Endpoint, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "cache.jsonl"
    first = judge(endpoint, cache=str(path))
    assert ask(first) == ask(first) == [1, 0]
    assert len(endpoint.requests) == 2
    assert ask(judge(endpoint, cache=str(path))) == [1, 0]
    assert len(endpoint.requests) == 2

    whole = path.read_bytes()
    path.write_bytes(whole[:-5])  # a crash in the middle of the last line
    assert ask(judge(endpoint, cache=str(path))) == [1, 0]
    assert len(endpoint.requests) == 3
    assert ask(judge(endpoint, cache=str(path))) == [1, 0]  # the new line was not glued to the torn one
    assert len(endpoint.requests) == 3

    ask(judge(endpoint, cache=str(path), model="another"))
    ask(judge(endpoint, cache=str(path), scale=(0, 2)))
    assert len(endpoint.requests) == 7  # what a score depends on is part of its key


def test_equal_questions_are_asked_once(endpoint: Endpoint) -> None:
    rows = {"prompts": ["q"] * 8, "completions": ["right"] * 8, "answer": ["right"] * 8}
    assert asyncio.run(judge(endpoint)(**rows)) == [1.0] * 8
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("budget", [{"budget_calls": 1}, {"budget_tokens": 10}])
def test_budgets_end_all_calls(endpoint: Endpoint, budget: dict) -> None:
    (name, amount), *_ = budget.items()
    message = f"budget of {amount} {name.removeprefix('budget_')} is spent"
    with pytest.raises(JudgeError, match=message):
        ask(judge(endpoint, concurrency=1, **budget))
    assert len(endpoint.requests) == 1
    endpoint.requests.clear()
    excluding = judge(endpoint, concurrency=1, on_failure="exclude", **budget)
    assert ask(excluding) == [1, None]
    assert ask(excluding) == [1, None]  # what is known stays known
    assert len(endpoint.requests) == 1


def test_processes_share_the_budget(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompts": list("abcd"), "completions": list("abcd"), "answer": list("abcd")}
    for processes, asked in (("1", 4), ("2", 2), ("3", 1)):
        monkeypatch.setenv("WORLD_SIZE", processes)
        endpoint.requests.clear()
        scores = asyncio.run(judge(endpoint, concurrency=1, budget_calls=4, on_failure="exclude")(**row))
        assert len(endpoint.requests) == asked
        assert scores.count(None) == 4 - asked
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(
        ValueError, match="budget_calls is 4; it must be at least 1 for each of the processes, 5 in all"
    ):
        judge(endpoint, budget_calls=4)


def test_a_batch_may_take_longer_than_the_guard_waits_for_others(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(load, "TIMEOUT", 0.3)
    endpoint.reply = lambda number, body: (200, endpoint.score(body), {}, 0.5)
    options = {"url": endpoint.url, "model": "m"}
    (spec,) = load_rewards([{"name": "judge", "options": options}])
    assert asyncio.run(spec.function(**ROWS)) == [1, 0]
    (limited,) = load_rewards([{"name": "judge", "options": options, "timeout": 0.3}])
    with pytest.raises(UserError, match=r"did not end within 0.3 s"):
        asyncio.run(limited.function(**ROWS))

    path = tmp_path / "slow.py"
    path.write_text(
        "import time\n"
        "def slow(completions):\n    time.sleep(0.5)\n    return [1.0] * len(completions)\n"
        "def patient(completions, *, timeout=9.0):\n    return slow(completions)\n"
    )
    with pytest.raises(UserError, match=r"did not end within 0.3 s"):
        load_rewards([f"{path}:slow"])[0].function(completions=["a"])
    assert load_rewards([f"{path}:patient"])[0].function(completions=["a"]) == [1.0]


def test_no_more_than_concurrency_at_once(endpoint: Endpoint) -> None:
    running, most = [0], [0]
    lock = threading.Lock()

    def reply(number: int, body: dict) -> tuple:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.1)
        with lock:
            running[0] -= 1
        return 200, Endpoint.text("1")

    endpoint.reply = reply
    rows = {"prompts": list("abcdefgh"), "completions": list("abcdefgh"), "answer": list("abcdefgh")}
    assert asyncio.run(judge(endpoint, concurrency=3)(**rows)) == [1.0] * 8
    assert 2 <= most[0] <= 3


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"url": "http://example.org/v1"}, "must begin with https://"),
        ({"url": "ftp://127.0.0.1"}, "must begin with https://"),
        ({"url": "https://"}, "must begin with https://"),
        ({"url": "http://localhost.example.org/v1"}, "must begin with https://"),
        ({"url": "https://me:pw@example.org/v1"}, "user name or a password"),
        ({"scale": [1, 1]}, "lowest and the highest"),
        ({"timeout": 0}, "timeout is 0"),
        ({"instruction": "grade it"}, "lacks {response}"),
    ],
)
def test_refusals_before_anything_is_sent(options: dict, problem: str) -> None:
    entry = {"name": "judge", "options": {"url": "https://example.org/v1", "model": "m", **options}}
    with pytest.raises(UserError, match=problem):
        load_rewards([entry])
    for url in ("https://example.org/v1", "http://127.0.0.1:1/v1", "http://[::1]:1/v1", "http://localhost:1/v1"):
        assert Judge(url=url, model="m")


def test_a_recipe_uses_it(endpoint: Endpoint) -> None:
    (spec,) = load_rewards([{"name": "judge", "options": {"url": endpoint.url, "model": "m", "backoff": 0}}])
    assert asyncio.run(spec.function(**ROWS, other=[1, 2])) == [1, 0]
    endpoint.reply = lambda number, body: (500, "")
    with pytest.raises(UserError, match="reward 'judge' raised JudgeError"):
        asyncio.run(spec.function(**{**ROWS, "completions": ["new", "other"]}))
