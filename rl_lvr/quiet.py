"""Third-party chatter that tells a user of the command line nothing. Never called on import."""

from __future__ import annotations

import logging


def before_imports() -> None:
    """DeepSpeed announces on standard output that a machine has no GPU, whenever accelerate looks for it."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def transformers() -> None:
    """One progress display is ours; those of loading and saving weights would break it."""
    from transformers.utils import logging as chatter

    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
