"""The loop that trains: next batch, step, log, evaluate, save, stop."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import signal
from typing import TypeVar

import jax
from jax.experimental import multihost_utils
import numpy as np

from jaxalign import checkpoint
from jaxalign import metrics
from jaxalign import step as step_lib
from jaxalign import types

_T = TypeVar('_T')


@dataclasses.dataclass(frozen=True)
class Options:
  """How long, and how often.

  Attributes:
    steps: optimizer steps of the whole run, skipped ones included.
    log_every: steps between logged lines; each holds the mean over those steps.
    eval_every: steps between evaluations on held-out data; 0 evaluates only before and after.
    save_every: steps between checkpoints; 0 saves only the last.
    max_skipped: consecutive steps that were not finite after which the run stops, at the next line that is logged.
    profile: the first and the last step that JAX's profiler records; None for none.
  """

  steps: int
  log_every: int = 10
  eval_every: int = 0
  save_every: int = 0
  max_skipped: int = 10
  profile: tuple[int, int] | None = None

  def __post_init__(self):
    if self.steps < 1 or self.log_every < 1 or self.max_skipped < 1 or min(self.eval_every, self.save_every) < 0:
      raise types.UsageError(f'loop.{self}: steps, log_every and max_skipped must be at least 1, the others at least 0')
    if self.profile is not None and not 1 <= self.profile[0] <= self.profile[1] <= self.steps:
      raise types.UsageError(f'--profile={self.profile[0]}:{self.profile[1]}: the run has {self.steps} steps')


class Preemption:
  """Whether the machine is about to be taken away, which SIGTERM announces; with `with`, the signal does nothing else.

  The wait for a batch ends: a rollout may take longer than the machine is left. In a job of one process it does so at
  once. In a job of several JAX listens, and all of them learn of it at the same step, or the same call of `between`.
  """

  def __init__(self):
    self._told = self._waits = False
    self._asked = 0

  def __enter__(self) -> 'Preemption':
    if jax.process_count() == 1:
      self._before = signal.signal(signal.SIGTERM, self._tell)
    return self

  def __exit__(self, *_) -> None:
    if jax.process_count() == 1:
      signal.signal(signal.SIGTERM, self._before)

  def _tell(self, *_) -> None:
    self._told = True
    if self._waits:
      self._waits = False  # The signal may come again, while what was waited for is given up.
      raise _Told

  def until(self, batches: Iterable[_T]) -> Iterator[_T]:
    """The same batches up to the signal, also where that comes while the next is made."""
    iterator = iter(batches)
    with contextlib.suppress(_Told):
      while not self._told:
        self._waits = True
        batch = next(iterator, None)
        self._waits = False
        if batch is None:
          return
        yield batch

  def reached(self) -> bool:
    """Whether to save and stop; called at every step."""
    self._asked += 1
    if multihost_utils.reached_preemption_sync_point(self._asked):
      self._told = True
    return self._told

  def between(self) -> None:
    """Ends the wait for a batch where it is time; called by what makes one, as often in every process."""
    if self.reached():
      raise _Told


class _Told(BaseException):
  """SIGTERM came while a batch was waited for; whoever makes batches does not catch it."""


@dataclasses.dataclass
class Tools:
  """What a loop works with beside its state.

  Attributes:
    step_fn: the jitted step; the state is donated.
    evaluate: metrics of held-out data by name.
    store: where checkpoints go.
    writer: where metrics go.
    clock: measures the steps.
    epoch_of: epochs consumed, as a number, of a data state.
    constants: metrics that are not a step's, by the data state behind it: compilations, dropped and truncated records,
      what was sampled.
    flops_per_token: of the model, forward and backward, for its utilisation.
    after_first_step: called when everything that a step uses has been called once.
    debug: forbid implicit transfers between host and device.
    preemption: tells when to stop.
  """

  step_fn: Callable[[step_lib.TrainState, types.Batch], tuple[step_lib.TrainState, step_lib.Packed]]
  evaluate: Callable[[step_lib.TrainState], Mapping[str, float]]
  store: checkpoint.Store
  writer: metrics.Writer
  clock: metrics.Clock
  epoch_of: Callable[[tuple[int, int]], float]
  constants: Callable[[tuple[int, int]], Mapping[str, float]]
  flops_per_token: float
  after_first_step: Callable[[], None]
  debug: bool = False
  preemption: Preemption = dataclasses.field(default_factory=Preemption)


def run(
    state: step_lib.TrainState,
    batches: Iterator[tuple[tuple[int, int], types.Batch]],
    options: Options,
    tools: Tools,
) -> step_lib.TrainState:
  """Trains from `state` to `options.steps`; the last step is evaluated and saved.

  The first step is logged by itself, at once; after it nothing waits for the device: an interval is fetched and logged
  when the first step of the next one has been dispatched.

  Args:
    state: fresh or restored.
    batches: yields the data state after the batch, and the batch.
    options: how long and how often.
    tools: what to call.

  Raises:
    RunError: too many consecutive steps were not finite, or a checkpoint could not be written, or a reward failed; the
      steps before that are saved, in a job of several processes where all of them fail alike (`everywhere`).
    Preempted: SIGTERM came, and the step that was running, or the last before it, is saved.
  """
  first = step = int(state.step)
  if first >= options.steps:  # A run that went further: what it would read next was not prepared.
    _check_finite(first, int(state.skipped_in_row), options)
    return state
  due = lambda every: step == options.steps or (every > 0 and step % every == 0)
  running: list[step_lib.Packed] = []
  waiting: _Interval | None = None
  evaluated: Mapping[str, float] = {}
  saving = stopping = False
  failures: list[Exception] = []
  with contextlib.closing(metrics.Progress(step, options.steps)) as progress, tools.preemption as preemption:
    for data_state, batch in preemption.until(tools.clock.waiting(_until_failure(batches, failures))):
      with jax.transfer_guard('disallow') if tools.debug and step > first else contextlib.nullcontext():
        state, measured = tools.step_fn(state, batch)
      if waiting is not None:
        _write(waiting.step, _fetch(waiting, tools), options, tools, progress, failures)
        waiting = None
      running.append(measured)
      step += 1
      progress.advance()
      stopping = preemption.reached()
      saving = stopping or due(options.save_every)
      pausing = saving or step == first + 1 or due(options.eval_every)
      if pausing or due(options.log_every):
        waiting, running = _Interval(step, data_state, running), []
      if pausing and waiting is not None:
        values, waiting = _fetch(waiting, tools), None
        evaluates = due(options.eval_every) and not failures
        evaluated = _pause(state, tools, step == first + 1, evaluates, values, failures) or evaluated
        _write(step, values, options, tools, progress, failures)
        if saving:
          _save(tools, state, step, data_state, evaluated)
        tools.clock.start()
      if stopping or failures or step >= options.steps:
        break
    if step > first and not saving:  # The signal, or the failure, came behind a step that was not saved.
      if waiting or running:
        values = _fetch(waiting or _Interval(step, data_state, running), tools)
        _write(step, values, options, tools, progress, failures)
      _save(tools, state, step, data_state, evaluated)
  if failures:
    tools.store.wait()
    raise failures[0]
  if stopping or step < options.steps:
    raise _stopped(step, step > first, tools.store)
  return state


@contextlib.contextmanager
def _collecting(failures: list[Exception]) -> Iterator[None]:
  """Puts what fails among `failures`, so that steps can be saved first.

  Not where one of several processes may have failed alone: it would wait for the others to save with it.
  """
  try:
    yield
  except (types.RunError, types.UsageError) as err:
    if jax.process_count() > 1 and not err.everywhere:
      raise
    failures.append(err)


def _until_failure(batches: Iterator[_T], failures: list[Exception]) -> Iterator[_T]:
  """The same, ended by what fails in making them."""
  with _collecting(failures):
    yield from batches


def _pause(
    state: step_lib.TrainState, tools: Tools, is_first: bool, evaluates: bool, values: dict, failures: list[Exception]
) -> Mapping[str, float]:
  """Stops the clock; metrics of held-out data where they are due, which become some of `values`."""
  tools.clock.pause()
  if is_first:
    tools.after_first_step()
  found: Mapping[str, float] = {}
  if evaluates:
    with _collecting(failures):
      found = tools.evaluate(state)
  values |= found
  return found


def _stopped(step: int, is_saved: bool, store: checkpoint.Store) -> types.Preempted:
  store.wait()
  when = f'after step {step}, which is saved; the same command resumes' if is_saved else f'before step {step + 1}'
  return types.Preempted(f'stopped by SIGTERM {when}')


def _save(tools: Tools, state: step_lib.TrainState, step: int, data_state: tuple[int, int], evaluated) -> None:
  tools.writer.flush()
  place = {'epoch': data_state[0], 'step': data_state[1], 'num_tokens': tools.clock.seen}
  tools.store.save(state, step, place, evaluated)


@dataclasses.dataclass
class _Interval:
  """Steps that have been dispatched and not been logged."""

  step: int
  data_state: tuple[int, int]
  measured: list[step_lib.Packed]


def _fetch(interval: _Interval, tools: Tools) -> dict[str, float]:
  """Waits for an interval's last step; its means, its newest gauges, its speed and what is constant."""
  fetched = [packed.unpacked() for packed in jax.device_get(interval.measured)]
  sums = jax.tree.map(lambda *xs: np.sum(xs, axis=0), *(m.means for m in fetched), is_leaf=np.isscalar)
  values = {name: float(pair.mean()) for name, pair in sums.items()}
  gauges = {name: float(value) for name, value in fetched[-1].gauges.items()}
  tokens = sum(int(m.gauges['num_tokens']) for m in fetched)
  speed = tools.clock.lap(tokens, len(fetched))
  values |= gauges | {'num_tokens': tools.clock.seen, 'epoch': tools.epoch_of(interval.data_state)}
  if speed is not None:
    values['tokens_per_s'] = speed.tokens_per_s
    values['step_time'] = speed.seconds_per_step
    values |= {'time/host': speed.host_s, 'time/input': speed.input_s}
    mfu = metrics.utilisation(tools.flops_per_token, speed.tokens_per_s)
    if mfu is not None:
      values['mfu'] = mfu
  return {**values, **tools.constants(interval.data_state)}


def _write(
    step: int, values: dict[str, float], options: Options, tools: Tools, progress: metrics.Progress, failures: list
) -> None:
  """Logs what was fetched; a run that does not recover is a failure."""
  tools.writer.write(step, values)
  progress.show(step, values)
  with _collecting(failures):
    _check_finite(step, int(values['skipped_in_row']), options)


def _check_finite(step: int, skipped: int, options: Options) -> None:
  """Raises RunError, in all processes, where as many steps in a row were not finite as are borne."""
  if skipped >= options.max_skipped:
    raise types.RunError(
        f'step {step}: the loss or its gradient was not finite in {skipped} consecutive steps; parameters are as they'
        ' were before them. Lower the learning rate, look for extreme rows with --mode=show, or find the operation with'
        ' --debug',
        everywhere=True,
    )
