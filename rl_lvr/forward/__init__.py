"""The one teacher-forced pass: its batch, latents fed into it or recomputed in it, objectives on its states."""
