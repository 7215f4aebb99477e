"""Sampling on the device: prefill, a decode loop over a KV cache, and the log-probabilities of what was sampled."""

from collections.abc import Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sharding
from jaxalign import types
from jaxalign import vocab
from jaxalign.models import transformer

_BUCKET = 32  # prompts are padded to a multiple of it, so that few programs are compiled
_OUT = -1e30


class Sampled(NamedTuple):
  """One response.

  Attributes:
    ids: the sampled tokens, the stop token included.
    logps: their log-probabilities, in nats, under the model as it is: temperature and filters do not enter.
    finished: whether it ended with a stop token rather than at the length limit.
  """

  ids: list[int]
  logps: list[float]
  finished: bool


class _Static(NamedTuple):
  max_new_tokens: int
  temperature: float
  top_k: int
  top_p: float
  stop_ids: tuple[int, ...]


def sample(
    model: transformer.Transformer,
    params: types.PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    rows: int = 128,
) -> list[Sampled]:
  """Samples a response to each prompt.

  The n-th prompt's token at position t is drawn with one uniform number that depends on (seed, n, t) alone, so the same
  ids come out whatever the number of rows.

  Args:
    model: any model with a language-model head.
    params: its parameters, on any mesh (the current one, `jax.set_mesh`).
    prompts: token ids, at least one each, with room for the new ones in the model's context; every process passes the
      same.
    max_new_tokens: length at which a response is cut.
    temperature: divides the logits; 0 takes the most probable token.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: keep the fewest tokens whose probability reaches p.
    seed: of the random numbers.
    stop_ids: tokens that end a response.
    rows: prompts that are decoded at once; a multiple of what the mesh splits a batch by.

  Returns:
    One response per prompt, on every process.
  """
  if not prompts:
    return []
  static = _Static(max_new_tokens, temperature, top_k, top_p, tuple(stop_ids))
  longest = max(map(len, prompts))
  length = -(-longest // _BUCKET) * _BUCKET
  rows = min(rows, -(-len(prompts) // 8) * 8)
  key = jax.random.key(seed)
  found: list[Sampled] = []
  for start in range(0, len(prompts), rows):
    part = prompts[start : start + rows]
    ids = np.zeros((rows, length), np.int32)
    lengths = np.ones(rows, np.int32)
    for row, prompt in enumerate(part):
      ids[row, : len(prompt)] = prompt
      lengths[row] = len(prompt)
    requests = np.arange(start, start + rows, dtype=np.uint32)
    tokens, logps, counts = (np.asarray(x) for x in _decode(model, static, params, ids, lengths, requests, key))
    for row in range(len(part)):
      count = int(counts[row])
      new = tokens[row, :count].tolist()
      found.append(Sampled(new, logps[row, :count].tolist(), bool(new) and new[-1] in static.stop_ids))
  return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(model, static: _Static, params, ids_BT, lengths_B, requests_B, key):
  """Tokens `[B, new]`, their log-probabilities, and how many of them each row has; replicated."""
  batch, prompt = ids_BT.shape
  head_DV = transformer.output_matrix(params).astype(model.dtype)
  row_keys = jax.vmap(lambda r: jax.random.fold_in(key, r))(requests_B)
  positions_BT = jnp.broadcast_to(jnp.arange(prompt), ids_BT.shape)
  segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
  cache = transformer.init_cache(model.config, batch, prompt + static.max_new_tokens, model.dtype)
  hidden_BTD, cache = model.apply({'params': params}, ids_BT, positions_BT, segments_BT, cache)
  last_BD = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
  shape = batch, static.max_new_tokens
  stop = jnp.array(static.stop_ids or (-1,), jnp.int32)

  def going(carry):
    step, _, _, _, _, done_B, _ = carry
    return (step < static.max_new_tokens) & ~jnp.all(done_B)

  def one(carry):
    step, cache, last_BD, tokens, logps, done_B, counts_B = carry
    logits_BV = jax.lax.dot(last_BD, head_DV, preferred_element_type=jnp.float32)
    logits_BV = vocab.soften(logits_BV, model.config.final_softcap)
    logits_BV = jnp.where(jnp.arange(logits_BV.shape[1])[None, :] < model.config.vocab_size, logits_BV, _OUT)
    uniform_B = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, step)))(row_keys)
    token_B = _choose(static, logits_BV, uniform_B)
    logp_B = jnp.take_along_axis(jax.nn.log_softmax(logits_BV), token_B[:, None], axis=1)[:, 0]
    tokens = tokens.at[:, step].set(jnp.where(done_B, 0, token_B))
    logps = logps.at[:, step].set(jnp.where(done_B, 0.0, logp_B))
    counts_B = counts_B + jnp.where(done_B, 0, 1)
    done_B = done_B | jnp.any(token_B[:, None] == stop[None, :], axis=1)
    here_B1 = (lengths_B + step)[:, None]
    hidden, cache = model.apply({'params': params}, token_B[:, None], here_B1, jnp.ones_like(here_B1), cache)
    return step + 1, cache, hidden[:, 0], tokens, logps, done_B, counts_B

  start = (
      jnp.zeros((), jnp.int32),
      cache,
      last_BD,
      jnp.zeros(shape, jnp.int32),
      jnp.zeros(shape, jnp.float32),
      jnp.zeros(batch, bool),
      jnp.zeros(batch, jnp.int32),
  )
  _, _, _, tokens, logps, _, counts_B = jax.lax.while_loop(going, one, start)
  return (
      sharding.constrain(tokens, None, None),
      sharding.constrain(logps, None, None),
      sharding.constrain(counts_B, None),
  )


def _choose(static: _Static, logits_BV, uniform_B):
  """The token at which the cumulative probability passes the uniform number; the largest where temperature is 0."""
  if static.temperature == 0:
    return jnp.argmax(logits_BV, axis=1).astype(jnp.int32)
  logits_BV = logits_BV / static.temperature
  if static.top_k:
    least_B1 = jax.lax.top_k(logits_BV, static.top_k)[0][:, -1:]
    logits_BV = jnp.where(logits_BV < least_B1, _OUT, logits_BV)
  if 0 < static.top_p < 1:
    sorted_BV = -jnp.sort(-logits_BV, axis=1)
    before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), axis=1) - jax.nn.softmax(sorted_BV)
    least_B1 = jnp.min(jnp.where(before_BV < static.top_p, sorted_BV, jnp.inf), axis=1, keepdims=True)
    logits_BV = jnp.where(logits_BV < least_B1, _OUT, logits_BV)
  cumulative_BV = jnp.cumsum(jax.nn.softmax(logits_BV), axis=1)
  passed_BV = cumulative_BV <= uniform_B[:, None] * cumulative_BV[:, -1:]
  return jnp.minimum(jnp.sum(passed_BV, axis=1), logits_BV.shape[1] - 1).astype(jnp.int32)
