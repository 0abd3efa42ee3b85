"""What of serving needs no vLLM: the command's refusals, the protocol, and the client's own checks."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from rl_lvr import cli
from rl_lvr.errors import UserError
from rl_lvr.lab.tokenizer import build_tokenizer
from rl_lvr.latents.format import FormatIds, get_format
from rl_lvr.latents.starting import FREE, LatentStart
from rl_lvr.models import ImageFrame
from rl_lvr.rollout.checks import Limits
from rl_lvr.rollout.server import protocol
from rl_lvr.rollout.server.engine import ServerRolloutEngine
from rl_lvr.rollout.types import Capability, Request, Sampling, Uncut
from rl_lvr.rollout.vllm import calls, wire
from rl_lvr.rollout.vllm.calls import Answer
from rl_lvr.rollout.vllm.settings import LatentSettings
from rl_lvr.rollout.vllm.slots import FED, FORCED, SLOT

LVR = get_format("lvr", k=2)
TOKENIZER = build_tokenizer("qwen2_5_vl", ("red",), LVR.tokens)
OTHER = build_tokenizer("qwen2_5_vl", ("red",), ("<|other|>", *LVR.tokens))
BOUND = LVR.bind(TOKENIZER)
SETTINGS = LatentSettings(
    markers=replace(BOUND, placeholders=(5, 6)),
    limits=Limits(4, vocabulary=50, max_positions=64, image_token=6, special_ids=frozenset(TOKENIZER.all_special_ids)),
    eos=(TOKENIZER.eos_token_id,),
    max_latents=16,
    text_only=False,
    single_picture=False,
    frame=ImageFrame(4, 5, (7,)),
)


# ---- the command


def test_a_port_in_use_is_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "no-such-model", "--port", str(port)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"rl-lvr: port {port} of 127.0.0.1 cannot be had")
    assert told.count("\n") == 1
    assert cli.main(["serve", "no-such-model", "--port", str(port)]) == 2
    assert "no-such-model" in capsys.readouterr().err, "a free port is no obstacle: now the model is at fault"


@pytest.mark.parametrize("address", [["--host", "no.such.host.invalid"], ["--port", "99999"]])
def test_an_impossible_address_is_one_sentence(address: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["serve", "model", *address]) == 2
    assert "see --host and --port" in capsys.readouterr().err


# ---- the protocol


def test_settings_arrive_as_they_were() -> None:
    sent = json.loads(json.dumps(protocol.settings_to_json(SETTINGS)))
    assert protocol.settings_from_json(sent) == SETTINGS


@given(
    arrays.arrays("float32", st.tuples(st.integers(0, 5), st.just(4)), elements=st.floats(width=32)),
    arrays.arrays("float32", st.integers(0, 6), elements=st.floats(width=32, allow_nan=False)),
    arrays.arrays("int8", st.integers(0, 9)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_answers_arrive_bit_by_bit(vectors: Any, logprobs: Any, marks: Any, dtype: torch.dtype) -> None:
    answer = Answer(
        prompt_ids=[1, 2],
        token_ids=[3],
        logprobs=torch.from_numpy(logprobs),
        finish_reason="stop",
        stop_reason=None,
        vectors=torch.from_numpy(vectors).to(dtype),
        marks=torch.from_numpy(marks),
    )
    got = protocol.answer_from_json(json.loads(json.dumps(protocol.answer_to_json(answer), allow_nan=False)), 4)
    assert got.vectors.dtype is dtype
    for name in ("vectors", "logprobs", "marks"):
        assert same_bits(getattr(got, name), getattr(answer, name)), name
    assert (got.prompt_ids, got.token_ids, got.finish_reason) == ([1, 2], [3], "stop")
    assert got.uncut is None


def test_what_a_cut_kept_arrives_and_is_missed_if_it_does_not() -> None:
    cut = Sampling(max_tokens=2, top_k=3)
    uncut = Uncut(torch.tensor([-1.5, -2.0]), torch.tensor([-0.1, 0.0]))
    marks = torch.zeros(4, dtype=torch.int8)
    answer = Answer([1, 2], [3, 4], torch.tensor([-1.4, -2.0]), "length", None, torch.empty(0, 4), marks, uncut)
    got = protocol.answer_from_json(json.loads(json.dumps(protocol.answer_to_json(answer))), 4)
    rollout = calls.rollout_of(0, Request([1, 2]), 0, cut, SETTINGS, got)
    assert torch.equal(rollout.uncut_logprobs, uncut.logprobs)
    assert torch.equal(rollout.log_kept_mass, uncut.log_kept_mass)
    with pytest.raises(RuntimeError, match="no log-probs before the cut"):
        calls.rollout_of(0, Request([1, 2]), 0, cut, SETTINGS, replace(answer, uncut=None))
    plain = calls.rollout_of(0, Request([1, 2]), 0, Sampling(max_tokens=2), SETTINGS, replace(answer, uncut=None))
    assert torch.equal(plain.uncut_logprobs, answer.logprobs)
    assert not plain.log_kept_mass.any()


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """NaN included."""
    raw = [t.clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (left, right)]
    return left.shape == right.shape and torch.equal(*raw)


def test_pictures_arrive_pixel_by_pixel() -> None:
    picture = Image.effect_noise((17, 9), 90).convert("RGB")
    sent = protocol.call_to_json([1], [picture], {})
    (got,) = protocol.pictures_from_json(json.loads(json.dumps(sent))["pictures"])
    assert got.tobytes() == picture.tobytes()


def _gif() -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, format="GIF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not base64!", "no base64"),
        (base64.b64encode(b"no image").decode(), "no PNG"),
        (base64.b64encode(_gif()).decode(), "no PNG"),
        (base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(20)).decode(), "no PNG"),
    ],
    ids=["base64", "bytes", "gif", "torn"],
)
def test_what_is_no_picture_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        protocol.pictures_from_json([text])


# ---- calls


def test_an_answer_becomes_a_rollout() -> None:
    marks = torch.zeros(12, dtype=torch.int8)
    marks[3:5] = SLOT | FORCED | FED
    marks[5] = FORCED
    answer = Answer(
        [1, 2],
        [BOUND.start, BOUND.slot, BOUND.slot, BOUND.end, 2],
        torch.zeros(5),
        "stop",
        None,
        torch.arange(12.0).reshape(3, 4),
        marks,
    )
    rollout = calls.rollout_of(0, Request([1, 2]), 7, Sampling(sigma=0.5), SETTINGS, answer)
    assert rollout.latent_positions == (3, 4)
    assert rollout.latents.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]], "what vLLM dropped at the end is left out"
    assert rollout.forced.tolist() == [False, True, True, True, False]
    assert (rollout.seed, rollout.sigma, rollout.stop_reason.value) == (7, 0.5, "eos")


def test_another_prompt_than_the_requests_is_refused() -> None:
    answer = Answer([1, 2, 3], [2], torch.zeros(1), "stop", None, torch.empty(0, 4), torch.zeros(4, dtype=torch.int8))
    with pytest.raises(UserError, match="request 3: vLLM's image processor makes 3 prompt tokens"):
        calls.rollout_of(3, Request([1, 2]), 0, Sampling(), SETTINGS, answer)


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request([1, 6], images={"pixel_values": torch.zeros(1)}), "give the original images too"),
        (Request([1], pictures=(Image.new("RGB", (2, 2)),)), "what the processor made of them"),
        (Request([1], k=17), "raise max_latents"),
    ],
    ids=["no pictures", "no images", "k"],
)
def test_a_request_that_cannot_run_is_named(request_: Request, words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        calls.check(4, request_, SETTINGS)
    assert str(told.value).startswith("request 4")


@pytest.mark.parametrize("seed", [-1, -7, 2**63])
def test_a_seed_that_vllm_would_not_use_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=f"the seed {seed} cannot be used with vLLM"):
        calls.sampling_fields(Request([1]), seed, Sampling(), SETTINGS)
    for good in (0, 2**63 - 1):
        assert calls.sampling_fields(Request([1]), good, Sampling(), SETTINGS)["seed"] == good


def test_numbers_beyond_use_are_cut_or_refused() -> None:
    fields = calls.sampling_fields(Request([1]), 0, Sampling(max_tokens=2**70, top_k=2**70), SETTINGS)
    assert (fields["max_tokens"], fields["top_k"]) == (64, 50)
    fields = calls.sampling_fields(Request([1]), 0, Sampling(max_tokens=7, top_k=3), SETTINGS)
    assert (fields["max_tokens"], fields["top_k"]) == (7, 3)
    with pytest.raises(UserError, match=r"sigma is 1e\+39"):
        calls.sampling_fields(Request([1]), 0, Sampling(sigma=1e39), SETTINGS)


def test_a_request_carries_the_start_that_holds_for_it() -> None:
    sampling = Sampling(latent_start=LatentStart.parse("forced"))
    for start, sent in ((None, "forced"), (FREE, None), (LatentStart.parse("bias 2"), "bias 2")):
        fields = calls.sampling_fields(Request([1], latent_start=start), 0, sampling, SETTINGS)
        assert fields["extra_args"].get(wire.START) == sent
        assert fields["max_tokens"] == 64, "a forced START is one of them"
    with pytest.raises(UserError, match="request r: latents cannot be combined with structured outputs"):
        calls.checked_args("r", {wire.START: "forced"}, [1, 2], 0, SETTINGS, structured=True)
    with pytest.raises(UserError, match="request r: latent_start is 'bias 2', but intervention 'none' forbids START"):
        calls.checked_args("r", {wire.START: "bias 2", wire.INTERVENTION: "none"}, [1, 2], 0, SETTINGS)


def test_log_probs_without_the_bias_are_missed_if_they_do_not_come() -> None:
    answer = Answer([1, 2], [3], torch.zeros(1), "length", None, torch.empty(0, 4), torch.zeros(3, dtype=torch.int8))
    biased = Request([1, 2], latent_start=LatentStart.parse("bias 2"))
    with pytest.raises(RuntimeError, match="no log-probs before the cut"):
        calls.rollout_of(0, biased, 0, Sampling(), SETTINGS, answer)
    none = Request([1, 2], latent_start=LatentStart.parse("bias 0"))
    assert calls.rollout_of(0, none, 0, Sampling(), SETTINGS, answer).latent_start == none.latent_start


ROWS = wire.to_text(torch.ones(2, 4))
OPENING = replace(SETTINGS, markers=FormatIds(get_format("monet", k=3), 7, 8, 9))


@pytest.mark.parametrize(
    ("settings_", "prompt", "more", "fits"),
    [
        (OPENING, [1, 2], {}, True),
        (OPENING, [1, 2], {"latent_intervention": "zeros"}, True),
        (OPENING, [1, 2, 7, 8], {wire.PROMPT_VECTORS: ROWS, wire.PROMPT_POSITIONS: [2, 3]}, False),
        (OPENING, [1, 2], {"latent_intervention": "none"}, False),
        (OPENING, [1, 2], {"latent_intervention": "markers_only"}, False),
        (replace(SETTINGS, markers=FormatIds(LVR, 7, 8, 9)), [1, 2], {}, False),
        (replace(SETTINGS, markers=FormatIds(get_format("slots"), 7, 8, 9)), [1, 2], {}, False),
    ],
)
def test_a_completion_opens_with_start_only_where_that_means_something(
    settings_: LatentSettings, prompt: list[int], more: dict[str, Any], fits: bool
) -> None:
    calls.checked_args("r", {}, [1, 2], 0, settings_)
    if fits:
        assert calls.checked_args("r", {"latent_opens": 1, **more}, prompt, 0, settings_).opens
        return
    calls.checked_args("r", more, prompt, 0, settings_)
    with pytest.raises(UserError, match="latent_opens is for formats whose first latent comes before_start"):
        calls.checked_args("r", {"latent_opens": 1, **more}, prompt, 0, settings_)


# ---- the client


@contextmanager
def server(status: dict[str, Any], code: int = 200) -> Iterator[str]:
    """Answers everything with `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(status).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *words: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def served(**changes: Any) -> dict[str, Any]:
    about = {"version": protocol.VERSION, "model": "m", "settings": protocol.settings_to_json(SETTINGS)}
    return {**about, **changes}


def test_a_client_takes_the_servers_word() -> None:
    with server(served()) as url:
        engine = ServerRolloutEngine(url + "/", TOKENIZER, LVR)
        assert engine.markers == SETTINGS.markers
        assert engine.generate([], Sampling()) == []
        assert Capability.WEIGHTS not in engine.capabilities  # so that a trainer refuses it
        with pytest.raises(UserError, match="restart the server on it"):
            engine.sync_weights(torch.nn.Linear(1, 1))
        engine.close()


@pytest.mark.parametrize(
    ("status", "code", "tokenizer", "format_", "words"),
    [
        (served(version=0), 200, TOKENIZER, LVR, "install the same rl-lvr"),
        (served(), 200, TOKENIZER, get_format("lvr", k=3), "serves latent format"),
        (served(), 200, OTHER, LVR, "another tokenizer"),
        ({"error": {"message": "the plugin is asleep."}}, 503, TOKENIZER, LVR, "503: the plugin is asleep"),
        ({"error": "Unauthorized"}, 401, TOKENIZER, LVR, "another api_key"),
        ({}, 404, TOKENIZER, LVR, "no rl-lvr server"),
    ],
    ids=["version", "format", "tokenizer", "sick", "key", "stranger"],
)
def test_a_server_that_does_not_fit_is_refused(
    status: dict[str, Any], code: int, tokenizer: Any, format_: Any, words: str
) -> None:
    with server(status, code) as url, pytest.raises(UserError, match=words):
        ServerRolloutEngine(url, tokenizer, format_)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "no address", "http://[::1"])
def test_nobody_there_is_one_sentence(url: str) -> None:
    with pytest.raises(UserError, match=r"cannot be reached|no address"):
        ServerRolloutEngine(url, TOKENIZER, LVR)
