"""The token cache: every record tokenised once, with an index of lengths that plans are made from.

A cache is a folder `CACHE_DIR/KEY` with three files:

  groups.arrayrecord   one group per entry, in the order of the source
  index.npz            lengths_NK, trained_NK, keys_NK, places_N
  meta.json            counts, label names, sizes; written last

KEY is a hash of the source's records, the tokenizer and how examples are made of records. The folder is written beside
its place and then renamed, so it is there whole or not at all, and any number of processes may build it at once.
"""

import array
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from typing import Any
import zipfile

from absl import logging
from array_record.python import array_record_data_source
from array_record.python import array_record_module
from flax import serialization
import numpy as np
import tqdm

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import sources
from jaxalign.data import tokenizers

# Part of the key: raise it when what is written changes.
_VERSION = '2'
_GROUPS, _INDEX, _META = 'groups.arrayrecord', 'index.npz', 'meta.json'

_COUNTS = ('records', 'kept', 'truncated', 'bad')
_SHOWN_BAD = 5

ExampleFn = Callable[[dict[str, Any]], examples.Group]


class _Damaged(Exception):
  """A cache folder is not what was written."""


class Dataset:
  """Tokenised groups with random access.

  Attributes:
    lengths_NK: int32, token slots of each sequence (its tokens less one).
    trained_NK: int32, how many of them count.
    keys_NK: uint64, a hash of each sequence's ids and mask, the same wherever the sequence occurs.
    group_size: K.
    label_names: names of the numbers that every group carries.
    token_label_names: names of those that every token carries that counts.
    report: how many `records` there were and what became of them: `kept`, of these `truncated`, `bad` (unreadable and
      skipped), and `dropped`: {reason: {'count', 'first'}}, with nothing to learn from.
    fingerprint: changes when any group does.
  """

  def __init__(self, directory: str):
    """Opens a cache folder; raises _Damaged where it is not whole."""
    self._directory = directory
    self.fingerprint = os.path.basename(directory)
    try:
      with open(os.path.join(directory, _META), encoding='utf-8') as f:
        meta = json.load(f)
      if any(os.path.getsize(os.path.join(directory, name)) != size for name, size in meta['sizes'].items()):
        raise _Damaged('a file has another size than was written')
      with np.load(os.path.join(directory, _INDEX)) as index:
        self.lengths_NK, self.trained_NK, self.keys_NK = (index[f'{n}_NK'] for n in ('lengths', 'trained', 'keys'))
        self._places = index['places_N']
      self._groups = array_record_data_source.ArrayRecordDataSource(os.path.join(directory, _GROUPS))
      if len(self._groups) != len(self._places):
        raise _Damaged('its files disagree')
      self.label_names: tuple[str, ...] = tuple(meta['label_names'])
      self.token_label_names: tuple[str, ...] = tuple(meta['token_label_names'])
      self.report: dict[str, Any] = meta['report']
      self._affixes: tuple[str, str] = tuple(meta['affixes'])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile) as err:
      raise _Damaged(sources.one_line(err)) from err
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
    return f'{self._affixes[0]}{self._places[index]}{self._affixes[1]}'

  def log_report(self, spec: str) -> None:
    """Logs what became of the records: one line, and one per reason for leaving some out."""
    logging.info('%s: %s', spec, ', '.join(f'{self.report[name]} {name}' for name in _COUNTS))
    for reason, found in self.report['dropped'].items():
      logging.warning('%s: %d records dropped: %s (first %s)', spec, found['count'], reason, found['first'])


class Joined:
  """Data sets one behind the other, their records numbered through.

  Attributes:
    sizes: records of each.
    lengths_NK, keys_NK, group_size, label_names, token_label_names: as of a `Dataset`.
  """

  def __init__(self, datasets: Sequence[Dataset]):
    """Joins them; raises UsageError where their responses or labels differ."""
    self._datasets = list(datasets)
    first = self._datasets[0]
    for other in self._datasets[1:]:
      shapes = [(d.group_size, d.label_names + d.token_label_names) for d in (first, other)]
      if shapes[0] != shapes[1]:
        said = ['{} responses labelled {}'.format(*shape) for shape in shapes]
        raise types.UsageError(f'--data mixes {said[0]} with {said[1]}; all sources must give the same')
    self.sizes = [len(d) for d in self._datasets]
    self._ends = np.cumsum(self.sizes)
    self.group_size, self.label_names = first.group_size, first.label_names
    self.token_label_names = first.token_label_names
    self.lengths_NK = np.concatenate([d.lengths_NK for d in self._datasets])
    self.keys_NK = np.concatenate([d.keys_NK for d in self._datasets])

  def __len__(self) -> int:
    return sum(self.sizes)

  def __getitem__(self, index: int) -> examples.Group:
    dataset, local = self._find(index)
    return dataset[local]

  def where(self, index: int) -> str:
    """Which record of which source a group was made of."""
    dataset, local = self._find(index)
    return dataset.where(local)

  def _find(self, index: int) -> tuple[Dataset, int]:
    source = int(np.searchsorted(self._ends, index, 'right'))
    return self._datasets[source], int(index) - int(self._ends[source]) + self.sizes[source]


