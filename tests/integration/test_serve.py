"""A real server on a tiny model: rollouts over HTTP equal the reference engine's, and nobody can hurt it.

The server is started once.
"""

from __future__ import annotations

import base64
import io
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from engine_cases import same
from helpers import noise_image
from lab_tools import write_puzzles
from safetensors.torch import load_file, save_file
from serve_cases import (
    CLOSE,
    FLAGS,
    GREEDY,
    LVR,
    ROOM,
    Server,
    begin,
    documented,
    refusal,
    run_documented,
    within,
)
from vllm_cases import VLLMRig, opened, thinking
from vllm_pairs import STARTS

from rl_lvr.cli import main
from rl_lvr.errors import UserError
from rl_lvr.evaluation.rows import read_rows
from rl_lvr.latents.format import get_format
from rl_lvr.latents.interventions import Intervention
from rl_lvr.latents.starting import LatentStart
from rl_lvr.rollout.replay import check_parity
from rl_lvr.rollout.server import protocol
from rl_lvr.rollout.server.engine import ServerRolloutEngine
from rl_lvr.rollout.types import Request, Sampling
from rl_lvr.rollout.vllm import guards, wire
from rl_lvr.rollout.vllm.engine import VLLMRolloutEngine
from rl_lvr.serving.launch import ServeOptions, vllm_arguments

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def rig(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> VLLMRig:
    return VLLMRig(thinking(tiny_folder, tmp_path_factory.mktemp("serve"), "qwen2_5_vl"))


@pytest.fixture(scope="module")
def server(rig: VLLMRig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(rig.folder, tmp_path_factory.mktemp("log") / "server.log")
    try:
        server.ready()
        yield server
    finally:
        if server.process.poll() is None:
            server.interrupt()


@pytest.fixture(scope="module")
def engine(server: Server, rig: VLLMRig) -> Iterator[ServerRolloutEngine]:
    engine = ServerRolloutEngine(server.url, rig.processor, LVR)
    yield engine
    engine.close()


@pytest.fixture
def empty_afterwards(server: Server) -> Iterator[None]:
    """Nothing of a test's requests stays in the worker."""
    yield
    within(5, lambda: not any(server.tables().values()))


# ---- the client engine


def test_the_server_tells_its_state(server: Server, engine: ServerRolloutEngine) -> None:
    assert httpx.get(server.url + "/health").status_code == 200
    status = httpx.get(server.url + protocol.STATUS).json()
    assert status["ready"]
    assert status["model"] == str(server.folder)
    (worker,) = status["workers"]
    assert worker["counters"]["planted_rows"] == 3, "the self-test of the start"
    assert engine.markers.format == LVR


@pytest.mark.usefixtures("empty_afterwards")
def test_rollouts_are_those_of_the_reference_engine(rig: VLLMRig, engine: ServerRolloutEngine) -> None:
    assert engine.markers.start is not None
    requests = opened(rig.requests(), engine.markers.start)
    rollouts = engine.generate(requests, GREEDY)
    wanted = rig.engine(LVR).generate(requests, GREEDY)
    assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in wanted]
    assert all(same(mine, theirs, CLOSE) for mine, theirs in zip(rollouts, wanted, strict=True))
    assert not same(replace(rollouts[0], latents=rollouts[0].latents + 1e-2), wanted[0], CLOSE)
    report = check_parity(engine, rig.model, requests, GREEDY, rollouts=rollouts)
    assert report.passes(), report


@pytest.mark.usefixtures("empty_afterwards")
def test_sampled_rollouts_are_those_of_the_reference_engine(rig: VLLMRig, engine: ServerRolloutEngine) -> None:
    requests = opened(rig.requests(), engine.markers.start or 0)
    sampling = Sampling(max_tokens=12, temperature=1.0, top_k=60, sigma=0.2, seed=7)
    rollouts = engine.generate(requests, sampling)
    report = check_parity(engine, rig.model, requests, sampling, rollouts=rollouts)
    assert report.passes(), report
    wanted, others = (rig.engine(LVR).generate(requests, replace(sampling, seed=seed)) for seed in (7, 8))
    assert [r.completion_ids for r in rollouts] == [r.completion_ids for r in wanted]
    assert min(float(r.log_kept_mass.min()) for r in rollouts) < -0.1
    assert [r.completion_ids for r in rollouts] != [r.completion_ids for r in others]
    silent = [replace(r, sigma=0.0) for r in rollouts]
    assert not check_parity(engine, rig.model, requests, sampling, rollouts=silent).passes(), "the noise is seen"


@pytest.mark.usefixtures("empty_afterwards")
def test_an_evaluation_asks_it(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rows are those of the engine hf. Control: another number of latents is another format, and refused."""
    data = write_puzzles(tmp_path / "data", train=1, test=3) / "test.parquet"
    ask = ["evaluate", str(server.folder), "--data", str(data), "--format", "lvr", "--max-tokens", "10"]
    ask += ["--conditions", "own,own/forced,noise/forced,swap/forced"]
    remote = ["--engine", "server", "--url", server.url]
    rows = []
    for name, more in (("hf", []), ("server", remote)):
        out = tmp_path / f"{name}.jsonl"
        assert main([*ask, "--k", "3", "--out", str(out), *more]) == 0
        rows.append({row.key: row for row in read_rows(out)})
    assert rows[0] == rows[1]
    assert sum(row.latents for row in rows[1].values()) >= 3 * 3 * 3
    capsys.readouterr()
    assert main([*ask, "--k", "2", "--out", str(tmp_path / "other.jsonl"), *remote]) == 2
    assert "serves latent format" in capsys.readouterr().err


@pytest.mark.usefixtures("empty_afterwards")
def test_every_request_has_its_own_intervention(rig: VLLMRig, engine: ServerRolloutEngine) -> None:
    assert engine.markers.start is not None
    (base,) = rig.requests([([], "what is next from red")])
    thinks = replace(base, prompt_ids=[*base.prompt_ids, engine.markers.start], seed=5)
    reference = rig.engine(LVR)
    (first,) = reference.generate([thinks], GREEDY)
    cut = len(thinks.prompt_ids) + 2  # in the middle of its first span
    requests = [
        replace(thinks, intervention=Intervention.ZEROS),
        replace(thinks, intervention=Intervention.NOISE),
        replace(thinks, intervention=Intervention.MARKERS_ONLY),
        replace(thinks, intervention=Intervention.GIVEN, vectors=torch.randn(2, 64), k=4),
        replace(base, intervention=Intervention.SKIP),
        replace(base, intervention=Intervention.NONE),
        replace(base, intervention=Intervention.PLAIN_TOKENS, filler_id=base.prompt_ids[-1], k=2),
        Request(first.ids[:cut], prompt_latents=(first.latents[:2], first.latent_positions[:2])),
    ]
    requests[-2] = replace(requests[-2], filler_id=rig.tokenizer.encode(" red")[0])
    rollouts = engine.generate(requests, GREEDY)
    wanted = reference.generate(requests, GREEDY)
    for mine, theirs in zip(rollouts, wanted, strict=True):
        assert same(mine, theirs, CLOSE), mine.intervention
    continued = rollouts[-1]
    assert continued.ids[: len(first.ids)] == first.ids[: len(continued.ids)]
    assert rollouts[0].completion_ids != rollouts[3].completion_ids


@pytest.mark.usefixtures("empty_afterwards")
def test_every_request_has_its_own_start(rig: VLLMRig, engine: ServerRolloutEngine) -> None:
    requests = [replace(r, latent_start=start) for r, start in zip(rig.requests(), STARTS, strict=True)]
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=7, latent_start=LatentStart.parse("forced"))
    rollouts = engine.generate(requests, sampling)
    wanted = rig.engine(LVR).generate(requests, sampling)
    assert all(same(mine, theirs, CLOSE) for mine, theirs in zip(rollouts, wanted, strict=True))
    assert [r.latent_start for r in rollouts] == [r.latent_start for r in wanted]
    assert [r.uncut is None for r in rollouts] == [start is None or not start.biased for start in STARTS]
    free = engine.generate(rig.requests(), replace(sampling, latent_start=LatentStart()))
    assert [same(a, b, CLOSE) for a, b in zip(rollouts, free, strict=True)][1:5] == [True, False, False, False]
    with pytest.raises(UserError, match="request 0: latent_start is 'forced', but intervention 'none' forbids START"):
        engine.generate([replace(requests[0], intervention=Intervention.NONE)], sampling)


@pytest.mark.usefixtures("empty_afterwards")
def test_one_request_without_room_ends_all_and_says_which(
    server: Server, rig: VLLMRig, engine: ServerRolloutEngine
) -> None:
    """Also those that would go on for many tokens more."""
    requests = opened(rig.requests(), engine.markers.start or 0)[:3]
    requests[0] = replace(requests[0], intervention=Intervention.NONE)
    requests[1] = replace(requests[1], k=ROOM)
    requests[2] = replace(requests[2], intervention=Intervention.NONE)
    with pytest.raises(UserError, match=rf"request 1: .* more than max_latents \({ROOM}\)"):
        engine.generate(requests, replace(GREEDY, max_tokens=150))
    within(5, lambda: not any(server.tables().values()))
    body = {"prompt": list(requests[1].prompt_ids), "max_tokens": 60, "temperature": 0}
    assert "raise max_latents" in refusal(server.post("/v1/completions", {**body, "vllm_xargs": {"latent_k": ROOM}}))


def test_weights_stay(rig: VLLMRig, engine: ServerRolloutEngine) -> None:
    with pytest.raises(UserError, match="restart the server on it"):
        engine.sync_weights(rig.model)


# ---- OpenAI's routes


def complete(server: Server, prompt: Any, **more: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 10, "temperature": 0, "return_token_ids": True, **more}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    return response.json()


def decoded(latents: dict[str, Any]) -> torch.Tensor:
    return wire.from_text(latents["vectors"], latents["width"])


@pytest.mark.usefixtures("empty_afterwards")
def test_completions_return_latents_only_if_asked(server: Server, rig: VLLMRig, engine: ServerRolloutEngine) -> None:
    (request,) = opened(rig.requests([([], "yellow"), ([], "what is next from red")]), engine.markers.start or 0)[1:]
    prompt = list(request.prompt_ids)
    (wanted,) = rig.engine(LVR).generate([replace(request, k=2)], replace(GREEDY, max_tokens=10))
    (plain,) = complete(server, prompt, vllm_xargs={"latent_k": 2})["choices"]
    assert plain["token_ids"] == list(wanted.completion_ids)
    assert "latents" not in plain
    (asked,) = complete(server, prompt, vllm_xargs={"latent_k": 2}, return_latents=True)["choices"]
    assert {key: asked[key] for key in plain} == plain
    assert asked["latents"]["positions"] == list(wanted.latent_positions)
    assert torch.allclose(decoded(asked["latents"]), wanted.latents, atol=CLOSE)


@pytest.mark.usefixtures("empty_afterwards")
def test_latents_can_be_switched_off(server: Server, engine: ServerRolloutEngine) -> None:
    """A text prompt, as any OpenAI client sends it."""
    start = engine.markers.start
    (on,) = complete(server, "what is next from red")["choices"]
    (off,) = complete(server, "what is next from red", vllm_xargs={"latent_intervention": "none"})["choices"]
    assert start in on["token_ids"]
    assert start not in off["token_ids"]


@pytest.mark.usefixtures("empty_afterwards")
def test_any_client_controls_start(server: Server, engine: ServerRolloutEngine) -> None:
    prompt, start = "what is next from red", engine.markers.start
    found = {}
    for wanted in ("free", "forced", "forbidden", "bias -30"):
        (found[wanted],) = complete(server, prompt, return_latents=True, vllm_xargs={"latent_start": wanted})["choices"]
    assert found["forced"]["token_ids"][0] == start
    assert found["forced"]["latents"]["positions"]
    assert found["forbidden"]["token_ids"] == found["bias -30"]["token_ids"] != found["free"]["token_ids"]
    assert start in found["free"]["token_ids"]
    assert start not in found["forbidden"]["token_ids"]


@pytest.mark.usefixtures("empty_afterwards")
def test_filters_of_the_distribution(server: Server) -> None:
    """vLLM's own kernel for them does not run on a CPU. The likeliest token alone is left, whatever the temperature."""
    (greedy,) = complete(server, "what is next from red")["choices"]
    for filters in ({"top_p": 1e-6}, {"top_k": 1}, {"top_p": 1e-6, "top_k": 5}):
        (filtered,) = complete(server, "what is next from red", temperature=2.0, seed=1, **filters)["choices"]
        assert filtered["token_ids"] == greedy["token_ids"], filters
    (free,) = complete(server, "what is next from red", temperature=2.0, seed=1)["choices"]
    assert free["token_ids"] != greedy["token_ids"]


@pytest.mark.usefixtures("empty_afterwards")
def test_every_choice_has_its_own_latents(server: Server, rig: VLLMRig, engine: ServerRolloutEngine) -> None:
    (request,) = opened(rig.requests([([], "yellow"), ([], "green")]), engine.markers.start or 0)[1:]
    prompt = list(request.prompt_ids)
    noisy = {"seed": 3, "vllm_xargs": {"latent_sigma": 0.3}}
    first, second = complete(server, prompt, n=2, temperature=1.0, return_latents=True, **noisy)["choices"]
    for choice in (first, second):
        ids = [*prompt, *choice["token_ids"]]
        places = [i for i, token in enumerate(ids) if token == engine.markers.slot]
        assert choice["latents"]["positions"] == places
        assert decoded(choice["latents"]).shape == (len(places), 64)
    assert (decoded(first["latents"])[0] - decoded(second["latents"])[0]).abs().max() > 0.1, "noise of two seeds"


@pytest.mark.usefixtures("empty_afterwards")
def test_chat_with_an_image(server: Server, rig: VLLMRig) -> None:
    picture = noise_image(3, 56, 56)
    (request,) = rig.requests([([picture], "yellow")])
    (wanted,) = rig.engine(LVR).generate([request], replace(GREEDY, max_tokens=10))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "yellow"}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 10, "temperature": 0}
    response = server.post("/v1/chat/completions", {**body, "return_token_ids": True, "return_latents": True})
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["prompt_token_ids"] == list(wanted.prompt_ids)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == list(wanted.completion_ids)
    assert choice["latents"]["positions"] == list(wanted.latent_positions)
    assert torch.allclose(decoded(choice["latents"]), wanted.latents, atol=CLOSE)
    assert len(wanted.latent_positions) > 0


