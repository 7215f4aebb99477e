"""Alignment of language models in JAX: one jitted step, short pure losses, any mesh."""
