"""LatentFormat: presets, refusals, binding to real tokenizers, the file beside a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizer

from rl_lvr.errors import UserError
from rl_lvr.latents.format import FORMAT_FILE, PRESETS, LatentFormat, get_format

PLAIN = {"name": "own", "slot": "<s>", "start": "<a>", "end": "<b>"}


@pytest.fixture(scope="module")
def tokenizers(tiny_folder: Callable[..., Path]) -> Callable[..., Any]:
    """`tokenizers(*presets)`: a fresh tokenizer of a tiny model that was built with these formats."""

    def load(*presets: str) -> Any:
        return AutoTokenizer.from_pretrained(tiny_folder("qwen2_5_vl", latent_formats=presets))

    return load


# ---- presets and binding


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_binds_to_a_tokenizer_with_its_markers(name: str, tokenizers: Callable[..., Any]) -> None:
    latent_format, tokenizer = get_format(name), tokenizers(*PRESETS)
    ids = latent_format.bind(tokenizer)
    text_ids = tokenizer(latent_format.text(), add_special_tokens=False)["input_ids"]
    assert text_ids == ids.span()
    assert text_ids.count(ids.slot) == latent_format.slots
    assert tokenizer.convert_ids_to_tokens(ids.span(2)) == tokenizer.tokenize(latent_format.text(2))


@pytest.mark.parametrize("name", PRESETS)
def test_a_tokenizer_without_the_markers_is_refused(name: str, tokenizers: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="add_marker_tokens") as refusal:
        get_format(name).bind(tokenizers())
    assert all(token in str(refusal.value) for token in get_format(name).tokens)


def test_two_formats_with_the_same_ids_of_other_meaning_stay_apart(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers("lvr", "lantern")
    lvr, lantern = (get_format(name).bind(tokenizer) for name in ("lvr", "lantern"))
    assert (lvr.start, lvr.end) == (lantern.start, lantern.end)
    assert lvr.slot != lantern.slot


def test_the_number_of_slots_counts_the_overwritten_start() -> None:
    monet, lvr = get_format("monet", k=5), get_format("lvr", k=5)
    assert (monet.slots, lvr.slots) == (4, 5)
    assert (monet.slots_of(1), monet.slots_of(0), lvr.slots_of(0)) == (0, 0, 0)
    with pytest.raises(ValueError, match="-1 latents"):
        lvr.text(-1)


def test_slot_and_end_and_placeholders_are_never_sampled_but_start_is(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers("lvr")
    ids = get_format("lvr").bind(tokenizer, {"image": tokenizer.image_token_id, "video": tokenizer.video_token_id})
    assert set(ids.never_sampled) == {ids.slot, ids.end, tokenizer.image_token_id, tokenizer.video_token_id}


def test_a_slot_token_that_is_an_image_token_is_refused(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers("lvr")
    clash = get_format("lvr", slot=tokenizer.image_token)
    clash.bind(tokenizer)  # the control: without the list of placeholders nobody can know
    with pytest.raises(UserError, match="is the model's image token"):
        clash.bind(tokenizer, {"image": tokenizer.image_token_id})


class SharedIds(PreTrainedTokenizer):
    """A tokenizer written in Python whose vocabulary gives two tokens one id; the compiled ones cannot."""

    vocabulary: ClassVar[dict[str, int]] = {"<a>": 0, "<s>": 1, "<b>": 1, "<c>": 2}

    @property
    def vocab_size(self) -> int:
        return 3

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return [text]

    def _convert_token_to_id(self, token: str) -> int:
        return self.vocabulary[token]

    def _convert_id_to_token(self, index: int) -> str:
        return {index: token for token, index in self.vocabulary.items()}[index]


def test_two_markers_with_one_id_are_refused() -> None:
    tokenizer = SharedIds()
    assert LatentFormat(**{**PLAIN, "end": "<c>"}).bind(tokenizer).span(1) == [0, 1, 2]
    with pytest.raises(UserError, match="two markers have the same token id"):
        LatentFormat(**PLAIN).bind(tokenizer)


def test_an_entry_of_the_vocabulary_that_text_never_yields_is_no_marker(tokenizers: Callable[..., Any]) -> None:
    tokenizer = tokenizers("lvr")
    unreachable = next(
        token
        for token, index in tokenizer.get_vocab().items()
        if tokenizer(token, add_special_tokens=False)["input_ids"] != [index]
    )
    latent_format = get_format("lvr", slot=unreachable)
    assert latent_format.missing_tokens(tokenizer) == [unreachable]
    with pytest.raises(UserError, match="has no token"):
        latent_format.bind(tokenizer)
    assert get_format("lvr").missing_tokens(tokenizer) == []


def test_added_markers_bind_and_a_resized_model_looks_them_up(load_tiny: Callable[..., tuple[Any, Any]]) -> None:
    model, processor = load_tiny("qwen2_5_vl", latent_formats=("lvr",))
    tokenizer, monet = processor.tokenizer, get_format("monet")
    lvr_before, special_before = get_format("lvr").bind(tokenizer), set(tokenizer.all_special_tokens)
    assert monet.add_tokens(tokenizer) == 3
    assert monet.add_tokens(tokenizer) == 0
    ids = monet.bind(tokenizer)
    assert get_format("lvr").bind(tokenizer) == lvr_before
    assert set(tokenizer.all_special_tokens) == special_before | set(monet.tokens)
    tokens = torch.tensor([ids.span(3)])
    with pytest.raises(IndexError):
        model(input_ids=tokens)
    model.resize_token_embeddings(len(tokenizer))
    assert model(input_ids=tokens).logits.shape == (1, len(ids.span(3)), len(tokenizer))


def test_the_table_in_the_documentation_is_what_the_code_says() -> None:
    text = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8").replace("\\|", "|")
    for preset in PRESETS.values():
        row = f"| `{preset.name}` | `{' '.join(preset.tokens)}` | {preset.k} | {preset.length} | {preset.first} |"
        assert row in text


# ---- refusals


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"k": 0}, "k is 0; it must be a whole number above 0"),
        ({"k": -3}, "k is -3"),
        ({"k": True}, "k is True"),
        ({"k": 2.0}, "k is 2.0"),
        ({"k": "8"}, "k is '8'"),
        ({"length": "endless"}, "length is 'endless'; choose fixed or free"),
        ({"first": "after"}, "first is 'after'; choose at_start or before_start"),
        ({"feedback": ["hidden"]}, "choose hidden or none"),
        ({"projector": "cnn"}, "choose none or linear or mlp"),
        ({"norm": "layer"}, "choose none or embedding"),
        ({"name": ""}, "name is ''"),
        ({"slot": ""}, "slot is ''"),
        ({"slot": 7}, "slot is 7; it must be a text"),
        ({"start": ""}, "start is ''.*leave it out"),
        ({"end": None}, "both a start and an end token"),
        ({"start": None}, "both a start and an end token"),
        ({"slot": "<a>"}, "one token twice: <a>, <a>, <b>"),
        ({"end": "<a>"}, "one token twice"),
        ({"start": None, "end": None}, "feeds hidden states back but has no start"),
        ({"start": None, "end": None, "feedback": "none", "length": "free"}, "ends its spans freely"),
        ({"start": None, "end": None, "feedback": "none", "first": "before_start"}, "on its start token"),
        ({"feedback": "none", "projector": "mlp"}, "has a projector but feeds nothing back"),
    ],
)
def test_a_bad_field_is_refused_in_one_line(changes: dict[str, Any], line: str) -> None:
    LatentFormat(**PLAIN)  # the control: it is the change that is refused
    with pytest.raises(UserError, match=line) as refusal:
        LatentFormat(**{**PLAIN, **changes})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("monnet", "did you mean 'monet'"),
        ("lantern2", "did you mean 'lantern'"),
        ("", "no latent format ''"),
        (None, "no latent format None"),
        (["lvr"], "no latent format"),
    ],
)
def test_an_unknown_preset_is_refused_with_the_list(name: Any, line: str) -> None:
    with pytest.raises(UserError, match=line) as refusal:
        get_format(name)
    assert ", ".join(PRESETS) in str(refusal.value)


def test_an_unknown_field_is_refused_with_the_nearest_one() -> None:
    assert get_format("lvr", projector="mlp").projector == "mlp"
    with pytest.raises(UserError, match="no field 'projctor'; did you mean 'projector'"):
        get_format("lvr", projctor="mlp")
    with pytest.raises(UserError, match=r"no field 'qqqq'\. Fields"):
        get_format("lvr", qqqq=1)


# ---- beside a checkpoint


@pytest.mark.parametrize("name", PRESETS)
def test_the_file_beside_a_checkpoint_gives_the_format_back(name: str, tmp_path: Path) -> None:
    changed = get_format(name, k=3, norm="embedding")
    changed.save(tmp_path)
    assert LatentFormat.load(tmp_path) == changed != get_format(name)


def test_a_folder_without_the_file_has_no_format(tmp_path: Path) -> None:
    assert LatentFormat.load(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"name": "lvr", ', "no valid JSON"),
        (b"", "no valid JSON"),
        (b"\xff\xfe\x00", "no text file"),
        (b"[1, 2]", "does not describe a latent format"),
        (b'{"name": "lvr"}', "does not describe a latent format"),
        (b'{"name": "lvr", "slot": "<s>", "colour": 1}', "does not describe a latent format"),
        (b'{"name": "own", "slot": 5, "feedback": "none"}', "slot is 5"),
        (b'{"name": "own", "slot": "<s>", "feedback": "none", "k": 0}', "k is 0"),
    ],
)
def test_a_damaged_file_is_refused_by_its_path(content: bytes, line: str, tmp_path: Path) -> None:
    (tmp_path / FORMAT_FILE).write_bytes(content)
    with pytest.raises(UserError, match=line) as refusal:
        LatentFormat.load(tmp_path)
    assert str(tmp_path / FORMAT_FILE) in str(refusal.value)


def test_a_file_of_an_older_version_without_the_newer_fields_loads(tmp_path: Path) -> None:
    (tmp_path / FORMAT_FILE).write_text(json.dumps(PLAIN), encoding="utf-8")
    assert LatentFormat.load(tmp_path) == LatentFormat(**PLAIN)


@pytest.mark.parametrize(
    "changes",
    [
        {"slot": "<other>"},
        {"start": "<other>"},
        {"end": "<other>"},
        {"first": "before_start"},
        {"feedback": "none"},
        {"projector": "linear"},
        {"norm": "embedding"},
    ],
)
def test_a_checkpoint_of_another_format_is_refused(changes: dict[str, Any]) -> None:
    trained = LatentFormat(**PLAIN)
    with pytest.raises(UserError, match=f"checkpoint in here was trained with.*{next(iter(changes))}"):
        replace(trained, **changes).check_against(trained, "here")


def test_what_the_model_does_not_see_may_differ_from_the_checkpoint() -> None:
    trained = LatentFormat(**PLAIN)
    replace(trained, k=3, length="free", name="other", source="notes").check_against(trained, "here")
    get_format("ilvr").check_against(get_format("mirage"), "here")  # they differ in K alone


@pytest.mark.parametrize("name", ["lvr", "monet", "skila"])
def test_the_most_latents_of_a_completion(name: str) -> None:
    """Counted on the densest completion that there is: one span after another."""
    format_ = get_format(name, k=3)
    span = [format_.start] + [format_.slot] * format_.slots + [format_.end]
    held = {format_.slot} if format_.first == "at_start" else {format_.slot, format_.start}
    for tokens in range(1, 4 * len(span)):
        dense = (span * 4)[:tokens]
        assert format_.most_latents(tokens) == sum(token in held for token in dense)
    assert get_format("slots").most_latents(100) == 0
