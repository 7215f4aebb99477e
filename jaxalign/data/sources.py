"""Where records come from: JSONL, Parquet, TFDS and the sets that ship with the package.

A spec is `SCHEME:PLACE`, with an optional slice at its end: `jsonl:pairs.jsonl.gz[300:]`, `parquet:pairs.parquet`,
`tfds:hh_rlhf:train[:90%]`, `builtin:sentiment:test`. A record is a plain dict of Python values, whatever its source.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import gzip
import hashlib
import importlib.resources
import json
import math
import mmap
import os
import pathlib
import re
from typing import Any
import zlib

import numpy as np

from jaxalign import storage
from jaxalign import types
from jaxalign.data import generated

SCHEMES = ('jsonl', 'parquet', 'tfds', 'builtin')


class BadRecord(types.RunError):
  """One record cannot be read, while the others can."""


@dataclasses.dataclass(frozen=True)
class Source:
  """Records with random access.

  Attributes:
    spec: what was opened.
    read: gives the record of a place; raises BadRecord.
    places: int64, one per record: a line number (from 1) in JSONL, else a row number (from 0).
    affixes: what stands before and behind a place when it is named: ('pairs.jsonl:', '').
    fingerprint: changes when the records do.
  """

  spec: str
  read: Callable[[int], dict[str, Any]]
  places: np.ndarray
  affixes: tuple[str, str]
  fingerprint: str

  def __len__(self) -> int:
    return len(self.places)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self.read(index)

  def where(self, index: int) -> str:
    """The record's place in words, for messages: 'pairs.jsonl:17'."""
    return f'{self.affixes[0]}{self.places[index]}{self.affixes[1]}'

  def at(self, place: int) -> dict[str, Any]:
    """The record of one of `places`."""
    return self.read(int(np.searchsorted(self.places, place)))


def open_source(spec: str, data_dir: str | None = None) -> Source:
  """Opens a spec.

  Args:
    spec: `jsonl:PATH` (plain or .gz), `parquet:PATH`, `tfds:NAME[/CONFIG][:VERSION][:SPLIT]`, `builtin:NAME[:SPLIT]`;
      SPLIT is train where left out. A slice may follow, as in TFDS: `[a:b]`, in records or per cent, from the end where
      negative.
    data_dir: where `tfds:` sets lie.

  Raises:
    UsageError: the spec is not of this form, or names a file or set that is not there.
    RunError: the file cannot be read.
  """
  scheme, colon, rest = spec.partition(':')
  rest, bounds = _cut_slice(rest)
  if scheme not in SCHEMES or not colon or not rest:
    meant = None if colon and not storage.is_remote(spec) else re.search(r'\.(jsonl|parquet)(\.gz)?(\[.*)?$', spec)
    hint = f'; did you mean {meant[1]}:{spec}?' if meant else ''
    raise types.UsageError(
        f'data {spec!r}: write {", ".join(f"{s}:..." for s in SCHEMES[:-1])} or {SCHEMES[-1]}:...{hint}'
    )
  if scheme == 'jsonl':
    source = _open_jsonl(spec, os.path.basename(rest), _read_bytes(spec, rest))
  elif scheme == 'parquet':
    source = _open_parquet(spec, rest)
  elif scheme == 'tfds':
    source = _open_tfds(spec, rest, data_dir)
  else:
    source = _open_builtin(spec, rest)
  return _sliced(source, bounds) if bounds else source


def parse_mixture(text: str) -> list[tuple[str, float]]:
  """Reads 'A:0.7,B:0.3' into specs and weights; without any weight, each spec counts 1.

  Raises:
    UsageError: a weight is not positive, or some specs have one and others do not.
  """
  mixture: list[tuple[str, float | None]] = []
  for part in filter(None, (p.strip() for p in text.split(','))):
    match = re.fullmatch(r'(\w+:.+):(-?[\d.]+(?:e-?\d+)?|nan|-?inf)', part)
    try:
      mixture.append((match[1], float(match[2])) if match else (part, None))
    except ValueError:  # A version, as in tfds:set:1.0.0.
      mixture.append((part, None))
  weights = [weight for _, weight in mixture]
  if not mixture:
    raise types.UsageError('no data: write for example builtin:sentiment or jsonl:A.jsonl:0.7,jsonl:B.jsonl:0.3')
  if None in weights and set(weights) != {None}:
    raise types.UsageError(f'data {text!r}: give every source a weight, or none')
  for spec, weight in mixture:
    if weight is not None and not 0 < weight < math.inf:
      raise types.UsageError(f'data {text!r}: the weight of {spec} is {weight:g}; weights must be positive')
  return [(spec, 1.0 if weight is None else weight) for spec, weight in mixture]


def parse_all(text: str) -> list[str]:
  """The specs of a mixture whose records are all read, once each.

  Raises:
    UsageError: as `parse_mixture` does; or sources have weights, which only training draws by.
  """
  mixture = parse_mixture(text)
  for spec, weight in mixture:
    if weight != 1.0:
      raise types.UsageError(f'data {text!r}: every record is read once, so leave out the weight {weight:g} of {spec}')
  return [spec for spec, _ in mixture]


