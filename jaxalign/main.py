"""jaxalign: aligns language models.

    python -m jaxalign.main --algo=dpo
    python -m jaxalign.main --algo=sft --model=DIR --data=jsonl:train.jsonl --eval_data=jsonl:test.jsonl --workdir=runs/a
    python -m jaxalign.main --mode=eval --checkpoint=runs/a
    python -m jaxalign.main --mode=sample --checkpoint=runs/a --prompt='Once upon a time'
    python -m jaxalign.main --mode=show --algo=dpo --data=jsonl:pairs.jsonl
    python -m jaxalign.main --list

Exit codes: 0, 2 for a wrong flag or binding, 1 for a run that failed.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import sys

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

_FLAGS = flags.FlagValues()


def _define(kind, name: str, default, text: str, **options) -> None:
  kind(name, default, text, flag_values=_FLAGS, **options)


_define(flags.DEFINE_enum, 'mode', 'train', 'What to do.', enum_values=['train', 'eval', 'sample', 'show'])
_define(flags.DEFINE_string, 'algo', None, 'The algorithm: a file of gin_configs; --list names them.')
_define(
    flags.DEFINE_string,
    'model',
    None,
    'A Hugging Face directory, a checkpoint of jaxalign, or a name in gin_configs/models. Default: the built-in'
    f' {recipe_lib.DEFAULT_MODEL}.',
)
_define(
    flags.DEFINE_string,
    'tokenizer',
    None,
    'A SentencePiece .model, a tokenizer.json, or a directory with one. Default: the one beside the model.',
)
_define(
    flags.DEFINE_string,
    'data',
    None,
    'Training data: jsonl:PATH (also .gz), parquet:PATH, tfds:NAME[/CONFIG][:SPLIT], builtin:NAME[:SPLIT]; a slice'
    ' [a:b] may follow; a mixture is A:0.7,B:0.3. Default: the built-in data of the algorithm.',
)
_define(flags.DEFINE_string, 'eval_data', None, 'Held-out data, as --data.')
_define(flags.DEFINE_string, 'data_dir', None, 'Where TFDS data sets lie.')
_define(
    flags.DEFINE_string,
    'cache_dir',
    None,
    'Where tokenised data and reference log-probabilities are kept. Default: $XDG_CACHE_HOME/jaxalign or'
    ' ~/.cache/jaxalign.',
)
_define(
    flags.DEFINE_bool, 'skip_bad_records', False, 'Skip and count malformed records, rather than stop at the first.'
)
_define(
    flags.DEFINE_string,
    'mesh',
    '',
    'Sizes of the mesh axes data, fsdp, tensor, context and expert, as fsdp:4,tensor:2; -1 is the rest. Default:'
    ' fsdp:-1.',
)
_define(flags.DEFINE_string, 'dcn_mesh', '', 'The same between slices of a multi-slice TPU job. Default: data:-1.')
_define(flags.DEFINE_string, 'workdir', None, 'Where the run is kept; the same command resumes it. Default: runs/ALGO.')
_define(flags.DEFINE_integer, 'steps', None, 'Optimizer steps of the whole run.', lower_bound=1)
_define(flags.DEFINE_integer, 'seed', 0, 'Seed of data order, initialisation and sampling.')
_define(flags.DEFINE_integer, 'log_every', None, 'Steps between logged lines.', lower_bound=1)
_define(flags.DEFINE_integer, 'eval_every', None, 'Steps between evaluations; 0: only before and after.', lower_bound=0)
_define(flags.DEFINE_integer, 'save_every', None, 'Steps between checkpoints; 0: only the last.', lower_bound=0)
_define(flags.DEFINE_multi_string, 'gin_file', [], 'A gin file of your own, applied after those of the algorithm.')
_define(flags.DEFINE_multi_string, 'gin', [], "A gin binding, applied last, as 'preference.dpo.beta=0.2'.")
_define(flags.DEFINE_string, 'checkpoint', None, 'For --mode=eval and sample: a workdir, or one checkpoint in it.')
_define(flags.DEFINE_multi_string, 'prompt', [], 'For --mode=sample: what to continue.')
_define(flags.DEFINE_integer, 'max_new_tokens', 128, 'For --mode=sample: length of the response.', lower_bound=1)
_define(flags.DEFINE_float, 'temperature', 1.0, 'For --mode=sample: 0 is greedy.', lower_bound=0)
_define(flags.DEFINE_bool, 'list', False, 'List the algorithms, one line each.')
_define(flags.DEFINE_bool, 'markdown', False, 'With --list: a table with paper, gin file and test.')
_define(
    flags.DEFINE_bool,
    'debug',
    False,
    'Locate NaNs, forbid implicit transfers between host and device, and print shapes. Slow.',
)
_define(flags.DEFINE_bool, 'help', False, 'Show this.', short_name='h')

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
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  try:
    rest = _FLAGS(list(sys.argv if argv is None else argv))[1:]
    if rest:
      raise types.UsageError(f'unexpected argument {rest[0]!r}; flags are written --name=value')
    _dispatch()
  except (types.UsageError, flags.Error) as err:
    _say(f'jaxalign: {_one_line(err)}')
    return 2
  except types.RunError as err:
    _say(f'jaxalign: {_one_line(err)}')
    return 1
  except KeyboardInterrupt:
    _say('jaxalign: interrupted; the same command resumes from the last checkpoint')
    return 1
  return 0


def _say(text: str) -> None:
  sys.stderr.write(text + '\n')


def _one_line(err: Exception) -> str:
  return ' '.join(str(err).split())


def _dispatch() -> None:
  if _FLAGS.help:
    sys.stdout.write(f'{__doc__}\n{_FLAGS.get_help()}\n')
  elif _FLAGS.list:
    sys.stdout.write(config.table() if _FLAGS.markdown else config.listing())
  else:
    {'train': _train, 'eval': _evaluate, 'sample': _sample, 'show': _show}[_FLAGS.mode]()


def _parse(algo: str, model: str, data: str | None) -> None:
  """Parses the algorithm's gin file, those of a built-in model or data set, and the user's, in that order."""
  config.check_algorithm(algo)
  bindings = list(_FLAGS.gin)
  for flag in ('steps', 'log_every', 'eval_every', 'save_every'):
    if _FLAGS[flag].value is not None:
      bindings.append(f'loop.Options.{flag} = {_FLAGS[flag].value}')
  files = []
  for folder, name in (('models', model), ('data', data or '')):
    name = name.removeprefix('builtin:').split(':')[0].split('[')[0]
    if config.exists(f'{folder}/{name}.gin'):
      files.append(f'{folder}/{name}.gin')
  config.parse(algo, files=files, user_files=_FLAGS.gin_file, bindings=bindings)


def _job(recipe: recipe_lib.Recipe, run: dict | None = None) -> recipe_lib.Job:
  """What the flags say; in a mode that starts from a checkpoint, `run` (its run.json) says the rest."""
  run = run or {}
  data = _FLAGS.data or run.get('data') or recipe.data
  # Held-out data that belong to the default training data say nothing about other data.
  default_eval = '' if _FLAGS.data else run.get('eval_data', recipe.eval_data)
  algo = _FLAGS.algo or run.get('algo') or ''
  mesh = sharding.make_mesh(_FLAGS.mesh, _FLAGS.dcn_mesh)
  logging.info('%d %s devices, mesh %s', mesh.size, sharding.platform_of(mesh), dict(mesh.shape))
  cache = (
      _FLAGS.cache_dir or pathlib.Path(os.environ.get('XDG_CACHE_HOME', pathlib.Path.home() / '.cache')) / 'jaxalign'
  )
  return recipe_lib.Job(
      algo=algo,
      workdir=pathlib.Path(_FLAGS.workdir or f'runs/{algo}').absolute(),
      mesh=mesh,
      seed=_FLAGS.seed,
      model=_FLAGS.model or run.get('model_spec') or recipe_lib.DEFAULT_MODEL,
      tokenizer=_FLAGS.tokenizer or run.get('tokenizer', ''),
      data=data,
      eval_data=_FLAGS.eval_data or default_eval,
      data_dir=_FLAGS.data_dir,
      cache_dir=pathlib.Path(cache).absolute(),
      skip_bad_records=_FLAGS.skip_bad_records,
      debug=_FLAGS.debug,
  )


def _start() -> None:
  """Joins the other processes of a job and sets what holds for the whole process."""
  sharding.start_distributed()
  jax.config.update('jax_threefry_partitionable', True)
  if _FLAGS.debug:
    jax.config.update('jax_debug_nans', True)


def _train() -> None:
  if _FLAGS.algo is None:
    raise types.UsageError(f'--algo is needed: {", ".join(config.algorithms())} (--list describes them)')
  _start()
  _parse(_FLAGS.algo, _FLAGS.model or recipe_lib.DEFAULT_MODEL, _FLAGS.data)
  recipe = config.get('recipe.Recipe')()
  job = _job(recipe)
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


def _restored() -> tuple[pathlib.Path, dict]:
  """The checkpoint folder of --checkpoint and its run.json."""
  if _FLAGS.checkpoint is None:
    raise types.UsageError(f'--mode={_FLAGS.mode} needs --checkpoint=DIR (a workdir, or one checkpoint in it)')
  folder, _ = checkpoint.find(_FLAGS.checkpoint)
  return folder, json.loads((folder / 'run.json').read_text(encoding='utf-8'))


def _evaluate() -> None:
  folder, run = _restored()
  _start()
  config.parse_saved((folder / 'config.gin').read_text(encoding='utf-8'), _FLAGS.gin_file, _FLAGS.gin)
  recipe = config.get('recipe.Recipe')()
  job = _job(recipe, run)
  values = config.get('evaluate.evaluate')(job, _FLAGS.checkpoint, recipe=recipe)
  if jax.process_index() == 0:
    sys.stdout.write(json.dumps(values, indent=1) + '\n')


def _sample() -> None:
  _restored()
  if not _FLAGS.prompt:
    raise types.UsageError("--mode=sample needs --prompt='...' (repeatable)")
  _start()
  mesh = sharding.make_mesh(_FLAGS.mesh, _FLAGS.dcn_mesh)
  for prompt, response in evaluate.respond(
      _FLAGS.checkpoint,
      mesh,
      _FLAGS.prompt,
      max_new_tokens=_FLAGS.max_new_tokens,
      temperature=_FLAGS.temperature,
      seed=_FLAGS.seed,
  ):
    if jax.process_index() == 0:
      sys.stdout.write(f'{prompt}{response}\n')


def _show() -> None:
  if _FLAGS.algo is None:
    raise types.UsageError(f'--mode=show needs --algo, one of {", ".join(config.algorithms())}')
  _parse(_FLAGS.algo, _FLAGS.model or recipe_lib.DEFAULT_MODEL, _FLAGS.data)
  recipe = config.get('recipe.Recipe')()
  sys.stdout.write(streams.show(_job(recipe), recipe))


def run() -> None:
  """Entry point of the console script."""
  sys.exit(main())


if __name__ == '__main__':
  run()
