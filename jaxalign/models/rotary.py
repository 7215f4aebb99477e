"""Rotary positions: frequencies, as each family scales them, and the rotation. Su et al., 2021, arXiv 2104.09864."""

import math

import jax.numpy as jnp
import numpy as np

from jaxalign import types
from jaxalign.models import architecture


def frequencies(config: architecture.Config, kind: str) -> tuple[np.ndarray, float]:
  """Angles per position of the rotated pairs, float64 `[R/2]`, and the factor of their cosines and sines.

    theta^(-2i/R) for pair i of R rotated units of a head, scaled as `architecture.RopeScaling` says

  Args:
    config: of the model.
    kind: of the layer, 'global' or 'local'.
  """
  size = config.rotated_size
  is_own = kind == 'local' and config.local_rope_theta > 0
  theta = config.local_rope_theta if is_own else config.rope_theta
  plain = theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
  scaling = config.rope_scaling
  if scaling is None or is_own:
    return plain, 1.0
  if scaling.kind == 'linear':
    return plain / scaling.factor, 1.0
  if scaling.kind == 'llama3':
    return _llama3(plain, scaling), 1.0
  factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
  return _yarn(plain, scaling, theta, size), factor


def _llama3(plain, scaling: architecture.RopeScaling):
  """Long wavelengths are divided by the factor, short ones are left, and those between are mixed."""
  turns = scaling.original_length * plain / (2 * math.pi)
  keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
  keep = np.clip(keep, 0.0, 1.0)
  return keep * plain + (1 - keep) * plain / scaling.factor


def _yarn(plain, scaling: architecture.RopeScaling, theta: float, size: int):
  """The same by a ramp over the number of the pair. Peng et al., 2023, https://arxiv.org/abs/2309.00071, Sec. 3.2."""
  pair_of = lambda turns: size * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
  low, high = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
  if scaling.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, size - 1)
  ramp = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
  return ramp * plain / scaling.factor + (1 - ramp) * plain


def rotations(config: architecture.Config, kind: str, positions_BT) -> tuple[types.Array, types.Array] | None:
  """Cosines and sines `[B, T, 1, R/2]`, once for all layers of a kind, whose heads share them; None for 'nope'."""
  if kind == 'nope':
    return None
  angles, factor = frequencies(config, kind)
  angles_BT1R = positions_BT[..., None, None].astype(jnp.float32) * jnp.asarray(angles, jnp.float32)[None, None, None]
  return jnp.cos(angles_BT1R) * factor, jnp.sin(angles_BT1R) * factor


def rotate(x_BTNH, rotation: tuple[types.Array, types.Array] | None):
  """Rotates the pairs (i, i + R/2) of the first R units of each head."""
  if rotation is None:
    return x_BTNH
  cos, sin = rotation
  size = 2 * cos.shape[-1]
  a, b = jnp.split(x_BTNH[..., :size].astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)
  return turned if size == x_BTNH.shape[-1] else jnp.concatenate([turned, x_BTNH[..., size:]], axis=-1)
