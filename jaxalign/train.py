"""The loop of every algorithm, on data or on what the policy samples, by one step."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import json
from typing import Any
from typing import NamedTuple

from absl import logging
import jax

from jaxalign import checkpoint
from jaxalign import evaluate
from jaxalign import forward
from jaxalign import loop
from jaxalign import metrics
from jaxalign import needs as needs_lib
from jaxalign import objectives
from jaxalign import opening
from jaxalign import optim
from jaxalign import profiling
from jaxalign import recipe as recipe_lib
from jaxalign import reference
from jaxalign import step as step_lib
from jaxalign import storage
from jaxalign import streams as streams_lib
from jaxalign import types
from jaxalign.data import tokenizers
from jaxalign.models import lora
from jaxalign.models import transformer
from jaxalign.rl import collapse
from jaxalign.rl import rollouts


def train(
    job: recipe_lib.Job,
    *,
    recipe: recipe_lib.Recipe,
    optimizer: Callable[[int], optim.Optimizer],
    options: loop.Options,
    checkpoints: checkpoint.Options,
    samples: evaluate.Samples | None,
    config: Callable[[], tuple[str, str]],
) -> dict[str, Any]:
  """Trains, or goes on where an earlier run of the same workdir stopped, and evaluates before and after.

  Args:
    job: what the flags say.
    recipe: the algorithm.
    optimizer: makes the optimizer from the number of steps.
    options: how long and how often.
    checkpoints: how many stay.
    samples: what is sampled before and after, None for nothing.
    config: called when everything has been called once; checks that every binding was used, and returns the bindings
      and the operative configuration as texts.

  Returns:
    The content of summary.json.
  """
  with jax.set_mesh(job.mesh):
    tokenizer = recipe_lib.open_tokenizer(job)
    counter, follows, preemption = metrics.Compilations(), recipe.sync is not None, loop.Preemption()
    opened = _open(job, recipe, tokenizer, options.steps, counter, preemption)
    model, objective, streams, (trained, frozen), critic, flops = opened
    store = checkpoint.Store(job.workdir / 'checkpoints', checkpoints)
    ref = reference.Reference.of(model, trained, frozen)
    base = _keep_base(job, store, ref) if streams.reference or frozen or recipe.rollouts is not None else ''
    opt = optimizer(options.steps)
    # Of frozen parameters there is no copy to be made.
    has_live = streams.live or (bool(frozen) and recipe.rollouts is not None)
    own = recipe_lib.reference_of(recipe, job.mesh, model) if has_live else None
    live = own and reference.Reference.of(model, trained, frozen, follows=follows).kept(follows, own)
    state, data_state = _start(job, store, trained | critic, opt, streams.needs.state, follows)
    logging.info('memory of a device: %s', _memory(state, frozen, live))
    kept = functools.partial(checkpoint.load_base, job.workdir / 'checkpoints', model, job.mesh)
    evaluator = evaluate.Evaluator(
        job,
        recipe,
        model,
        tokenizer,
        streams,
        samples,
        counter,
        frozen,
        live,
        kept if recipe.rollouts and not frozen else None,
    )
    before, whole = _before(job, evaluator, state), _Whole(evaluator)
    max_kl = None if recipe.rollouts is None else recipe.rollouts.max_kl
    step = step_lib.make_step(objective, opt, recipe.sync, max_kl)
    tools = loop.Tools(
        step_fn=_jit_step(job, counter.counted(step), state, frozen, live and live.moving),
        evaluate=lambda now: whole(now).metrics() if recipe.rollouts else evaluator.held_out(*_evaluated(now)),
        store=store,
        writer=(metrics.Writer if recipe.rollouts is None else collapse.Writer)(job.workdir, int(state.step)),
        clock=metrics.Clock(data_state['num_tokens']),
        epoch_of=streams.epochs,
        constants=lambda place: {'compilations': counter.count, **streams.said(place)},
        flops_per_token=flops,
        after_first_step=functools.partial(_save_run, job, recipe, model, tokenizer, base, streams.needs, config),
        debug=job.debug,
        preemption=preemption,
    )
    if job.debug:
      _show_shapes(state)
    place = data_state['epoch'], data_state['step']
    newest = _Newest(tools.step_fn, state, frozen, live, recipe.sync)
    batches = streams.training_batches(place, newest.params)
    if options.profile is not None:
      into = profiling.folder(job.workdir)
      batches = profiling.recorded(batches, options.profile, into, done=int(state.step), wait=newest.wait)
    with contextlib.closing(tools.writer):
      state = loop.run(state, batches, options, dataclasses.replace(tools, step_fn=newest))
      after = whole(state)
      store.close()
    return _finish(job, state, before, after, tools, streams, counter)


def _evaluated(state: step_lib.TrainState) -> tuple[types.PyTree, types.PyTree, types.PyTree]:
  return state.params, state.loss_state, state.reference


class _Whole:
  """Evaluates the whole of a state, the newest once."""

  def __init__(self, evaluator: evaluate.Evaluator):
    self._evaluator, self._found = evaluator, dict[int, evaluate.Whole]()

  def __call__(self, state: step_lib.TrainState) -> evaluate.Whole:
    step = int(state.step)
    if step not in self._found:
      self._found = {step: self._evaluator.whole(*_evaluated(state))}
    return self._found[step]


class _Newest:
  """A step that remembers the state which it returned last, for who needs the policy between two steps."""

  def __init__(
      self,
      step_fn: Callable,
      state: step_lib.TrainState,
      frozen: types.PyTree,
      live: reference.Reference | None,
      sync: reference.Sync | None,
  ):
    self._step_fn, self._state, self._frozen, self._live, self._sync = step_fn, state, frozen, live, sync
    self._moved = jax.jit(sync.moved) if sync is not None else lambda *_: None

  def __call__(self, state: step_lib.TrainState, batch: types.Batch):
    self._state, measured = self._step_fn(state, batch)
    return self._state, measured

  def wait(self) -> None:
    """Until the step that returned the state is over."""
    jax.block_until_ready(self._state)

  def params(self) -> rollouts.Params:
    """Those of all models, as the next step begins with them."""
    policy, critic = forward.divided(self._state.params)
    whole = lambda trained: lora.join(trained, self._frozen)
    ref = None
    if self._live is not None:
      ref = lora.join(self._followed(policy) if self._sync is not None else self._live.moving, self._live.fixed)
    own = None if critic is None else whole(critic)
    return rollouts.Params(whole(policy), own, ref, self._state.loss_state, int(self._state.step))

  def _followed(self, policy: types.PyTree) -> types.PyTree:
    now = self._state
    due = self._sync is not None and int(now.step) % self._sync.every == 0
    return self._moved(now.reference, policy, now.step) if due else now.reference


class _Opened(NamedTuple):
  """What a run begins with.

  `critic` is `{}` or the parameters of one, under their name; `flops_per_token` are those of a step.
  """

  model: transformer.Transformer
  objective: objectives.Objective
  streams: Any
  params: opening.Params
  critic: dict[str, types.PyTree]
  flops_per_token: float


def _open(
    job,
    recipe: recipe_lib.Recipe,
    tokenizer: tokenizers.Tokenizer,
    steps: int,
    counter: metrics.Compilations,
    preemption: loop.Preemption,
) -> _Opened:
  """Model, objective, data and parameters; what does not go together is refused before a weight is read."""
  model, params = opening.open_model(job, recipe, tokenizer)
  critic_model, critic_params = opening.open_critic(job, recipe, tokenizer)
  streams: streams_lib.Streams | streams_lib.Online
  if recipe.rollouts is not None:
    between = preemption.between if jax.process_count() > 1 else None
    streams = streams_lib.open_prompts(job, recipe, tokenizer, model, critic_model, between=between)
  else:
    streams = streams_lib.open_streams(job, recipe, tokenizer, train=True)
  ref_model = recipe_lib.reference_of(recipe, job.mesh, model).model if streams.live else None
  objective = needs_lib.bind(recipe, model, streams.needs, ref_model, critic_model)
  first = params()
  if isinstance(streams, streams_lib.Streams) and streams.cached:
    ref = reference.Reference.of(model, *first)
    streams = streams_lib.with_reference(streams, job, recipe, ref, steps=steps, counter=counter)
  critic = {} if critic_model is None else {forward.CRITIC: critic_params(first.frozen)}
  length = recipe.packing.row_length
  flops = needs_lib.flops_per_token(streams.needs, model, critic_model, length, live=streams.live)
  return _Opened(model, objective, streams, first, critic, flops)


def _keep_base(job, store: checkpoint.Store, ref: reference.Reference) -> str:
  """Saves what the run begins with, and returns its checksum.

  Raises:
    RunError: the run is resumed, and began with something else.
  """
  checksum, folder = reference.checksum(ref.params), job.workdir / 'checkpoints'
  if store.latest() is None:
    checkpoint.save_base(folder, ref)
    return checksum
  checkpoint.check_shapes(folder / 'base', ref.fixed or ref.moving)
  if checkpoint.read_json(folder / 'run.json').get('base', checksum) != checksum:
    raise types.RunError(
        f'--model={job.model}: not the weights that the run in {job.workdir} began with; restore them, or choose'
        ' another --workdir'
    )
  return checksum


def _start(
    job, store: checkpoint.Store, params, opt: optim.Optimizer, loss_state: types.PyTree, follows: bool
) -> tuple[step_lib.TrainState, dict[str, int]]:
  """The newest checkpoint's state, or a fresh one; and the place in the data. Neither leaves anything of `params`."""
  abstract = step_lib.abstract_state(job.mesh, params, opt.tx, job.seed, loss_state, follows, opt.memory)
  step = store.latest()
  if step is not None:
    logging.info('resuming at step %d from %s', step, job.workdir)
    for x in jax.tree.leaves(params):
      x.delete()  # What is restored takes its place, as a fresh state takes it over.
    return store.restore(step, abstract)
  init = lambda fresh: step_lib.init_state(fresh, opt.tx, job.seed, loss_state, follows)
  state = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract), donate_argnums=0)(params)
  return state, {'epoch': 0, 'step': 0, 'num_tokens': 0}