# ---- bad requests


def rows(count: int, width: int = 64, value: float = 0.0) -> str:
    return wire.to_text(torch.full((count, width), value))


GIVEN = {"latent_intervention": "given"}
BAD_XARGS = {
    "unknown key": ({"latent_kk": 1}, "did you mean 'latent_k'"),
    "wrong type": ({"latent_k": "three"}, "must be a whole number"),
    "k 0": ({"latent_k": 0}, "k is 0; it must be above 0"),
    "k beyond the room": ({"latent_k": ROOM + 1}, "raise max_latents"),
    "sigma": ({"latent_sigma": -1.0}, "latent_sigma is -1"),
    "intervention": ({"latent_intervention": "dream"}, "choose own"),
    "start": ({"latent_start": "force"}, "did you mean 'forced'"),
    "bias": ({"latent_start": "bias nan"}, "latent_start has the bias nan"),
    "start of no block": (
        {"latent_start": "forced", "latent_intervention": "none"},
        "latent_start is 'forced', but intervention 'none' forbids START",
    ),
    "no vectors": (GIVEN, "needs vectors of shape"),
    "vectors for nobody": ({"latent_vectors": rows(1)}, "takes no vectors"),
    "width": ({**GIVEN, "latent_vectors": rows(1, 63)}, "no rows of 64 float32"),
    "garbage": ({**GIVEN, "latent_vectors": "?" * 40}, "must be base64"),
    "not finite": ({**GIVEN, "latent_vectors": rows(2, value=float("nan"))}, "finite"),
    "too many": ({**GIVEN, "latent_vectors": rows(ROOM + 1)}, "raise max_latents"),
    "positions alone": ({"latent_prompt_positions": [1]}, "go together"),
    "a uid": ({"latent_uid": "mine"}, "is the server's own"),
    "sigma beyond all tables": ({"latent_sigma": 1e39}, "at most 1e\\+06"),
    "opens": ({"latent_opens": "yes"}, "latent_opens is 'yes'; it must be 0 or 1"),
    "opens at_start": ({"latent_opens": 1}, "latent_opens is for formats whose first latent comes before_start"),
    "prompt latents of no kind": ({"latent_prompt_vectors": 3, "latent_prompt_positions": 4}, "must be text"),
    "filler": ({"latent_filler": 2**63}, "latent_filler is 9223372036854775808; it must be a whole number, 0 to"),
    **{
        f"k {kind}": ({"latent_k": 2**63, "latent_intervention": kind}, "latent_k is 9223372036854775808; it must")
        for kind in ("own", "none", "skip", "markers_only", "plain_tokens")
    },
}
BAD_BODIES = {
    "beside vllm_xargs": ({"latent_k": 2}, "belongs into vllm_xargs"),
    "not a switch": ({"return_latents": "yes"}, "must be true or false"),
    "streamed": ({"return_latents": True, "stream": True}, "leave stream out"),
    "two prompts": ({"return_latents": True, "prompt": ["red", "blue"]}, "send the 2 prompts singly"),
    "a slot without its vector": ({"prompt": "red <|lvr_start|><|lvr|>"}, "gives no vector"),
    "structure": ({"response_format": {"type": "json_object"}}, "structured outputs"),
    "beams": ({"use_beam_search": True, "n": 2}, "leave use_beam_search out"),
    "top_k": ({"temperature": 1.0, "top_k": 2**63}, "top_k is 9223372036854775808; it must be"),
    "top_k beyond any message": ({"temperature": 1.0, "top_k": 2**64}, "top_k is 18446744073709551616; it must be"),
    "stop token": ({"stop_token_ids": [2**63]}, "stop_token_ids holds 9223372036854775808; ids are"),
}


