"""Turns records into a TFDS data set that needs no TensorFlow to be read.

  python tools/prepare_data.py --input=jsonl:pairs.jsonl.gz --output_dir=data --name=my_pairs --test_fraction=0.1
  python -m jaxalign.main --algo=dpo --data=tfds:my_pairs --eval_data=tfds:my_pairs:test --data_dir=data

The features are inferred: text, whole numbers, numbers, true or false, objects of these, and lists of any of them (such
as messages with role and content). TFDS stores numbers with a fraction in 32 bits, has no missing values, and
cannot nest lists without TensorFlow.
"""

import argparse
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import os
import re
import sys
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxalign import types
from jaxalign.data import sources

_VERSION = '1.0.0'
_SCALARS = {bool: np.bool_, int: np.int64, float: np.float32}


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set of given records; TFDS wants a class where a function would do."""

  VERSION = tfds.core.Version(_VERSION)

  def __init__(self, name: str, source: sources.Source, features: tfds.features.FeaturesDict, splits, data_dir: str):
    self.name = name
    self._source, self._features, self._splits = source, features, splits
    super().__init__(data_dir=data_dir, file_format='array_record')

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
        builder=self, description=f'Made from {self._source.spec}.', features=self._features, disable_shuffling=True
    )

  def _split_generators(self, dl_manager) -> dict[str, Iterator]:
    del dl_manager
    return {name: self._generate_examples(indices) for name, indices in self._splits.items()}

  def _generate_examples(self, indices: Iterable[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    for index in indices:
      yield int(index), self._source[int(index)]


def infer(values: Sequence[Any], wheres: Sequence[str], column: str) -> Any:
  """The TFDS feature that holds all values of a column.

  Args:
    values: one per place.
    wheres: the places, for messages.
    column: its name, for messages.

  Raises:
    RunError: a value is missing, values are of several kinds, or TFDS has no feature for them.
  """
  kinds = {float if type(value) is int and _any_float(values) else type(value) for value in values}
  if type(None) in kinds:
    where = wheres[[value is None for value in values].index(True)]
    raise types.RunError(f'{where}: column {column!r} has no value; TFDS needs one in every record')
  if len(kinds) > 1:
    names = ' and '.join(sorted(kind.__name__ for kind in kinds))
    other = next(where for value, where in zip(values, wheres) if type(value) is not type(values[0]))
    raise types.RunError(f'column {column!r} holds {names} (see {wheres[0]} and {other}); TFDS needs one kind')
  kind = kinds.pop() if kinds else str
  if kind is int and not all(-(2**63) <= value < 2**63 for value in values):
    raise types.RunError(f'column {column!r} holds whole numbers of more than 64 bits')
  if kind is str:
    return tfds.features.Text()
  if kind in _SCALARS:
    return tfds.features.Scalar(_SCALARS[kind])
  if kind is dict:
    return _infer_columns(values, wheres, column + '.')
  if kind is list:
    items = [(item, where) for value, where in zip(values, wheres) for item in value]
    if any(_has_list(item) for item, _ in items):
      raise types.RunError(f'column {column!r} holds lists of lists, which TFDS cannot write without TensorFlow')
    return tfds.features.Sequence(infer([item for item, _ in items], [where for _, where in items], f'{column}[]'))
  raise types.RunError(f'{wheres[0]}: column {column!r} holds {kind.__name__}, for which TFDS has no feature')


def _has_list(value: Any) -> bool:
  return isinstance(value, list) or (isinstance(value, dict) and any(_has_list(item) for item in value.values()))


def _any_float(values: Sequence[Any]) -> bool:
  return any(type(value) is float for value in values)


def _infer_columns(
    records: Sequence[dict[str, Any]], wheres: Sequence[str], prefix: str = ''
) -> tfds.features.FeaturesDict:
  names = dict.fromkeys(name for record in records for name in record)
  return tfds.features.FeaturesDict(
      {name: infer([record.get(name) for record in records], wheres, prefix + name) for name in names}
  )


def split(count: int, test_fraction: float, seed: int) -> dict[str, np.ndarray]:
  """Record numbers of `train` and, where the fraction is positive, `test`; in the order of the source.

  Raises:
    UsageError: a split would be empty.
  """
  tests = round(count * test_fraction) if 0 <= test_fraction < 1 else -1
  if not 0 <= tests < count or (test_fraction != 0 and tests == 0):
    raise types.UsageError(f'--test_fraction={test_fraction:g} of {count} records leaves a split empty')
  shuffled = np.random.default_rng(seed).permutation(count)
  splits = {'train': np.sort(shuffled[tests:])}
  return splits | ({'test': np.sort(shuffled[:tests])} if tests else {})


def prepare(spec: str, output_dir: str, name: str, test_fraction: float, seed: int) -> str:
  """Writes the data set and returns its folder.

  Raises:
    UsageError: the name cannot be one, or is taken.
    RunError: a record cannot be read or stored, or the disk is full.
  """
  if not re.fullmatch(r'[a-z][a-z0-9_]*', name):
    raise types.UsageError(f'--name={name}: write small letters, digits and _, a letter first')
  folder = os.path.join(output_dir, name, _VERSION)
  if os.path.exists(folder):
    raise types.UsageError(f'{folder} exists; choose another --name, or remove it')
  source = sources.open_source(spec)
  if not len(source):
    raise types.RunError(f'{spec}: there are no records')
  features = _infer_columns([source[i] for i in range(len(source))], [source.where(i) for i in range(len(source))])
  builder = _Builder(name, source, features, split(len(source), test_fraction, seed), output_dir)
  try:
    builder.download_and_prepare()
  except (OSError, RuntimeError) as err:
    raise types.RunError(f'{folder}: cannot be written ({sources.one_line(err)})') from err
  return folder


def main(argv: Sequence[str]) -> int:
  """Reads the flags and returns the exit code: 2 where they are wrong, 1 where the data are."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument(
      '--input', required=True, help='records: jsonl:PATH (also .gz) or parquet:PATH; a slice may follow'
  )
  parser.add_argument('--output_dir', required=True, help='where data sets lie, later --data_dir')
  parser.add_argument('--name', required=True, help='name of the data set: small letters, digits and _')
  parser.add_argument(
      '--test_fraction', type=float, default=0.0, help='share of the records that becomes the split test'
  )
  parser.add_argument('--seed', type=int, default=0, help='of the choice of test records')
  args = parser.parse_args(argv)
  try:
    folder = prepare(args.input, args.output_dir, args.name, args.test_fraction, args.seed)
  except (types.UsageError, types.RunError) as err:
    sys.stderr.write(f'{err}\n')
    return 2 if isinstance(err, types.UsageError) else 1
  print(f'wrote {folder}; read it with --data=tfds:{args.name} --data_dir={args.output_dir}')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
