"""The command line: which mode reads which flag, and what flags bind."""

from collections.abc import Callable
from collections.abc import Collection
import dataclasses
import functools
import textwrap
from typing import Any

from absl import flags

from jaxalign import profiling
from jaxalign import respond
from jaxalign import types
from jaxalign.cli import catalog
from jaxalign.cli import flag_table
from jaxalign.models import lora
from jaxalign.rewards import functions

# Flags that a mode does not read are refused. (What trains is also what is shown.)
_OPTIMIZING = ('workdir', 'steps', 'log_every', 'eval_every', 'save_every', 'profile')
_OF_TRAINING = ('algo', 'model', 'tokenizer', 'data', 'lora', 'environment', *_OPTIMIZING)
_OF_DATA = ('eval_data', 'data_dir', 'cache_dir', 'skip_bad_records', 'gin_file', 'gin')
_OF_DRAWING = ('max_new_tokens', 'temperature', 'top_k', 'top_p', 'min_p', 'repetition_penalty', 'stop', 'cache_dtype')
_OF_SAMPLING = ('prompt', 'chat', 'samples_per_prompt', 'stream', 'decode', 'guide', *_OF_DRAWING)
_OF_SCORING = ('per', 'row_length')
_OF_REWARDS = ('reward', 'combine')
_OF_PLANS = ('topology', 'num_slices', 'json', 'search')
_but = lambda names, *out: tuple(name for name in names if name not in out)
_BUT_MODEL = _but(_OF_TRAINING, 'model', 'data')
_BUT_PLACES = _but(_OF_DATA, 'data_dir', 'cache_dir')
_UNREAD: dict[str, tuple[str, ...]] = {
    'train': ('checkpoint', *_OF_SAMPLING, *_OF_SCORING),
    'show': ('checkpoint', 'profile', *_OF_SAMPLING, *_OF_SCORING),
    'plan': ('checkpoint', 'profile', 'workdir', *_OF_SAMPLING, *_OF_SCORING, 'debug'),
    'eval': (*_OF_TRAINING, *_OF_SAMPLING, *_OF_SCORING, *_OF_REWARDS),
    'sample': (*_BUT_MODEL, *_BUT_PLACES, *_OF_SCORING, 'guide', 'combine'),
    'sample --reward': (*_BUT_MODEL, *_BUT_PLACES, *_OF_SCORING, 'guide'),
    'sample --decode': (*_BUT_MODEL, *_but(_BUT_PLACES, 'gin_file', 'gin'), *_OF_SCORING),
    'score': (*_BUT_MODEL, *_OF_SAMPLING, 'eval_data', 'gin', 'seed', 'combine'),
    'score --reward': (
        *_but(_OF_TRAINING, 'tokenizer', 'data'),
        *_but(_BUT_PLACES, 'skip_bad_records'),
        *_OF_SAMPLING,
        *('checkpoint', 'mesh', 'dcn_mesh', 'seed', 'per', 'row_length', 'debug'),
    ),
    'score --reward=DIR': (
        *_but(_OF_TRAINING, 'tokenizer', 'data'),
        *_but(_BUT_PLACES, 'skip_bad_records'),
        *_OF_SAMPLING,
        *('checkpoint', 'seed', 'per', 'debug'),
    ),
}
_INSTEAD = {
    'checkpoint': '; --model=DIR starts from a checkpoint',
    'data': '; --eval_data names other held-out data',
    'markdown': '; it goes with --list',
    'combine': '; it goes with --reward',
    'guide': '; it goes with --decode',
    **dict.fromkeys(_OF_PLANS, '; it goes with --mode=plan'),
}


_LORA_VALUES: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    str: str,
    bool: lambda text: {'true': True, 'false': False}[text],
    tuple[str, ...]: lambda text: tuple(text.split('+')),
}


def parse(argv: list[str]) -> flags.FlagValues:
  """The flags of a command line, `argv[0]` being the program; fresh ones at each call.

  Raises:
    flags.Error: a flag is unknown or its value is wrong.
    UsageError: there is something else than flags.
  """
  args = flags.FlagValues()
  for define, name, default, text in flag_table.FLAGS:
    define(name, default, text, flag_values=args)
  rest = args(argv)[1:]
  if rest:
    raise types.UsageError(f'unexpected argument {rest[0]!r}; flags are written --name=value')
  return args


