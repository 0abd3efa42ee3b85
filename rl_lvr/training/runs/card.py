"""The model card (README.md) beside saved weights: base model, data, latent format, use. No path of this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import Trainer

from rl_lvr.latents.format import LatentFormat
from rl_lvr.training.runs.folder import versions
from rl_lvr.training.runs.settings import RunSettings

FILE = "README.md"
TAGS = ("generated_from_trainer", "rl-lvr")
_PART_OF_A_RUN = re.compile(r"merged|checkpoint-\d+")


@dataclass(frozen=True)
class Named:
    """A model or a data set as others may know it."""

    name: str
    on_hub: bool = False

    def link(self, place: str = "") -> str:
        return f"[{self.name}](https://huggingface.co/{place}{self.name})" if self.on_hub else f"`{self.name}`"


def named_model(path: str) -> Named | None:
    """The hub's name of a model, or the name of its folder; None for a model that was loaded from nowhere."""
    if not path:
        return None
    for part in Path(path).parts:
        if part.startswith("models--"):  # the hub's cache
            return Named("/".join(part.split("--")[1:]), on_hub=True)
    folder = Path(path)
    if not folder.exists() and not folder.is_absolute() and len(folder.parts) <= 2:
        return Named(path, on_hub=True)
    folder = folder.resolve()
    while _PART_OF_A_RUN.fullmatch(folder.name):
        folder = folder.parent
    return Named(folder.name) if folder.name else None


def named_file(path: str) -> Named | None:
    """A data file by its name and its folder's."""
    whole = Path(path).resolve()
    return Named("/".join(whole.parts[1:][-2:])) if path else None


@dataclass(frozen=True)
class Card:
    """What a card says."""

    name: str
    """Of the run."""
    method: str
    """As a clause: "latent SFT (TRL's SFTTrainer)"."""
    base: Named | None
    data: Named | None
    latents: LatentFormat | None
    adapter: bool
    """The folder holds an adapter, not a model."""
    text_only: bool
    tags: Sequence[str] = ()
    hub_id: str | None = None
    citation: str | None = None

    def save(self, folder: Path) -> None:
        ModelCard(f"---\n{self._data().to_yaml()}\n---\n\n{self._text()}").save(folder / FILE)

    def _data(self) -> ModelCardData:
        return ModelCardData(
            base_model=None if self.base is None else self.base.name,
            datasets=[self.data.name] if self.data is not None and self.data.on_hub else None,
            library_name="peft" if self.adapter else "transformers",
            model_name=self.name,
            pipeline_tag="text-generation" if self.text_only else "image-text-to-text",
            tags=sorted({*TAGS, *self.tags, *(["latent-reasoning"] if self.latents else [])}),
        )

    def _text(self) -> str:
        what = "an adapter for" if self.adapter else "a fine-tuned version of"
        base = "a model that was not loaded from a folder" if self.base is None else self.base.link()
        data = "" if self.data is None else f" on {self.data.link('datasets/')}"
        parts = [
            f"# {self.name}",
            f"This is {what} {base}, trained{data} with {self.method} by rl-lvr. The settings of the run are in its "
            "`run.json`.",
            self._latents(),
            self._use(),
            "## Versions\n\n" + "\n".join(f"- {name} {version}" for name, version in versions().items()),
        ]
        if self.citation:
            parts.append(f"## Citation\n\n```bibtex\n{self.citation.strip()}\n```")
        return "\n\n".join(parts) + "\n"

    def _latents(self) -> str:
        if self.latents is None:
            return "## Latents\n\nNone: the model was trained without a latent format."
        format_ = self.latents
        markers = ", ".join(f"`{token}`" for token in format_.tokens)
        length = f"exactly {format_.k}" if format_.length == "fixed" else f"at most {format_.k}"
        rows = [
            f"- format `{format_.name}`, stored beside the weights",
            f"- {length} latents per span, the first one `{format_.first}`",
            f"- marker tokens: {markers or 'none'}",
            f"- projector `{format_.projector}`, norm `{format_.norm}`",
        ]
        return "## Latents\n\n" + "\n".join(rows)

    def _use(self) -> str:
        place = self.hub_id or self.name
        image = "" if self.text_only else "--image picture.png "
        lines = ["## Use", ""]
        if self.adapter:
            lines += [
                "The adapter alone answers nothing. At the end of a run `rl-lvr` writes the model with the adapter in "
                "it to `merged`.",
                "",
            ]
            place += "/merged"
        if self.latents is None:
            kind = "AutoModelForCausalLM" if self.text_only else "AutoModelForImageTextToText"
            lines += [
                "```python",
                f"from transformers import {kind}",
                "",
                f'model = {kind}.from_pretrained("{place}")',
                "```",
            ]
        else:
            lines += [
                "```bash",
                f'rl-lvr generate {place} {image}--question "What is to the left of the door?"',
                f"rl-lvr serve {place}",
                "```",
                "",
                "transformers alone loads the weights, but feeds no latents.",
            ]
        return "\n".join(lines)


def card_of(trainer: Trainer, name: str | None = None, data: str | None = None, tags: Sequence[str] = ()) -> Card:
    """The card of what a trainer saves. `name` of the run, `data` on the hub, and `tags` are those of TRL's own."""
    model, args = trainer.model, trainer.args
    file = args.train_file if isinstance(args, RunSettings) else ""
    return Card(
        name=name or Path(args.hub_model_id or args.output_dir).resolve().name,
        method=f"TRL's {trainer._name}{'' if trainer.markers is None else ' on latents'}",
        base=named_model(model.config._name_or_path),
        data=Named(data, on_hub=True) if data else named_file(file),
        latents=None if trainer.markers is None else trainer.markers.format,
        adapter=isinstance(model, PeftModel),
        text_only=model.config.get_text_config() is model.config,
        tags=(*trainer._tag_names, *tags),
        hub_id=args.hub_model_id,
        citation=trainer._paper.get("citation"),
    )
