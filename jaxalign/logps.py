"""Log-probabilities of targets from hidden states, in chunks: full logits `[B, T, V]` never exist.

Only targets that the mask counts are computed. They are compacted to the front, and a loop takes them a chunk at a
time, forward and backward; the largest array with a vocabulary axis is `[chunk, V / tensor]`. The loop runs under
`shard_map`, so that the head is gathered over fsdp once before it and its gradient is reduced and scattered once after
it.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import sharding

# Statistics beside the log-probability that `token_stats` can be asked for; only entropy carries a gradient.
DENSE = ('correct', 'mean_logit', 'sharpness', 'entropy')
_MASKED_LOGIT = -1e30  # finite, so that 0 * logit is 0


class _Axes(NamedTuple):
  """Mesh axes that the tokens, the vocabulary and the width of the head are split over; empty off a mesh."""

  tokens: tuple[str, ...] = ()
  vocab: tuple[str, ...] = ()
  embed: tuple[str, ...] = ()


class _Static(NamedTuple):
  vocab_size: int
  chunk: int
  dense: tuple[str, ...]
  softcap: float


def token_stats(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int = 512,
    dense: tuple[str, ...] = (),
    softcap: float = 0.0,
) -> dict[str, jax.Array]:
  """Log-probability of each target, and dense statistics of its distribution.

    logit = softcap(hidden . head)     logps = logit[target] - logsumexp(logit)     in float32, whatever `hidden` is

  Args:
    hidden_BTD: hidden states after the final norm; their dtype is that of the matrix product's operands.
    head_DV: output matrix. Columns from `vocab_size` on are padding and have probability 0.
    targets_BT: int32 ids in [0, vocab_size).
    mask_BT: where it is 0 every result is 0, nothing is computed and no gradient flows.
    vocab_size: number of real columns.
    chunk: targets per chunk and device.
    dense: any of 'entropy' (nats), 'correct' (1 where the target has the highest logit), 'mean_logit' (over the
      vocabulary) and 'sharpness' (log sum_v p_v^2). Entropy is differentiable, the others are not.
    softcap: c of c tanh(logit / c); 0 for none.

  Returns:
    `logps` and each of `dense`, float32 `[B, T]`.
  """
  unknown = set(dense) - set(DENSE)
  if unknown:
    raise ValueError(f'unknown dense statistics {sorted(unknown)}; there are {DENSE}')
  static = _Static(vocab_size, chunk, tuple(name for name in DENSE if name in dense), softcap)
  return _token_stats(static, hidden_BTD, head_DV.astype(hidden_BTD.dtype), targets_BT, mask_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_stats(static, hidden_BTD, head_DV, targets_BT, mask_BT):
  return _forward(static, hidden_BTD, head_DV, targets_BT, mask_BT)[0]


def _forward(static, hidden_BTD, head_DV, targets_BT, mask_BT):
  """All statistics, and what the backward pass keeps: no more than `[B, T]` beside the inputs."""
  names = ('logps', 'normaliser', *static.dense)
  run = _sharded(functools.partial(_forward_local, static), 'htym', ('y',) * len(names))
  stats = dict(zip(names, run(hidden_BTD, head_DV, targets_BT, mask_BT)))
  normaliser_BT = stats.pop('normaliser')
  return stats, (hidden_BTD, head_DV, targets_BT, mask_BT, normaliser_BT, stats.get('entropy'))


def _backward(static, kept, cotangents):
  hidden_BTD, head_DV, targets_BT, mask_BT, normaliser_BT, entropy_BT = kept
  if entropy_BT is None:
    entropy_BT, entropy_cotangent_BT = jnp.zeros_like(normaliser_BT), jnp.zeros_like(normaliser_BT)
  else:
    entropy_cotangent_BT = cotangents['entropy']
  d_hidden, d_head = _sharded(functools.partial(_backward_local, static), 'htyyyyym', ('h', 't'))(
      hidden_BTD,
      head_DV,
      targets_BT,
      normaliser_BT,
      entropy_BT,
      cotangents['logps'],
      entropy_cotangent_BT,
      mask_BT,
  )
  return d_hidden, d_head, None, None


_token_stats.defvjp(_forward, _backward)


def _sharded(local: Callable, ins: str, outs: tuple[str, ...]) -> Callable:
  """Runs `local(axes, ...)` on every device's shard; off a mesh, on the whole.

  `ins` and `outs` spell the kind of each array: h hidden states, t the head, anything else one number per token.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return functools.partial(local, _Axes())
  # A collective over an axis of one device is not always compiled away.
  split = lambda *names: tuple(a for name in names for a in sharding.axes_of(name) if mesh.shape[a] > 1)
  axes = _Axes(split('batch', 'length'), split('vocab'), split('embed'))
  kinds = {'h': sharding.spec('batch', 'length', None), 't': sharding.spec('embed', 'vocab')}
  of = lambda kind: kinds.get(kind, sharding.spec('batch', 'length'))
  return jax.shard_map(
      functools.partial(local, axes),
      mesh=mesh,
      in_specs=tuple(of(kind) for kind in ins),
      out_specs=tuple(of(kind) for kind in outs),
      check_vma=False,
  )


