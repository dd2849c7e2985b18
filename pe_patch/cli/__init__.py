"""The command line, `pe-patch`: one module for each command."""
