"""Trainers: subclasses of TRL's, with latents."""
