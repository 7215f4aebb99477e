"""What a run says on the terminal, and what it keeps off it."""

import logging as python_logging
import os
import re
import sys
import threading
import time
import traceback
import warnings

from absl import flags
from absl import logging
import jax


def set_up_logging() -> None:
  """The time and one message a line; nothing of Orbax and gcsfs, which tell of every file and raise what matters."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(['jaxalign'])
  logging.use_absl_handler()
  logging.set_verbosity(logging.INFO)
  handler = logging.get_absl_handler()
  handler.setFormatter(python_logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
  handler.addFilter(_is_told)


def quiet_failed_saves() -> None:
  """Keeps the traces of a failed save off the terminal: the main thread learns of it, and says it in one line.

  They come from Orbax's threads and, once those have given up, from TensorStore's, which then find no event loop, and
  from the coroutines that nobody waits for any more.
  """
  warnings.filterwarnings('ignore', message='coroutine .* was never awaited', category=RuntimeWarning)
  told, shown = threading.excepthook, sys.unraisablehook
  of_orbax = lambda args: type(args.thread).__module__.startswith('orbax.')
  late = lambda args: isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == 'Event loop is closed'
  threading.excepthook = lambda args: None if of_orbax(args) else told(args)
  sys.unraisablehook = lambda args: None if late(args) else shown(args)


def _is_told(record: python_logging.LogRecord) -> bool:
  return not any(
      library in record.pathname for library in ('/orbax/', '/asyncio/', '/gcsfs/', '/fsspec/', '/google/auth/')
  )


def located(err: FloatingPointError) -> str:
  """What --debug found not to be finite, and the line that computed it."""
  ours = [frame for frame in traceback.extract_tb(err.__traceback__) if '/site-packages/' not in frame.filename]
  return f'{str(err).splitlines()[0]} at {ours[-1].filename}:{ours[-1].lineno}: {ours[-1].line}'


def lost_process(err: jax.errors.JaxRuntimeError) -> bool:
  """Whether an error says that another process of the job is gone."""
  told = re.search('Gloo|[Cc]onnection (reset|closed)|heartbeat|UNAVAILABLE|coordination service', str(err))
  return jax.process_count() > 1 and told is not None


def leave(code: int) -> None:
  """Ends this process at once: an orderly end would wait for all the others, of which one is gone."""
  sys.stdout.flush()
  sys.stderr.flush()
  if jax.process_index() == 0:
    time.sleep(2)  # The others are ended with it, and should say first why.
  os._exit(code)
