"""How a scheme is put into a model and taken out."""