def _cut_slice(text: str) -> tuple[str, tuple[str, str] | None]:
  match = re.fullmatch(r'(.*)\[(-?\d+%?)?:(-?\d+%?)?\]', text)
  return (match[1], (match[2] or '', match[3] or '')) if match else (text, None)


def _sliced(source: Source, bounds: tuple[str, str]) -> Source:
  count = len(source)

  def bound(text: str) -> int | None:
    return round(int(text[:-1]) / 100 * count) if text.endswith('%') else int(text) if text else None

  indices = range(count)[bound(bounds[0]) : bound(bounds[1])]
  if not indices:
    raise types.UsageError(f'data {source.spec!r}: the slice is empty; the source has {count} records')
  return dataclasses.replace(
      source,
      read=lambda index: source.read(indices[index]),
      places=source.places[indices.start : indices.stop],
      fingerprint=f'{source.fingerprint}[{indices.start}:{indices.stop}]',
  )


def _digest(data) -> str:
  return hashlib.blake2b(data, digest_size=16).hexdigest()


def _map_file(spec: str, path: str):
  """The file's bytes, mapped rather than read, so that large files cost no memory."""
  try:
    with open(storage.local(path), 'rb') as f:
      return mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(f.fileno()).st_size else b''
  except FileNotFoundError:
    raise types.UsageError(f'data {spec!r}: there is no file {path}') from None
  except storage.errors() as err:
    raise types.RunError(f'data {spec!r}: cannot read {path}: {storage.reason(err)}') from err


def _gunzip(name: str, data) -> bytes:
  try:
    if not data:
      raise EOFError('it is empty')
    return gzip.decompress(data)
  except (EOFError, gzip.BadGzipFile, zlib.error) as err:
    raise types.RunError(f'{name}: not a whole gzip file ({err})') from err


def _read_bytes(spec: str, path: str):
  data = _map_file(spec, path)
  return _gunzip(os.path.basename(path), data) if path.endswith('.gz') else data


def _line_starts(data, block: int = 1 << 24) -> np.ndarray:
  """Where each line begins, and the end of the data; by blocks, as a mask of all of it could be large."""
  newlines = [
      np.flatnonzero(np.frombuffer(data, np.uint8, min(block, len(data) - start), start) == ord('\n')) + start + 1
      for start in range(0, len(data), block)
  ]
  return np.unique(np.concatenate([[0], *newlines, [len(data)]]).astype(np.int64))


def _open_jsonl(spec: str, name: str, data) -> Source:
  starts = _line_starts(data)
  lines = np.array([i for i in range(len(starts) - 1) if data[starts[i] : starts[i + 1]].strip()], np.int64)

  def read(index: int) -> dict[str, Any]:
    line = lines[index]
    where = f'{name}:{line + 1}'
    try:
      record = json.loads(data[starts[line] : starts[line + 1]].rstrip().decode('utf-8-sig'))
    except UnicodeDecodeError as err:
      raise BadRecord(f'{where}: not UTF-8 ({err.reason} at byte {err.start})') from err
    except json.JSONDecodeError as err:
      raise BadRecord(f'{where}: not valid JSON ({err.msg} at column {err.colno})') from err
    except RecursionError as err:
      raise BadRecord(f'{where}: not valid JSON (nested too deeply)') from err
    if not isinstance(record, dict):
      raise BadRecord(f'{where}: not a JSON object but a {type(record).__name__}')
    return record

  return Source(spec, read, lines + 1, (name + ':', ''), 'jsonl ' + _digest(data))


def _open_parquet(spec: str, path: str) -> Source:
  # Imported here: it takes a third of a second that other sources need not wait for.
  import pyarrow as pa  # pylint: disable=g-import-not-at-top
  import pyarrow.parquet as pq  # pylint: disable=g-import-not-at-top

  data, name = _map_file(spec, path), os.path.basename(path)
  try:
    table = pq.read_table(pa.BufferReader(data))
  except (pa.ArrowException, OSError) as err:
    raise types.RunError(f'{name}: not a readable Parquet file ({err})') from err

  def read(index: int) -> dict[str, Any]:
    return table.slice(index, 1).to_pylist()[0]

  return Source(spec, read, np.arange(table.num_rows), (name + '[', ']'), 'parquet ' + _digest(data))


