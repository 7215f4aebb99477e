"""Turns public files of feedback into records that --data reads.

  python tools/convert_data.py --format=tulu --input=annotations.jsonl.gz --output=tulu.jsonl.gz
  python -m jaxalign.main --algo=margin_dpo --model=DIR --data=jsonl:tulu.jsonl.gz

Formats, and the shapes that each can be given (the first by default):

  tulu      human evaluation of Tulu 1: pairs (a clear preference has margin 1, a slight one 0.5), binary (acceptable?)
  oasst     trees of OpenAssistant: lists (replies to the same turns, ranked), pairs (the best against the worst reply),
            all_pairs, demonstrations (a conversation a tree, along the best replies)
  sharegpt  conversations of LLaMA-Factory: demonstrations, pairs (`chosen` and `rejected`), binary (`label`)
  gsm8k     GSM8K: demonstrations (train and test); of example_model_solutions also binary (right?) and pairs (right
            against wrong)
  xstest    completions of XSTest, a CSV: binary (a safe prompt is to be answered, an unsafe one refused)

Prompts are messages, for a chat template to write; --text writes them as plain text with an empty line behind it.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import csv
import gzip
import io
import json
import os
import pathlib
import sys
from typing import Any
import zlib

from jaxalign import storage
from jaxalign import types
from jaxalign.data import public
from jaxalign.data import sources

_Places = Iterator[tuple[str, dict[str, Any]]]


def _rows_of(path: pathlib.Path) -> public.Rows:
  """The rows of a file; raises UsageError where it is not there, RunError while it is read."""
  kinds = {'.json': _json_rows, '.csv': _csv_rows, '.jsonl': _jsonl_rows}
  suffix = pathlib.Path(path.name.removesuffix('.gz')).suffix
  if suffix not in kinds:
    raise types.UsageError(f'--input={path}: a file ends in {", ".join(kinds)}, or in one of these and .gz')
  return public.Rows(kinds[suffix](path))


def _jsonl_rows(path: pathlib.Path) -> _Places:
  source = sources.open_source(f'jsonl:{path}')
  return ((source.where(i), source[i]) for i in range(len(source)))


def _json_rows(path: pathlib.Path) -> _Places:
  try:
    found = json.loads(_read(path))
  except json.JSONDecodeError as err:
    raise sources.BadRecord(f'{path.name}: not valid JSON ({err})') from err
  if not isinstance(found, list):
    raise sources.BadRecord(f'{path.name}: not a list of rows but a {type(found).__name__}')
  for i, row in enumerate(found):
    if not isinstance(row, dict):
      raise sources.BadRecord(f'{path.name}[{i}]: not an object but a {type(row).__name__}')
    yield f'{path.name}[{i}]', row


def _csv_rows(path: pathlib.Path) -> _Places:
  count = 0
  try:
    for row in csv.DictReader(io.StringIO(_read(path), newline=''), strict=True):
      yield f'{path.name}[{count}]', row
      count += 1
  except csv.Error as err:
    raise sources.BadRecord(f'{path.name}[{count}]: not valid CSV ({err})') from err


def _read(path: pathlib.Path) -> str:
  try:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == '.gz' else data).decode('utf-8-sig')
  except FileNotFoundError:
    raise types.UsageError(f'--input={path}: there is no such file') from None
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as err:
    raise sources.BadRecord(f'{path.name}: cannot be read ({sources.one_line(err)})') from err


def _plain(rows: public.Rows, record: dict[str, Any]) -> Iterator[dict[str, Any]]:
  """The record with its prompt as text; none (and counted) where the prompt is more than what a user says first."""
  prompt, rest = record.get('prompt'), dict(record)
  if prompt is None:
    *prompt, last = rest.pop('messages')
    rest['completion'] = last['content']
  if [message['role'] for message in prompt] == ['user']:
    yield rest | {'prompt': prompt[0]['content'] + '\n\n'}
  else:
    rows.leave_out('several turns, which --text cannot write')


def convert(args: argparse.Namespace) -> None:
  """Reads, converts and writes.

  Raises:
    UsageError: a flag has no such value, or the output exists.
    RunError: a row is not of the format, or nothing is left.
  """
  shapes = public.FORMATS[args.format]
  shape = args.shape or next(iter(shapes))
  if shape not in shapes:
    raise types.UsageError(f'--shape={shape}: --format={args.format} has {", ".join(shapes)}')
  if not args.output.name.endswith(('.jsonl', '.jsonl.gz')):
    raise types.UsageError(f'--output={args.output}: it ends in .jsonl or .jsonl.gz')
  if args.output.exists():
    raise types.UsageError(f'--output={args.output} exists; choose another, or remove it')
  rows, lines = _rows_of(args.input), []
  try:
    for record in shapes[shape](rows):
      lines += [json.dumps(one) + '\n' for one in (_plain(rows, record) if args.text else [record])]
  except sources.BadRecord:  # It names its row.
    raise
  except types.RunError as err:
    raise types.RunError(f'{rows.where}: {err}; is it --format={args.format} --shape={shape}?') from err
  for reason, count in rows.left.items():
    print(f'left out {count}: {reason}')
  if not lines:
    raise types.RunError(f'{args.input}: of {rows.count} rows none became a record')
  data = ''.join(lines).encode('utf-8')
  part = args.output.with_name(f'{args.output.name}.part')
  part.write_bytes(gzip.compress(data, mtime=0) if args.output.suffix == '.gz' else data)
  os.replace(part, args.output)
  print(f'wrote {args.output}: {len(lines)} {shape} of {rows.count} rows; read them with --data=jsonl:{args.output}')


def main(argv: Sequence[str] | None = None) -> int:
  """Reads the flags and returns the exit code: 2 where they are wrong, 1 where the data are."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--format', choices=public.FORMATS, required=True, help='what the file is')
  parser.add_argument('--shape', help='what it becomes; default: the first shape of its format')
  parser.add_argument('--input', type=storage.on_disk, required=True, help='the file: .jsonl, .json or .csv, also .gz')
  parser.add_argument('--output', type=storage.on_disk, required=True, help='what is written: .jsonl or .jsonl.gz')
  parser.add_argument('--text', action='store_true', help='write prompts of one turn as plain text, and no others')
  args = parser.parse_args(argv)
  try:
    convert(args)
  except (types.UsageError, types.RunError) as err:
    print(f'convert_data: {err}', file=sys.stderr)
    return 2 if isinstance(err, types.UsageError) else 1
  except OSError as err:
    print(f'convert_data: {args.output}: cannot be written ({err.strerror})', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
