"""jaxalign: aligns language models.

    python -m jaxalign.main --algo=dpo
    python -m jaxalign.main --algo=sft --model=DIR --data=jsonl:train.jsonl --eval_data=jsonl:test.jsonl --steps=500
    python -m jaxalign.main --mode=eval --checkpoint=runs/a
    python -m jaxalign.main --mode=sample --checkpoint=runs/a --prompt='Once upon a time'
    python -m jaxalign.main --mode=sample --checkpoint=runs/a --prompt='Once' --decode=best_of_n --reward=runs/rm
    python -m jaxalign.main --mode=score --checkpoint=runs/rm --data=jsonl:pairs.jsonl
    python -m jaxalign.main --mode=score --reward=my_rewards.py:score --data=jsonl:samples.jsonl
    python -m jaxalign.main --mode=show --algo=dpo --data=jsonl:pairs.jsonl
    python -m jaxalign.main --mode=plan --algo=dpo --model=llama3_1_8b --topology=v5p:4x4x4
    python -m jaxalign.main --list

Exit codes: 0, 2 for a wrong flag or binding, 1 for a run that failed, 75 for one that was stopped, by SIGTERM or as
another process of it is gone, and resumes (134 where JAX sees that first and aborts; launch/local.sh makes 75 of it).
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import json
import pathlib
import re
import sys
from typing import Any

if __name__ == '__main__':  # Before what takes long to import: the process may begin anew.
  from jaxalign import pages

  pages.begin_with_huge(['-m', 'jaxalign.main'])

from absl import flags
from absl import logging
import jax

from jaxalign import checkpoint
from jaxalign import compiling
from jaxalign import profiling
from jaxalign import recipe as recipe_lib
from jaxalign import respond
from jaxalign import resume
from jaxalign import score
from jaxalign import sharding
from jaxalign import steering
from jaxalign import storage
from jaxalign import streams
from jaxalign import types
from jaxalign.cli import catalog
from jaxalign.cli import command
from jaxalign.cli import config
from jaxalign.cli import terminal
from jaxalign.data import sources
from jaxalign.planning import search
from jaxalign.planning import topology as topology_lib
from jaxalign.rewards import functions
from jaxalign.rewards import modelled

_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit code."""
  terminal.set_up_logging()
  try:
    _dispatch(command.parse(list(sys.argv if argv is None else argv)))
  except (types.UsageError, flags.Error) as err:
    return _fail(str(err), 2)
  except types.RunError as err:
    return _fail(str(err), 1)
  except types.Preempted as err:
    return _fail(str(err), _AGAIN)
  except jax.errors.JaxRuntimeError as err:
    if not terminal.lost_process(err):
      raise
    terminal.leave(_fail(f'another process of this job is gone, as its log may tell; resume all ({err})', _AGAIN))
  except TypeError as err:
    if not (problem := config.unbound(err)):
      raise
    return _fail(problem, 2)
  except FloatingPointError as err:
    return _fail(terminal.located(err), 1)
  except storage.errors() as err:
    return _fail(re.sub(r'\[Errno \d+\] ', '', str(err)), 1)
  except KeyboardInterrupt:
    return _fail('interrupted; the same command resumes from the last checkpoint', 1)
  return 0


def _fail(message: str, code: int) -> int:
  message = message.split('\n  In call to configurable')[0]  # what gin adds to an exception that passes through it
  sys.stderr.write(f'jaxalign: {" ".join(message.split())}\n')
  return code


def _dispatch(args: flags.FlagValues) -> None:
  if args.help:
    sys.stdout.write(command.describe(__doc__ or ''))
  elif args.list:
    sys.stdout.write(catalog.table() if args.markdown else catalog.listing())
  else:
    modes = {'train': _train, 'eval': _evaluate, 'sample': _sample, 'score': _score, 'show': _show, 'plan': _plan}
    if args.mode not in modes:
      raise types.UsageError(f'--mode={args.mode}: it is one of {", ".join(modes)}')
    command.check_mode(args)
    storage.keep_copies(_cache_dir(args) / 'copies')
    modes[args.mode](args)


