"""What sampling runs on the device: reading prompts, giving rows to them, and writing many tokens at a time.

A row holds one response at a time, and is given another prompt when it has ended. Prompts are read apart, once each;
what was read is copied to the rows of all their samples.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import metrics
from jaxalign import sharding
from jaxalign import types
from jaxalign import vocab
from jaxalign.generation import next_token
from jaxalign.models import experts as experts_lib
from jaxalign.models import kv_cache
from jaxalign.models import quant
from jaxalign.models import transformer

compilations = metrics.Compilations()


class Program(NamedTuple):
  """What programs are compiled for.

  Attributes:
    models: the policy, then those that guide it.
    rule: how tokens are drawn.
    stop_ids: tokens that end a response.
    process: see `sampling.Guidance`; None without guidance.
    cache_dtype: of keys and values; None for that of each model.
    told_at: the temperature of the log-probabilities that are told beside those of the draw.
    keeps_experts: whether the policy's cache has the experts that tokens took.
  """

  models: tuple[transformer.Transformer, ...]
  rule: next_token.Rule
  stop_ids: tuple[int, ...]
  process: Callable[..., types.Array] | None = None
  cache_dtype: str | None = None
  told_at: float = 1.0
  keeps_experts: bool = False


@struct.dataclass
class Reading:
  """What a model has read of each row, and what it makes of the last token, `[B, D]`."""

  cache: kv_cache.Cache
  hidden_BD: types.Array


@struct.dataclass
class Prompts:
  """Prompts that were read, by each model, and which tokens each has, `[B, V]`, where that is asked for."""

  readings: tuple[Reading, ...]
  seen_BV: types.Array = None


@struct.dataclass
class Rows:
  """The responses that are being written.

  Attributes:
    readings: of each model.
    tokens_BN: int32, what was written.
    logps_BN: log-probabilities of that under the model as it is, in nats.
    processed_BN: the same under guidance, penalty, temperature and filters.
    counts_B: int32, tokens written.
    limits_B: int32, at which count a response is cut.
    done_B: whether a row has ended; so has one that was never given anything.
    uniform_BN: a number in [0, 1) for each token, of its request and place alone.
    steps: int32, steps of all programs so far.
    seen_BV: see `Prompts`.
  """

  readings: tuple[Reading, ...]
  tokens_BN: types.Array
  logps_BN: types.Array
  processed_BN: types.Array
  counts_B: types.Array
  limits_B: types.Array
  done_B: types.Array
  uniform_BN: types.Array
  steps: types.Array
  seen_BV: types.Array = None


@dataclasses.dataclass(frozen=True)
class View:
  """What a function that changes the policy's logits sees of a model that guides it, at the next token of each row."""

  _model: transformer.Transformer
  _params: types.PyTree
  _reading: Reading

  @property
  def logits_BV(self) -> types.Array:
    """Its own logits of the next token, float32."""
    return next_token.logits(self._model, self._params, self._reading.hidden_BD)

  @property
  def scores_BO(self) -> types.Array:
    """What its head that scores makes of the tokens so far."""
    return transformer.scores(self._params, self._reading.hidden_BD[:, None])[:, 0]

  def scores_of(self, tokens_BC: types.Array) -> types.Array:
    """What its head that scores would make of them with each of these tokens behind, `[B, C, outputs]`."""
    cache = kv_cache.with_mode(self._reading.cache, 'either')
    positions_BC = jnp.broadcast_to(kv_cache.lengths(cache)[:, None], tokens_BC.shape)
    ones_BC = jnp.ones_like(tokens_BC)
    hidden_BCD, _ = _apply(self._model, self._params, tokens_BC, positions_BC, ones_BC, cache)
    return transformer.scores(self._params, hidden_BCD)


def _apply(model: transformer.Transformer, params, *args, **how) -> tuple[types.Array, kv_cache.Cache]:
  return model.apply({'params': params}, *args, **how)  # type: ignore[return-value]


