"""Measuring what a conversion to multi-head latent attention costs."""
