"""Where models and results are written."""
