"""Latent rollouts on an unmodified vLLM: a plugin for its Model Runner V2, and the engine that drives it."""
