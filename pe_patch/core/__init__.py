"""The vocabulary that schemes, attention and adapters share; no Transformers."""