def check_mode(args: flags.FlagValues) -> None:
  """Raises UsageError where a flag was given that `--mode` does not read."""
  mode = args.mode
  if mode == 'score' and args.reward:
    mode = 'score --reward=DIR' if any(map(functions.is_model, args.reward)) else 'score --reward'
  if mode == 'sample' and (args.decode or args.reward):
    mode = 'sample --decode' if args.decode else 'sample --reward'
  for name in (*_UNREAD[mode], 'markdown', *(() if mode == 'plan' else _OF_PLANS)):
    if args[name].present:
      raise types.UsageError(f'--mode={mode} does not read --{name}{_INSTEAD.get(name, "")}')


def planned(args: flags.FlagValues, chosen: Collection[str]) -> list[str]:
  """The command line of a run that is planned, without its mesh and the bindings that are `chosen` anew."""
  found = ['python', '-m', 'jaxalign.main']
  for name in sorted(args):
    if args[name].present and name not in (*_OF_PLANS, 'mode', 'mesh'):
      value: Any = args[name].value
      values = map(str, value if isinstance(value, list) else [value])
      found += [f'--{name}={x}' for x in values if name != 'gin' or x.partition('=')[0].strip() not in chosen]
  if not args['tokenizer'].present and catalog.own_files('models', [args.model or '']):
    found.append('--tokenizer=FILE')  # Which a plan does without, and a run of random weights does not.
  return found


def bindings(args: flags.FlagValues) -> list[str]:
  """The gin bindings of a run: those of `--gin`, then those of flags that have some."""
  return [*args.gin, *lora_bindings(args.lora), *reward_bindings(args), *loop_bindings(args)]


def reward_bindings(args: flags.FlagValues, options: str = 'rollouts.Options') -> list[str]:
  """The gin bindings of `--reward`, `--environment` and `--combine`, for rollouts or other options.

  Raises:
    UsageError: a reward is not of the form that is wanted, or there is no such function or directory.
  """
  for spec in args.reward:
    functions.parse(spec)
  found = [f'{options}.environment = {args.environment!r}'] if args.environment else []
  if args.reward or args.environment:  # which rewards of its own, so that those of the data are not wanted
    found.append(f'{options}.rewards = {tuple(args.reward)!r}')
  return found + ([f'{options}.combine = {args.combine!r}'] if args['combine'].present else [])


def loop_bindings(args: flags.FlagValues) -> list[str]:
  """The gin bindings of how long, how often, and which steps are profiled.

  Raises:
    UsageError: `--profile` names no steps.
  """
  often = ('steps', 'log_every', 'eval_every', 'save_every')
  found = [f'loop.Options.{flag} = {args[flag].value}' for flag in often if args[flag].value is not None]
  return found + ([f'loop.Options.profile = {profiling.parse(args.profile)}'] if args.profile else [])


def sampling_options(args: flags.FlagValues) -> respond.Options:
  """How `--mode=sample` samples.

  Raises:
    UsageError: a number has no meaning, or a text is empty.
  """
  named: dict[str, Any] = {name: args[name].value for name in _OF_DRAWING}
  named |= {'stop': tuple(args.stop), 'cache_dtype': args.cache_dtype or None}
  return respond.Options(chat=args.chat, per_prompt=args.samples_per_prompt, **named)


def lora_bindings(text: str) -> list[str]:
  """The gin bindings of `--lora`: 'rank:16,targets:q+v' binds `lora.Lora.rank` and `lora.Lora.targets`.

  Raises:
    UsageError: an item is no setting of `lora.Lora`, or has no such value.
  """
  fields = {field.name: field.type for field in dataclasses.fields(lora.Lora)}
  found = ['recipe.Recipe.lora = @lora.Lora()'] if text else []
  for item in filter(None, text.split(',')):
    name, _, value = item.partition(':')
    read = _LORA_VALUES.get(fields.get(name, ''))
    if read is None:
      raise types.UsageError(f'--lora={text}: {item!r} is not NAME:VALUE; the names are {", ".join(fields)}')
    try:
      found.append(f'lora.Lora.{name} = {read(value)!r}')
    except (ValueError, KeyError) as err:
      raise types.UsageError(f'--lora={text}: {value!r} is no value of {name}') from err
  return found


def describe(intro: str) -> str:
  """What --help shows."""
  indent = '      '
  wrap = functools.partial(textwrap.fill, width=100, initial_indent=indent, subsequent_indent=indent)
  lines = [f'  --{name}\n{wrap(text, break_on_hyphens=False)}' for _, name, _, text in flag_table.FLAGS]
  return '\n'.join([intro, *lines, ''])
