"""Rotary positions. Su et al., 2021, https://arxiv.org/abs/2104.09864."""

import jax.numpy as jnp


def rotations(positions_BT, head_size: int, theta: float):
  """Cosines and sines of position * theta^(-2i/H), `[B, T, 1, H/2]`; once for all layers, whose heads share them."""
  frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
  angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies[None, None, None, :]
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTNH, rotation):
  """Rotates the pairs (i, i + H/2) of each head."""
  cos, sin = rotation
  a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
