"""Engines that generate completions with latents."""