def _configure(args: flags.FlagValues) -> recipe_lib.Recipe:
  """Parses the gin files of the algorithm, of a named model or data set, and the user's, in that order."""
  if args.algo is None:
    raise types.UsageError(f'--algo is needed: {", ".join(catalog.algorithms())} (--list describes them)')
  catalog.check_algorithm(args.algo)
  bindings = command.bindings(args)
  parse = lambda files: config.parse(args.algo, files=files, user_files=args.gin_file, bindings=bindings)
  files = catalog.own_files('models', [args.model or recipe_lib.DEFAULT_MODEL])
  parse(files)
  # Which data there are by default is bound in gin, so it is known only now.
  data = args.data or config.query('recipe.Recipe.data')
  online = catalog.is_online(args.algo)
  data_files = catalog.own_files(
      'data', [spec for spec, _ in sources.parse_mixture(data)], ['', '_online'][: 1 + online]
  )
  if online and (args.reward or args.environment or args.eval_data):
    data_files.append(catalog.HELD_OUT_PROMPTS)
  if data_files:
    parse([*files, *data_files])
  recipe = config.recipe()
  given = [*map('--reward={}'.format, args.reward), *map('--environment={}'.format, filter(None, [args.environment]))]
  if recipe.rollouts is None and given:
    raise types.UsageError(f'{given[0]}: --algo={args.algo} samples nothing that could be judged')
  recipe_lib.check_model(recipe, args.model, args.tokenizer, is_named=bool(files))
  return _with_scorings(recipe, lambda: parse([*files, *data_files]))


def _with_scorings(recipe: recipe_lib.Recipe, parse: Callable[[], None]) -> recipe_lib.Recipe:
  """The same, whose rollouts know how models among their rewards score; `parse` parses it again."""
  scorings = _scorings(recipe.rollouts.rewards) if recipe.rollouts is not None else {}
  if not scorings:
    return recipe
  parse()  # Their recipes have taken the place of this one.
  recipe = config.recipe()
  assert recipe.rollouts is not None
  return dataclasses.replace(recipe, rollouts=dataclasses.replace(recipe.rollouts, scorings=scorings))


def _scorings(rewards: Sequence[str]) -> dict[str, modelled.Scoring]:
  """What the recipes of models among some rewards say of how they score, by directory; gin has the last of them."""
  found = {}
  for model in map(functions.parse, filter(functions.is_model, rewards)):
    for directory in model.directories if isinstance(model, modelled.Model) else ():
      run = recipe_lib.run_of(directory)
      if run.get('scored_fn'):
        config.parse_saved([run['bindings']], [], [])
        found[directory] = config.scoring()
  return found


def _job(args: flags.FlagValues, defaults: Mapping[str, Any], devices: list[Any] | None = None) -> recipe_lib.Job:
  """What the flags say, and `defaults` (data of the recipe, the run.json of a checkpoint) where they say nothing."""
  algo = args.algo or defaults.get('algo', '')
  there = {} if devices is None else {'devices': devices}
  mesh = sharding.make_mesh(args.mesh, args.dcn_mesh, **there)
  logging.info('%d %s devices, mesh %s', mesh.size, sharding.platform_of(mesh), dict(mesh.shape))
  return recipe_lib.Job(
      algo=algo,
      workdir=storage.absolute(args.workdir or f'runs/{algo}'),
      mesh=mesh,
      seed=defaults.get('seed', 0) if args.seed is None else args.seed,
      model=args.model or defaults.get('model_spec', recipe_lib.DEFAULT_MODEL),
      tokenizer=args.tokenizer or defaults.get('tokenizer', ''),
      data=args.data or defaults['data'],
      eval_data=defaults['eval_data'] if args.eval_data is None else args.eval_data,
      data_dir=args.data_dir,
      cache_dir=_cache_dir(args),
      skip_bad_records=args.skip_bad_records,
      debug=args.debug,
  )


def _of(recipe: recipe_lib.Recipe) -> dict[str, Any]:
  return {'data': recipe.data, 'eval_data': recipe.eval_data}