def said(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content, **more}]}


BAD_TEXTS = (
    (said("what is <|lvr_start|>"), "messages[0].content holds the control token '<|lvr_start|>'"),
    (said([{"type": "text", "text": "an <|image_pad|>"}]), "messages[0].content[0] holds"),
    (said([{"type": "text", "text": "red<|im_"}, {"type": "text", "text": "end|>"}]), "messages[0].content[0] holds"),
    (said("red", name="<|im_start|>"), "messages[0].name holds"),
    ({"messages": [{"role": "system", "content": "<|lvr|>"}, *said("red")["messages"]]}, "messages[0].content holds"),
    ({**said("red"), "chat_template_kwargs": {"words": ["<|im_end|>"]}}, "chat_template_kwargs.words[0] holds"),
)
GOOD_CALL = {"prompt_token_ids": [20, 21], "sampling_params": {"max_tokens": 2, "temperature": 0.0, "logprobs": 0}}
BAD_CALLS = {
    "field": ({"prompt": "red"}, "prompt: extra inputs"),
    "type": ({"prompt_token_ids": ["red"]}, "prompt_token_ids"),
    "empty": ({"prompt_token_ids": []}, "empty"),
    "vocabulary": ({"prompt_token_ids": [10**6]}, "10\\d* is"),
    "picture": ({"pictures": ["AAAA"]}, "no PNG, JPEG or WebP"),
    "sampling field": ({"sampling_params": {"max_tokens": 2, "n": 2}}, "sampling_params.n: extra inputs"),
    "sampling value": ({"sampling_params": {"max_tokens": 2, "temperature": -1.0}}, "temperature"),
    "seed": ({"sampling_params": {"max_tokens": 2, "seed": 2**63}}, "the seed 9223372036854775808 cannot be used"),
    "no seed": ({"sampling_params": {"max_tokens": 2, "seed": -1}}, "the seed -1 cannot be used"),
    "tokens": ({"sampling_params": {"max_tokens": 2**31 - 1}}, "max_tokens is 2147483647; it must be"),
    "sampling type": ({"sampling_params": {"max_tokens": "many"}}, "max_tokens: input should be a valid integer"),
}


