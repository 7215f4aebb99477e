"""Where metrics go: a JSONL file, TensorBoard, a progress bar; throughput, utilisation and memory."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import functools
import json
import math
import pathlib
import re
import resource
import sys
import time
from typing import Any
from typing import cast
from typing import NamedTuple
from typing import TypeVar

from absl import logging
import jax
import numpy as np
import tensorboardX
from tensorboardX.proto import summary_pb2
import tqdm

from jaxalign import storage

_SECONDS = 60.0  # between two times that what has grown is sent to a bucket

_T = TypeVar('_T')

# Peak bf16 FLOP/s of a device, by the `device_kind` that JAX reports; vendors' data sheets. A chip of TPU7x is two.
PEAK_FLOPS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5e': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'TPU v6e': 918e12,
    'TPU7x': 1153.5e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA H200': 989e12,
}


class Writer:
  """Appends one JSON object per logged step to `metrics.jsonl` and mirrors it to TensorBoard, on process 0 alone.

  On resume, lines beyond the resumed step are cut off first: they come again. To a workdir in a bucket both are sent
  once a minute, before a checkpoint is saved, and at the end.
  """

  def __init__(self, workdir: storage.Path, step: int):
    self._main = jax.process_index() == 0
    if not self._main:
      return
    self._grown = storage.Growing(workdir, 'metrics.jsonl')
    folder = self._grown.folder
    _cut_after(folder / 'metrics.jsonl', step)
    self._file = (folder / 'metrics.jsonl').open('a', encoding='utf-8')
    self._board = tensorboardX.SummaryWriter(str(folder / 'tensorboard'), purge_step=step + 1 if step else None)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one line; a number that is not finite becomes null, since JSON has none."""
    if not self._main:
      return
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    self._file.write(json.dumps({'step': step, **finite}) + '\n')
    self._file.flush()
    of = summary_pb2.Summary.Value  # One event for all: `add_scalar` would take a millisecond a step.
    scalars = [of(tag=re.sub(r'[^-/\w.]', '_', name), simple_value=value) for name, value in values.items()]
    self._board.file_writer.add_summary(summary_pb2.Summary(value=scalars), step)
    if self._grown.is_due(_SECONDS):
      try:
        self._grown.send()
      except storage.errors() as err:
        logging.warning('metrics could not be sent, which is tried again: %s', storage.reason(err))

  def flush(self) -> None:
    """Sends what was written; raises RunError where a bucket does not take it."""
    if self._main:
      self._board.flush()
      with storage.naming('metrics could not be written'):
        self._grown.send()

  def close(self) -> None:
    """Closes the files."""
    if self._main:
      self._file.close()
      self._board.close()
      with storage.naming('metrics could not be written'):
        self._grown.close()


def _cut_after(path: pathlib.Path, step: int) -> None:
  if not path.exists():
    return
  lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
  # A kill may leave a last line without its newline.
  kept = [line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= step]
  if kept != lines:
    storage.write_text(path, ''.join(kept))


class Progress:
  """A progress bar on a terminal, one line per logged step elsewhere."""

  def __init__(self, start: int, total: int):
    self._total = total
    terminal = sys.stderr.isatty() and jax.process_index() == 0
    self._bar = tqdm.tqdm(total=total, initial=start, unit='step', dynamic_ncols=True) if terminal else None

  def advance(self) -> None:
    """Counts a step."""
    if self._bar is not None:
      self._bar.update()

  def show(self, step: int, values: Mapping[str, float]) -> None:
    """Shows the loss, the reward or accuracy where there is one, tokens/s, and the time to go."""
    accuracy = next((values[n] for n in ('rewards/accuracies', 'accuracy', 'mean_token_accuracy') if n in values), None)
    shown = {'loss': f'{values["loss"]:.4f}'}
    if 'reward' in values:
      shown['reward'] = f'{values["reward"]:.3f}'
    elif accuracy is not None:
      shown['accuracy'] = f'{accuracy:.3f}'
    if 'tokens_per_s' in values:
      shown['tok/s'] = f'{values["tokens_per_s"]:,.0f}'
    if self._bar is not None:
      self._bar.set_postfix(shown)
      return
    if 'step_time' in values:
      shown['eta'] = '{}m{:02d}s'.format(*divmod(round(values['step_time'] * (self._total - step)), 60))
    logging.info('step %d/%d  %s', step, self._total, '  '.join(f'{name} {text}' for name, text in shown.items()))

  def close(self) -> None:
    """Leaves the bar as it is."""
    if self._bar is not None:
      self._bar.close()


class Speed(NamedTuple):
  """How fast training was; `host_s` and `input_s` are `Clock`'s, of a step."""

  tokens_per_s: float
  seconds_per_step: float
  host_s: float
  input_s: float


class Clock:
  """Time and tokens of training steps alone: paused during evaluation, saving and the first, compiling step.

  What the host does shows in two further numbers of a step: `host_s`, CPU seconds of the thread that trains, which
  sleeps while it waits for the device or for input; and `input_s`, seconds until the next batch is on the devices.
  """

  def __init__(self, seen: int):
    self.seen = seen  # tokens of the whole run, compiling steps and earlier sessions included
    self._since: np.ndarray | None = None
    self._waited = 0.0
    self._sums, self._tokens, self._steps = np.zeros(3), 0, 0

  def _now(self) -> np.ndarray:
    return np.array([time.perf_counter(), time.thread_time(), self._waited])

  def start(self) -> None:
    """Begins a lap."""
    self._since = self._now()

  def pause(self) -> None:
    """Leaves out the time until `start`."""
    self._since = None

  def waiting(self, items: Iterable[_T]) -> Iterator[_T]:
    """The same items, whose coming is timed."""
    iterator, nothing = iter(items), object()
    while True:
      asked = time.perf_counter()
      item = next(iterator, nothing)
      self._waited += time.perf_counter() - asked
      if item is nothing:
        return
      yield cast(_T, item)

  def lap(self, tokens: int, steps: int) -> Speed | None:
    """The speed since `start` or the last lap, over `steps` steps with `tokens` tokens; None while paused."""
    self.seen += tokens
    if self._since is None:
      return None
    now = self._now()
    passed, self._since = now - self._since, now
    self._sums, self._tokens, self._steps = self._sums + passed, self._tokens + tokens, self._steps + steps
    return _speed(passed, tokens, steps)

  def mean(self) -> Speed:
    """The speed over all laps."""
    return _speed(self._sums, self._tokens, self._steps)


def _speed(passed: np.ndarray, tokens: int, steps: int) -> Speed:
  return Speed(tokens / max(passed[0], 1e-9), *(passed / max(steps, 1)).tolist())


class Compilations:
  """Counts how often jitted functions were traced, which is how often they were compiled or fetched from the cache."""

  def __init__(self):
    self.count = 0

  def counted(self, fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, counting each time that Python runs its body; pass the result to `jax.jit`."""

    @functools.wraps(fn)
    def traced(*args):
      self.count += 1
      return fn(*args)

    return traced


def utilisation(flops_per_token: float, tokens_per_s: float) -> float | None:
  """Model FLOP utilisation of all devices, or None where the peak of this kind of device is not known."""
  peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
  return None if peak is None else flops_per_token * tokens_per_s / (peak * jax.device_count())


def peak_memory_bytes() -> int:
  """Largest memory of one local device where the backend counts it, else of this process on the host."""
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s['peak_bytes_in_use'] for s in stats if s and 'peak_bytes_in_use' in s]
  return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