def _memory(state: step_lib.TrainState, frozen: types.PyTree, live: reference.Reference | None) -> str:
  """What each model of a run takes of a device, and what goes along with training."""
  size = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)) / 1e6
  policy, critic = forward.divided(state.params)
  is_away = any(x.sharding.memory_kind == 'pinned_host' for x in jax.tree.leaves(state.opt_state))
  optimizer = 'optimizer (in the memory of the host)' if is_away else 'optimizer'
  parts = {'policy': policy, 'critic': critic, 'frozen base': frozen, optimizer: state.opt_state}
  parts['reference'] = state.reference if jax.tree.leaves(state.reference) else live and live.moving
  return ', '.join(f'{name} {size(tree):.1f} MB' for name, tree in parts.items() if jax.tree.leaves(tree))


def _jit_step(job, step: Callable, state: step_lib.TrainState, frozen, ref) -> Callable:
  """The jitted step on (state, batch); the state is donated, except where NaNs are to be located."""
  # The operation that made a NaN is found by running the step again, which needs its arguments.
  jitted = step_lib.jitted(step, job.mesh, state, donate=not job.debug)
  return lambda state, batch: jitted(state, frozen, batch, ref)


def _before(job, evaluator: evaluate.Evaluator, state: step_lib.TrainState) -> evaluate.Whole:
  """The evaluation before the first step; a resumed run reads what it found then."""
  path = job.workdir / 'before.json'
  if path.exists() and int(state.step):
    return evaluate.Whole.from_json(json.loads(path.read_text(encoding='utf-8')))
  found = evaluator.whole(*_evaluated(state), compared=False)
  if jax.process_index() == 0:
    storage.write_text(path, json.dumps(found.to_json()))
  return found