@pytest.mark.usefixtures("empty_afterwards")
def test_bad_requests_are_refused_in_a_sentence(server: Server) -> None:
    good = {"prompt": "red", "max_tokens": 2, "temperature": 0}
    cases = [({**good, "vllm_xargs": extra}, words) for extra, words in BAD_XARGS.values()]
    cases += [({**good, **changes}, words) for changes, words in BAD_BODIES.values()]
    assert server.post("/v1/completions", good).status_code == 200
    for body, words in cases:
        told = refusal(server.post("/v1/completions", body))
        assert re.search(words, told), (body, told)
        assert "\n" not in told
        assert len(told) < 400
    messages = {"messages": [{"role": "user", "content": "red"}], "max_tokens": 2}
    assert "belongs into" in refusal(server.post("/v1/chat/completions", {**messages, "latent_k": 2}))
    assert "did you mean" in refusal(server.post("/v1/chat/completions", {**messages, "vllm_xargs": {"latent_kk": 2}}))
    assert "leave use_beam_search" in refusal(
        server.post("/v1/chat/completions", {**messages, "use_beam_search": True})
    )
    for content, where in BAD_TEXTS:
        told = refusal(server.post("/v1/chat/completions", {**messages, **content}))
        assert told.startswith(where), (content, told)
        assert "control token" in told
    assert server.post("/v1/completions", good).status_code == 200, "it lives"


