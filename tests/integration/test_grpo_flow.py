"""docs/architecture.md follows a generation batch through a step; here a step is traced."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from grpo_cases import make_trainer, opening

import rl_lvr
from rl_lvr.training.grpo.batch import GenerationBatch

PAGE = Path(rl_lvr.__file__).parents[1] / "docs" / "architecture.md"
MOST = 10


def traced(run: Any) -> list[str]:
    """Public functions of the package that are called with a batch or return one, in the order of their first call.

    Methods that TRL calls are the trainer's own, and stand beside the picture.
    """
    found: list[str] = []

    def note(frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or f"{Path('rl_lvr') / 'training'}" not in code.co_filename:
            return
        given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
        takes = event == "call" and any(isinstance(argument, GenerationBatch) for argument in given)
        makes = event == "return" and isinstance(value, GenerationBatch)
        name = code.co_qualname
        if (takes or makes) and not any(part.startswith("_") for part in name.split(".")) and name not in found:
            found.append(name)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def test_the_page_names_the_functions_that_a_batch_goes_through(load_tiny: Any, tmp_path: Path) -> None:
    trainer = make_trainer(*opening(load_tiny), tmp_path, latent_policy="gaussian")
    found = traced(trainer.train)
    page = re.findall(r"^\d+\. `([\w.]+)`$", PAGE.read_text(encoding="utf-8"), re.M)
    helpers = {"GenerationBatch.carrier", "GenerationBatch.loss_mask"}
    assert [name for name in found if name not in helpers] == page
    assert len(page) <= MOST
