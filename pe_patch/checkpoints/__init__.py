"""Save, load and export models, and guard output folders."""
