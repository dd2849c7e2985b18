"""Attention that never holds a whole `[heads, query, key]` tensor."""