def build(
    spec: str,
    *,
    tokenizer: tokenizers.Tokenizer,
    example_fn: ExampleFn,
    key_parts: str,
    cache_dir: str | os.PathLike[str],
    data_dir: str | None = None,
    skip_bad_records: bool = False,
) -> Dataset:
  """Opens the tokenised form of a source, making it first where it is not there or damaged.

  Args:
    spec: see `sources.open_source`.
    tokenizer: what `example_fn` tokenises with; its fingerprint is part of the key.
    example_fn: makes a group of a record, or raises `examples.Dropped`.
    key_parts: names `example_fn` and its options; two functions that make different groups need different `key_parts`.
    cache_dir: the folder of caches.
    data_dir: where `tfds:` sets lie.
    skip_bad_records: count records that cannot be read, rather than stop at the first.

  Raises:
    UsageError: the spec is wrong.
    RunError: a record cannot be read, no record is left, or the cache cannot be written.
  """
  source = sources.open_source(spec, data_dir)
  parts = [_VERSION, source.fingerprint, tokenizer.fingerprint, key_parts, str(skip_bad_records)]
  key = hashlib.blake2b('\0'.join(parts).encode(), digest_size=12).hexdigest()
  directory = os.path.join(cache_dir, key)
  try:
    dataset = Dataset(directory)
  except _Damaged as err:
    if os.path.exists(directory):
      logging.warning('%s is damaged (%s); building it again', directory, err)
    dataset = _make(source, example_fn, skip_bad_records, directory)
  dataset.log_report(spec)
  return dataset


def _make(source: sources.Source, example_fn: ExampleFn, skip_bad_records: bool, directory: str) -> Dataset:
  """Builds a cache in a folder of its own, then moves it to its place."""
  parent = os.path.dirname(directory)
  scratch = ''
  try:
    os.makedirs(parent, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix='building-', dir=parent)
    _write(source, example_fn, skip_bad_records, scratch)
    return _move(scratch, directory)
  except OSError as err:
    raise types.RunError(f'cannot write the token cache in {parent}: {err.strerror}') from err
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _move(scratch: str, directory: str) -> Dataset:
  """Renames `scratch` to `directory`; a whole one that is there already wins, a damaged one goes."""
  try:
    os.rename(scratch, directory)
  except OSError:
    try:
      return Dataset(directory)
    except _Damaged:
      os.rename(directory, os.path.join(scratch, 'damaged'))
      os.rename(scratch, directory)
      shutil.rmtree(os.path.join(directory, 'damaged'), ignore_errors=True)
  return Dataset(directory)


