"""Multi-head latent attention: how trained projections become latents, and how attention over latents is computed."""
