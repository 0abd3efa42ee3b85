"""What a latent is: its format, its spans, its carrier, its feedback map."""