@pytest.mark.usefixtures("empty_afterwards")
def test_bad_rollout_calls_are_refused(server: Server) -> None:
    assert server.post(protocol.ROLLOUT, GOOD_CALL).status_code == 200
    for changes, words in BAD_CALLS.values():
        told = refusal(server.post(protocol.ROLLOUT, {**GOOD_CALL, **changes}))
        assert re.search(words, told), (changes, told)


# ---- clients that go away


@pytest.mark.usefixtures("empty_afterwards")
def test_a_killed_client_leaves_nothing(server: Server, rig: VLLMRig, engine: ServerRolloutEngine) -> None:
    (request,) = opened(rig.requests([([], "yellow"), ([], "green")]), engine.markers.start or 0)[1:]
    fields = {"max_tokens": 200, "temperature": 0.0, "logprobs": 0}
    call = protocol.call_to_json(request.prompt_ids, [], fields)
    completion = {"prompt": list(request.prompt_ids), "max_tokens": 200, "temperature": 0, "return_latents": True}
    # Two more than run at once, so that some die while they wait.
    dying = [begin(server, "/v1/completions", completion), *(begin(server, protocol.ROLLOUT, call) for _ in range(9))]
    running = int(str(FLAGS["max-num-seqs"]))
    within(30, lambda: server.tables()["live"] == running)  # the control: while they live, the worker owes them latents
    for connection in dying:
        connection.close()
    within(5, lambda: not any(server.tables().values()))  # far sooner than 200 tokens


