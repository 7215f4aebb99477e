"""Sampling: responses to prompts, as many rows at a time, each given the next prompt when it has ended.

What runs on the device is in `decoding`, how a token is chosen in `next_token`.
"""

import collections
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import NamedTuple

from absl import logging
import jax
import numpy as np

from jaxalign import sharding
from jaxalign import types
from jaxalign.generation import buckets
from jaxalign.generation import decoding
from jaxalign.generation import next_token
from jaxalign.models import transformer

ROWS = 128  # responses that are written at once, if nothing else is said
_AT_FIRST = 64  # tokens behind the longest prompt that there is room for at first
_LOOK = 8  # tokens between looks at texts
_PAUSE = 64  # tokens of a row, at most, between calls of `between`


class Sampled(NamedTuple):
  """One response.

  Attributes:
    ids: the sampled tokens; those that ended it are included.
    logps: their log-probabilities, in nats, under the model as it is: filters do not enter, and of temperatures only
      `told_at`.
    processed_logps: the same under all that shaped the draw: guidance, penalty, temperature and filters. They are 0
      where temperature is 0.
    stop_reason: 'eos' for a stop token, 'stop' for a text, 'length' where it was cut.
    experts: `[n - 1, L, k]`, the experts of each layer that all but the last of the n tokens of prompt and response
      took; None where that is not asked for.
  """

  ids: list[int]
  logps: list[float]
  processed_logps: list[float]
  stop_reason: str
  experts: np.ndarray | None = None

  @property
  def finished(self) -> bool:
    """Whether it came to its own end."""
    return self.stop_reason != 'length'


class Guide(NamedTuple):
  """A model that is read beside the policy.

  Attributes:
    model: with the policy's vocabulary; it may have a head that scores.
    params: its parameters.
    prompts: what it reads in place of the policy's prompts, one for each; None for the same.
  """

  model: transformer.Transformer
  params: types.PyTree
  prompts: Sequence[Sequence[int]] | None = None


class Guidance(NamedTuple):
  """What changes the policy's logits before penalty, temperature and filters.

  Attributes:
    process: (float32 logits `[B, V]`, a `decoding.View` of each guide) -> logits `[B, V]`; pure, and compiled. It is
      compared by identity: another `functools.partial` is another program.
    guides: models that it sees.
  """

  process: Callable[..., types.Array] | None
  guides: tuple[Guide, ...] = ()


class Stop(NamedTuple):
  """Texts that end a response.

  Attributes:
    texts: a response ends with the first token behind which it holds one.
    decode: the text of a response's tokens.
  """

  texts: tuple[str, ...]
  decode: Callable[[list[int]], str]

  def end(self, ids: list[int], known: int) -> int | None:
    """How many tokens there are up to the first of the texts, None without any; the first `known` hold none."""
    holds = lambda count: any(text in self.decode(ids[:count]) for text in self.texts)
    if not self.texts or not holds(len(ids)):
      return None
    return next(count for count in range(known + 1, len(ids) + 1) if holds(count))


def sample(
    model: transformer.Transformer,
    params: types.PyTree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    n: int = 1,
    seed: int = 0,
    requests: Sequence[int] | None = None,
    stop_ids: Sequence[int] = (),
    stop: Stop | None = None,
    guidance: Guidance | None = None,
    cache_dtype: str | None = None,
    told_at: float = 1.0,
    keep_experts: bool = False,
    experts: Sequence[np.ndarray | None] | None = None,
    rows: int = ROWS,
    watch: Callable[[int, list[int]], None] | None = None,
    between: Callable[[], None] | None = None,
    rules: Mapping[str, Sequence[str]] | None = None,
    **rule: Any,
) -> list[Sampled]:
  """Samples responses to each prompt; a uniform number depends on (seed, requests[i] * n + k, position) alone.

  Args:
    model: any model with a language-model head.
    params: its parameters, on any mesh (the current one, `jax.set_mesh`).
    prompts: token ids, at least one each, with room for the new ones in the context; the same on every process.
    max_new_tokens: length at which a response is cut, of all or of those to each prompt.
    n: responses to each prompt.
    seed: of the random numbers.
    requests: a number for each prompt; None for its place.
    stop_ids: tokens that end a response.
    stop: texts that do.
    guidance: what else shapes the draw.
    cache_dtype: 'int8' keeps keys and values in 8 bits; None in the precision of each model.
    told_at: the temperature of the log-probabilities that are told beside those of the draw.
    keep_experts: tells which experts tokens took, for a model that has some.
    experts: with that, which ones the first tokens of each prompt take, `[m, L, k]`; of others the routers choose.
    rows: responses that are written at once; more where the mesh does not divide them.
    watch: called with the number of a response (i * n + k) and its tokens so far, every few tokens.
    between: called every now and then, as often in every process of a job; what it raises ends the sampling.
    rules: of sharding for the policy's parameters meanwhile, see `sharding.RULES`; None leaves them in place.
    **rule: temperature, top_k, top_p, min_p and repetition_penalty, see `next_token.Rule`.

  Returns:
    The n responses to the first prompt, then those to the next, on every process.

  Raises:
    UsageError: a number has no meaning, or a guide has another vocabulary.
  """
  told = cache_dtype, told_at, keep_experts and model.config.num_experts > 0
  program, models_params, guides_prompts = _opened(model, params, stop_ids, guidance, told, rules, rule)
  if not prompts:
    return []
  read = [prompts, *(own or prompts for own in guides_prompts)]
  limits, key = _limits(max_new_tokens, len(prompts), n, rows), jax.random.key(seed)
  requests, stop = range(len(prompts)) if requests is None else requests, stop or Stop((), lambda ids: '')
  experts = experts if program.keeps_experts else None
  return _Run(program, models_params, read, experts, limits, requests, n, rows, key, stop, watch, between).all()


