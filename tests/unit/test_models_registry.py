"""Finding a family, adding one, and loading checkpoints from disk."""

import shutil

import pytest
import torch
from helpers import install, make_batch, noise_image
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from rl_lvr.errors import UserError
from rl_lvr.lab.tiny import TinySpec, build_tiny
from rl_lvr.models import (
    Family,
    TokenGrid,
    UnsupportedFamily,
    family_of,
    load_model,
    register_family,
    registry,
)
from rl_lvr.models.internvl import InternVL
from rl_lvr.models.llava_onevision import LlavaOnevision
from rl_lvr.models.qwen import Qwen2_5VL, Qwen3VL
from rl_lvr.models.registry import family_class, required_members


@pytest.fixture
def own_registry(monkeypatch):
    """Families that a test adds are forgotten after it."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))


def test_each_model_has_its_family(tiny, family_name):
    expected = {
        "qwen2_5_vl": Qwen2_5VL,
        "qwen3_vl": Qwen3VL,
        "internvl": InternVL,
        "llava_onevision": LlavaOnevision,
    }[family_name]
    assert type(family_of(tiny[0])) is type(family_of(tiny[0].config)) is expected
    assert family_of(tiny[0].config).hidden_size == 64


@pytest.mark.parametrize("config", [LlamaConfig(), LlavaConfig()])
def test_another_model_type_is_refused_with_what_an_adapter_must_give(config):
    with pytest.raises(UnsupportedFamily) as caught:
        family_of(config)
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert repr(config.model_type) in message
    for name in ("Qwen2.5-VL", "Qwen3-VL", "InternVL", "LLaVA-OneVision", "register_family"):
        assert name in message
    for member in required_members():
        assert f"{member} (" in message
    assert "\n" not in message


# A fifth family, written from nothing but the members that the error names.
QWEN2_VL_MEMBERS = {
    "name": "Qwen2-VL",
    "model_types": ("qwen2_vl",),
    "image_keys": ("pixel_values", "image_grid_thw"),
    "placeholder_ids": lambda self, tokenizer: {"image": self.config.image_token_id},
    "vision_parts": lambda self, model: {
        "tower": [self.core(model).visual.patch_embed, self.core(model).visual.blocks],
        "merger": [self.core(model).visual.merger],
    },
    "rows_per_image": lambda self, images: {
        "pixel_values": images["image_grid_thw"].prod(-1).tolist(),
        "image_grid_thw": [1] * len(images["image_grid_thw"]),
    },
    "image_features": lambda self, model, images: list(
        self.core(model).get_image_features(**self.image_inputs(images)).pooler_output
    ),
    "token_grid": lambda self, images: [TokenGrid(0, h // 2, w // 2) for _, h, w in images["image_grid_thw"].tolist()],
}


def test_the_named_members_are_all_that_a_fifth_family_needs(own_registry, load_tiny):
    assert set(QWEN2_VL_MEMBERS) == set(required_members())
    register_family(type("Qwen2VL", (Family,), dict(QWEN2_VL_MEMBERS)))

    _, processor = load_tiny("qwen2_5_vl")
    tokenizer = processor.tokenizer
    # The tiny tokenizer and processor of Qwen2.5-VL serve Qwen2-VL as well.
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=tokenizer.image_token_id, video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    family = family_of(model)
    assert family.name == "Qwen2-VL"
    batch = make_batch(processor, [([noise_image(0)], "red"), ([noise_image(1)], "what is next")])
    with torch.no_grad():
        whole = family.image_features(model, batch)
        rows = family.split_images(batch, [1, 1])
        alone = [family.image_features(model, row)[0] for row in rows]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, alone, strict=True))
    assert family.token_grid(batch) == [TokenGrid(0, 2, 3)] * 2
    assert family.core(model) is model.model
    assert family.head(model) is model.lm_head
    assert len(family.text_layers(model)) == 2


@pytest.mark.parametrize("member", sorted(QWEN2_VL_MEMBERS))
def test_an_incomplete_family_is_refused_by_the_missing_member(own_registry, member):
    members = {name: value for name, value in QWEN2_VL_MEMBERS.items() if name != member}
    with pytest.raises(UserError, match=f"must give {member}"):
        register_family(type("Qwen2VL", (Family,), members))


@pytest.mark.parametrize("model_type", ["gemma3", "paligemma"])
def test_bidirectional_attention_is_refused_by_name(own_registry, model_type):
    with pytest.raises(UnsupportedFamily, match=f"'{model_type}' is not supported: its attention is bidirectional"):
        family_class(model_type)
    with pytest.raises(UnsupportedFamily, match="causal attention"):
        register_family(type("Mine", (Family,), {**QWEN2_VL_MEMBERS, "model_types": (model_type,)}))
    assert "no adapter" in str(UnsupportedFamily("llama"))  # control: another kind of refusal


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nope = nowhere_at_all:Family", "there is no module 'nowhere_at_all'"),
        ("nope = rl_lvr.models.base:TokenGrid", "no subclass of rl_lvr.models.Family"),
        ("nope = rl_lvr.models.base:Family", "is incomplete"),
        ("nope = rl_lvr.models.internvl:InternVL", "whose model_types are internvl"),
        ("internvl = rl_lvr.models.qwen:Qwen3VL", "2 installed packages have a family"),
        ("gemma3 = rl_lvr.models.internvl:InternVL", "bidirectional"),
    ],
)
def test_an_entry_point_that_is_no_family_is_refused(tmp_path, monkeypatch, entry, message):
    monkeypatch.setattr(registry, "_FAMILIES", {})
    install(tmp_path, "other_families", registry.KIND.group, entry)
    assert type(family_of(Qwen2_5_VLConfig())) is Qwen2_5VL
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=message):
        family_class(entry.split()[0])


def test_an_installation_without_entry_points_says_so(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", {})
    monkeypatch.setattr(registry, "installed", lambda kind: {})
    with pytest.raises(UserError, match="make setup"):
        family_class("qwen2_5_vl")


def test_a_taken_model_type_is_refused(own_registry):
    with pytest.raises(UserError, match=r"already belongs to Qwen2\.5-VL"):
        register_family(type("Mine", (Family,), {**QWEN2_VL_MEMBERS, "model_types": ("qwen2_5_vl",)}))
    assert family_of(Qwen2_5_VLConfig()).name == "Qwen2.5-VL"


# ---- inputs that do not belong together


def test_internvl_tiles_are_counted_in_the_ids(load_tiny):
    model, processor = load_tiny("internvl")
    family = family_of(model)
    images = [noise_image(0, 56, 56), noise_image(1, 56, 112), noise_image(2, 112, 112)]
    batch = make_batch(processor, [(images, "red"), (images[:1], "what")])
    assert family.image_inputs(batch)["num_patches"].tolist() == [1, 3, 5, 1]
    lists = {"input_ids": batch["input_ids"].tolist(), "pixel_values": batch["pixel_values"].numpy()}
    assert family.image_inputs(lists)["num_patches"].tolist() == [1, 3, 5, 1]
    with pytest.raises(UserError, match="image_inputs"):
        family.image_features(model, {"pixel_values": batch["pixel_values"]})
    with pytest.raises(ValueError, match="do not belong together"):
        family.image_inputs(dict(batch, pixel_values=batch["pixel_values"][1:]))
    with pytest.raises(UserError, match="no thumbnail"):
        family.token_grid({"pixel_values": batch["pixel_values"][:2], "num_patches": torch.tensor([2])})


def test_llava_rows_are_not_torn_apart(load_tiny):
    model, processor = load_tiny("llava_onevision")
    family = family_of(model)
    batch = make_batch(processor, [([noise_image(0), noise_image(1)], "red")])
    assert len(family.split_images(batch, [2])) == 1
    with pytest.raises(ValueError, match="processed in groups"):
        family.split_images(batch, [1, 1])


def test_video_is_refused(load_tiny):
    model, processor = load_tiny("qwen2_5_vl")
    family = family_of(model)
    ids = torch.tensor([[processor.tokenizer.video_token_id]])
    with pytest.raises(UserError, match="only images"):
        family.positions(model, ids)
    with pytest.raises(UserError, match="4 frames"):
        family.token_grid({"pixel_values": torch.zeros(16, 4), "image_grid_thw": torch.tensor([[4, 2, 2]])})


def test_a_tokenizer_of_another_family_is_refused(load_tiny):
    model, _ = load_tiny("internvl")
    _, processor = load_tiny("qwen3_vl")
    with pytest.raises(UserError, match="does not belong to a InternVL model"):
        family_of(model).placeholder_ids(processor)


# ---- loading


def test_load_model(tiny_folder, family_name):
    model, processor = load_model(tiny_folder(family_name), dtype=torch.float32, device="cpu")
    assert not model.training
    assert model.dtype == torch.float32
    batch = make_batch(processor, [([noise_image(0)], "what is next")])
    assert torch.isfinite(model(**batch).logits).all()
    assert load_model(tiny_folder(family_name), dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no model folder"),
        ("no/model-of-that-name", "hf download no/model-of-that-name"),
        ("bad name/x y", "no model folder"),
        ("a/b/c/d", "no model folder"),
    ],
)
def test_what_is_not_there_is_one_clear_sentence(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(name)
    assert "\n" not in str(caught.value)


@pytest.fixture
def copy_of_tiny(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder("qwen2_5_vl"), tmp_path / "model")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", r"no model\.safetensors"),
        ("processor_config.json", "no processor"),
        ("tokenizer_config.json", "no processor"),
    ],
)
def test_a_folder_that_lacks_something_is_refused(copy_of_tiny, lost, message):
    (copy_of_tiny / lost).unlink()
    with pytest.raises(UserError, match=message):
        load_model(copy_of_tiny)


def test_pickled_weights_are_not_read(copy_of_tiny):
    model, _ = load_model(copy_of_tiny)
    (copy_of_tiny / "model.safetensors").unlink()
    torch.save(model.state_dict(), copy_of_tiny / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(copy_of_tiny)


def test_an_unknown_family_is_refused_before_the_weights_are_read(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFamily):
        load_model(tmp_path)


def test_a_broken_file_is_the_users_to_mend(copy_of_tiny):
    data = (copy_of_tiny / "model.safetensors").read_bytes()
    (copy_of_tiny / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(copy_of_tiny)
    (copy_of_tiny / "model.safetensors").write_bytes(data)
    load_model(copy_of_tiny)
    (copy_of_tiny / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(copy_of_tiny)


def test_weights_that_lack_a_parameter_are_refused(copy_of_tiny):
    weights = load_file(copy_of_tiny / "model.safetensors")
    del weights["model.norm.weight"]  # its name on disk
    save_file(weights, copy_of_tiny / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 of .* model\.language_model\.norm\.weight"):
        load_model(copy_of_tiny)


def test_sharded_weights(copy_of_tiny):
    model, _ = load_model(copy_of_tiny)
    (copy_of_tiny / "model.safetensors").unlink()
    model.save_pretrained(copy_of_tiny, max_shard_size="200KB")
    shards = sorted(copy_of_tiny.glob("model-*.safetensors"))
    assert len(shards) > 1
    again, _ = load_model(copy_of_tiny)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    shards[0].unlink()
    with pytest.raises(UserError, match=shards[0].name):
        load_model(copy_of_tiny)


def test_tied_embeddings_are_no_missing_weights(tiny_folder, family_name):
    model, _ = load_model(tiny_folder(family_name, tie=True))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    untied, _ = load_model(tiny_folder(family_name))
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


def test_building_with_a_seed_is_what_load_model_reads(tmp_path):
    a = load_model(build_tiny(TinySpec("internvl", seed=1), tmp_path / "a"))[0].state_dict()
    b = load_model(build_tiny(TinySpec("internvl", seed=2), tmp_path / "b"))[0].state_dict()
    assert not torch.equal(a["lm_head.weight"], b["lm_head.weight"])
