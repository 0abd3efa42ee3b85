"""Text-only Qwen2 and Qwen3 from the shell and from the encoder: a family as the others are."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import noise_image
from lab_tools import grpo, logged, sft, weights
from vllm_cases import TEXT, thinking

from rl_lvr.cli import main
from rl_lvr.data.encoding import Encoder
from rl_lvr.data.images import ImageRef
from rl_lvr.data.record import Record
from rl_lvr.data.sources import RowError
from rl_lvr.latents.format import get_format
from rl_lvr.models import family_of, load_model

# As the released tokenizers of Qwen2 write it: content is a string, and a list would be printed as it stands.
STRINGS_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROWS = [
    {
        "id": str(number),
        "messages": [
            {"role": "user", "content": f"what is next from {color} {number % 3 + 1} hops"},
            {"role": "assistant", "content": answer},
        ],
        "answer": answer,
    }
    for number, (color, answer) in enumerate([("red", "blue"), ("blue", "green"), ("green", "red")] * 4)
]
REWARD = """
def looks(attention_mass, image_mass, latent_entropy, spans, **_):
    assert image_mass == [0.0] * len(spans)
    latents = [sum(span["latents"] for span in found) for found in spans]
    assert any(latents)
    assert all((value > 0) == (count > 0) for value, count in zip(latent_entropy, latents))
    return [mass + count for mass, count in zip(attention_mass, latents)]

looks.signals = [
    "attention_mass",
    {"attention_mass": {"name": "image_mass", "to": "image"}},
    "latent_entropy",
]
"""


@pytest.fixture(scope="module", params=TEXT)
def folder(request, tiny_folder, tmp_path_factory):
    return thinking(tiny_folder, tmp_path_factory.mktemp("text"), request.param)


@pytest.fixture(scope="module", params=TEXT)
def opener(request, tiny_folder, tmp_path_factory):
    """A model in whose head START's row points along the states of answers, so that most completions open a span."""
    model, tokenizer = load_model(tiny_folder(request.param, latent_formats=("lvr",)), dtype=torch.float32)
    chats = [tokenizer.apply_chat_template(row["messages"], return_dict=False) for row in ROWS]
    with torch.no_grad():
        mean = torch.stack([model.get_decoder()(torch.tensor([ids])).last_hidden_state[0, -3:-1] for ids in chats])
        mean = mean.mean((0, 1))
        row = model.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(get_format("lvr").start)]
        row.copy_(8 * mean / mean.norm() ** 2)
    place = tmp_path_factory.mktemp("opener") / request.param
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_generate_answers_with_latents(folder, capsys):
    ask = ["generate", str(folder), "--question", "what is next from red", "--format", "lvr", "--k", "3"]
    assert main([*ask, "--max-tokens", "30", "--temperature", "1", "--n", "2", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert len(answers) == 2
    assert sum(answer["latents"] for answer in answers) >= 3


def test_generate_refuses_an_image(folder, capsys, tmp_path):
    noise_image(0).save(tmp_path / "a.png")
    ask = ["generate", str(folder), "--question", "what", "--format", "lvr", "--image", str(tmp_path / "a.png")]
    assert main(ask) != 0
    assert "takes none" in capsys.readouterr().err


def test_records_are_written_with_string_contents(folder):
    model, tokenizer = load_model(folder)
    tokenizer.chat_template = STRINGS_ONLY
    format_ = get_format("lvr", k=2)
    encoder = Encoder(tokenizer, family_of(model), format_.bind(tokenizer, {}))
    text = [{"type": "text", "text": "what is "}, {"type": "text", "text": "next"}]
    answer = [{"type": "text", "text": "<latent>red"}]
    record = Record("a", ({"role": "user", "content": text}, {"role": "assistant", "content": answer}))
    (row,) = encoder.encode([record])
    written = "<|im_start|>user\nwhat is next<|im_end|><|im_start|>assistant\n" + format_.text(2) + "red<|im_end|>"
    assert tokenizer.decode(row.input_ids) == written
    picture = {"role": "user", "content": [{"type": "image"}, *text]}
    with pytest.raises(RowError, match="show an image"):
        encoder.encode([replace(record, messages=(picture, record.messages[1]), images=(ImageRef("a.png"),))])


def test_latent_sft_trains_on_text_alone(folder, tmp_path):
    """Spans without targets are filled with the model's own predictions, also where whole batches have none."""
    rows = [
        {
            "id": str(number),
            "messages": [
                {"role": "user", "content": "what is next from red"},
                {"role": "assistant", "content": "<latent> blue" if number < 4 else "blue"},
            ],
            "answer": "blue",
        }
        for number in range(8)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"train_file": tmp_path / "data" / "train.jsonl", "max_steps": 4, "learning_rate": 1e-2}
    assert sft(folder, tmp_path / "data", tmp_path / "run", **settings) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in logged if "loss" in row]
    assert losses[-1] < losses[0]
    trained, before = (load_model(place)[0].state_dict() for place in (tmp_path / "run", folder))
    assert any(not torch.equal(before[name], tensor) for name, tensor in trained.items())
    ask = ["generate", str(tmp_path / "run"), "--question", "what is next from red", "--max-tokens", "8"]
    assert main(ask) == 0


def test_grpo_trains_on_text_alone(opener, tmp_path):
    """Rewards that read attention and entropies at latents work as with images; the mass on an image is 0."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "mine.py").write_text(REWARD)
    settings = {
        "train_file": tmp_path / "data" / "train.jsonl",
        "rewards": ["attention", f"{tmp_path / 'mine.py'}:looks"],
        "latent_policy": "gaussian",
        "latent_sigma": 0.1,
    }
    assert grpo(opener, tmp_path / "data", tmp_path / "run", **settings) == 0
    rows = logged(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert math.isfinite(row["loss"])
        assert row["grad_norm"] > 0
        assert row["latent/rate"] > 0
        assert row["latent/replay_logp_diff"] < 1e-3
        assert row["rewards/looks/std"] > 0
        assert row["rewards/attention/mean"] > 0
    before, after = weights(opener), weights(tmp_path / "run")
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items())


def test_evaluate_asks_under_interventions(opener, tmp_path):
    data, out = tmp_path / "test.jsonl", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    ask = ["evaluate", str(opener), "--data", str(data), "--format", "lvr", "--k", "3", "--max-tokens", "12"]
    ask += ["--conditions", "own,zeros,noise,mean,swap,skip,none", "--signals", "attention_mass"]
    ask += ["--temperature", "1", "--out", str(out)]
    assert main(ask) == 0
    summary = json.loads(out.with_suffix(".json").read_text())
    assert len(out.read_text().splitlines()) == 7 * len(ROWS)
    assert summary["conditions"]["own"]["trigger_rate"] > 0.5
    assert summary["conditions"]["none"]["trigger_rate"] is None
    assert summary["conditions"]["own"]["signals"]["attention_mass"] > 0