def _save_run(job, recipe, model, tokenizer, base, needs, config) -> None:
  """Writes what a checkpoint needs beside arrays; the first moment at which the operative configuration is known."""
  bindings, operative = config()
  run = {
      'model': model.config.to_json(),
      'lora': model.lora and dataclasses.asdict(model.lora),
      'base': base,
      'writes': needs.writes,
      'scored_fn': recipe.scored_fn is not None,
      'hf_config': recipe_lib.origin(job, recipe),
      'dtype': recipe.dtype,
      'row_length': recipe.packing.row_length,
      'bindings': bindings,
      **job.identity(),
  }
  checkpoint.save_run(job.workdir / 'checkpoints', run, operative, tokenizer)
  if jax.process_index() == 0:
    storage.write_text(job.workdir / 'config.gin', operative)


def _show_shapes(state: step_lib.TrainState) -> None:
  for path, x in jax.tree_util.tree_leaves_with_path(state.params):
    logging.info('%s %s %s %s', jax.tree_util.keystr(path), x.dtype, x.shape, x.sharding.spec)


def write_samples(path: storage.Path, before: evaluate.Sampled, after: evaluate.Sampled) -> None:
  """Writes samples.md: the same prompts before and after training."""
  lines = ['# Samples before and after training', '']
  for (prompt, old), (_, new) in zip(before.shown, after.shown):
    lines += [f'## {" ".join(prompt.split())}', '', '**before:** ' + old.strip(), '', '**after:** ' + new.strip(), '']
  storage.write_text(path, '\n'.join(lines))


def _finish(job, state, before: evaluate.Whole, after: evaluate.Whole, tools, streams, counter) -> dict[str, Any]:
  """Writes samples.md and summary.json."""
  speed = tools.clock.mean()
  summary: dict[str, Any] = dict(after.held_out)
  for name, value in before.held_out.items():
    if name in ('eval/loss', 'eval/accuracy'):  # Margins to the reference are rounding errors then.
      summary[f'{name}_before'] = value
  for when, found in (('before', before), ('after', after)):
    values = found.sampled.metrics.items()
    summary |= {f'eval/{name}_{when}': value for name, value in values if not name.startswith('kl')}
  summary |= {f'eval/{name}': value for name, value in after.sampled.metrics.items() if name.startswith('kl')}
  summary |= streams.report | {
      'steps': int(state.step),
      'skipped_steps': int(state.skipped),
      'num_tokens': tools.clock.seen,
      'tokens_per_s': speed.tokens_per_s,
      'step_time': speed.seconds_per_step,
      'compilations': counter.count,
      'peak_memory_bytes': metrics.peak_memory_bytes(),
  }
  if isinstance(tools.writer, collapse.Writer):
    summary['collapse'] = ', '.join(tools.writer.seen)
  if jax.process_index() == 0:
    if after.sampled.shown:
      write_samples(job.workdir / 'samples.md', before.sampled, after.sampled)
    storage.write_text(job.workdir / 'summary.json', json.dumps(summary, indent=1))
  return summary