# ---- the documentation


@pytest.mark.usefixtures("empty_afterwards")
def test_every_curl_line_of_the_documentation_works(server: Server, tmp_path: Path) -> None:
    noise_image(3, 56, 56).save(tmp_path / "picture.png")
    blocks = [block for block in documented("") if protocol.WEIGHTS not in block]
    answers = [run_documented(block, server, tmp_path) for block in blocks]
    (models, status), chats, pictures, (off, plain), rollouts, with_picture = answers
    assert models["data"][0]["id"] == str(server.folder)
    assert status["ready"]
    for told in (*chats, *pictures, plain):
        assert told["choices"][0]["latents"]["width"] == 64
    assert "latents" not in off["choices"][0]
    assert pictures[0]["usage"]["prompt_tokens"] > chats[0]["usage"]["prompt_tokens"]
    for (rollout,), (chat,) in ((rollouts, chats), (with_picture, pictures)):
        assert len(rollout["prompt_token_ids"]) == chat["usage"]["prompt_tokens"]
        assert rollout["finish_reason"] in ("length", "stop")


# ---- how it starts and ends


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU only")
def test_the_cache_has_a_size_that_fits(server: Server) -> None:
    told = re.search(r"the key-value cache takes (\d+\.\d+) GiB; --kv-cache-memory-bytes", server.log.read_text())
    assert told
    assert 0 <= float(told[1]) < 0.1, "256 blocks of a tiny model"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU only")