def _program(*static: int, donate: tuple[int, ...] = ()):
  """Compiles a function and counts how often; the arguments with these numbers are static."""
  return lambda fn: jax.jit(compilations.counted(fn), static_argnums=static, donate_argnums=donate)


@_program(0, 2)
def prepare(model: transformer.Transformer, params: types.PyTree, rules: sharding.Pairs | None = None) -> types.PyTree:
  """Parameters as they are read at each step: those that are not used in float32 in the precision of the model.

  `rules` of sharding say where they lie meanwhile, None where they lie anyway.
  """

  def of(path, x):
    is_wide = any(word in jax.tree_util.keystr(path) for word in ('norm', 'score', 'lora'))
    return x if is_wide or quant.is_array_of(x) or x.dtype != jnp.float32 else x.astype(model.dtype)

  params = jax.tree_util.tree_map_with_path(of, params, is_leaf=quant.is_array_of)
  if rules is not None:
    whole = dataclasses.replace(model, apart=False)
    mesh = jax.sharding.get_abstract_mesh()
    placed = transformer.abstract_params(whole, mesh, dict(rules))  # type: ignore[arg-type]
    params = jax.tree.map(lambda x, of: jax.lax.with_sharding_constraint(x, of.sharding.spec), params, placed)
  return transformer.apart(params, model.config) if model.apart else params


def _cache(program: Program, model: transformer.Transformer, rows: int, length: int, mode: str) -> kv_cache.Cache:
  make = kv_cache.apart if model.apart else kv_cache.init
  dtype = program.cache_dtype or model.dtype
  with_experts = program.keeps_experts and model == program.models[0]
  return make(model.config, rows, length, dtype, mode, with_experts=with_experts)


@_program(0)
def read(
    program: Program, params: Sequence[types.PyTree], ids: Sequence, lengths: Sequence, experts_PTLk: types.Array = None
) -> Prompts:
  """Reads prompts, `ids` `[P, T]` and `lengths` `[P]` of each model; the policy's tokens take these experts."""
  taken = experts_PTLk, *[None] * (len(ids) - 1)
  readings = tuple(_read(program, *one) for one in zip(program.models, params, ids, lengths, taken, strict=True))
  if program.rule.repetition_penalty == 1:
    return Prompts(readings)
  ids_PT, lengths_P = ids[0], lengths[0]
  ids_PT = jnp.where(jnp.arange(ids_PT.shape[1])[None, :] < lengths_P[:, None], ids_PT, -1)
  seen_PV = jnp.zeros((len(ids_PT), program.models[0].config.padded_vocab), bool)
  return Prompts(readings, seen_PV.at[jnp.arange(len(ids_PT))[:, None], ids_PT].set(True, mode='drop'))


def named(program: Program, experts: Sequence[np.ndarray | None], shape: tuple[int, int]) -> np.ndarray:
  """What `read` takes of prompts `[P, T]` whose first tokens took these experts, `[m, L, k]` each."""
  wanted = experts_lib.shape_of(program.models[0].config, shape)
  table = np.full(wanted.shape, experts_lib.free(wanted.dtype), wanted.dtype)
  for place, known in enumerate(experts):
    if known is not None:
      table[place, : len(known)] = known
  return table


def _read(program: Program, model: transformer.Transformer, params, ids_PT, lengths_P, experts_PTLk) -> Reading:
  count, length = ids_PT.shape
  positions_PT = jnp.broadcast_to(jnp.arange(length), (count, length))
  segments_PT = (positions_PT < lengths_P[:, None]).astype(jnp.int32)
  cache = _cache(program, model, count, length, 'first')
  tokens = ids_PT, positions_PT, segments_PT
  hidden_PTD, cache = _apply(model, params, *tokens, cache, experts_BTLk=experts_PTLk)
  return Reading(cache, jnp.take_along_axis(hidden_PTD, (lengths_P - 1)[:, None, None], axis=1)[:, 0])


