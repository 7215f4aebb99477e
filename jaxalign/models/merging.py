"""Models out of models: operations on trees of parameters of one shape, tensor by tensor, in float32."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxalign import types


def linear(models: Sequence[types.PyTree], weights: Sequence[float]) -> types.PyTree:
  """A weighted sum of models: an average (model soup, rewarded soup, WARM) where the weights sum to 1.

  Wortsman et al., 2022, https://arxiv.org/abs/2203.05482; Rame et al., 2023, https://arxiv.org/abs/2306.04488.
  """
  return jax.tree.map(lambda *xs: sum(w * x.astype(jnp.float32) for w, x in zip(weights, xs, strict=True)), *models)


def extrapolate(base: types.PyTree, tuned: types.PyTree, alpha: float) -> types.PyTree:
  """Beyond the tuned model on the line from its base: tuned + alpha (tuned - base).

  Zheng et al., 2024 (ExPO), https://arxiv.org/abs/2404.16792, Eq. 2; alpha 0.1 to 0.5.
  """
  return linear([tuned, base], [1 + alpha, -alpha])


def slerp(base: types.PyTree, first: types.PyTree, second: types.PyTree, share: float) -> types.PyTree:
  """Between two models on the arc of their differences d1, d2 from the base; `share` 0 is the first, 1 the second.

    base + sin((1 - share) w) / sin(w) d1 + sin(share w) / sin(w) d2,    w the angle between d1 and d2, per tensor

  Where they are nearly parallel it is the straight line. Rame et al., 2024 (WARP), https://arxiv.org/abs/2406.16768,
  Eq. 3.
  """

  def one(base, first, second):
    base = base.astype(jnp.float32)
    d1, d2 = first - base, second - base
    norms = jnp.linalg.norm(d1.reshape(-1)) * jnp.linalg.norm(d2.reshape(-1))
    angle = jnp.arccos(jnp.clip(jnp.sum(d1 * d2) / jnp.maximum(norms, 1e-30), -1.0, 1.0))
    is_flat = (norms == 0) | (jnp.sin(angle) < 1e-4)
    sine = jnp.where(is_flat, 1.0, jnp.sin(angle))
    a = jnp.where(is_flat, 1 - share, jnp.sin((1 - share) * angle) / sine)
    b = jnp.where(is_flat, share, jnp.sin(share * angle) / sine)
    return base + a * d1 + b * d2

  return jax.tree.map(one, base, first, second)


def ties(
    base: types.PyTree, models: Sequence[types.PyTree], *, density: float, scale: float, weights: Sequence[float]
) -> types.PyTree:
  """Differences from the base, trimmed to their largest, those that disagree with the elected sign left out.

  Of each difference the share `density` of largest magnitude stays, per tensor. The sign of an entry is that of the
  weighted sum; the differences of that sign are averaged by weight, times `scale`, onto the base. Yadav et al., 2023,
  https://arxiv.org/abs/2306.01708, Alg. 1: density 0.2, scale 1.
  """

  def trimmed(d):
    kept = max(1, round(density * d.size))
    least = jnp.sort(jnp.abs(d).reshape(-1))[-kept]
    return jnp.where(jnp.abs(d) >= least, d, 0.0)

  def one(base, *tuned):
    base = base.astype(jnp.float32)
    differences = [trimmed(x - base) for x in tuned]
    sign = jnp.sign(sum(w * d for w, d in zip(weights, differences, strict=True)))
    agree = [(jnp.sign(d) == sign) & (d != 0) for d in differences]
    total = sum(w * jnp.where(a, d, 0.0) for w, d, a in zip(weights, differences, agree))
    weight = sum(w * a for w, a in zip(weights, agree))
    return base + scale * total / jnp.maximum(weight, 1e-30)

  return jax.tree.map(one, base, *models)
