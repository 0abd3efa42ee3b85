"""f: hidden state -> latent. The identity, or a learned projector, or a rescaling to the embeddings' norm.

The module hangs on the model under the top-level name `latent_proj`, so that it is trained, saved and synced with
the model and no engine remaps its name into the language model.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rl_lvr.errors import UserError
from rl_lvr.finite import CURE, finite
from rl_lvr.latents.format import LatentFormat
from rl_lvr.wrapping import gathered, input_embeddings, unwrapped

NAME = "latent_proj"


class LatentFeedback(nn.Module):
    """z = scale(project(h)). Starts as the identity (times the norm), so that training starts from plain feedback."""

    embedding_norm: Tensor

    def __init__(self, hidden_size: int, projector: str = "none", norm: str = "none") -> None:
        super().__init__()
        self.projector = projector
        self.norm = norm
        if projector == "linear":
            self.linear = nn.Linear(hidden_size, hidden_size)
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)
        elif projector == "mlp":
            self.up = nn.Linear(hidden_size, hidden_size)
            self.down = nn.Linear(hidden_size, hidden_size)
            nn.init.zeros_(self.down.weight)  # residual: the identity at the start
            nn.init.zeros_(self.down.bias)
        if norm == "embedding":
            self.register_buffer("embedding_norm", torch.ones(()))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]"""
        if self.projector == "linear":
            hidden = self.linear(hidden)
        elif self.projector == "mlp":
            hidden = hidden + self.down(nn.functional.gelu(self.up(hidden)))
        if self.norm == "embedding":
            length = hidden.float().norm(dim=-1, keepdim=True).clamp_min(1e-6)
            hidden = (hidden.float() * (self.embedding_norm / length)).to(hidden.dtype)
        return hidden


def attach_feedback(
    model: nn.Module,
    format: LatentFormat,  # noqa: A002
    folder: str | Path | None = None,
) -> None:
    """Give `model` the feedback module that `format` asks for; a format without one leaves the model untouched.

    With `folder`, weights stored there under `latent_proj.*` are loaded; a checkpoint that was trained with a
    projector but lacks its weights is refused. A LoRA adapter stores them too if its `modules_to_save` names
    `latent_proj`; so the module must be there before PEFT wraps the model.
    """
    if format.projector == "none" and format.norm == "none":
        return
    if any(hasattr(module, "get_base_model") for module in model.modules()):
        raise ValueError(f"attach the latent feedback before PEFT wraps the model, and name {NAME} in modules_to_save.")
    base, embedding = unwrapped(model), input_embeddings(model)
    assert isinstance(embedding, nn.Embedding)
    module = LatentFeedback(embedding.embedding_dim, format.projector, format.norm)
    stored = _stored(folder) if folder is not None else {}
    if stored:
        _load(module, stored, folder)
    elif folder is not None and LatentFormat.load(folder) is not None:
        raise UserError(
            f"the checkpoint in {folder} has no weights {NAME}.*, which latent format {format.name!r} needs."
        )
    elif format.norm == "embedding":
        with gathered(embedding.weight), torch.no_grad():
            module.embedding_norm.fill_(embedding.weight.float().norm(dim=-1).mean())
    base.add_module(NAME, module.to(embedding.weight.device, embedding.weight.dtype))


def restore_feedback(model: nn.Module, folder: str | Path) -> None:
    """Load the weights of an attached feedback module from a checkpoint; a model without one is left alone."""
    module = getattr(unwrapped(model), NAME, None)
    if module is not None:
        _load(module, _stored(folder), folder)


def _load(module: LatentFeedback, stored: dict[str, Tensor], folder: str | Path | None) -> None:
    needed = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if found != needed:
        raise UserError(
            f"the weights {NAME}.* in {folder} do not fit the latent format: it needs {needed}, they are {found}. "
            "Use the checkpoint's own format."
        )
    bad = next((name for name, tensor in stored.items() if not finite([tensor])), None)
    if bad is not None:
        raise UserError(f"{NAME}.{bad} in {folder} is not finite (it holds NaN or infinity): {CURE}.")
    module.load_state_dict(stored)


def _stored(folder: str | Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                plain = name.removeprefix("base_model.model.")  # PEFT's prefix in an adapter's file
                if plain.startswith(NAME + "."):
                    found[plain.removeprefix(NAME + ".")] = file.get_tensor(name)
    return found


def feedback(model: nn.Module, hidden: Tensor) -> Tensor:
    """f(h) with the model's feedback module, or h itself where there is none. [..., H] -> [..., H]"""
    module = getattr(unwrapped(model), NAME, None)
    return hidden if module is None else module(hidden)