def test_a_size_that_does_not_fit_is_one_sentence(rig: VLLMRig, tmp_path: Path) -> None:
    """The user's own wins, and vLLM's traceback is in a file."""
    server = Server(rig.folder, tmp_path / "server.log", "--gpu-memory-utilization", "1.0")
    assert server.process.wait(300) == 2
    said = server.log.read_text()
    assert "Traceback" not in said
    told = re.search(r"rl-lvr: vLLM could not start: Available memory on node .* Its log is (\S+)\.\n$", said)
    assert told, said
    log = Path(told[1])
    assert "Traceback" in log.read_text()
    log.unlink()


@pytest.mark.parametrize(
    ("flags", "options", "words"),
    [
        (["--headless"], {}, "--headless cannot be used here"),
        (["--additional-config", '{"latent": {}}'], {}, "use --format and --max-latents"),
        ([], {"format": None}, "name one with --format"),
        ([], {"max_latents": 0}, "must be at least 1"),
        (["--enable-log-outputs"], {}, "requires --enable-log-requests"),
    ],
    ids=["headless", "additional config", "no format", "no room", "vllm's own"],
)
def test_settings_that_cannot_be_are_refused(
    rig: VLLMRig, flags: list[str], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        vllm_arguments(ServeOptions(str(rig.folder), **{"format": "lvr", **options}), flags, 8000)


def test_weights_that_are_not_finite_are_not_served(rig: VLLMRig, tmp_path: Path) -> None:
    shutil.copytree(rig.folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    stored = load_file(file)
    stored["lm_head.weight"][-1, -1] = float("nan")
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight in .* is not finite"):
        vllm_arguments(ServeOptions(str(tmp_path / "model"), format="lvr"), [], 8000)
    with pytest.raises(UserError, match=r"lm_head.weight in .* is not finite"):
        VLLMRolloutEngine(tmp_path / "model", rig.processor, get_format("lvr"), max_model_len=64)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU only")
def test_a_machine_that_runs_no_kernels_is_told_so(rig: VLLMRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "interpreted", lambda: False)  # Triton decides that once, on import
    with pytest.raises(UserError, match="set TRITON_INTERPRET=1 in the environment before the start"):
        vllm_arguments(ServeOptions(str(rig.folder), format="lvr"), [], 8000)


def test_development_routes_are_not_opened_to_the_world(
    rig: VLLMRig, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.post("/collective_rpc", {"method": "latent_status"}).status_code == 404
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    vllm_arguments(ServeOptions(str(rig.folder), format="lvr"), [], 8000)
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE"):
        vllm_arguments(ServeOptions(str(rig.folder), format="lvr", host="0.0.0.0"), [], 8000)


def test_ctrl_c_ends_the_server_and_its_children(server: Server) -> None:
    assert server.interrupt() == 0
    assert "rl-lvr: ended." in server.log.read_text()


def test_ctrl_c_ends_a_server_that_is_still_starting(rig: VLLMRig, tmp_path: Path) -> None:
    server = Server(rig.folder, tmp_path / "server.log")
    server.wait_for("starting the engine")
    time.sleep(2)
    assert server.interrupt() == 130
    assert "rl-lvr: interrupted." in server.log.read_text()
