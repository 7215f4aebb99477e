"""The token cache as it is read: groups with random access, and an index of lengths that plans are made from.

A cache is a folder `CACHE_DIR/KEY` with three files:

  groups.arrayrecord   one group per entry, in the order of the source
  index.npz            lengths_NK, keys_NK, shared_N, places_N
  meta.json            counts, label names, sizes; written last

`token_cache` makes it.
"""

from collections.abc import Sequence
import json
import os
from typing import Any
import zipfile

from absl import logging
from array_record.python import array_record_data_source
from flax import serialization
import numpy as np

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import sources

GROUPS, INDEX, META = 'groups.arrayrecord', 'index.npz', 'meta.json'
_COUNTS = ('records', 'kept', 'truncated', 'bad')


class Damaged(Exception):
  """A cache folder is not what was written."""


class Dataset:
  """Tokenised groups with random access.

  Attributes:
    lengths_NK: int32, token slots of each sequence (its tokens less one), 0 where a group has fewer than K.
    keys_NK: uint64, a hash of each sequence's ids and mask, the same wherever the sequence occurs.
    shared_N: int32, leading token slots that all sequences of a group have in common, see `examples.shared_slots`.
    group_size: K, the most sequences of a group.
    label_names: names of the numbers that every group carries.
    token_label_names: names of those that every token carries that counts.
    report: how many `records` there were and what became of them: `kept`, of these `truncated`, `bad` (unreadable and
      skipped), and `dropped`: {reason: {'count', 'first'}}, with nothing to learn from.
    fingerprint: changes when any group does.
    free: `[L, k]`, of a token whose routers choose, where sequences name experts; None as these name none.
  """

  free = None

  def __init__(self, directory: str):
    """Opens a cache folder; raises Damaged where it is not whole."""
    self._directory = directory
    self.fingerprint = os.path.basename(directory)
    try:
      with open(os.path.join(directory, META), encoding='utf-8') as f:
        meta = json.load(f)
      if any(os.path.getsize(os.path.join(directory, name)) != size for name, size in meta['sizes'].items()):
        raise Damaged('a file has another size than was written')
      with np.load(os.path.join(directory, INDEX)) as index:
        self.lengths_NK, self.keys_NK = index['lengths_NK'], index['keys_NK']
        self.shared_N, self._places = index['shared_N'], index['places_N']
      self._groups = array_record_data_source.ArrayRecordDataSource(os.path.join(directory, GROUPS))
      if len(self._groups) != len(self._places):
        raise Damaged('its files disagree')
      self.label_names: tuple[str, ...] = tuple(meta['label_names'])
      self.token_label_names: tuple[str, ...] = tuple(meta['token_label_names'])
      self.report: dict[str, Any] = meta['report']
      self._affixes: tuple[str, str] = tuple(meta['affixes'])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile) as err:
      raise Damaged(sources.one_line(err)) from err
    self.group_size: int = self.lengths_NK.shape[1]

  def __len__(self) -> int:
    return len(self._places)

  def __getitem__(self, index: int) -> examples.Group:
    """Reads a group; safe to call from several threads.

    Raises:
      RunError: the cache was damaged or removed since it was opened.
    """
    try:
      return _unpack(self._groups[index])
    except (OSError, ValueError, KeyError, RuntimeError) as err:
      raise types.RunError(
          f'{self.where(index)}: its tokens cannot be read from {self._directory}'
          f' ({sources.one_line(err)}); delete this folder to have it built again'
      ) from err

  def where(self, index: int) -> str:
    """Which record of the source a group was made of: 'pairs.jsonl:17'."""
    return f'{self._affixes[0]}{self.place(index)}{self._affixes[1]}'

  def place(self, index: int) -> int:
    """The place of that record in the source, see `sources.Source`."""
    return int(self._places[index])

  def log_report(self, spec: str) -> None:
    """Logs what became of the records: one line, and one per reason for leaving some out."""
    logging.info('%s: %s', spec, ', '.join(f'{self.report[name]} {name}' for name in _COUNTS))
    for reason, found in self.report['dropped'].items():
      logging.warning('%s: %d records dropped: %s (first %s)', spec, found['count'], reason, found['first'])


class Joined:
  """Data sets one behind the other, their records numbered through.

  Attributes:
    sizes: records of each.
    lengths_NK, keys_NK, shared_N, group_size, label_names, token_label_names, free: as of a `Dataset`.
  """

  def __init__(self, datasets: Sequence[Dataset]):
    """Joins them, the shorter lists as parts of the longest; raises UsageError where their labels differ."""
    self._datasets = list(datasets)
    first = self._datasets[0]
    for other in self._datasets[1:]:
      said = [', '.join(d.label_names + d.token_label_names) or 'nothing' for d in (first, other)]
      if said[0] != said[1]:
        raise types.UsageError(f'--data mixes labels {said[0]} with {said[1]}; all sources must give the same')
    self.sizes = [len(d) for d in self._datasets]
    self._ends = np.cumsum(self.sizes)
    self.group_size, self.label_names = max(d.group_size for d in self._datasets), first.label_names
    self.token_label_names, self.free = first.token_label_names, first.free
    wide = lambda table_NK: np.pad(table_NK, ((0, 0), (0, self.group_size - table_NK.shape[1])))
    self.lengths_NK = np.concatenate([wide(d.lengths_NK) for d in self._datasets])
    self.keys_NK = np.concatenate([wide(d.keys_NK) for d in self._datasets])
    self.shared_N = np.concatenate([d.shared_N for d in self._datasets])

  def __len__(self) -> int:
    return sum(self.sizes)

  def __getitem__(self, index: int) -> examples.Group:
    source, local = self._find(index)
    return self._datasets[source][local]

  def where(self, index: int) -> str:
    """Which record of which source a group was made of."""
    source, local = self._find(index)
    return self._datasets[source].where(local)

  def place(self, index: int) -> tuple[int, int]:
    """Which source that is, and the record's place in it."""
    source, local = self._find(index)
    return source, self._datasets[source].place(local)

  def _find(self, index: int) -> tuple[int, int]:
    source = int(np.searchsorted(self._ends, index, 'right'))
    return source, int(index) - int(self._ends[source]) + self.sizes[source]


def _unpack(data: bytes) -> examples.Group:
  tree = serialization.msgpack_restore(data)
  sequences = tuple(map(examples.Sequence, tree['ids'], tree['mask'], tree['token_labels']))
  return examples.Group(sequences, tree['labels'], tree['truncated'], tree['prompt_tokens'])
