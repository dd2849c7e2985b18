"""Load and export models, and guard output folders."""
