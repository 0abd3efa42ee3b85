"""Tiny models: tokenizer, processor and weights of all four families."""

import json

import pytest
import torch
from helpers import WORDS, make_batch, noise_image
from PIL import Image
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.chat_template_utils import is_chat_template_prefix_preserving, is_chat_template_stop_token_trained

from rl_lvr.errors import UserError
from rl_lvr.lab.tiny import TinySpec, build_tiny
from rl_lvr.lab.tokenizer import build_tokenizer
from rl_lvr.latents.format import get_format


def test_each_word_is_one_token_and_other_text_survives(tiny):
    tokenizer = tiny[1].tokenizer
    for word in (*WORDS, "user", "assistant"):
        assert len(tokenizer(word).input_ids) == len(tokenizer(" " + word).input_ids) == 1
    assert len(tokenizer("zebra").input_ids) > 1  # not a word of the list
    text = "héllo 你好 redder red. 12\n\n  x\t<|lvr|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_words_may_hold_digits_and_punctuation():
    tokenizer = build_tokenizer("internvl", ("r1-c2", "r1-c20", "(0,1)", "don't"), ())
    for word in ("r1-c2", "r1-c20", "(0,1)", "don't"):
        assert len(tokenizer(word).input_ids) == len(tokenizer(" " + word).input_ids) == 1


@pytest.mark.parametrize("word", ["", "two words", "a<|im_end|>"])
def test_what_is_no_word_is_refused(word):
    with pytest.raises(UserError, match="tiny tokenizer"):
        build_tokenizer("internvl", (word,), ())


def test_special_tokens_are_single_and_unlike_the_released_ids(tiny, family_name):
    model, processor = tiny
    tokenizer = processor.tokenizer
    specials = [*get_format("lvr").tokens, "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    assert all(len(tokenizer(token).input_ids) == 1 for token in specials)
    assert len(tokenizer) == model.config.text_config.vocab_size < 100_000  # released ids start at 151643
    assert model.config.image_token_id == processor.image_token_id
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"


def test_images_reach_the_hidden_states(tiny):
    model, processor = tiny
    question = "what is next"
    batch = make_batch(processor, [([noise_image(0)], question), ([noise_image(1)], question)])
    with torch.no_grad():
        hidden = model.model(**batch).last_hidden_state
    assert torch.isfinite(hidden).all()
    assert (hidden[0, -1] - hidden[1, -1]).abs().max() > 0.05


def test_chat_template_is_fit_for_training(tiny):
    processor = tiny[1]
    assert is_chat_template_prefix_preserving(processor)
    assert is_chat_template_stop_token_trained(processor)
    messages = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": [{"type": "text", "text": "blue red"}]},
        {"role": "user", "content": "red"},
    ]
    out = processor.tokenizer.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        add_generation_prompt=True,
    )
    spoken = [i for i, mine in zip(out["input_ids"], out["assistant_masks"], strict=True) if mine]
    assert processor.tokenizer.decode(spoken) == "blue red<|im_end|>"
    assert processor.tokenizer.decode(out["input_ids"]).endswith("red<|im_end|><|im_start|>assistant\n")


def test_the_lab_shapes_take_an_image_as_it_is(tiny_folder):
    for family in ("qwen2_5_vl", "qwen3_vl"):
        folder = tiny_folder(
            family, patch=4, hidden=128, heads=4, kv_heads=2, layers=3, vision_hidden=64, init_std=0.02
        )
        processor = AutoProcessor.from_pretrained(folder)
        out = processor.image_processor([Image.new("RGB", (32, 24))], return_tensors="pt")
        assert out["image_grid_thw"].tolist() == [[1, 6, 8]]  # 24 x 32 pixels in patches of 4: not resized
        assert processor.image_processor([Image.new("RGB", (36, 24))], return_tensors="pt")[
            "image_grid_thw"
        ].tolist() == [[1, 6, 8]]  # 36 is no multiple of 8: this one is


def test_same_spec_same_files(tmp_path, family_name):
    spec = TinySpec(family_name, words=WORDS)
    a, b = build_tiny(spec, tmp_path / "a"), build_tiny(spec, tmp_path / "b")
    names = sorted(path.name for path in a.iterdir())
    assert "model.safetensors" in names
    assert names == sorted(path.name for path in b.iterdir())
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    other = build_tiny(TinySpec(family_name, words=WORDS, seed=1), tmp_path / "c")
    assert (a / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]  # nothing half made left


def test_building_leaves_the_random_stream_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_tiny(TinySpec("internvl"), tmp_path / "a")
    assert torch.equal(torch.rand(1), expected)


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        build_tiny(TinySpec("qwen3_vl"), tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "x"


def test_a_family_without_a_tiny_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no adapter for model type 'gpt'; supported are .*Qwen2\.5-VL"):
        build_tiny(TinySpec("gpt"), tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"heads": 3}, "multiple of heads"),
        ({"heads": 16, "kv_heads": 16}, "multiple of 8"),
        ({"image_size": 30}, "multiple of patch"),
    ],
)
def test_impossible_shapes_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        TinySpec(**{"family": "internvl", **change})


def test_llava_weights_have_their_released_names(tiny_folder, tmp_path):
    """vLLM finds the tower by them; a model read under these names is saved under them again."""
    folder = tiny_folder("llava_onevision")
    again = tmp_path / "again"
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(again)
    for path in (folder, again):
        with safe_open(path / "model.safetensors", framework="pt") as file:
            tower = [name for name in file.keys() if "vision_tower" in name]  # noqa: SIM118 - no dict
        assert tower
        assert all("vision_tower.vision_model." in name for name in tower)


def test_latent_formats_choose_the_markers(tiny_folder):
    folder = tiny_folder("qwen2_5_vl", latent_formats=("mirage", "ilvr"))
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert set(get_format("mirage").tokens) <= set(vocabulary)
    assert "<|lvr|>" not in vocabulary