def _placed(rows: Rows) -> Rows:
  """What every program ends with, so that the next is compiled for one layout: all but what models read is whole."""
  readings = tuple(
      Reading(kv_cache.each(kv_cache.placed, one.cache), sharding.constrain(one.hidden_BD, 'batch', None))
      for one in rows.readings
  )
  whole = lambda x: sharding.constrain(x, *[None] * x.ndim)
  return jax.tree.map(whole, dataclasses.replace(rows, readings=())).replace(readings=readings)


@_program(0, 1, 2, 3)
def start(program: Program, rows: int, lengths: tuple[int, ...], new: int) -> Rows:
  """Rows that have ended, with room for so many tokens of each model, `new` of them written."""
  readings = tuple(
      Reading(
          _cache(program, model, rows, length, 'next'),
          jnp.zeros((rows, model.config.embed_dim), model.dtype),
      )
      for model, length in zip(program.models, lengths, strict=True)
  )
  written = lambda dtype: jnp.zeros((rows, new), dtype)
  each = lambda dtype: jnp.zeros(rows, dtype)
  seen = program.rule.repetition_penalty != 1
  made = Rows(
      readings,
      written(jnp.int32),
      written(jnp.float32),
      written(jnp.float32),
      each(jnp.int32),
      each(jnp.int32),
      jnp.ones(rows, bool),
      written(jnp.float32),
      jnp.zeros((), jnp.int32),
      jnp.zeros((rows, program.models[0].config.padded_vocab), bool) if seen else None,
  )
  return _placed(made)


@_program(donate=(0,))
def give(rows: Rows, prompts: Prompts, key: types.Array, rows_A, sources_A, requests_A, limits_A) -> Rows:
  """Begins responses: row `rows_A` that to prompt `sources_A`; rows beyond the last are left out.

  Random numbers are made of `key`, the request and the place of a token.
  """
  fold, places_N = jax.random.fold_in, jnp.arange(rows.tokens_BN.shape[1])
  of_row = lambda request: jax.vmap(lambda place: jax.random.uniform(fold(fold(key, request), place)))(places_N)
  put = lambda to, x: to.at[rows_A].set(x, mode='drop')
  copy = lambda to, of: kv_cache.copy(to, rows_A, of, sources_A)
  readings = tuple(
      Reading(kv_cache.each(copy, own.cache, of.cache), put(own.hidden_BD, of.hidden_BD[sources_A]))
      for own, of in zip(rows.readings, prompts.readings, strict=True)
  )
  given = dataclasses.replace(
      rows,
      readings=readings,
      counts_B=put(rows.counts_B, 0),
      limits_B=put(rows.limits_B, limits_A),
      done_B=put(rows.done_B, False),
      uniform_BN=put(rows.uniform_BN, jax.vmap(of_row)(requests_A)),
      seen_BV=None if rows.seen_BV is None else put(rows.seen_BV, prompts.seen_BV[sources_A]),
  )
  return _placed(given)


@_program(0)
def grow(lengths: tuple[int, ...], rows: Rows) -> Rows:
  """The same with room for so many tokens of each model."""
  readings = tuple(
      Reading(kv_cache.grown(one.cache, length), one.hidden_BD)
      for one, length in zip(rows.readings, lengths, strict=True)
  )
  return _placed(dataclasses.replace(rows, readings=readings))


@_program()
def experts_of(rows: Rows, rows_A: types.Array) -> types.Array:
  """The experts that tokens of some rows took, of as many as there is room for: `[A, S, L, k]`, whole everywhere."""
  cache = rows.readings[0].cache
  each = [cache] if isinstance(cache, kv_cache.KVCache) else cache
  found_LASk = jnp.concatenate([one.experts_LBKSH[:, rows_A, 0] for one in each])
  return sharding.constrain(found_LASk.transpose(1, 2, 0, 3), None, None, None, None)


