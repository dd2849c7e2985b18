"""One class for each positional scheme."""
