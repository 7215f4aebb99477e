"""What losses ask of whole distributions over the vocabulary: divergence from a reference, and rivals of a target.

In chunks, as log-probabilities are: full logits `[B, T, V]` never exist.
"""

import functools

import jax
import jax.numpy as jnp

from jaxalign import vocab


def kl(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    ref_hidden_BTD: jax.Array,
    ref_head_DV: jax.Array,
    mask_BT: jax.Array,
    *,
    vocab_size: int,
    chunk: int = vocab.CHUNK,
    softcap: float = 0.0,
    temperature: float = 1.0,
) -> jax.Array:
  """The exact divergence of the policy's next-token distribution p from the reference's q, at each target.

    KL(q || p) = sum_v q_v (log q_v - log p_v)     with the gradient p - q with respect to the policy's logits

  Args:
    hidden_BTD: of the policy, see `logps.token_stats`.
    head_DV: of the policy.
    ref_hidden_BTD: of the reference; carries no gradient.
    ref_head_DV: of the reference; carries no gradient.
    mask_BT: where it is 0 the result is 0, nothing is computed and no gradient flows.
    vocab_size: number of real columns.
    chunk: targets per chunk and device.
    softcap: of both.
    temperature: of both.

  Returns:
    Float32 `[B, T]`, in nats.
  """
  output = vocab.Output(vocab_size, chunk, softcap, temperature)
  heads = (head_DV.astype(hidden_BTD.dtype), ref_head_DV.astype(ref_hidden_BTD.dtype))
  return _kl(output, hidden_BTD, heads[0], *jax.lax.stop_gradient((ref_hidden_BTD, heads[1])), mask_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(output, hidden, head, ref_hidden, ref_head, mask):
  return _forward(output, hidden, head, ref_hidden, ref_head, mask)[0]


def _forward(output, hidden, head, ref_hidden, ref_head, mask):
  (found,) = vocab.sharded(functools.partial(_kl_local, output), 'hthtm', ('y',))(
      hidden, head, ref_hidden, ref_head, mask
  )
  return found, (hidden, head, ref_hidden, ref_head, mask)


def _backward(output, kept, cotangent):
  hidden, head, ref_hidden, ref_head, mask = kept
  local = functools.partial(_slope_local, output)
  d_hidden, d_head = vocab.sharded(local, 'hthtym', ('h', 't'))(hidden, head, ref_hidden, ref_head, cotangent, mask)
  return d_hidden, d_head, None, None, None


_kl.defvjp(_forward, _backward)


def _log_softmax(axes: vocab.Axes, logits):
  top = vocab.top(axes, logits)[:, None]
  return logits - top - jnp.log(vocab.total(axes, jnp.exp(logits - top)))[:, None]


def _flat(axes: vocab.Axes, hidden, head, ref_hidden, ref_head):
  flat = lambda x: x.reshape(-1, x.shape[-1])
  return flat(hidden), vocab.whole(axes, head), flat(ref_hidden), vocab.whole(axes, ref_head)


def _both(axes: vocab.Axes, output, rows, hidden, head, ref_hidden, ref_head):
  """Logits of the policy for a chunk, log p and log q `[c, v]`."""
  columns = vocab.columns(axes, head.shape[1])
  logits = vocab.logits(output, vocab.take(hidden, rows), head, columns)
  ref_logits = vocab.logits(output, vocab.take(ref_hidden, rows), ref_head, columns)
  return logits, _log_softmax(axes, logits), _log_softmax(axes, ref_logits)


def _kl_local(output, axes, hidden, head, ref_hidden, ref_head, mask):
  models = _flat(axes, hidden, head, ref_hidden, ref_head)
  chunk = min(output.chunk, mask.size)
  index, chunks = vocab.chunks(axes, mask, chunk)

  def body(i, out):
    rows = jax.lax.dynamic_slice(index, (i * chunk,), (chunk,))
    _, log_p, log_q = _both(axes, output, rows, *models)
    # The sums of p and of q are 1 both: each summand is then small, and not below 0, where p and q are close.
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return out.at[rows].set(vocab.total(axes, p - q + q * (log_q - log_p)), mode='drop')

  out = vocab.loop(0, chunks, index.size // chunk, body, jnp.zeros(mask.size, jnp.float32))
  return (out.reshape(mask.shape),)


def _slope_local(output, axes, hidden, head, ref_hidden, ref_head, d_kl, mask):
  models = _flat(axes, hidden, head, ref_hidden, ref_head)
  chunk = min(output.chunk, mask.size)
  index, chunks = vocab.chunks(axes, mask, chunk)

  def body(i, carry):
    d_hidden, d_head = carry
    rows = jax.lax.dynamic_slice(index, (i * chunk,), (chunk,))
    logits, log_p, log_q = _both(axes, output, rows, *models)
    d_logits = vocab.take(d_kl.reshape(-1), rows)[:, None] * (jnp.exp(log_p) - jnp.exp(log_q))
    d_h, d_w = vocab.pull_back(output, logits, d_logits, vocab.take(models[0], rows), models[1])
    return d_hidden.at[rows].set(d_h, mode='drop'), d_head + d_w

  zeros = jnp.zeros(models[0].shape, jnp.float32), jnp.zeros(models[1].shape, jnp.float32)
  d_hidden, d_head = vocab.gradients(axes, *vocab.loop(0, chunks, index.size // chunk, body, zeros))
  return d_hidden.reshape(hidden.shape).astype(hidden.dtype), d_head.astype(head.dtype)


def rivals(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    uniform_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    vocab_size: int,
    among: int,
    chunk: int = vocab.CHUNK,
    softcap: float = 0.0,
) -> jax.Array:
  """Draws at each target another token, from the softmax over the likeliest that are not the target.

  Args:
    hidden_BTD: see `logps.token_stats`; carries no gradient, as does nothing here.
    head_DV: see there.
    targets_BT: see there.
    uniform_BT: float32 random numbers in [0, 1), one a target.
    mask_BT: where it is 0 the result is 0.
    vocab_size: number of real columns.
    among: how many of the likeliest tokens the softmax is taken over, less than `vocab_size`.
    chunk: targets per chunk and device.
    softcap: see `logps.token_stats`.

  Returns:
    int32 ids `[B, T]`.
  """
  output = vocab.Output(vocab_size, chunk, softcap)
  local = functools.partial(_rivals_local, output, among)
  args = jax.lax.stop_gradient((hidden_BTD, head_DV.astype(hidden_BTD.dtype), targets_BT, uniform_BT, mask_BT))
  return vocab.sharded(local, 'htyym', ('y',))(*args)[0]


def _rivals_local(output, among, axes, hidden, head, targets, uniform, mask):
  chunk = min(output.chunk, mask.size)
  hidden, head = hidden.reshape(-1, hidden.shape[-1]), vocab.whole(axes, head)
  index, chunks = vocab.chunks(axes, mask, chunk)
  columns = vocab.columns(axes, head.shape[1])

  def body(i, out):
    rows = jax.lax.dynamic_slice(index, (i * chunk,), (chunk,))
    target, u = (vocab.take(x.reshape(-1), rows) for x in (targets, uniform))
    logits = vocab.logits(output, vocab.take(hidden, rows), head, columns)
    # No device has more of the likeliest than columns.
    most = min(among, logits.shape[1])
    best, where = jax.lax.top_k(jnp.where(columns == target[:, None], vocab.MASKED_LOGIT, logits), most)
    ids = jnp.take_along_axis(jnp.broadcast_to(columns, logits.shape), where, axis=1)
    if axes.vocab:
      best, ids = (jax.lax.all_gather(x, axes.vocab, axis=1, tiled=True) for x in (best, ids))
      best, where = jax.lax.top_k(best, among)
      ids = jnp.take_along_axis(ids, where, axis=1)
    below = jnp.cumsum(jax.nn.softmax(best, axis=1), axis=1) <= u[:, None]
    place = jnp.minimum(jnp.sum(below, axis=1), among - 1)
    return out.at[rows].set(jnp.take_along_axis(ids, place[:, None], axis=1)[:, 0], mode='drop')

  out = vocab.loop(0, chunks, index.size // chunk, body, jnp.zeros(mask.size, jnp.int32))
  return (out.reshape(mask.shape),)
