"""Batches packed by hand, for tests of what reads them, and sequences read alone."""

import functools

import jax
import numpy as np

from jaxalign import types


def micro_batch(rows, *, groups, size, length, slots=4, labels=()):
  """A micro-batch.

  Args:
    rows: of each row its sequences as (group, slot, prompt ids, response ids).
    groups: G.
    size: K.
    length: T.
    slots: S.
    labels: of labels that are 0 everywhere, the names.
  """
  B = len(rows)
  tokens = {name: np.zeros((B, length), np.int32) for name in ('inputs', 'targets', 'positions', 'segments')}
  responses, mask = np.full((B, length), -1, np.int32), np.zeros((B, length), np.float32)
  group_BS, slot_BS = (np.full((B, slots), -1, np.int32) for _ in range(2))
  for b, row in enumerate(rows):
    start = 0
    for rank, (group, slot, prompt, response) in enumerate(row):
      ids = [*prompt, *response]
      stop = start + len(ids) - 1
      tokens['inputs'][b, start:stop], tokens['targets'][b, start:stop] = ids[:-1], ids[1:]
      tokens['positions'][b, start:stop], tokens['segments'][b, start:stop] = range(len(ids) - 1), rank + 1
      mask[b, stop - len(response) : stop], responses[b, stop - len(response) : stop] = 1, rank
      group_BS[b, rank], slot_BS[b, rank] = group, slot
      start = stop
  return types.Batch(
      inputs_BT=tokens['inputs'],
      targets_BT=tokens['targets'],
      mask_BT=mask,
      positions_BT=tokens['positions'],
      segments_BT=tokens['segments'],
      responses_BT=responses,
      group_BS=group_BS,
      slot_BS=slot_BS,
      labels_BS={name: np.zeros((B, slots), np.float32) for name in labels},
      num_groups=groups,
      group_size=size,
  )


def stack(*micros):
  """A step of micro-batches of one shape."""
  return jax.tree.map(lambda *xs: np.stack(xs), *micros)


def pairs(seed, count, vocab_size=50):
  """Random pairs as (prompt, chosen, rejected), of ragged lengths."""
  rng = np.random.default_rng(seed)
  text = lambda low, high: rng.integers(1, vocab_size, rng.integers(low, high)).tolist()
  return [(text(2, 5), text(1, 6), text(1, 6)) for _ in range(count)]


def hidden_states(model, params, ids, experts=None, *, length=64):
  """Of a sequence that is read alone, `[T, D]` in float64: padding stands behind it, so that one program reads all."""
  place = np.zeros((1, length), np.int32)
  place[0, : len(ids)] = ids
  tokens = place, np.arange(length)[None], (np.arange(length) < len(ids)).astype(np.int32)[None]
  more = {}
  if experts is not None:
    more['experts_BTLk'] = np.full((1, length, *experts.shape[1:]), 255, experts.dtype)
    more['experts_BTLk'][0, : len(experts)] = experts
  return np.asarray(_read(model, params, tokens, more)[0, : len(ids)], np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _read(model, params, tokens, more):
  return model.apply({'params': params}, *tokens, **more)
