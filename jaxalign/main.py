"""jaxalign: aligns language models.

    python -m jaxalign.main --algo=dpo
    python -m jaxalign.main --algo=sft --model=DIR --data=jsonl:train.jsonl --eval_data=jsonl:test.jsonl --steps=500
    python -m jaxalign.main --mode=eval --checkpoint=runs/a
    python -m jaxalign.main --mode=sample --checkpoint=runs/a --prompt='Once upon a time'
    python -m jaxalign.main --mode=show --algo=dpo --data=jsonl:pairs.jsonl
    python -m jaxalign.main --list

Exit codes: 0, 2 for a wrong flag or binding, 1 for a run that failed.
"""

from collections.abc import Callable
from collections.abc import Sequence
import json
import logging as python_logging
import os
import pathlib
import re
import sys
from typing import Any

from absl import flags
from absl import logging
import jax

from jaxalign import checkpoint
from jaxalign import config
from jaxalign import evaluate
from jaxalign import recipe as recipe_lib
from jaxalign import sharding
from jaxalign import streams
from jaxalign import types
from jaxalign.data import sources

_DATA = 'jsonl:PATH (also .gz), parquet:PATH, tfds:NAME[/CONFIG][:SPLIT], builtin:NAME[:SPLIT]'

# (kind, name, default, help), in the order of --help.
_FLAGS: tuple[tuple[Callable[..., Any], str, Any, str], ...] = (
    (flags.DEFINE_bool, 'help', False, 'Show this.'),
    (flags.DEFINE_bool, 'list', False, 'List the algorithms, one line each.'),
    (flags.DEFINE_bool, 'markdown', False, 'With --list: a table with paper, gin file and test.'),
    (flags.DEFINE_string, 'mode', 'train', 'train, eval, sample or show.'),
    (flags.DEFINE_string, 'algo', None, 'The algorithm: a file of gin_configs; --list names them.'),
    (
        flags.DEFINE_string,
        'model',
        None,
        'A Hugging Face directory, a checkpoint of jaxalign, or a name in gin_configs/models (random initialisation).'
        f' Default: {recipe_lib.DEFAULT_MODEL}, which the package holds.',
    ),
    (
        flags.DEFINE_string,
        'tokenizer',
        None,
        'A SentencePiece .model, a tokenizer.json, or a directory with one. Default: the one beside the model.',
    ),
    (
        flags.DEFINE_string,
        'data',
        None,
        f'Training data: {_DATA}; a slice [a:b] may follow; a mixture is A:0.7,B:0.3. Default: the built-in data of the'
        ' algorithm.',
    ),
    (flags.DEFINE_string, 'eval_data', None, 'Held-out data, written as --data.'),
    (flags.DEFINE_string, 'data_dir', None, 'Where TFDS data sets lie.'),
    (
        flags.DEFINE_string,
        'cache_dir',
        None,
        'Where tokenised data and reference log-probabilities are kept. Default: jaxalign in $XDG_CACHE_HOME or'
        ' ~/.cache.',
    ),
    (
        flags.DEFINE_bool,
        'skip_bad_records',
        False,
        'Skip and count malformed records instead of stopping at the first.',
    ),
    (
        flags.DEFINE_string,
        'mesh',
        '',
        'Sizes of the mesh axes data, fsdp, tensor, context, expert, as fsdp:4,tensor:2; -1 is the rest. Default:'
        ' fsdp:-1.',
    ),
    (flags.DEFINE_string, 'dcn_mesh', '', 'The same between the slices of a multi-slice TPU job. Default: data:-1.'),
    (flags.DEFINE_string, 'workdir', None, 'Where the run is kept; the same command resumes it. Default: runs/ALGO.'),
    (flags.DEFINE_integer, 'steps', None, 'Optimizer steps of the whole run.'),
    (flags.DEFINE_integer, 'seed', 0, 'Seed of data order, initialisation and sampling.'),
    (flags.DEFINE_integer, 'log_every', None, 'Steps between logged lines.'),
    (flags.DEFINE_integer, 'eval_every', None, 'Steps between evaluations; 0: only before and after.'),
    (flags.DEFINE_integer, 'save_every', None, 'Steps between checkpoints; 0: only the last.'),
    (flags.DEFINE_multi_string, 'gin_file', [], 'A gin file of your own, applied after those of the algorithm.'),
    (flags.DEFINE_multi_string, 'gin', [], "A gin binding, applied last, as 'preference.dpo.beta=0.2'."),
    (flags.DEFINE_string, 'checkpoint', None, 'For --mode=eval and sample: a workdir, or one checkpoint in it.'),
    (flags.DEFINE_multi_string, 'prompt', [], 'For --mode=sample: what to continue.'),
    (flags.DEFINE_integer, 'max_new_tokens', 128, 'For --mode=sample: length of the response.'),
    (flags.DEFINE_float, 'temperature', 1.0, 'For --mode=sample: 0 is greedy.'),
    (
        flags.DEFINE_bool,
        'debug',
        False,
        'Locate NaNs, forbid implicit transfers between host and device, and print shapes. Slow.',
    ),
)

