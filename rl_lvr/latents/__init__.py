"""What a latent is: its format, its spans, its carrier, and how it enters a forward pass."""