def _cache_dir(args: flags.FlagValues) -> pathlib.Path:
  if storage.is_remote(args.cache_dir or ''):
    raise types.UsageError(f'--cache_dir={args.cache_dir}: it is on a disk of this machine')
  return pathlib.Path(args.cache_dir or storage.cache_dir()).absolute()


def _start(args: flags.FlagValues) -> None:
  """Joins the other processes of a job and sets what holds for the whole process."""
  compiling.keep_programs(_cache_dir(args))
  compiling.tune_compiler()
  sharding.start_distributed()
  jax.config.update('jax_threefry_partitionable', True)
  if args.debug:
    jax.config.update('jax_debug_nans', True)


def _train(args: flags.FlagValues) -> None:
  stdout = sys.stdout  # What judges a rollout that nobody waits for may still send it elsewhere.
  recipe = _configure(args)
  config.check_reachable('train.train', 'recipe.Recipe')
  if recipe.rollouts is not None:
    _check_judged(args, args.data or recipe.data)
  _start(args)
  job = _job(args, _of(recipe))
  if config.is_users('loop.Options.profile'):
    profiling.folder(job.workdir)
  bindings = config.bindings()
  summary = resume.finished(job, bindings, config.query('loop.Options.steps'))
  if summary is None:
    resume.check_writable(job.workdir)
    configured = lambda: (bindings, config.checked_operative())
    summary = config.get('train.train')(job, recipe=recipe, config=configured)
  if jax.process_index() == 0:
    stdout.write(json.dumps(summary, indent=1) + '\n')


def _check_judged(args: flags.FlagValues, data: str) -> None:
  """Raises UsageError where responses to the user's own prompts would be judged as those to the package's are."""
  theirs = [spec for spec, _ in sources.parse_mixture(data) if not spec.startswith('builtin:')]
  if theirs and not (args.reward or args.environment or config.is_users('rollouts.Options.rewards')):
    raise types.UsageError(
        f'--data={theirs[0]}: nothing says what judges responses to it; give --reward=MODULE:FUNCTION or DIR, or'
        ' --environment (the built-in prompts of stories are judged by jaxalign.rewards.rules:vader)'
    )


def _restored(args: flags.FlagValues) -> tuple[storage.Path, dict]:
  """The checkpoint folder of --checkpoint and its run.json."""
  if args.checkpoint is None:
    raise types.UsageError(f'--mode={args.mode} needs --checkpoint=DIR (a workdir, or one checkpoint in it)')
  folder, _ = checkpoint.find(args.checkpoint, '--checkpoint=')
  return folder, checkpoint.read_json(folder / 'run.json')


def _evaluate(args: flags.FlagValues) -> None:
  folder, run = _restored(args)
  if run['bindings'] is None:
    raise types.UsageError(f'--checkpoint={args.checkpoint}: it was imported, and no run says how to evaluate it')
  _start(args)
  # What training used, and beneath it what was bound for evaluation alone.
  saved = [run['bindings'], (folder / 'config.gin').read_text(encoding='utf-8')]
  if args.eval_data and catalog.is_online(run['algo']):
    saved.append(f"include '{catalog.HELD_OUT_PROMPTS}'")
  parse = lambda: config.parse_saved(saved, args.gin_file, args.gin)
  parse()
  config.check_reachable('evaluate.evaluate', 'recipe.Recipe')
  recipe = _with_scorings(config.recipe(), parse)
  job = _job(args, _of(recipe) | run)
  values = config.get('evaluate.evaluate')(job, args.checkpoint, recipe=recipe)
  config.checked_operative()
  if jax.process_index() == 0:
    sys.stdout.write(json.dumps(values, indent=1) + '\n')


