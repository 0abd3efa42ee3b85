"""What a model's own tokenizer, template and image processor refuse is refused before a run, with its place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rl_lvr.cli import main
from rl_lvr.data.check import require_valid
from rl_lvr.data.encoding import Encoder
from rl_lvr.data.image_tokens import ImageTokens
from rl_lvr.data.prompts import PromptJudge
from rl_lvr.data.record import Record
from rl_lvr.data.sources import RowError
from rl_lvr.data.writing import write_jsonl
from rl_lvr.errors import UserError
from rl_lvr.latents.format import get_format
from rl_lvr.models.loading import load_processor

LVR = get_format("lvr", k=4)
SIZES = ((56, 56), (1, 1), (199, 1), (400, 2), (1000, 5), (30, 5000), (57, 33))
TOO_LONG = (402, 2)


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def record(folder: Path, size: tuple[int, int] = (56, 56), answer: str = "<latent> red", **more: Any) -> Record:
    name = f"{size[0]}x{size[1]}.png"
    Image.new("RGB", size, "red").save(folder / name)
    row = {
        "id": "one",
        "messages": [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": [{"type": "image"}, part("what is next")]},
            {"role": "assistant", "content": answer},
        ],
        "images": [name],
        "answer": "red",
        **more,
    }
    return Record.from_row(row, folder)


def written(folder: Path, *records: Record) -> Path:
    write_jsonl(records, folder / "train.jsonl")
    return folder / "train.jsonl"


@pytest.fixture(scope="module")
def encoders(tiny_folder: Any) -> Any:
    """By family: an encoder with latents, and changes of it."""

    def make(family_name: str = "qwen2_5_vl", markers: bool = True, crops: bool = False, **spec: Any) -> Encoder:
        family, processor = load_processor(tiny_folder(family_name, **spec))
        tokenizer = processor.tokenizer
        bound = LVR.bind(tokenizer, family.placeholder_ids(tokenizer)) if markers else None
        return Encoder(processor, family, bound, crops=crops)

    return make


# ---- images


def test_lengths_are_those_that_the_processor_makes(encoders: Any, tmp_path: Path, family_name: str) -> None:
    """The judge knows the length of a record with an image of any size without its pixels, to the token."""
    encoder = encoders(family_name)
    most = encoder.positions
    for size in SIZES:
        encoder.positions = most
        shown = record(tmp_path, size)
        (row,) = encoder.encode([shown])
        encoder.positions = len(row.input_ids)
        encoder.judge(shown, learned=True)
        encoder.positions -= 1
        with pytest.raises(RowError, match=rf"take {row.prompt_length} tokens of prompt and"):
            encoder.judge(shown, learned=True)
        with pytest.raises(RowError, match=r"is the most in all"):
            encoder.encode([shown])


def test_a_processor_without_the_arithmetic_gets_a_blank_image(encoders: Any) -> None:
    processor = encoders().processor

    class Plain:
        def __getattr__(self, name: str) -> Any:
            if name == "_get_num_multimodal_tokens":
                raise AttributeError(name)
            return getattr(processor, name)

        def __call__(self, **given: Any) -> Any:
            return processor(**given)

    exact, blank = ImageTokens(processor), ImageTokens(Plain())
    assert [blank(*size) for size in SIZES] == [exact(*size) for size in SIZES]
    with pytest.raises(ValueError, match="aspect ratio"):
        blank(*TOO_LONG)


@pytest.mark.parametrize("learned", [True, False])
def test_an_image_that_the_processor_refuses_is_named(encoders: Any, tmp_path: Path, learned: bool) -> None:
    encoder = encoders()
    bad = record(tmp_path, TOO_LONG)
    with pytest.raises(
        RowError, match=r"'one': images\[0\]: is 402 x 2 pixels, which the model's image processor refus"
    ):
        encoder.judge(bad, learned=learned)
    shown = {"images": ["402x2.png"]}
    extra = record(tmp_path, latents=[shown])
    with pytest.raises(RowError, match=r"latents\[0\].images\[0\]: is 402 x 2"):
        encoder.judge(extra, learned=True)
    thin = record(tmp_path, (402, 40), latents=[{"boxes": [[0, 0, 402, 2]]}])
    encoder.judge(thin, learned=True)  # tokens under the box: the control
    with pytest.raises(RowError, match=r"latents\[0\].boxes\[0\]: is 402 x 2"):
        encoders(crops=True).judge(thin, learned=True)
    with pytest.raises(UserError, match=r"images\[0\]: is 402 x 2 pixels"):
        require_valid(written(tmp_path, bad), judge=PromptJudge(encoder, {}, []))
    encoders("internvl").judge(bad, learned=learned)  # another family's rule


def test_a_prompt_needs_room_for_its_completion(encoders: Any, tmp_path: Path) -> None:
    encoder = encoders()
    shown = record(tmp_path)
    length = len(encoder.prompts([shown])[0][0])
    PromptJudge(encoder, {}, [], room=encoder.positions - length)(shown)
    with pytest.raises(RowError, match=rf"take {length} tokens of prompt and {encoder.positions - length + 1} of"):
        PromptJudge(encoder, {}, [], room=encoder.positions - length + 1)(shown)
    PromptJudge(encoder, {}, [], room=3, limit=length + 3)(shown)
    with pytest.raises(RowError, match=f"{length + 2} is the most"):
        PromptJudge(encoder, {}, [], room=3, limit=length + 2)(shown)


def test_a_template_that_refuses_is_named(encoders: Any, tmp_path: Path) -> None:
    encoder = encoders()
    encoder.processor.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(RowError, match=r"'one': messages: are refused by the chat template \(no system role\)"):
        encoder.judge(record(tmp_path), learned=True)


# ---- control tokens

CONTROL = ("<|lvr_start|>", "<|lvr|>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|image_pad|>", "<|vision_end|>")


@pytest.mark.parametrize("markers", [True, False])
@pytest.mark.parametrize("token", CONTROL)
def test_a_control_token_is_refused_in_every_text(encoders: Any, tmp_path: Path, token: str, markers: bool) -> None:
    encoder = encoders(markers=markers)
    shown = record(tmp_path)
    for index, message in enumerate(shown.messages):
        half = len(token) // 2
        for content in ([part(f"a {token} b")], [part("a" + token[:half]), part(token[half:] + "b")]):
            kept = [one for one in message["content"] if one["type"] == "image"]
            messages = list(shown.messages)
            messages[index] = {**message, "content": [*kept, *content]}
            bad = replace(shown, messages=tuple(messages))
            words = "hold marker tokens" if markers and index == 2 and "lvr" in token else "holds the"
            with pytest.raises(RowError, match=rf"'one': messages.*{words}") as error:
                encoder.judge(bad, learned=True)
            assert words != "holds the" or token in str(error.value)
            if index < 2:
                with pytest.raises(RowError):
                    encoder.prompts([bad])
    apart = [part("a<|im_"), {"type": "image"}, part("end|>b")]  # an image stands between them: the control
    told = (shown.messages[0], {"role": "user", "content": apart}, shown.messages[2])
    encoder.judge(replace(shown, messages=told), learned=True)


def test_whole_spans_may_stand_as_markers_in_an_answer_but_not_in_a_prompt(encoders: Any, tmp_path: Path) -> None:
    encoder = encoders()
    literal = record(tmp_path, answer=LVR.text(2) + " red")
    encoder.judge(literal, learned=True)
    encoder.encode([literal])
    with pytest.raises(RowError, match="latents: are for 0 <latent>"):
        encoder.judge(
            replace(literal, latents=record(tmp_path, latents=[{"boxes": [[0, 0, 28, 28]]}]).latents), learned=True
        )
    longer = (*literal.messages, {"role": "user", "content": [part("and now")]})
    with pytest.raises(RowError, match=r"messages\[2\].content: has latents in the prompt"):
        PromptJudge(encoder, {}, [])(replace(literal, messages=longer))


def test_tokens_that_are_text_may_stand_anywhere(encoders: Any, tmp_path: Path) -> None:
    encoder = encoders()
    encoder.tokenizer.add_tokens(["<think>", "</think>"])
    encoder.judge(record(tmp_path, answer="<think>so</think> <latent> red <|lvr_ start|>"), learned=True)


# ---- from the shell


def test_data_check_asks_the_model(tiny_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = written(tmp_path, record(tmp_path, TOO_LONG))
    assert main(["data", "check", str(path)]) == 0
    assert main(["data", "check", str(path), "--model", str(tiny_folder("qwen2_5_vl"))]) == 2
    assert "images[0]: is 402 x 2 pixels, which the model's image processor refuses" in capsys.readouterr().out


def test_k_beyond_the_models_positions(encoders: Any) -> None:
    huge = replace(LVR, k=1_000_000)
    with pytest.raises(UserError, match=r"k is 1000000: a span takes 1000002 tokens .* the model takes 4096 positions"):
        huge.require_room(encoders().positions)
    replace(LVR, k=4093).require_room(4096)
    with pytest.raises(UserError, match="k is 4094"):
        replace(LVR, k=4094).require_room(4096)
