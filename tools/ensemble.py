"""Combines the scores that several reward models gave to the same records, and says how good each and all are.

  for seed in 0 1 2; do
    python -m jaxalign.main --algo=rm --seed=$seed --workdir=runs/rm$seed
    python -m jaxalign.main --mode=score --checkpoint=runs/rm$seed --data=jsonl:pairs.jsonl > rm$seed.jsonl
  done
  python tools/ensemble.py rm0.jsonl rm1.jsonl rm2.jsonl --how=uncertainty --penalty=0.5 --output=all.jsonl

It reads what `--mode=score` prints: members may differ in size, tokenizer and mesh, and another way of combining them
costs nothing. `--output` has the same form. Of pairs, the first response being the better one, a table on the terminal
gives accuracy, Brier score and expected calibration error of sigmoid(r_1 - r_2).
"""

import argparse
from collections.abc import Sequence
import json
import pathlib
import sys
from typing import Any

import numpy as np

from jaxalign import storage
from jaxalign import types
from jaxalign.losses import reward
from jaxalign.rewards import ensembles


def read(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """The records of a file of scores, by name.

  Raises:
    UsageError: there is no such file.
    RunError: a line is no such record, or the model gave several numbers, or scores of tokens.
  """
  if not path.is_file():
    raise types.UsageError(f'{path}: no such file')
  found = {}
  for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
    try:
      one = json.loads(line)
      if not all(isinstance(score, int | float) for score in one['scores']):
        raise types.RunError(
            f'{path}:{number}: scores that are no numbers; one score a response is wanted (--per=response)'
        )
      if one['record'] in found:
        raise types.RunError(f'{path}:{number}: {one["record"]} for the second time; score files of other names apart')
      found[one['record']] = one
    except (json.JSONDecodeError, KeyError, TypeError) as err:
      raise types.RunError(f'{path}:{number}: not a line of --mode=score ({err!r})') from err
  if not found:
    raise types.RunError(f'{path}: it holds no scores')
  return found


def stacked(members: Sequence[dict[str, dict[str, Any]]], paths: Sequence[pathlib.Path]) -> np.ndarray:
  """Scores `[E, N]` float64, records one behind the other.

  Raises:
    RunError: the members scored other records, or other responses.
  """
  first = members[0]
  for path, member in zip(paths, members):
    shared = [name for name in first if name in member and len(member[name]['scores']) == len(first[name]['scores'])]
    if len(shared) != len(first) or len(member) != len(first):
      odd = next(name for name in [*first, *member] if name not in shared)
      raise types.RunError(
          f'{path}: it and {paths[0]} do not score the same responses; the first that differs is {odd}'
      )
  return np.array([[score for name in first for score in member[name]['scores']] for member in members], np.float64)


def quality(scores_NK: np.ndarray) -> dict[str, float]:
  """Accuracy, Brier score and calibration error of pairs `[N, 2]`, the better response first."""
  zero = {'margin': np.zeros(scores_NK.shape, np.float32)}
  stats = types.Stats(rewards_GK=np.asarray(scores_NK, np.float32))
  found = reward.bradley_terry(stats, types.Stats(), zero).metrics
  ece = type(found['ece'])(*(np.asarray(part, np.float64).sum(axis=0) for part in found['ece']))
  return {name: float(np.mean(found[name])) for name in ('accuracy', 'brier')} | {'ece': float(ece.mean())}


def ensemble(args: argparse.Namespace) -> None:
  """Reads, combines, writes and reports."""
  if len(args.scores) < 2:
    raise types.UsageError('an ensemble has at least two members')
  if args.penalty is not None and args.how != 'uncertainty':
    raise types.UsageError(f'--penalty: --how={args.how} does not read it')
  members = [read(path) for path in args.scores]
  scores_EN = stacked(members, args.scores)
  scores_EN = ensembles.centred(scores_EN) if args.centre else scores_EN
  combined_N = ensembles.combine(scores_EN, how=args.how, penalty=1.0 if args.penalty is None else args.penalty)
  sizes = [len(one['scores']) for one in members[0].values()]
  if args.output is not None:
    parts = np.split(combined_N, np.cumsum(sizes)[:-1])
    records = [one | {'scores': part.tolist()} for one, part in zip(members[0].values(), parts)]
    storage.write_text(args.output, ''.join(json.dumps(record) + '\n' for record in records))
  print(f'{len(sizes)} records, mean deviation between members {scores_EN.std(axis=0).mean():.4f}')
  if set(sizes) == {2} and not any({'samples', 'completions'} & set(one) for one in members[0].values()):
    names = [*map(str, args.scores), args.how]
    print('| member | accuracy | Brier | ECE |\n|---|---|---|---|')
    for name, scores_N in zip(names, [*scores_EN, combined_N]):
      found = quality(scores_N.reshape(-1, 2))
      print(f'| {name} | {found["accuracy"]:.4f} | {found["brier"]:.4f} | {found["ece"]:.4f} |')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('scores', nargs='+', type=storage.on_disk, help='what --mode=score printed, a file a member')
  parser.add_argument('--how', choices=ensembles.HOW, default='mean', help='default: mean')
  parser.add_argument('--penalty', type=float, help='of the variance between members (uncertainty); default: 1')
  parser.add_argument('--centre', action='store_true', help="take each member's mean from its scores first")
  parser.add_argument('--output', type=storage.on_disk, help='where the combined scores go; default: nowhere')
  args = parser.parse_args(argv)
  try:
    ensemble(args)
  except (types.UsageError, types.RunError) as err:
    print(f'ensemble: {err}', file=sys.stderr)
    return 2 if isinstance(err, types.UsageError) else 1
  except (OSError, UnicodeDecodeError) as err:
    print(f'ensemble: a file of {", ".join(map(str, args.scores))} or {args.output}: {err}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