def _limits(max_new_tokens: int | Sequence[int], prompts: int, n: int, rows: int) -> list[int]:
  """Of each prompt; UsageError where one of the numbers has no meaning."""
  found = [max_new_tokens] * prompts if isinstance(max_new_tokens, int) else list(max_new_tokens)
  for name, count in (('max_new_tokens', min(found, default=1)), ('n', n), ('rows', rows)):
    if count < 1:
      raise types.UsageError(f'{name} = {count}: it must be at least 1')
  return found


def _opened(
    model, params, stop_ids, guidance: Guidance | None, told: tuple[str | None, float, bool], rules, rule
) -> tuple:
  """The program, parameters of each model, and the prompts of the guides; see `sample`."""
  rule = next_token.Rule(**rule)
  rule.check()
  check_cache_dtype(told[0])
  guidance = guidance or Guidance(None)
  models = (model, *(guide.model for guide in guidance.guides))
  sizes = {one.config.vocab_size for one in models}
  if len(sizes) > 1:
    raise types.UsageError(f'models that guide each other have one vocabulary; these have {sorted(sizes)} tokens')
  models = tuple(map(prepared, models))
  program = decoding.Program(models, rule, tuple(stop_ids), guidance.process, *told)
  params_of: list[types.PyTree] = [decoding.prepare(models[0], params, as_pairs(rules))]
  for its_model, guide in zip(models[1:], guidance.guides, strict=True):
    # The policy may guide itself, behind another prompt.
    is_policy = guide.params is params and its_model == models[0]
    params_of.append(params_of[0] if is_policy else decoding.prepare(its_model, guide.params))
  return program, params_of, [guide.prompts for guide in guidance.guides]


def as_pairs(rules: Mapping[str, Sequence[str]] | None) -> sharding.Pairs | None:
  """Rules of sharding as a key of a program."""
  return None if rules is None else tuple((logical, tuple(axes)) for logical, axes in sorted(rules.items()))


def check_cache_dtype(cache_dtype: str | None) -> None:
  """Raises UsageError where it is none of `sample`."""
  if cache_dtype not in (None, 'int8'):
    raise types.UsageError(f'cache_dtype = {cache_dtype}: it is int8 or left out')


def prepared(model: transformer.Transformer) -> transformer.Transformer:
  """The model as it writes."""
  mesh = jax.sharding.get_mesh()
  platform = jax.default_backend() if mesh.empty else sharding.platform_of(mesh)
  return dataclasses.replace(transformer.without_dropout(model), apart=platform == 'cpu')


