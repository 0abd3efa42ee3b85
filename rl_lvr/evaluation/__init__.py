"""Answer matching, and accuracy under interventions."""