def _sample(args: flags.FlagValues) -> None:
  spec = _model_of(args)
  if bool(args.prompt) == bool(args.data):
    raise types.UsageError("--mode=sample needs --prompt='...' (repeatable), or --data=SPEC with prompts: one of them")
  is_single = len(args.prompt) == args.samples_per_prompt == 1 and not args.decode and not args.reward
  if args.stream and not is_single:
    raise types.UsageError(
        '--stream shows one response: give one --prompt, and no --data, --samples_per_prompt, --decode or --reward'
    )
  options, draw_fn = steering.configured(args, command.sampling_options(args), _scorings)
  _start(args)
  if not args.data:
    as_written = is_single and (sys.stdout.isatty() if args.stream is None else args.stream)
    mesh = sharding.make_mesh(args.mesh, args.dcn_mesh)
    respond.write(spec, mesh, args.prompt, options, seed=args.seed or 0, as_written=as_written, draw_fn=draw_fn)
    return
  found = respond.to_records(_job(args, {'model_spec': spec, 'eval_data': ''}), options, draw_fn)
  if jax.process_index() == 0:
    sys.stdout.writelines(sources.to_json(record) + '\n' for record in found)


def _score(args: flags.FlagValues) -> None:
  spec = '' if args.reward else _model_of(args)
  if not args.data:
    raise types.UsageError('--mode=score needs --data=SPEC, the responses to score')
  on_devices = not args.reward or any(map(functions.is_model, args.reward))  # Functions want none, and ask for none.
  if args.reward:
    options = {'data_dir': args.data_dir, 'tokenizer': args.tokenizer, 'skip_bad_records': args.skip_bad_records}
    if on_devices:
      options |= {'own': _scorings(args.reward), 'row_length': args.row_length}
      _start(args)
      options['mesh'] = sharding.make_mesh(args.mesh, args.dcn_mesh)
    found = score.by_rewards(args.reward, args.data, how=args.combine, **options)
  else:
    _start(args)
    job = _job(args, {'model_spec': spec, 'eval_data': ''})
    found = score.score(job, per=args.per, row_length=args.row_length, recipe=_scoring_recipe(args, spec))
  for one in found:
    if not on_devices or jax.process_index() == 0:
      sys.stdout.write(sources.to_json(one) + '\n')


def _scoring_recipe(args: flags.FlagValues, spec: str) -> recipe_lib.Recipe | None:
  """The recipe of the run that trained a model, and of --gin_file, where it says what is read to score a response."""
  run = recipe_lib.run_of(spec)
  if args.gin_file and not run.get('bindings'):
    raise types.UsageError(f'--gin_file: it is read behind the bindings of a run, and {spec} is of none')
  if not args.gin_file and not run.get('scored_fn'):
    return None
  config.parse_saved([run['bindings']], args.gin_file, [])
  return config.recipe()


def _model_of(args: flags.FlagValues) -> str:
  """The one of --checkpoint and --model that was given."""
  if bool(args.checkpoint) == bool(args.model):
    raise types.UsageError(f'--mode={args.mode} needs --checkpoint=DIR, or --model=DIR of Hugging Face: one of them')
  if args.checkpoint:
    checkpoint.find(args.checkpoint, '--checkpoint=')
  return args.checkpoint or args.model


def _show(args: flags.FlagValues) -> None:
  recipe = _configure(args)
  sys.stdout.write(streams.show(_job(args, _of(recipe)), recipe))


def _plan(args: flags.FlagValues) -> None:
  if not args.topology:
    raise types.UsageError('--mode=plan needs --topology=CHIP:SIZES, as v5e:4x4 or v5p:4x4x4')
  topology = topology_lib.find(args.topology, args.num_slices)
  if catalog.own_files('models', [args.model or '']) and not args.tokenizer:
    args['tokenizer'].value = recipe_lib.DEFAULT_MODEL  # Of shapes alone any will do.
  recipe = _configure(args)
  config.check_reachable('planning.plan.plan', 'recipe.Recipe')
  job = _job(args, _of(recipe), topology.devices)
  plan = functools.partial(config.get('planning.plan.plan'), topology=topology, is_data_known=bool(args.data))
  how = topology, args.mesh, args.dcn_mesh, command.planned(args, search.BOUND)
  found = search.planned(job, recipe, plan, *how) if args.search else plan(job, recipe=recipe)
  sys.stdout.write(json.dumps(found.to_json(), indent=1) + '\n' if args.json else found.table())


def run() -> None:
  """Entry point of the console script."""
  terminal.quiet_failed_saves()
  sys.exit(main())


if __name__ == '__main__':
  run()