def _write(source: sources.Source, example_fn: ExampleFn, skip_bad_records: bool, scratch: str) -> None:
  """Writes the three files of a cache into the folder `scratch`."""
  report: dict[str, Any] = {'records': len(source), 'kept': 0, 'truncated': 0, 'bad': 0, 'dropped': {}}
  # Flat arrays, since lists of a million groups would take a gigabyte.
  lengths, trained, keys, places = (array.array(code) for code in 'iiQq')
  group_size = 0
  label_names: tuple[tuple[str, ...], ...] = ((), ())
  path = os.path.join(scratch, _GROUPS)
  with _writing(path) as write:
    for index in tqdm.trange(len(source), desc=f'tokenising {source.spec}', disable=None, leave=False):
      group = _example(source, index, example_fn, skip_bad_records, report)
      if group is None:
        continue
      names = tuple(sorted(group.labels)), tuple(sorted(group.sequences[0].labels))
      if places and (label_names != names or group_size != len(group.sequences)):
        raise types.RunError(
            f'{source.where(index)}: {len(group.sequences)} responses labelled {names}; the records before it have'
            f' {group_size} labelled {label_names}'
        )
      label_names, group_size = names, len(group.sequences)
      report['truncated'] += group.truncated
      write(_pack(group))
      lengths.extend(len(s.ids) - 1 for s in group.sequences)
      trained.extend(int(np.count_nonzero(s.mask[1:])) for s in group.sequences)
      keys.extend(_key(s) for s in group.sequences)
      places.append(int(source.places[index]))
  report['kept'] = len(places)
  if not places:
    found = [f'{r["count"]} dropped: {reason} (first {r["first"]})' for reason, r in report['dropped'].items()]
    found += [f'{report["bad"]} unreadable'] if report['bad'] else []
    if not len(source):
      raise types.RunError(f'data {source.spec!r}: it holds no records')
    raise types.RunError(f'data {source.spec!r}: none of its {len(source)} records can be used; {", ".join(found)}')
  np.savez(
      os.path.join(scratch, _INDEX),
      lengths_NK=np.array(lengths, np.int32).reshape(-1, group_size),
      trained_NK=np.array(trained, np.int32).reshape(-1, group_size),
      keys_NK=np.array(keys, np.uint64).reshape(-1, group_size),
      places_N=np.array(places, np.int64),
  )
  sizes = {name: os.path.getsize(os.path.join(scratch, name)) for name in (_GROUPS, _INDEX)}
  meta = {
      'sizes': sizes,
      'label_names': label_names[0],
      'token_label_names': label_names[1],
      'affixes': source.affixes,
      'report': report,
  }
  with open(os.path.join(scratch, _META), 'w', encoding='utf-8') as f:
    json.dump(meta, f, indent=2)


@contextlib.contextmanager
def _writing(path: str) -> Iterator[Callable[[bytes], None]]:
  """Opens an ArrayRecord file; gives the function that appends to it. What it holds back is written on closing."""

  def checked(fn: Callable[..., Any], *args: Any) -> Any:
    try:
      return fn(*args)
    except RuntimeError as err:
      raise types.RunError(f'cannot write the token cache: {sources.one_line(err)}; free some space') from err

  # One group per chunk, as they are read in random order.
  writer = checked(array_record_module.ArrayRecordWriter, path, 'group_size:1')
  try:
    yield lambda data: checked(writer.write, data)
  finally:
    checked(writer.close)


def _example(
    source: sources.Source, index: int, example_fn: ExampleFn, skip_bad_records: bool, report: dict[str, Any]
) -> examples.Group | None:
  """The group of a record, or None with the reason counted in `report`."""
  try:
    return example_fn(source[index])
  except examples.Dropped as err:
    reason = report['dropped'].setdefault(err.reason, {'count': 0, 'first': source.where(index)})
    reason['count'] += 1
  except types.RunError as err:
    where = source.where(index)
    # The first line is ours; what calls the function by configuration (gin) may have added others.
    message = f'{where}: {str(err).splitlines()[0].removeprefix(f"{where}: ")}'
    if not skip_bad_records:
      raise types.RunError(message) from err
    report['bad'] += 1
    if report['bad'] <= _SHOWN_BAD:
      logging.warning('%s (skipped)', message)
  return None


def _key(sequence: examples.Sequence) -> int:
  digest = hashlib.blake2b(sequence.ids.astype('<i4').tobytes(), digest_size=8)
  digest.update(np.packbits(sequence.mask).tobytes())
  return int.from_bytes(digest.digest(), 'little')


def _pack(group: examples.Group) -> bytes:
  return serialization.msgpack_serialize(
      {
          'ids': [s.ids.astype(np.int32) for s in group.sequences],
          'mask': [s.mask.astype(np.bool_) for s in group.sequences],
          'token_labels': [{name: x.astype(np.float32) for name, x in s.labels.items()} for s in group.sequences],
          'labels': {name: float(value) for name, value in group.labels.items()},
          'truncated': bool(group.truncated),
          'prompt_tokens': int(group.prompt_tokens),
      }
  )


def _unpack(data: bytes) -> examples.Group:
  tree = serialization.msgpack_restore(data)
  sequences = tuple(map(examples.Sequence, tree['ids'], tree['mask'], tree['token_labels']))
  return examples.Group(sequences, tree['labels'], tree['truncated'], tree['prompt_tokens'])