@_program(0, donate=(2,))
def write(
    program: Program,
    params: Sequence[types.PyTree],
    rows: Rows,
    ended_B: types.Array,
    most: types.Array,
    enough: types.Array,
) -> tuple[Rows, types.Array, types.Array]:
  """Writes tokens until so many rows have ended.

  Args:
    program: what to do.
    params: of each model.
    rows: which are not to be used again.
    ended_B: rows that have ended for another reason than those that are known here.
    most: tokens to write at most.
    enough: how many ended rows to stop at.

  Returns:
    The rows, their counts and whether each has ended, the same on every process.
  """
  going = lambda carry: (carry[0] < most) & (jnp.sum(carry[1].done_B) < enough)
  rows = dataclasses.replace(rows, done_B=rows.done_B | ended_B)
  one = lambda carry: (carry[0] + 1, _write_one(program, params, carry[1]))
  _, rows = jax.lax.while_loop(going, one, (jnp.zeros((), jnp.int32), rows))
  rows = _placed(rows)
  return rows, rows.counts_B, rows.done_B


def _write_one(program: Program, params, rows: Rows) -> Rows:
  """Draws a token for every row that has not ended, and reads it."""
  B = len(rows.counts_B)
  raw_BV = next_token.logits(program.models[0], params[0], rows.readings[0].hidden_BD)
  logits_BV = raw_BV
  if program.process is not None:
    guides = tuple(map(View, program.models[1:], params[1:], rows.readings[1:]))
    real_BV = raw_BV > vocab.MASKED_LOGIT
    logits_BV = jnp.where(real_BV, program.process(raw_BV, guides), vocab.MASKED_LOGIT)
  if rows.seen_BV is not None:
    logits_BV = next_token.penalise(program.rule, logits_BV, rows.seen_BV)
  uniform_B = jnp.take_along_axis(rows.uniform_BN, rows.counts_B[:, None], axis=1, mode='clip')[:, 0]
  token_B, processed_B = next_token.choose(program.rule, logits_BV, uniform_B)
  told_BV = raw_BV / program.told_at
  logp_B = jnp.take_along_axis(told_BV, token_B[:, None], axis=1)[:, 0] - jax.nn.logsumexp(told_BV, axis=1)
  # What has ended writes beyond the end, where all is lost.
  place_B = jnp.where(rows.done_B, rows.tokens_BN.shape[1], rows.counts_B)
  put = lambda to_BN, x_B: to_BN.at[jnp.arange(B), place_B].set(x_B, mode='drop')
  going_B = ~rows.done_B
  counts_B = rows.counts_B + going_B
  stop_1S = jnp.array(program.stop_ids or (-1,), jnp.int32)[None, :]
  ends_B = jnp.any(token_B[:, None] == stop_1S, axis=1) | (counts_B >= rows.limits_B)
  read_one = lambda model, params, reading: _read_one(model, params, reading, token_B, going_B)
  return dataclasses.replace(
      rows,
      readings=tuple(map(read_one, program.models, params, rows.readings)),
      tokens_BN=put(rows.tokens_BN, token_B),
      logps_BN=put(rows.logps_BN, logp_B),
      processed_BN=put(rows.processed_BN, processed_B),
      counts_B=counts_B,
      done_B=rows.done_B | ends_B,
      steps=rows.steps + 1,
      seen_BV=None if rows.seen_BV is None else rows.seen_BV.at[jnp.arange(B), token_B].set(True),
  )


def _read_one(model: transformer.Transformer, params, reading: Reading, token_B, going_B) -> Reading:
  here_B1, counts_B1 = kv_cache.lengths(reading.cache)[:, None], going_B[:, None].astype(jnp.int32)
  hidden_B1D, cache = _apply(model, params, token_B[:, None], here_B1, counts_B1, reading.cache)
  return Reading(cache, hidden_B1D[:, 0])
