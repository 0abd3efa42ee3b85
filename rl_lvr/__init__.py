"""rl-lvr: train, improve at test time and examine latent-visual-reasoning models.

Nothing but the version lives here, so that importing the package costs nothing.
"""

__version__ = "0.1.0"
