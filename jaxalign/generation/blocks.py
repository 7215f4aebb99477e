"""Responses block by block, each going on from the continuation that is kept of several; values of what is written."""

from collections.abc import Callable
from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import sharding
from jaxalign import types
from jaxalign.generation import buckets
from jaxalign.generation import sampling
from jaxalign.models import transformer

# (prompts with what is kept, their numbers, tokens at most, block) -> continuations, as many of each
DrawFn = Callable[[list[list[int]], list[int], int, int], Sequence[sampling.Sampled]]
# (numbers of prompts, responses so far with each continuation) -> places of those to keep, one of each prompt
ChooseFn = Callable[[list[int], list[sampling.Sampled]], Sequence[int]]


def grow(
    prompts: Sequence[Sequence[int]],
    *,
    block: int,
    longest: int,
    draw_fn: DrawFn,
    choose_fn: ChooseFn,
    stop: sampling.Stop,
) -> tuple[list[sampling.Sampled], list[int]]:
  """A response to each prompt, and in how many blocks it was written.

  Args:
    prompts: token ids.
    block: tokens after which one is chosen; the last block may be shorter.
    longest: tokens at which a response is cut.
    draw_fn: makes continuations.
    choose_fn: chooses among them; it sees responses from their first token on.
    stop: texts that end a response, also where a block ends within one.

  References:
    Mudgal et al., 2023, https://arxiv.org/abs/2310.17022, Sec. 3.3 (blockwise controlled decoding).
  """
  own = [sampling.Sampled([], [], [], 'length')] * len(prompts)
  blocks = [0] * len(prompts)
  for turn, written in enumerate(range(0, longest, block)):
    going = [i for i, one in enumerate(own) if not one.finished]
    if not going:
      break
    found = draw_fn([[*prompts[i], *own[i].ids] for i in going], going, min(block, longest - written), turn)
    of = [i for i in going for _ in range(len(found) // len(going))]
    whole = [_joined(own[i], one, stop) for i, one in zip(of, found, strict=True)]
    for i, place in zip(going, choose_fn(going, whole), strict=True):
      own[i] = whole[place]
      blocks[i] += 1
  return own, blocks


def _joined(before: sampling.Sampled, one: sampling.Sampled, stop: sampling.Stop) -> sampling.Sampled:
  """A response with what follows, up to a text that ends it."""
  ids, reason = before.ids + one.ids, one.stop_reason
  end = None if reason == 'eos' else stop.end(ids, len(before.ids))
  logps, processed = before.logps + one.logps, before.processed_logps + one.processed_logps
  return sampling.Sampled(ids[:end], logps[:end], processed[:end], reason if end is None else 'stop')


@functools.partial(jax.jit, static_argnums=0)
def _at_end(model: transformer.Transformer, params: types.PyTree, ids_BT, lengths_B) -> types.Array:
  positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
  segments_BT = (positions_BT < lengths_B[:, None]).astype(jnp.int32)
  hidden_BTD: types.Array = model.apply({'params': params}, ids_BT, positions_BT, segments_BT)
  last_B1D = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
  return sharding.constrain(transformer.scores(params, last_B1D)[:, 0], None, None)


def values(guide: sampling.Guide, sequences: Sequence[Sequence[int]]) -> np.ndarray:
  """What the head of a model makes of the last token of each sequence, `[N, O]` float64."""
  rows = buckets.Sizes.of([1], [1] * len(sequences), 1, sampling.ROWS).rows
  length = buckets.bucket(max(map(len, sequences)))
  model = transformer.without_dropout(guide.model).clone(attention='xla')
  found = []
  for start in range(0, len(sequences), rows):
    some = sequences[start : start + rows]
    ids_BT, lengths_B = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
    for row, one in enumerate(some):
      ids_BT[row, : len(one)], lengths_B[row] = one, len(one)
    found.append(np.asarray(_at_end(model, guide.params, ids_BT, lengths_B))[: len(some)])
  return np.concatenate(found).astype(np.float64)
