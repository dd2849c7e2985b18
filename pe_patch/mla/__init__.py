"""Multi-head latent attention (MLA): conversion of trained projections to latents, and attention over latents."""
