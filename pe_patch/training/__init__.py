"""Training recipes: one script, one YAML file each."""
