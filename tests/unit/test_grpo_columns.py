"""What is written down about a rollout besides the rollout itself."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from rl_lvr.data.images import ImageRef
from rl_lvr.training.grpo.recording import _paths, _without_images


def test_images_are_named_by_their_files(tmp_path: Path) -> None:
    made = Image.new("RGB", (4, 4), "red")
    (tmp_path / "a").mkdir()
    made.save(tmp_path / "a" / "b.png")
    decoded = ImageRef("a/b.png", tmp_path).open()
    assert _paths({"images": [decoded, made]}) == ["a/b.png"]
    assert _paths({"image": Image.open(tmp_path / "a" / "b.png")}) == [str(tmp_path / "a" / "b.png")]
    assert _paths({"image": None}) == _paths({}) == []
    assert not hasattr(decoded, "filename")  # `datasets` would store the name in place of the picture


def test_a_prompt_is_written_down_without_its_pictures() -> None:
    parts = [{"type": "image", "image": object()}, {"type": "text", "text": "look"}]
    said = [{"role": "system", "content": "be short"}, {"role": "user", "content": parts}]
    assert _without_images(said) == [
        said[0],
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "look"}]},
    ]
    assert _without_images("plain") == "plain"
