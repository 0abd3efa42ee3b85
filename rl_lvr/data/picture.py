"""A record's images side by side, enlarged, the latent targets drawn on them: for eyes, not for models."""

from __future__ import annotations

from PIL import Image, ImageDraw

from rl_lvr.data.record import Box, Record
from rl_lvr.errors import UserError

_WANTED = 480  # pixels of the longest side, for images smaller than that
_GAP = 8
_INKS = ("#ff00aa", "#00c8ff", "#ffb400", "#7cff00")


def draw_record(record: Record, scale: int | None = None) -> Image.Image:
    """`scale` enlarges by a whole number (default: until the longest side is near 480 pixels)."""
    pictures = record.open_images()
    if not pictures:
        raise UserError(f"record {record.id!r} has no images to draw.")
    if scale is None:
        scale = max(1, _WANTED // max(max(p.size) for p in pictures))
    large = [p.resize((p.width * scale, p.height * scale), Image.Resampling.NEAREST) for p in pictures]
    width = sum(p.width for p in large) + _GAP * (len(large) - 1)
    canvas = Image.new("RGB", (width, max(p.height for p in large)), "white")
    left, lefts = 0, []
    for picture in large:
        canvas.paste(picture, (left, 0))
        lefts.append(left)
        left += picture.width + _GAP
    draw = ImageDraw.Draw(canvas)
    for span, target in enumerate(record.targets):
        if target.image is None:
            continue
        ink, picture = _INKS[span % len(_INKS)], large[target.image]
        labels: dict[Box, list[str]] = {}  # one box may be the target of several latents
        for number, box in enumerate(target.boxes, 1):
            labels.setdefault(box, []).append(str(number))
        for box, numbers in labels.items():
            x0, y0, x1, y1 = (round(v * (picture.width, picture.height)[i % 2]) for i, v in enumerate(box))
            x0, x1 = x0 + lefts[target.image], x1 + lefts[target.image]
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=ink, width=3)
            text = ",".join(numbers)
            draw.rectangle(draw.textbbox((x0 + 6, y0 + 5), text, font_size=18), fill="black", outline="black", width=1)
            draw.text((x0 + 6, y0 + 5), text, fill="white", font_size=18)
    return canvas
