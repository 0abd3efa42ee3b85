"""What is fed in place of a model's own latents: one enum for the HF engine, the vLLM plugin and the diagnostics."""

from __future__ import annotations

from enum import StrEnum


class Intervention(StrEnum):
    """A condition. Zeros are off-distribution and raise false alarms: judge by `NOISE` and by `SWAP`."""

    OWN = "own"
    """The model's own latents."""
    ZEROS = "zeros"
    """Zero vectors (paper C)."""
    NOISE = "noise"
    """Gaussian direction with the norm of the latent it replaces, position by position."""
    UNIT_NOISE = "unit_noise"
    """N(0, 1) per element, not norm-matched (papers B and C: `random`)."""
    MEAN = "mean"
    """Mean latent of a data set, per latent of the span; vectors supplied."""
    SWAP = "swap"
    """Another sample's own latents; vectors supplied."""
    GIVEN = "given"
    """Any vectors supplied."""
    ORACLE = "oracle"
    """Encoder vectors of the annotated evidence; vectors supplied."""
    SKIP = "skip"
    """Empty pair: END is forced right after START. Paper C's `skip`, paper D's "markers only"."""
    NONE = "none"
    """No block: START cannot be sampled."""
    MARKERS_ONLY = "markers_only"
    """START, SLOT x k, END with SLOT's own embedding in every slot: markers and length kept, content gone."""
    PLAIN_TOKENS = "plain_tokens"
    """The block becomes as many ordinary tokens: START, SLOTs and END are each replaced by a filler token."""

    @property
    def needs_vectors(self) -> bool:
        """Whether the caller supplies the vectors. Vector i goes to latent i of the completion; a completion with
        more latents starts again at vector 0."""
        return self in (Intervention.MEAN, Intervention.SWAP, Intervention.GIVEN, Intervention.ORACLE)

    @property
    def feeds_vectors(self) -> bool:
        """Whether slots receive a vector other than SLOT's own embedding."""
        return self not in (
            Intervention.SKIP,
            Intervention.NONE,
            Intervention.MARKERS_ONLY,
            Intervention.PLAIN_TOKENS,
        )
