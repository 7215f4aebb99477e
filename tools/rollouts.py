"""Browses what a run sampled: the rollouts that are kept in WORKDIR/rollouts.

  python tools/rollouts.py runs/grpo | less
  python tools/rollouts.py runs/grpo --rollout=12
  python tools/rollouts.py runs/grpo --rollout=12 --sort=length --prompt='once upon'
  python tools/rollouts.py runs/grpo --rollout=12 --tokens | less

Without --rollout a line each: mean reward and its deviation, mean length in tokens, the share of responses that were
cut at the limit, and distinct token pairs over all pairs. With it the groups of one rollout: of each prompt the best
and the worst response, with reward, advantage and length; --sort shows all of them, the highest first. --tokens adds
the log-probability of each token by the sampler and, where a rollout is used for several updates, by the program that
trains, in nats, and the difference of the two.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import json
import math
import os
import sys
from typing import Any

from jaxalign import storage
from jaxalign import types
from jaxalign.data import tokenizers
from jaxalign.rl import experience

_FIELDS = {
    'group': int,
    'prompt': str,
    'response': str,
    'reward': float | int | None,
    'advantage': float | int | None,
    'finished': bool,
    'counted': bool,
    'labels': dict,
    'policy_version': int,
    'prompt_ids': list,
    'ids': list,
    'token_labels': dict,
    'sampler_logps': list,
}
_KEYS = {
    'reward': lambda line: -math.inf if line['reward'] is None else line['reward'],
    'length': lambda line: len(line['sampler_logps']),
    'advantage': lambda line: -math.inf if line['advantage'] is None else line['advantage'],
}
_SHORT = 200  # characters of a text on one line

Line = dict[str, Any]


def files(workdir: storage.Path) -> dict[int, storage.Path]:
  """The rollouts of a workdir by number.

  Raises:
    UsageError: there are none.
  """
  found = {int(path.stem): path for path in sorted((workdir / 'rollouts').glob('*.jsonl')) if path.stem.isdigit()}
  if not found:
    raise types.UsageError(f'{workdir}: it holds no rollouts (WORKDIR/rollouts/000000.jsonl and on)')
  return found


def read(path: storage.Path) -> list[Line]:
  """The responses of a rollout.

  Raises:
    RunError: a line is none.
  """
  lines = []
  for number, text in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
    try:
      line = json.loads(text)
    except json.JSONDecodeError as err:
      raise types.RunError(f'{path}:{number}: not valid JSON ({err.msg} at column {err.colno})') from err
    for name, kind in _FIELDS.items():
      if not isinstance(line, dict) or name not in line or not isinstance(line[name], kind):
        raise types.RunError(f'{path}:{number}: not a response of a rollout: {name} is missing or of another kind')
    line.pop('experts', None)  # By far the most of a line, and nothing that is shown.
    lines.append(line)
  if not lines:
    raise types.RunError(f'{path}: it is empty')
  return lines


def groups(lines: Sequence[Line], prompt: str) -> list[list[Line]]:
  """The responses to each prompt that has this text in it, whatever its case."""
  found: dict[int, list[Line]] = {}
  for line in lines:
    if prompt.casefold() in line['prompt'].casefold():
      found.setdefault(line['group'], []).append(line)
  return list(found.values())


def overview(paths: dict[int, storage.Path], prompt: str) -> Iterator[str]:
  """A table with a line for each rollout; raises UsageError where no prompt is left."""
  table = {number: groups(read(path), prompt) for number, path in paths.items()}
  if not any(table.values()):
    raise types.UsageError(f'--prompt={prompt}: no prompt has this in it')
  yield 'rollout responses     reward        std     length    clipped distinct-2'
  for number, shown in table.items():
    if shown:
      text = ''.join(json.dumps(line) + '\n' for group in shown for line in group)
      found = experience.of_text(text, len(shown[0])).metrics()
      names = 'mean_length', 'clipped_ratio', 'distinct_2'
      values = [found['reward'], found['reward_std'], *(found[f'completions/{name}'] for name in names)]
      yield f'{number:7d} {sum(map(len, shown)):9d} ' + ' '.join(f'{value:10.4f}' for value in values)


def detail(shown: Sequence[Sequence[Line]], sort: str, tokens: bool, tokenizer) -> Iterator[str]:
  """Groups, and of each the best and the worst response, or all in an order."""
  for group in shown:
    known = [line['reward'] for line in group if line['reward'] is not None]
    mean = sum(known) / len(known) if known else math.nan
    yield f'prompt {group[0]["group"]}: {_short(group[0]["prompt"])}'
    yield f'  {len(group)} responses, mean reward {mean:.4f}'
    ranked = sorted(group, key=_KEYS[sort or 'reward'], reverse=True)
    told = [('', line) for line in ranked]
    if not sort:
      told = [('best ', ranked[0]), ('worst ', ranked[-1])] if len(ranked) > 1 else told
    for name, line in told:
      reward = 'abstained' if line['reward'] is None else f'{line["reward"]:.4f}'
      end = '' if line['finished'] else ', cut'
      advantage = '' if line['advantage'] is None else f', advantage {line["advantage"]:+.4f}'
      said = f'reward {reward}{advantage}, {len(line["sampler_logps"])} tokens{end}'
      yield f'  {name}{said}: {_short(line["response"])}'
      if tokens:
        yield from table(line, tokenizer)
    yield ''


def table(line: Line, tokenizer: tokenizers.Tokenizer | None) -> Iterator[str]:
  """Tokens of a response with their log-probabilities."""
  names = ('sampler', 'trainer', 'difference') if 'old_logps' in line['token_labels'] else ('sampler',)
  columns = [line['sampler_logps']]
  if len(names) > 1:
    columns += [line['token_labels']['old_logps']]
    columns += [[own - other for own, other in zip(*columns)]]
  values = zip(*columns)
  yield '         id ' + ' '.join(f'{name:>10}' for name in names) + '  token'
  for token, is_sampled in zip(line['ids'], line.get('sampled', [1] * len(line['ids']))):
    told = (
        [f'{value:10.5f}' for value in next(values)] if is_sampled else ['  observed'] + [' ' * 10] * (len(names) - 1)
    )
    text = '' if tokenizer is None else repr(tokenizer.decode([token], continuation=True))
    yield f'    {token:7d} ' + ' '.join(told) + f'  {text}'


def _short(text: str) -> str:
  return json.dumps(text if len(text) <= _SHORT else text[:_SHORT] + ' ...', ensure_ascii=False)


def browse(args: argparse.Namespace) -> Iterator[str]:
  """Lines of text.

  Raises:
    UsageError: there is no such rollout or prompt, or options do not go together.
    RunError: a file is no rollout.
  """
  workdir = storage.path(args.workdir)
  paths = files(workdir)
  if args.rollout is None:
    for name in ('sort', 'tokens'):
      if vars(args)[name]:
        raise types.UsageError(f'--{name}: it is of one rollout; give --rollout=N')
    yield from overview(paths, args.prompt)
    return
  if args.rollout not in paths:
    raise types.UsageError(f'--rollout={args.rollout}: there are {min(paths)} to {max(paths)} in {args.workdir}')
  shown = groups(read(paths[args.rollout]), args.prompt)
  if not shown:
    raise types.UsageError(f'--prompt={args.prompt}: no prompt of rollout {args.rollout} has this in it')
  kept = workdir / 'checkpoints' / 'tokenizer'
  yield from detail(shown, args.sort, args.tokens, tokenizers.load(kept) if args.tokens and kept.exists() else None)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('workdir', help='of a run that trained on what it sampled')
  parser.add_argument('--rollout', type=int, help='which one is shown; default: a table of all')
  parser.add_argument('--prompt', default='', help='show only prompts with this text in them')
  parser.add_argument('--sort', choices=list(_KEYS), default='', help='all responses of a prompt, the highest first')
  parser.add_argument('--tokens', action='store_true', help='log-probabilities of each token')
  args = parser.parse_args(argv)
  try:
    for line in browse(args):
      print(line)
    sys.stdout.flush()
  except BrokenPipeError:  # `less` was left before the end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  except (types.UsageError, types.RunError) as err:
    print(f'rollouts: {err}', file=sys.stderr)
    return 2 if isinstance(err, types.UsageError) else 1
  except (*storage.errors(), UnicodeDecodeError) as err:
    print(f'rollouts: {args.workdir}: {err}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