class _Run:
  """The queue of a call: what waits, what was read, and who holds which row."""

  def __init__(
      self, program, params, prompts, experts, limits, requests, n: int, rows: int, key, stop: Stop, watch, between
  ):
    self._program, self._params, self._prompts, self._experts, self._limits = program, params, prompts, experts, limits
    self._reader = program._replace(process=None)  # Another process reads the same, by what is compiled already.
    self._requests, self._n, self._key, self._stop = requests, n, key, stop
    self._watch, self._between = watch, between
    sizes, total = buckets.Sizes.of([max(map(len, one)) for one in prompts], limits, n, rows), len(limits) * n
    self._size, self._together, self._most, longest = sizes.rows, sizes.together, sizes.most, sizes.longest
    # Prompts of like length are read together.
    self._waiting = collections.deque(sorted(range(len(limits)), key=lambda i: -buckets.bucket(len(prompts[0][i]))))
    self._room = tuple(min(most, buckets.bucket(length + _AT_FIRST)) for most, length in zip(self._most, longest))
    self._read: decoding.Prompts | None = None
    self._ready: collections.deque[tuple[int, int]] = collections.deque()  # (place among the prompts read, response)
    self._owners: list[int | None] = [None] * self._size
    self._counts = np.zeros(self._size, np.int32)
    self._ended = np.zeros(self._size, bool)
    self._found: list[Sampled | None] = [None] * total
    self._rows = decoding.start(self._reader, self._size, self._room, sizes.new)

  def all(self) -> list[Sampled]:
    """Writes every response."""
    compiled = decoding.compilations.count
    self._fill()
    while self._active():
      if self._between is not None:
        self._between()
      self._write()
      self._fill()
    found = [one for one in self._found if one is not None]
    if decoding.compilations.count > compiled:
      logging.info(
          'sampling: %d programs compiled, %d in all; %d tokens in %d steps of %d rows',
          decoding.compilations.count - compiled,
          decoding.compilations.count,
          sum(len(one.ids) for one in found),
          int(self._rows.steps),
          self._size,
      )
    return found

  def _active(self) -> list[tuple[int, int]]:
    return [(row, owner) for row, owner in enumerate(self._owners) if owner is not None]

  def _fill(self) -> None:
    """Gives the rows that are free to the requests that wait."""
    free = [row for row, owner in enumerate(self._owners) if owner is None]
    while free and (self._ready or self._waiting):
      if not self._ready:
        self._read_next()
      count = min(len(free), len(self._ready))
      given = [(free.pop(0), *self._ready.popleft()) for _ in range(count)]
      table = np.zeros((4, self._padded(count)), np.int32)
      table[0] = self._size
      for place, (row, source, response) in enumerate(given):
        prompt, sample = divmod(response, self._n)
        table[:, place] = row, source, self._requests[prompt] * self._n + sample, self._limits[prompt]
        self._owners[row], self._counts[row], self._ended[row] = response, 0, False
      self._rows = decoding.give(self._rows, self._read, self._key, *table[:2], table[2].astype(np.uint32), table[3])

  def _padded(self, count: int) -> int:
    """So many rows as one of two numbers: few, or up to all."""
    few = max(1, self._size // 8)
    return few if count <= few else self._size

  def _read_next(self) -> None:
    """Reads the prompts that come next."""
    chosen = [self._waiting.popleft() for _ in range(min(self._together, len(self._waiting)))]
    ids, lengths = [], []
    for prompts in self._prompts:
      own = [prompts[i] for i in chosen]
      ids.append(np.zeros((self._together, buckets.bucket(max(map(len, own)))), np.int32))
      lengths.append(np.ones(self._together, np.int32))
      for place, prompt in enumerate(own):
        ids[-1][place, : len(prompt)] = prompt
        lengths[-1][place] = len(prompt)
    known = self._experts and [self._experts[i] for i in chosen]
    taken = known and decoding.named(self._program, known, ids[0].shape)
    self._read = decoding.read(self._reader, self._params, ids, lengths, taken)
    self._ready += [(place, i * self._n + k) for place, i in enumerate(chosen) for k in range(self._n)]

  def _write(self) -> None:
    """Writes until a row is free for what waits, or all have ended, or it is time to look at the texts."""
    active = self._active()
    longest = [
        max(len(prompts[owner // self._n]) + int(self._counts[row]) for row, owner in active)
        for prompts in self._prompts
    ]
    sizes = zip(self._most, self._room, longest)
    room = tuple(size if count < size else min(most, buckets.bucket(count * 3 // 2)) for most, size, count in sizes)
    if room != self._room:
      self._room, self._rows = room, decoding.grow(room, self._rows)
    most = _LOOK if self._stop.texts or self._watch else max(self._limits) if self._between is None else _PAUSE
    most = min(most, *(size - count for size, count in zip(self._room, longest)))
    waits = bool(self._ready or self._waiting)
    enough = self._size - len(active) + max(1, self._size // 16) if waits else self._size
    numbers = np.int32(most), np.int32(enough)
    self._rows, counts, done = decoding.write(self._program, self._params, self._rows, self._ended, *numbers)
    before, self._counts, done = self._counts, np.array(counts), np.array(done)
    if self._stop.texts or self._watch or any(done[row] for row, _ in active):
      written = [np.array(x) for x in (self._rows.tokens_BN, self._rows.logps_BN, self._rows.processed_BN)]
      ended = [
          (row, owner) for row, owner in active if self._look(row, owner, int(before[row]), bool(done[row]), written)
      ]
      if ended and self._program.keeps_experts:
        self._keep_experts(ended)

  def _keep_experts(self, ended: list[tuple[int, int]]) -> None:
    """Adds to responses that have ended, and what rows they had, the experts that their tokens took."""
    rows_A = np.zeros(self._padded(len(ended)), np.int32)
    rows_A[: len(ended)] = [row for row, _ in ended]
    for (_, owner), experts in zip(ended, np.asarray(decoding.experts_of(self._rows, rows_A))):
      found = self._found[owner]
      assert found is not None
      read = len(self._prompts[0][owner // self._n]) + len(found.ids) - 1
      self._found[owner] = found._replace(experts=experts[:read].copy())  # Not all that was fetched with it.

  def _look(self, row: int, owner: int, known: int, done: bool, written: Sequence[np.ndarray]) -> bool:
    """Whether the response of a row has ended; keeps it then."""
    count = int(self._counts[row])
    ids = written[0][row, :count].tolist()
    end = self._stop.end(ids, known)
    ids = ids[:end]
    if self._watch is not None:
      self._watch(owner, ids)
    if not done and end is None:
      return False
    logps, processed = (x[row, : len(ids)].tolist() for x in written[1:])
    reason = 'stop' if end is not None else 'eos' if ids[-1] in self._program.stop_ids else 'length'
    self._found[owner] = Sampled(ids, logps, processed, reason)
    self._owners[row], self._ended[row] = None, True
    return True