# Bindings that may differ between a run and its resumption: they change how long and how often, not what.
_RESUMABLE = (
    'loop.Options.steps',
    'loop.Options.log_every',
    'loop.Options.eval_every',
    'loop.Options.save_every',
    'checkpoint.Options.keep',
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit code."""
  _set_up_logging()
  try:
    _dispatch(_parse_flags(list(sys.argv if argv is None else argv)))
  except (types.UsageError, flags.Error) as err:
    return _fail(str(err), 2)
  except types.RunError as err:
    return _fail(str(err), 1)
  except KeyboardInterrupt:
    return _fail('interrupted; the same command resumes from the last checkpoint', 1)
  return 0


def _set_up_logging() -> None:
  """The time and one message a line; of Orbax, which tells of every file, only warnings."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['jaxalign'])
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  handler.addFilter(lambda record: record.levelno > python_logging.INFO or '/orbax/' not in record.pathname)


def _fail(message: str, code: int) -> int:
  message = message.split('\n  In call to configurable')[0]  # what gin adds to an exception that passes through it
  sys.stderr.write(f'jaxalign: {" ".join(message.split())}\n')
  return code


def _parse_flags(argv: list[str]) -> flags.FlagValues:
  args = flags.FlagValues()
  for define, name, default, text in _FLAGS:
    define(name, default, text, flag_values=args)
  rest = args(argv)[1:]
  if rest:
    raise types.UsageError(f'unexpected argument {rest[0]!r}; flags are written --name=value')
  return args


def _dispatch(args: flags.FlagValues) -> None:
  modes = {'train': _train, 'eval': _evaluate, 'sample': _sample, 'show': _show}
  if args.mode not in modes:
    raise types.UsageError(f'--mode={args.mode}: it is one of {", ".join(modes)}')
  if args.help:
    lines = [f'  --{name}\n      {text}' for _, name, _, text in _FLAGS]
    sys.stdout.write('\n'.join([__doc__ or '', *lines, '']))
  elif args.list:
    sys.stdout.write(config.table() if args.markdown else config.listing())
  else:
    modes[args.mode](args)


def _configure(args: flags.FlagValues) -> recipe_lib.Recipe:
  """Parses the gin files of the algorithm, of a named model or data set, and the user's, in that order."""
  if args.algo is None:
    raise types.UsageError(f'--algo is needed: {", ".join(config.algorithms())} (--list describes them)')
  config.check_algorithm(args.algo)
  bindings = list(args.gin)
  for flag in ('steps', 'log_every', 'eval_every', 'save_every'):
    if args[flag].value is not None:
      bindings.append(f'loop.Options.{flag} = {args[flag].value}')
  parse = lambda files: config.parse(args.algo, files=files, user_files=args.gin_file, bindings=bindings)
  files = _own_files('models', [args.model or recipe_lib.DEFAULT_MODEL])
  parse(files)
  # Which data there are by default is bound in gin, so it is known only now.
  data = args.data or config.query('recipe.Recipe.data')
  data_files = _own_files('data', [spec for spec, _ in sources.parse_mixture(data)])
  if data_files:
    parse([*files, *data_files])
  return config.get('recipe.Recipe')()


def _own_files(folder: str, specs: Sequence[str]) -> list[str]:
  """The package's gin file for a named model or data set; none for what is the user's, or for several at once."""
  names = {re.split(r'[:\[]', spec.removeprefix('builtin:'))[0] for spec in specs}
  return [f'{folder}/{name}.gin' for name in names if len(names) == 1 and config.exists(f'{folder}/{name}.gin')]


def _job(args: flags.FlagValues, recipe: recipe_lib.Recipe, run: dict | None = None) -> recipe_lib.Job:
  """What the flags say; in a mode that starts from a checkpoint, `run` (its run.json) says the rest."""
  run = run or {}
  data = args.data or run.get('data') or recipe.data
  algo = args.algo or run.get('algo') or ''
  mesh = sharding.make_mesh(args.mesh, args.dcn_mesh)
  logging.info('%d %s devices, mesh %s', mesh.size, sharding.platform_of(mesh), dict(mesh.shape))
  cache = args.cache_dir or pathlib.Path(os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache')) / 'jaxalign'
  return recipe_lib.Job(
      algo=algo,
      workdir=pathlib.Path(args.workdir or f'runs/{algo}').absolute(),
      mesh=mesh,
      seed=args.seed,
      model=args.model or run.get('model_spec') or recipe_lib.DEFAULT_MODEL,
      tokenizer=args.tokenizer or run.get('tokenizer', ''),
      data=data,
      eval_data=args.eval_data or run.get('eval_data', recipe.eval_data),
      data_dir=args.data_dir,
      cache_dir=pathlib.Path(cache).absolute(),
      skip_bad_records=args.skip_bad_records,
      debug=args.debug,
  )


def _start(args: flags.FlagValues) -> None:
  """Joins the other processes of a job and sets what holds for the whole process."""
  sharding.start_distributed()
  jax.config.update('jax_threefry_partitionable', True)
  if args.debug:
    jax.config.update('jax_debug_nans', True)


def _train(args: flags.FlagValues) -> None:
  recipe = _configure(args)
  _start(args)
  job = _job(args, recipe)
  bindings = config.bindings()
  summary = _finished(job, bindings)
  if summary is None:
    configured = lambda: (bindings, config.checked_operative())
    summary = config.get('train.train')(job, recipe=recipe, config=configured)
  if jax.process_index() == 0:
    sys.stdout.write(json.dumps(summary, indent=1) + '\n')


def _finished(job: recipe_lib.Job, bindings: str) -> dict | None:
  """The summary of a run that is over, None where there is something to do.

  Raises:
    UsageError: the workdir holds a run of other flags or bindings.
  """
  path = job.workdir / 'checkpoints' / 'run.json'
  if not path.exists():
    return None
  run = json.loads(path.read_text(encoding='utf-8'))
  changed = [f'{k}: {run[k]!r} -> {v!r}' for k, v in job.identity().items() if run[k] != v]
  changed += config.diff(run['bindings'], bindings, ignore=_RESUMABLE)
  if changed:
    raise types.UsageError(f'{job.workdir} holds another run ({"; ".join(changed)}); choose another --workdir')
  done = job.workdir / 'summary.json'
  if not done.exists():
    return None
  summary = json.loads(done.read_text(encoding='utf-8'))
  if summary['steps'] < config.query('loop.Options.steps'):
    return None
  logging.info(
      '%s is finished: %d steps; its summary follows (choose another --workdir, or more --steps)',
      job.workdir,
      summary['steps'],
  )
  return summary


def _restored(args: flags.FlagValues) -> tuple[pathlib.Path, dict]:
  """The checkpoint folder of --checkpoint and its run.json."""
  if args.checkpoint is None:
    raise types.UsageError(f'--mode={args.mode} needs --checkpoint=DIR (a workdir, or one checkpoint in it)')
  folder, _ = checkpoint.find(args.checkpoint)
  return folder, json.loads((folder / 'run.json').read_text(encoding='utf-8'))


def _evaluate(args: flags.FlagValues) -> None:
  folder, run = _restored(args)
  _start(args)
  config.parse_saved((folder / 'config.gin').read_text(encoding='utf-8'), args.gin_file, args.gin)
  recipe = config.get('recipe.Recipe')()
  job = _job(args, recipe, run)
  values = config.get('evaluate.evaluate')(job, args.checkpoint, recipe=recipe)
  if jax.process_index() == 0:
    sys.stdout.write(json.dumps(values, indent=1) + '\n')


def _sample(args: flags.FlagValues) -> None:
  _restored(args)
  if not args.prompt:
    raise types.UsageError("--mode=sample needs --prompt='...' (repeatable)")
  _start(args)
  mesh = sharding.make_mesh(args.mesh, args.dcn_mesh)
  for prompt, response in evaluate.respond(
      args.checkpoint,
      mesh,
      args.prompt,
      max_new_tokens=args.max_new_tokens,
      temperature=args.temperature,
      seed=args.seed,
  ):
    if jax.process_index() == 0:
      sys.stdout.write(f'{prompt}{response}\n')


def _show(args: flags.FlagValues) -> None:
  recipe = _configure(args)
  sys.stdout.write(streams.show(_job(args, recipe), recipe))


def run() -> None:
  """Entry point of the console script."""
  sys.exit(main())


if __name__ == '__main__':
  run()
