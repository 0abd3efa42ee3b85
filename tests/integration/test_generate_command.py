"""`rl-lvr generate` from the arguments to what is printed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from helpers import noise_image

from rl_lvr.cli import main
from rl_lvr.commands.generate import INTERVENTIONS
from rl_lvr.latents.batch import LatentBatch
from rl_lvr.latents.format import get_format
from rl_lvr.latents.interventions import Intervention


@pytest.fixture(scope="module")
def folder(load_tiny, tmp_path_factory):
    """A checkpoint that opens a span at once: START's logit is the largest wherever the model has not just used it."""
    model, processor = load_tiny("qwen2_5_vl")
    format_ = get_format("lvr", k=3)
    start = processor.tokenizer.convert_tokens_to_ids(format_.start)
    red = processor.tokenizer.encode(" red", add_special_tokens=False)[0]
    with torch.no_grad():
        model.lm_head.weight[start] *= 6
        model.lm_head.weight[red] *= 6
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    format_.save(path)
    return path


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a.png"
    noise_image(0).save(path)
    return str(path)


@pytest.fixture
def ask(folder, image, capsys):
    def run(*more: str, images=True) -> tuple[int, str, str]:
        picture = ["--image", image] if images else []
        arguments = ["generate", str(folder), "--question", "what is next", "--max-tokens", "30", *picture, *more]
        code = main(arguments)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_text_with_spans_and_facts(ask):
    code, out, _ = ask("--temperature", "1", "--n", "3")
    assert code == 0
    assert "⟦3 latents⟧" in out
    assert "<|lvr" not in out
    assert out.count("intervention own") == 3
    assert "seed 2" in out


def test_json_and_saved_latents_agree(ask, tmp_path):
    file = tmp_path / "latents.safetensors"
    code, out, _ = ask("--json", "--n", "2", "--temperature", "1", "--save-latents", str(file), "--k", "2")
    assert code == 0
    answers = json.loads(out)["answers"]
    batch = LatentBatch.load(file)
    assert len(answers) == len(batch) == 2
    for row, answer in enumerate(answers):
        values, positions = batch.row(row)
        assert positions.tolist() == answer["latent_positions"]
        assert values.norm(dim=-1).tolist() == pytest.approx(answer["latent_norms"], abs=1e-3)
        assert len(answer["logprobs"]) == len(answer["completion_ids"])
    assert sum(answer["latents"] for answer in answers) > 0
    code, _, err = ask("--save-latents", str(file))
    assert code == 2
    assert "exists" in err


def test_interventions_from_the_shell(ask, tmp_path):
    file = tmp_path / "latents.safetensors"
    base = ("--json", "--temperature", "1", "--seed", "3")
    own = json.loads(ask(*base, "--save-latents", str(file))[1])["answers"][0]
    assert own["latents"] >= 3
    extra = {"oracle": ["--oracle-box", "0,0,42,28"], "plain_tokens": ["--filler", " red"]}
    extra |= {kind: ["--vectors", str(file)] for kind in ("given", "swap", "mean")}
    for kind in INTERVENTIONS:
        code, out, _ = ask(*base, "--intervention", kind, *extra.get(kind, []))
        assert code == 0
        answer = json.loads(out)["answers"][0]
        assert answer["intervention"] == kind
        assert bool(answer["latents"]) == Intervention(kind).feeds_vectors
        if kind == "zeros":
            assert set(answer["latent_norms"]) == {0.0}
        if kind == "given":
            assert answer["latent_norms"][:3] == pytest.approx(own["latent_norms"][:3], abs=1e-3)


def test_control_of_start_from_the_shell(ask):
    base = ("--json", "--temperature", "1", "--seed", "3")
    found = {}
    for start in ("free", "forced", "forbidden", "bias=-900"):
        code, out, _ = ask(*base, "--latent-start", start)
        assert code == 0
        (found[start],) = json.loads(out)["answers"]
        assert found[start]["latent_start"] == start.replace("=", " ")
    assert found["forced"]["latent_positions"][0] == len(found["forced"]["prompt_ids"]) + 1
    assert found["forced"]["logprobs"][0] == 0
    assert found["free"]["latents"] > 0
    assert found["forbidden"]["latents"] == found["bias=-900"]["latents"] == 0
    assert "latent_start forced" in ask("--latent-start", "forced")[1]
    assert "latent_start" not in ask()[1]


def test_without_an_image(ask):
    code, out, _ = ask("--json", images=False)
    assert code == 0
    assert json.loads(out)["images"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--n", "0"], "n is 0"),
        (["--k", "0"], "k is 0"),
        (["--latent-start", "force"], "latent_start is 'force'; did you mean 'forced'?"),
        (["--latent-start", "bias nan"], "latent_start has the bias nan"),
        (["--latent-start", "forced", "--intervention", "none"], "intervention 'none' forbids START"),
        (["--format", "lvrr"], "did you mean 'lvr'"),
        (["--format", "monet"], "was trained with latent format 'lvr'"),
        (["--intervention", "oracle"], "--oracle-box"),
        (["--oracle-box", "0,0,4,4"], "go together"),
        (["--intervention", "oracle", "--oracle-box", "0,0,1000,10"], "no region of the image of 84 x 56"),
        (["--intervention", "swap"], "--vectors"),
        (["--intervention", "given", "--vectors", "missing.safetensors"], "no latents file"),
        (["--intervention", "plain_tokens", "--filler", "from what"], "choose a text of exactly one"),
        (["--image", "missing.png"], "does not exist"),
        (["--save-latents", "no/such/folder/x.safetensors"], "create it first"),
        (["--device", "cuda:99"], "cannot be used here"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(ask, arguments, message):
    code, out, err = ask(*arguments)
    assert code == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("rl-lvr: ")
    assert message in last


def test_a_checkpoint_without_a_format_asks_for_one(tiny_folder, capsys):
    folder = str(tiny_folder("qwen2_5_vl"))
    assert main(["generate", folder, "--question", "what"]) == 2
    assert "--format" in capsys.readouterr().err
    assert main(["generate", folder, "--question", "what", "--format", "lvr", "--max-tokens", "3"]) == 0
    assert main(["generate", folder + "x", "--question", "what"]) == 2


def test_the_names_are_the_enums_and_help_needs_no_torch():
    assert tuple(kind.value for kind in Intervention) == INTERVENTIONS
    code = "import sys, rl_lvr.commands.generate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("token", ["<|lvr_start|>", "<|image_pad|>", "<|im_end|>"])
def test_a_question_with_a_control_token_is_refused(ask, token):
    code, _, said = ask("--question", f"what is {token} next")
    assert code == 2
    assert f"--question: holds the {'' if 'image' in token else 'control '}token {token!r}" in said


def test_what_the_model_cannot_take_is_refused_before_its_weights_are_read(ask, tmp_path, monkeypatch):
    monkeypatch.setattr("rl_lvr.models.loading.load_weights", lambda *_, **__: pytest.fail("weights were read"))
    code, _, said = ask("--k", "1000000")
    assert code == 2
    assert "k is 1000000: a span takes 1000002 tokens with its markers, and the model takes 4096 positions" in said
    code, _, said = ask("--k", "4090", "--max-tokens", "5000", images=False)
    assert code == 2
    assert "4092 of completion, and 4096 is the most in all" in said
    noise_image(0, 2, 402).save(tmp_path / "thin.png")
    code, _, said = ask("--image", str(tmp_path / "thin.png"))
    assert code == 2
    assert f"--image {tmp_path / 'thin.png'}: is 402 x 2 pixels, which the model's image processor refuses" in said