def _chunks(axes: _Axes, mask, chunk: int):
  """Indices of counted tokens, compacted and padded with n (out of bounds), and how many chunks hold any.

  The number of chunks is the largest of any device, so that all of them run the loop's collectives equally often.
  """
  n = mask.size
  size = -(-n // chunk) * chunk
  (index,) = jnp.nonzero(mask.reshape(-1) > 0, size=size, fill_value=n)
  count = jnp.sum(mask > 0)
  if axes.tokens:
    count = jax.lax.pmax(count, axes.tokens)
  return index, -(-count // chunk)


def _take(x, rows):
  return jnp.take(x, rows, axis=0, mode='fill', fill_value=0)


def soften(logits, softcap: float):
  """Computes c tanh(logits / c); nothing where c is 0. Gemma Team, 2024, https://arxiv.org/abs/2408.00118, Sec. 2."""
  return softcap * jnp.tanh(logits / softcap) if softcap else logits


def _logits(axes: _Axes, static: _Static, hidden, head, targets):
  """Float32 logits of a chunk `[c, v]` on this device's part of the vocabulary, and where the targets stand in it."""
  logits = soften(jax.lax.dot(hidden, head, preferred_element_type=jnp.float32), static.softcap)
  offset = jax.lax.axis_index(axes.vocab) * head.shape[1] if axes.vocab else 0
  column = jnp.arange(head.shape[1])[None, :]
  logits = jnp.where(column + offset < static.vocab_size, logits, _MASKED_LOGIT)
  return logits, column == (targets - offset)[:, None]


def _forward_local(static, axes, hidden, head, targets, mask):
  shape, chunk = targets.shape, min(static.chunk, targets.size)
  if axes.embed:
    head = jax.lax.all_gather(head, axes.embed, axis=0, tiled=True)
  hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
  index, chunks = _chunks(axes, mask, chunk)
  total = lambda x: jax.lax.psum(jnp.sum(x, axis=1), axes.vocab) if axes.vocab else jnp.sum(x, axis=1)

  def body(i, out):
    rows = jax.lax.dynamic_slice(index, (i * chunk,), (chunk,))
    logits, is_target = _logits(axes, static, _take(hidden, rows), head, _take(targets, rows))
    top = jnp.max(logits, axis=1)
    top = jax.lax.pmax(top, axes.vocab) if axes.vocab else top
    # Differences to the largest logit lose nothing where logits are large and the result is small.
    shifted = logits - top[:, None]
    exp = jnp.exp(shifted)
    sum_exp = total(exp)
    log_sum = jnp.log(sum_exp)
    chosen = total(jnp.where(is_target, shifted, 0.0))
    new = [chosen - log_sum, top + log_sum]
    if 'correct' in static.dense:
      new.append((chosen >= 0).astype(jnp.float32))
    if 'mean_logit' in static.dense:
      new.append(total(jnp.where(logits > _MASKED_LOGIT, logits, 0.0)) / static.vocab_size)
    if 'sharpness' in static.dense:
      new.append(jnp.log(total(exp * exp)) - 2 * log_sum)
    if 'entropy' in static.dense:
      new.append(log_sum - total(exp * shifted) / sum_exp)
    return tuple(o.at[rows].set(x, mode='drop') for o, x in zip(out, new))

  zeros = (jnp.zeros(targets.size, jnp.float32),) * (2 + len(static.dense))
  return tuple(x.reshape(shape) for x in jax.lax.fori_loop(0, chunks, body, zeros))


def _backward_local(static, axes, hidden, head, targets, normaliser, entropy, d_logps, d_entropy, mask):
  shape, chunk = hidden.shape, min(static.chunk, targets.size)
  if axes.embed:
    head = jax.lax.all_gather(head, axes.embed, axis=0, tiled=True)
  hidden = hidden.reshape(-1, shape[-1])
  per_token = [x.reshape(-1) for x in (targets, normaliser, entropy, d_logps, d_entropy)]
  index, chunks = _chunks(axes, mask, chunk)

  def body(i, carry):
    d_hidden, d_head = carry
    rows = jax.lax.dynamic_slice(index, (i * chunk,), (chunk,))
    h = _take(hidden, rows)
    y, z, ent, d_lp, d_ent = (_take(x, rows) for x in per_token)
    logits, is_target = _logits(axes, static, h, head, y)
    logp = logits - z[:, None]
    p = jnp.where(logits > _MASKED_LOGIT, jnp.exp(logp), 0.0)
    # d logps = 1[target] - p;  d entropy = -p (log p + entropy).
    d_logits = d_lp[:, None] * (is_target - p)
    if 'entropy' in static.dense:
      d_logits -= d_ent[:, None] * p * (logp + ent[:, None])
    if static.softcap:  # (c tanh(x / c))' = 1 - tanh^2, which is 0 for padding
      d_logits *= 1.0 - jnp.square(jnp.maximum(logits / static.softcap, -1.0))
    d_logits = d_logits.astype(h.dtype)
    d_h = jax.lax.dot_general(d_logits, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    d_w = jax.lax.dot_general(h, d_logits, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return d_hidden.at[rows].set(d_h, mode='drop'), d_head + d_w

  zeros = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32)
  d_hidden, d_head = jax.lax.fori_loop(0, chunks, body, zeros)
  if axes.vocab:
    d_hidden = jax.lax.psum(d_hidden, axes.vocab)
  if axes.embed:
    d_head = jax.lax.psum_scatter(d_head, axes.embed, scatter_dimension=0, tiled=True)
  replicas = tuple(a for a in axes.tokens if a not in axes.embed)
  if replicas:
    d_head = jax.lax.psum(d_head, replicas)
  return d_hidden.reshape(shape).astype(hidden.dtype), d_head.astype(head.dtype)
