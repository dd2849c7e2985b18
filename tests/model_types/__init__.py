"""Try every causal model type of Transformers."""
