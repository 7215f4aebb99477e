"""Log-probabilities of targets from hidden states, in chunks: full logits `[B, T, V]` never exist.

Only targets that the mask counts are computed. They are compacted to the front, and a loop takes them a chunk at a
time, forward and backward; the largest array with a vocabulary axis is `[chunk, V / tensor]`. The loop runs under
`shard_map`, so that the head is gathered over fsdp once before it and its gradient is reduced and scattered once after
it.
"""

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
    temperature: float = 1.0,
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

  Returns:
    `logps` and each of `dense`, float32 `[B, T]`.
  """
  unknown = set(dense) - set(DENSE)
  if unknown:
    raise ValueError(f'unknown dense statistics {sorted(unknown)}; there are {DENSE}')
  output = vocab.Output(vocab_size, chunk, softcap, temperature)
  static = _Static(output, tuple(name for name in DENSE if name in dense))
  return _token_stats(static, hidden_BTD, head_DV.astype(hidden_BTD.dtype), targets_BT, mask_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_stats(static, hidden_BTD, head_DV, targets_BT, mask_BT):
  return _forward(static, hidden_BTD, head_DV, targets_BT, mask_BT)[0]


def _forward(static, hidden_BTD, head_DV, targets_BT, mask_BT):
  """All statistics, and what the backward pass keeps: no more than `[B, T]` beside the inputs."""
  names = ('logps', 'normaliser', *static.dense)
  run = vocab.sharded(functools.partial(_forward_local, static), 'htym', ('y',) * len(names))
  stats = dict(zip(names, run(hidden_BTD, head_DV, targets_BT, mask_BT)))
  normaliser_BT = stats.pop('normaliser')
  return stats, (hidden_BTD, head_DV, targets_BT, mask_BT, normaliser_BT, stats.get('entropy'))


def _backward(static, kept, cotangents):
  hidden_BTD, head_DV, targets_BT, mask_BT, normaliser_BT, entropy_BT = kept
  if entropy_BT is None:
    entropy_BT, entropy_cotangent_BT = jnp.zeros_like(normaliser_BT), jnp.zeros_like(normaliser_BT)
  else:
    entropy_cotangent_BT = cotangents['entropy']
  d_hidden, d_head = vocab.sharded(functools.partial(_backward_local, static), 'htyyyyym', ('h', 't'))(
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


def _forward_local(static, axes, hidden, head, targets, mask):
  shape, chunk = targets.shape, min(static.output.chunk, targets.size)
  head = vocab.whole(axes, head)
  hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
  index, chunks = vocab.chunks(axes, mask, chunk)
  columns = vocab.columns(axes, head.shape[1])
  total = functools.partial(vocab.total, axes)

  def body(i, out):
    rows = jax.lax.dynamic_slice(index, (i * chunk,), (chunk,))
    logits = vocab.logits(static.output, vocab.take(hidden, rows), head, columns)
    is_target = columns == vocab.take(targets, rows)[:, None]
    top = vocab.top(axes, logits)
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
      new.append(total(jnp.where(logits > vocab.MASKED_LOGIT, logits, 0.0)) / static.output.vocab_size)
    if 'sharpness' in static.dense:
      new.append(jnp.log(total(exp * exp)) - 2 * log_sum)
    if 'entropy' in static.dense:
      new.append(log_sum - total(exp * shifted) / sum_exp)
    return tuple(o.at[rows].set(x, mode='drop') for o, x in zip(out, new))

  zeros = (jnp.zeros(targets.size, jnp.float32),) * (2 + len(static.dense))
  return tuple(x.reshape(shape) for x in jax.lax.fori_loop(0, chunks, body, zeros))


def _backward_local(static, axes, hidden, head, targets, normaliser, entropy, d_logps, d_entropy, mask):
  shape, chunk = hidden.shape, min(static.output.chunk, targets.size)
  hidden = hidden.reshape(-1, shape[-1])
  per_token = [x.reshape(-1) for x in (targets, normaliser, entropy, d_logps, d_entropy)]
  index, chunks = vocab.chunks(axes, mask, chunk)

  def body(head, columns, i, carry):
    d_hidden, d_head = carry
    rows = jax.lax.dynamic_slice(index, (i * chunk,), (chunk,))
    h = vocab.take(hidden, rows)
    y, z, ent, d_lp, d_ent = (vocab.take(x, rows) for x in per_token)
    logits = vocab.logits(static.output, h, head, columns)
    is_target = columns == y[:, None]
    logp = logits - z[:, None]
    p = jnp.where(logits > vocab.MASKED_LOGIT, jnp.exp(logp), 0.0)
    # d logps = 1[target] - p;  d entropy = -p (log p + entropy).
    d_logits = d_lp[:, None] * (is_target - p)
    if 'entropy' in static.dense:
      d_logits -= d_ent[:, None] * p * (logp + ent[:, None])
    d_h, d_w = vocab.pull_back(static.output, logits, d_logits, h, head)
    return d_hidden.at[rows].set(d_h, mode='drop'), d_head + d_w

  def local(head, columns):
    zeros = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32)
    return jax.lax.fori_loop(0, chunks, functools.partial(body, head, columns), zeros)

  d_hidden, d_head = vocab.gradients_in_parts(axes, local, hidden, head)
  return d_hidden.reshape(shape).astype(hidden.dtype), d_head.astype(head.dtype)
