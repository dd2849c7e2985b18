"""Attention kernels that never materialize a `[heads, query, key]` tensor."""
