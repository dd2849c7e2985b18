"""Plugins for servers that load a patched checkpoint themselves."""
