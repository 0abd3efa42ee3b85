"""A reward that changes what it is given changes nothing for anybody else."""

from __future__ import annotations

import asyncio
import copy
from collections import OrderedDict, deque, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from rl_lvr.training.rewards.call import guard, watched
from rl_lvr.training.rewards.isolating import isolated

Pair = namedtuple("Pair", "left right")


def columns() -> dict[str, Any]:
    message = {"role": "user", "content": [{"type": "text", "text": "which?"}]}
    return {
        "prompts": [[message], [message]],  # TRL repeats one object for a group
        "completions": [[{"role": "assistant", "content": "red"}], [{"role": "assistant", "content": "blue"}]],
        "texts": ["red", "blue"],
        "completion_ids": [[1, 2, 3], [4]],
        "spans": [[{"begin": 0, "stop": 2, "status": "closed"}], []],
        "attention_mass": [[0.5, 0.25], [0.0]],
        "meta": [{"boxes": {"a": [1, 2]}, "pair": Pair([1], 2)}, OrderedDict(b=deque([[3]]))],
        "tags": [{"x"}, {"y"}],
        "vector": [torch.ones(2), np.ones(2)],
    }


def spoil(value: Any) -> None:
    """Change everything that can be changed, at every depth."""
    if isinstance(value, torch.Tensor | np.ndarray):
        value *= 7
    elif isinstance(value, dict):
        for item in value.values():
            spoil(item)
        value.clear()
    elif isinstance(value, tuple):
        for item in value:
            spoil(item)
    elif isinstance(value, list | deque):
        for item in value:
            spoil(item)
        value.clear()
        value.append("spoiled")
    elif isinstance(value, set):
        value.clear()


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple | deque):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return bool(torch.equal(one, other)) if isinstance(one, torch.Tensor) else bool(np.all(one == other))


def greedy(**given: Any) -> list[float]:
    spoil(given)
    return [1.0, 1.0]


async def greedy_async(**given: Any) -> list[float]:
    await asyncio.sleep(0)
    spoil(given)
    await asyncio.sleep(0)
    return [1.0, 1.0]


@pytest.mark.parametrize("wrap", [lambda f: guard(f, "greedy"), lambda f: watched(f, [])], ids=["guarded", "plain"])
@pytest.mark.parametrize("function", [greedy, greedy_async], ids=["sync", "async"])
def test_no_change_leaves_a_reward(wrap: Any, function: Any) -> None:
    given, known = columns(), columns()
    found = wrap(function)(**given)
    if asyncio.iscoroutine(found):
        found = asyncio.run(found)
    assert found == [1, 1]
    assert same(given, known)


def test_the_check_would_notice() -> None:
    given = columns()
    greedy(**given)
    assert not same(given, columns())


def test_rows_of_a_group_share_nothing_within_one_call() -> None:
    def first_only(prompts: Any, completions: Any, **_: Any) -> list[float]:
        prompts[0][0]["content"] = "gone"
        return [float(row[0]["content"] != "gone") for row in prompts]

    assert guard(first_only, "mine")(**columns()) == [0, 1]


def test_its_own_second_call_sees_what_the_first_one_saw() -> None:
    """After an error the samples are tried alone, and then the good ones together."""

    def once(completions: Any, **_: Any) -> list[float]:
        texts = [row.pop()["content"] for row in completions]
        if "blue" in texts:
            raise ValueError("no blue")
        return [float(text == "red") for text in texts]

    assert guard(once, "mine", on_error="exclude")(**columns()) == [1, None]


def test_rewards_side_by_side_do_not_meet() -> None:
    seen = []

    async def changes(completions: Any, **_: Any) -> list[float]:
        completions[0][0]["content"] = "changed"
        await asyncio.sleep(0.05)
        return [0.0, 0.0]

    async def reads(completions: Any, **_: Any) -> list[float]:
        await asyncio.sleep(0.02)
        seen.append(copy.deepcopy(completions))
        return [0.0, 0.0]

    async def both(**given: Any) -> None:
        await asyncio.gather(*(watched(reward, [])(**given) for reward in (changes, reads)))

    asyncio.run(both(**columns()))
    assert seen == [columns()["completions"]]


def test_images_keep_their_pixels_and_cost_no_copy(tmp_path: Any) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for image in (Image.new("RGB", (4, 4)), Image.open(tmp_path / "a.png")):
        given = {"images": [[image]], "prompts": [[{"content": [{"type": "image", "image": image}]}]]}
        one, two = isolated(given)["images"][0][0], isolated(given)["prompts"][0][0]["content"][0]["image"]
        assert one.im is image.im  # until it is changed
        assert getattr(one, "filename", None) == getattr(image, "filename", None)
        ImageDraw.Draw(one).rectangle((0, 0, 3, 3), fill=(9, 9, 9))
        two.putpixel((0, 0), (5, 5, 5))
        one.info["source"] = "mine"
        assert [i.getpixel((0, 0)) for i in (one, two, image)] == [(9, 9, 9), (5, 5, 5), (0, 0, 0)]
        assert "source" not in image.info


def test_what_is_no_data_is_handed_over_as_it_is() -> None:
    class Environment:
        pass

    state, environment = object(), Environment()
    given = isolated({"trainer_state": state, "environments": [environment], "log_metric": print})
    assert given["trainer_state"] is state
    assert given["environments"] == [environment]
    assert given["log_metric"] is print


def test_texts_are_there_even_where_a_trainer_makes_none() -> None:
    def short(texts: Any, answer: Any) -> list[float]:
        return [float(text == wanted) for text, wanted in zip(texts, answer, strict=True)]

    given = {k: v for k, v in columns().items() if k != "texts"} | {"answer": ["red", "red"]}
    assert guard(short, "short")(**given) == [1, 0]
    given["texts"] = ["red", "red"]  # a trainer's own, without what a span leaves in a completion
    assert guard(short, "short")(**given) == [1, 1]
