"""Measure what a conversion to multi-head latent attention changes."""