def _open_builtin(spec: str, rest: str) -> Source:
  name, _, split = rest.partition(':')
  split = split or 'train'
  made = generated.TASKS[name]() if name in generated.TASKS else {}
  if split in made:
    records = made[split]
    fingerprint = 'generated ' + _digest(json.dumps(records).encode())
    return Source(spec, lambda i: dict(records[i]), np.arange(len(records)), (f'{name}-{split}[', ']'), fingerprint)
  file_name = f'{name}-{split}.jsonl.gz'
  folder = importlib.resources.files('jaxalign') / 'assets'
  known = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith('.jsonl.gz'))
  if file_name not in known:
    names = [':'.join(k.removesuffix('.jsonl.gz').rsplit('-', 1)) for k in known]
    names += [f'{task}:{part}' for task, make in generated.TASKS.items() for part in make()]
    raise types.UsageError(f'data {spec!r}: unknown; there is {", ".join(f"builtin:{n}" for n in names)}')
  return _open_jsonl(spec, file_name, _gunzip(file_name, (folder / file_name).read_bytes()))


def _open_tfds(spec: str, rest: str, data_dir: str | None) -> Source:
  # Imported here: it takes half a second that other sources need not wait for.
  import tensorflow_datasets as tfds  # pylint: disable=g-import-not-at-top

  match = re.fullmatch(r'([\w./-]+)(?::(\d+\.\d+\.\d+))?(?::([\w-]+))?', rest)
  if not match:
    raise types.UsageError(f'data {spec!r}: write tfds:NAME[/CONFIG][:VERSION][:SPLIT]')
  name, version, split = match[1], match[2], match[3] or 'train'
  if storage.is_remote(data_dir or ''):
    raise types.UsageError(f'data {spec!r}: --data_dir={data_dir}: TFDS sets are read from a disk; copy it there')
  directory = _tfds_directory(spec, name, version, pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser())
  try:
    builder = tfds.builder_from_directory(directory)
  except (OSError, ValueError, tfds.core.DatasetNotFoundError) as err:
    raise types.RunError(f'data {spec!r}: {directory} is not a readable TFDS set ({one_line(err)})') from err
  if split not in builder.info.splits:
    raise types.UsageError(f'data {spec!r}: no split {split!r}; there is {", ".join(sorted(builder.info.splits))}')
  if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
    raise types.RunError(
        f'data {spec!r}: its files are {builder.info.file_format.value}, which only TensorFlow reads; prepare the set'
        ' again with file_format="array_record"'
    )
  try:
    rows = builder.as_data_source(split)
    digests = [_digest(_map_file(spec, str(path))) for path in builder.info.splits[split].filepaths]
  except (OSError, ValueError, RuntimeError) as err:
    raise types.RunError(f'data {spec!r}: cannot read {directory} ({one_line(err)})') from err

  def read(index: int) -> dict[str, Any]:
    try:
      return _as_python(rows[index], builder.info.features)
    except (RuntimeError, ValueError) as err:
      raise BadRecord(f'{name}/{split}[{index}]: cannot be read ({one_line(err)})') from err

  fingerprint = ' '.join(['tfds', *digests])
  return Source(spec, read, np.arange(len(rows)), (f'{name}/{split}[', ']'), fingerprint)


def _tfds_directory(spec: str, name: str, version: str | None, data_dir: pathlib.Path) -> pathlib.Path:
  """The folder `DATA_DIR/NAME/VERSION`, of the newest version where none is asked for."""
  found = sorted(
      (path.parent for path in (data_dir / name).glob('*/dataset_info.json') if version in (None, path.parent.name)),
      key=lambda path: [int(n) for n in re.findall(r'\d+', path.name)],
  )
  if found:
    return found[-1]
  # A set without configurations lies two levels down, a set with them three.
  infos = [*data_dir.glob('*/*/dataset_info.json'), *data_dir.glob('*/*/*/dataset_info.json')]
  known = sorted(str(path.parent.parent.relative_to(data_dir)) + ':' + path.parent.name for path in infos)
  raise types.UsageError(
      f'data {spec!r}: no such set in --data_dir={data_dir}; there is {", ".join(known) or "no TFDS set"}'
  )


def _as_python(value: Any, feature: Any) -> Any:
  """Turns values of TFDS into those of JSON: bytes into text, arrays into lists, a Sequence into a list of dicts."""
  if isinstance(value, Mapping):
    inner = feature.feature if hasattr(feature, 'feature') else feature
    columns = {key: _as_python(item, inner[key]) for key, item in value.items()}
    if inner is feature:
      return columns
    return [dict(zip(columns, items)) for items in zip(*columns.values())]
  if isinstance(value, bytes):
    return value.decode('utf-8')
  if isinstance(value, np.ndarray | np.generic):
    return _as_python(value.tolist(), feature)
  return [_as_python(item, feature) for item in value] if isinstance(value, list) else value


def to_json(record: Mapping[str, Any]) -> str:
  """A record as a line of JSON Lines, without its end; dates, decimals and bytes, which Parquet has, become text."""
  return json.dumps(record, default=_as_text)


def _as_text(value: Any) -> str:
  if isinstance(value, bytes):
    return value.decode('utf-8', 'backslashreplace')
  return value.isoformat() if hasattr(value, 'isoformat') else str(value)


def one_line(err: Exception) -> str:
  """A library's error in one line, for a message of ours."""
  return ' '.join(str(err).split()) or type(err).__name__
