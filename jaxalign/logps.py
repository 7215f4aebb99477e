"""Log-probabilities of targets from hidden states, in chunks: full logits `[B, T, V]` never exist unless they are kept.

Only targets that the mask counts are computed. They are compacted to the front, and a loop takes them a chunk at a
time, forward and backward; the largest array with a vocabulary axis is `[chunk, V / tensor]`, but for logits that the
forward pass is told to keep for the backward pass, which makes the others again. The loop runs under `shard_map`, so
that the head is gathered over fsdp once before it and its gradient is reduced and scattered once after it.
"""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import vocab

# Statistics beside the log-probability that `token_stats` can be asked for; only entropy carries a gradient.
DENSE = ('correct', 'mean_logit', 'sharpness', 'entropy')


class _Static(NamedTuple):
  output: vocab.Output
  dense: tuple[str, ...]
  kept_bytes: int


def token_stats(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int = vocab.CHUNK,
    dense: tuple[str, ...] = (),
    softcap: float = 0.0,
    temperature: float = 1.0,
    kept_bytes: int = 0,
) -> dict[str, jax.Array]:
  """Log-probability of each target, and dense statistics of its distribution.

    logit = softcap(hidden . head) / temperature     logps = logit[target] - logsumexp(logit)

  in float32, whatever `hidden` is.

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
    temperature: of the distributions.
    kept_bytes: of logits, a device, that the backward pass finds, in whole chunks; it computes the others again.

  Returns:
    `logps` and each of `dense`, float32 `[B, T]`.
  """
  unknown = set(dense) - set(DENSE)
  if unknown:
    raise ValueError(f'unknown dense statistics {sorted(unknown)}; there are {DENSE}')
  output = vocab.Output(vocab_size, chunk, softcap, temperature)
  static = _Static(output, tuple(name for name in DENSE if name in dense), kept_bytes)
  return _token_stats(static, hidden_BTD, head_DV.astype(hidden_BTD.dtype), targets_BT, mask_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_stats(static, hidden_BTD, head_DV, targets_BT, mask_BT):
  return _forward(static._replace(kept_bytes=0), hidden_BTD, head_DV, targets_BT, mask_BT)[0]


def _forward(static, hidden_BTD, head_DV, targets_BT, mask_BT):
  """All statistics, and what the backward pass keeps: `[B, T]` beside the inputs, and the logits that are to be."""
  names = ('logps', 'normaliser', *static.dense)
  kept = ('logits',) if static.kept_bytes else ()
  run = vocab.sharded(functools.partial(_forward_local, static), 'htym', ('y',) * len(names) + ('l',) * len(kept))
  stats = dict(zip(names + kept, run(hidden_BTD, head_DV, targets_BT, mask_BT)))
  normaliser_BT, *logits = (stats.pop(name) for name in ('normaliser', *kept))
  return stats, (hidden_BTD, head_DV, targets_BT, mask_BT, normaliser_BT, stats.get('entropy'), logits)


def _backward(static, kept, cotangents):
  hidden_BTD, head_DV, targets_BT, mask_BT, normaliser_BT, entropy_BT, logits = kept
  if entropy_BT is None:
    entropy_BT, entropy_cotangent_BT = jnp.zeros_like(normaliser_BT), jnp.zeros_like(normaliser_BT)
  else:
    entropy_cotangent_BT = cotangents['entropy']
  kinds = 'htyyyyym' + 'l' * len(logits)
  d_hidden, d_head = vocab.sharded(functools.partial(_backward_local, static), kinds, ('h', 't'))(
      hidden_BTD,
      head_DV,
      targets_BT,
      normaliser_BT,
      entropy_BT,
      cotangents['logps'],
      entropy_cotangent_BT,
      mask_BT,
      *logits,
  )
  return d_hidden, d_head, None, None


_token_stats.defvjp(_forward, _backward)


def _forward_local(static, axes, hidden, head, targets, mask):
  head = vocab.whole(axes, head)
  local = functools.partial(_forward_in_blocks, static, axes)
  return vocab.in_blocks(local, head.shape[1], hidden, head, targets, mask)


def _forward_in_blocks(static, axes, block, hidden, head, targets, mask):
  shape, chunk = targets.shape, min(static.output.chunk, targets.size)
  hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
  index, chunks = vocab.chunks(axes, mask, chunk)

  def of_block(carry, start, part, ids):
    def of_chunk(is_kept, i, carry):
      sums, kept = carry
      at = (i * chunk,)
      rows = jax.lax.dynamic_slice(index, at, (chunk,))
      logits = vocab.unmasked_logits(static.output, vocab.take(hidden, rows), part)
      if is_kept:
        kept = jax.lax.dynamic_update_slice(kept, logits, (*at, start))
      is_target = ids == vocab.take(targets, rows)[:, None]
      old = {name: jax.lax.dynamic_slice(x, at, (chunk,)) for name, x in sums.items()}
      new = _added(old, vocab.masked(static.output, logits, ids), is_target)
      return {name: jax.lax.dynamic_update_slice(x, new[name], at) for name, x in sums.items()}, kept

    return _loop(chunks, most_kept, index.size // chunk, of_chunk, carry)

  most_kept = _kept_chunks(static, index.size // chunk, chunk * head.shape[1])
  nothing = {name: jnp.zeros(index.size, jnp.float32) for name in _sums(static.dense)}
  nothing['top'] += vocab.MASKED_LOGIT
  none_kept = jnp.zeros((most_kept * chunk, head.shape[1]), jnp.float32)
  carry = nothing, none_kept
  sums, kept = vocab.fold(of_block, carry, head, vocab.columns(axes, head.shape[1]), block)
  found = _of_sums(static, _everywhere(axes, sums))
  zeros = jnp.zeros(targets.size, jnp.float32)
  stats = tuple(zeros.at[index].set(x, mode='drop').reshape(shape) for x in found)
  return (*stats, kept) if static.kept_bytes else stats


def _kept_chunks(static, chunks: int, size: int) -> int:
  """How many of a device's chunks, each with logits of this size, are kept."""
  return min(chunks, static.kept_bytes // (4 * size))


def _loop(count, kept: int, most: int, body: Callable, carry):
  """`body(is_kept, i, carry)` for `count` chunks, at most `most`, of which the logits of the first `kept` are."""
  first = jnp.minimum(count, kept) if kept else 0
  if kept:
    carry = vocab.loop(0, first, kept, functools.partial(body, True), carry)
  if kept < most:
    carry = vocab.loop(first, count, most - kept, functools.partial(body, False), carry)
  return carry


# What is summed up over the vocabulary, in words of l = logit - top. Differences to the largest logit lose nothing
# where logits are large and the result is small.
#   top max logit   target its logit   exp sum e^l   logits sum logit   squares sum e^2l   shifted sum l e^l
def _sums(dense: tuple[str, ...]) -> list[str]:
  of = {'mean_logit': 'logits', 'sharpness': 'squares', 'entropy': 'shifted'}
  return ['top', 'target', 'exp', *(of[name] for name in dense if name in of)]


def _added(sums, logits, is_target):
  """The sums with those over further columns `[c, v]`."""
  top = jnp.maximum(sums['top'], jnp.max(logits, axis=1))
  shifted = logits - top[:, None]
  exp = jnp.exp(shifted)
  of = {
      'target': lambda: jnp.where(is_target, logits, 0.0),
      'exp': lambda: exp,
      'logits': lambda: jnp.where(logits > vocab.MASKED_LOGIT, logits, 0.0),
      'squares': lambda: exp * exp,
      'shifted': lambda: exp * shifted,
  }
  sums = _moved(sums, top)
  return {name: x if name == 'top' else x + jnp.sum(of[name](), axis=1) for name, x in sums.items()}


def _moved(sums, top):
  """The same sums where another logit is called the top."""
  lower = sums['top'] - top
  scale = jnp.exp(lower)
  moved = sums | {'top': top, 'exp': scale * sums['exp']}
  if 'squares' in sums:
    moved['squares'] = scale * scale * sums['squares']
  if 'shifted' in sums:
    moved['shifted'] = scale * (sums['shifted'] + lower * sums['exp'])
  return moved


def _everywhere(axes, sums):
  """The sums over the columns of all devices."""
  if not axes.vocab:
    return sums
  top = jax.lax.pmax(sums['top'], axes.vocab)
  sums = _moved(sums, top)
  return {name: x if name == 'top' else jax.lax.psum(x, axes.vocab) for name, x in sums.items()}


def _of_sums(static, sums):
  """Log-probabilities, the logarithm of the normaliser, and the dense statistics that are asked for."""
  # Where no target was counted nothing was summed.
  exp = jnp.where(sums['exp'] == 0, 1.0, sums['exp'])
  log_sum, chosen = jnp.log(exp), sums['target'] - sums['top']
  of = {
      'correct': lambda: (chosen >= 0).astype(jnp.float32),
      'mean_logit': lambda: sums['logits'] / static.output.vocab_size,
      'sharpness': lambda: jnp.log(sums['squares']) - 2 * log_sum,
      'entropy': lambda: log_sum - sums['shifted'] / exp,
  }
  return [chosen - log_sum, sums['top'] + log_sum, *(of[name]() for name in static.dense)]


def _backward_local(static, axes, hidden, head, *rest):
  local = functools.partial(_backward_in_blocks, static, axes)
  return vocab.in_blocks(local, head.shape[1], hidden, head, *rest)


def _backward_in_blocks(
    static, axes, block, hidden, head, targets, normaliser, entropy, d_logps, d_entropy, mask, *kept
):
  shape, chunk = hidden.shape, min(static.output.chunk, targets.size)
  hidden = hidden.reshape(-1, shape[-1])
  per_token = [x.reshape(-1) for x in (targets, normaliser, entropy, d_logps, d_entropy)]
  index, chunks = vocab.chunks(axes, mask, chunk)

  def of_chunk(part, ids, start, several, is_kept, i, carry):
    d_hidden, d_part = carry
    rows = jax.lax.dynamic_slice(index, (i * chunk,), (chunk,))
    h = vocab.take(hidden, rows)
    y, z, ent, d_lp, d_ent = (vocab.take(x, rows) for x in per_token)
    if is_kept:
      logits = jax.lax.dynamic_slice(kept[0], (i * chunk, start), (chunk, part.shape[1]))
    else:
      logits = vocab.unmasked_logits(static.output, h, part)
    logits = vocab.masked(static.output, logits, ids)
    is_target = ids == y[:, None]
    logp = logits - z[:, None]
    p = jnp.where(logits > vocab.MASKED_LOGIT, jnp.exp(logp), 0.0)
    # d logps = 1[target] - p;  d entropy = -p (log p + entropy).
    d_logits = d_lp[:, None] * (is_target - p)
    if 'entropy' in static.dense:
      d_logits -= d_ent[:, None] * p * (logp + ent[:, None])
    d_h, d_w = vocab.pull_back(static.output, logits, d_logits, h, part)
    if several:  # To what the blocks before have given.
      d_h += jax.lax.dynamic_slice(d_hidden, (i * chunk, 0), d_h.shape)
    return jax.lax.dynamic_update_slice(d_hidden, d_h, (i * chunk, 0)), d_part + d_w

  def of_block(first, carry, start, part, ids):
    d_hidden, d_head = carry
    several = part.shape[1] < d_head.shape[1]
    d_part = jax.lax.dynamic_slice_in_dim(d_head, start, part.shape[1], axis=1)
    body = functools.partial(of_chunk, part, ids, first + start, several)
    d_hidden, d_part = _loop(chunks, most_kept, index.size // chunk, body, (d_hidden, d_part))
    return d_hidden, jax.lax.dynamic_update_slice_in_dim(d_head, d_part, start, axis=1)

  def local(start, head, ids):
    zeros = jnp.zeros((index.size, shape[-1]), jnp.float32), jnp.zeros(head.shape, jnp.float32)
    return vocab.fold(functools.partial(of_block, start), zeros, head, ids, block)

  most_kept = _kept_chunks(static, index.size // chunk, chunk * head.shape[1]) if kept else 0

  d_compact, d_head = vocab.gradients_in_parts(axes, local, (index.size, shape[-1]), head)
  d_hidden = jnp.zeros(hidden.shape, hidden.dtype).at[index].set(d_compact.astype(hidden.dtype), mode='drop')
  return d_hidden.reshape(shape), d_head.astype(head.dtype)
