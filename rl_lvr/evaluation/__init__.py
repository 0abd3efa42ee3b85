"""Accuracy under interventions."""
