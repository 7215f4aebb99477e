"""Making the token cache: every record of a source tokenised once.

A cache is a folder `CACHE_DIR/KEY`, see `dataset`. KEY is a hash of the source's records, the tokenizer and how
examples are made of records. The folder is written beside its place and then renamed, so it is there whole or not at
all, and any number of processes may build it at once.
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

from absl import logging
from array_record.python import array_record_module
from flax import serialization
import numpy as np
import tqdm

from jaxalign import types
from jaxalign.data import dataset as dataset_lib
from jaxalign.data import examples
from jaxalign.data import feedback
from jaxalign.data import sources
from jaxalign.data import tokenizers

# Part of the key: raise it when what is written changes.
_VERSION = '3'
_SHOWN_BAD = 5
_TRIED = 64  # records, for one with another prompt

ExampleFn = Callable[[dict[str, Any]], examples.Group | list[examples.Group]]


def build(
    spec: str,
    *,
    tokenizer: tokenizers.Tokenizer,
    example_fn: ExampleFn,
    key_parts: str,
    cache_dir: str | os.PathLike[str],
    data_dir: str | None = None,
    skip_bad_records: bool = False,
    mismatched: bool = False,
) -> dataset_lib.Dataset:
  """Opens the tokenised form of a source, making it first where it is not there or damaged.

  Args:
    spec: see `sources.open_source`.
    tokenizer: what `example_fn` tokenises with; its fingerprint is part of the key.
    example_fn: makes a group of a record, or raises `examples.Dropped`.
    key_parts: names `example_fn` and its options; two functions that make different groups need different `key_parts`.
    cache_dir: the folder of caches.
    data_dir: where `tfds:` sets lie.
    skip_bad_records: count records that cannot be read, rather than stop at the first.
    mismatched: give each record another one, see `feedback.mismatched`.

  Raises:
    UsageError: the spec is wrong.
    RunError: a record cannot be read, no record is left, or the cache cannot be written.
  """
  source = sources.open_source(spec, data_dir)
  parts = [_VERSION, source.fingerprint, tokenizer.fingerprint, key_parts, str(skip_bad_records), str(mismatched)]
  key = hashlib.blake2b('\0'.join(parts).encode(), digest_size=12).hexdigest()
  directory = os.path.join(cache_dir, key)
  try:
    dataset = dataset_lib.Dataset(directory)
  except dataset_lib.Damaged as err:
    if os.path.exists(directory):
      logging.warning('%s is damaged (%s); building it again', directory, err)
    dataset = _make(source, example_fn, skip_bad_records, mismatched, directory)
  dataset.log_report(spec)
  return dataset


def _make(
    source: sources.Source, example_fn: ExampleFn, skip_bad_records: bool, mismatched: bool, directory: str
) -> dataset_lib.Dataset:
  """Builds a cache in a folder of its own, then moves it to its place."""
  parent = os.path.dirname(directory)
  scratch = ''
  try:
    os.makedirs(parent, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix='building-', dir=parent)
    _write(source, example_fn, skip_bad_records, mismatched, scratch)
    return _move(scratch, directory)
  except OSError as err:
    raise types.RunError(f'cannot write the token cache in {parent}: {err.strerror}') from err
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _move(scratch: str, directory: str) -> dataset_lib.Dataset:
  """Renames `scratch` to `directory`; a whole one that is there already wins, a damaged one goes."""
  try:
    os.rename(scratch, directory)
  except OSError:
    try:
      return dataset_lib.Dataset(directory)
    except dataset_lib.Damaged:
      os.rename(directory, os.path.join(scratch, 'damaged'))
      os.rename(scratch, directory)
      shutil.rmtree(os.path.join(directory, 'damaged'), ignore_errors=True)
  return dataset_lib.Dataset(directory)


def _write(
    source: sources.Source, example_fn: ExampleFn, skip_bad_records: bool, mismatched: bool, scratch: str
) -> None:
  """Writes the three files of a cache into the folder `scratch`."""
  report: dict[str, Any] = {'records': len(source), 'kept': 0, 'truncated': 0, 'bad': 0, 'dropped': {}}
  # Flat arrays, since lists of a million groups would take a gigabyte.
  lengths, keys, places, sizes, shared = (array.array(code) for code in 'iQqii')
  every: set[str] = set()
  common: tuple[set[str], set[str]] = set(), set()
  path = os.path.join(scratch, dataset_lib.GROUPS)
  with _writing(path) as write:
    for index in tqdm.trange(len(source), desc=f'tokenising {source.spec}', disable=None, leave=False):
      for group in _examples(source, index, example_fn, mismatched, skip_bad_records, report):
        names = set(group.labels), set(group.sequences[0].labels)
        every = every | names[0] | names[1]
        common = (common[0] & names[0], common[1] & names[1]) if places else names
        report['truncated'] += group.truncated
        write(_pack(group))
        sizes.append(len(group.sequences))
        lengths.extend(len(s.ids) - 1 for s in group.sequences)
        keys.extend(_key(s) for s in group.sequences)
        places.append(int(source.places[index]))
        shared.append(examples.shared_slots(group.sequences))
  report['kept'] = len(places)
  if every - common[0] - common[1]:
    partly = ', '.join(sorted(every - common[0] - common[1]))
    logging.warning('%s: only some records are labelled with %s, which is left out', source.spec, partly)
  if not places:
    found = [f'{r["count"]} dropped: {reason} (first {r["first"]})' for reason, r in report['dropped'].items()]
    found += [f'{report["bad"]} unreadable'] if report['bad'] else []
    if not len(source):
      raise types.RunError(f'data {source.spec!r}: it holds no records')
    raise types.RunError(f'data {source.spec!r}: none of its {len(source)} records can be used; {", ".join(found)}')
  np.savez(
      os.path.join(scratch, dataset_lib.INDEX),
      lengths_NK=_table(np.array(lengths, np.int32), sizes),
      keys_NK=_table(np.array(keys, np.uint64), sizes),
      shared_N=np.array(shared, np.int32),
      places_N=np.array(places, np.int64),
  )
  written = {name: os.path.getsize(os.path.join(scratch, name)) for name in (dataset_lib.GROUPS, dataset_lib.INDEX)}
  meta = {
      'sizes': written,
      'label_names': sorted(common[0]),
      'token_label_names': sorted(common[1]),
      'affixes': source.affixes,
      'report': report,
  }
  with open(os.path.join(scratch, dataset_lib.META), 'w', encoding='utf-8') as f:
    json.dump(meta, f, indent=2)


def _table(flat: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
  """Numbers of groups one behind the other as `[N, K]`, 0 where a group has fewer than K."""
  sizes_N = np.array(sizes)
  table_NK = np.zeros((len(sizes_N), sizes_N.max()), flat.dtype)
  table_NK[np.arange(sizes_N.max())[None, :] < sizes_N[:, None]] = flat
  return table_NK


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


def _examples(
    source: sources.Source,
    index: int,
    example_fn: ExampleFn,
    mismatched: bool,
    skip_bad_records: bool,
    report: dict[str, Any],
) -> list[examples.Group]:
  """The groups of a record; none with the reason counted in `report`."""
  try:
    made = _with_another(source, index, example_fn) if mismatched else example_fn(source[index])
    return made if isinstance(made, list) else [made]
  except examples.Dropped as err:
    reason = report['dropped'].setdefault(err.reason, {'count': 0, 'first': source.where(index)})
    reason['count'] += 1
  except types.RunError as err:
    where = source.where(index)
    # The first line is ours; what calls the function by configuration (gin) may have added others.
    message = f'{where}: {str(err).splitlines()[0].removeprefix(f"{where}: ")}'
    if not skip_bad_records:
      hint = '; --skip_bad_records leaves such records out' if isinstance(err, sources.BadRecord) else ''
      raise types.RunError(f'{message}{hint}') from err
    report['bad'] += 1
    if report['bad'] <= _SHOWN_BAD:
      logging.warning('%s (skipped)', message)
  return []


def _with_another(source: sources.Source, index: int, example_fn: ExampleFn) -> examples.Group | list[examples.Group]:
  """The groups of a record that is given another one: half the source away, or the next with another prompt."""
  record, start = source[index], index + max(1, len(source) // 2)
  for other in range(start, start + min(_TRIED, len(source))):
    try:
      return example_fn({**record, feedback.OTHER: source[other % len(source)]})
    except feedback.SamePrompt:
      continue
  raise examples.Dropped('no other record with another prompt near by')


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
          'labels': {name: np.asarray(value, float).tolist() for name, value in group.labels.items()},
          'truncated': bool(group.truncated),
          'prompt_tokens': int(group.prompt_tokens),
      }
  )
