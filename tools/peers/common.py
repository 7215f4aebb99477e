"""What the scripts of this folder share: a work is read from a JSON file, and a JSON line says how long its steps took.

Peers have virtual environments of their own: nothing but the standard library is imported here.
"""

import json
import pathlib
import random
import resource
import sys
from typing import Any


def read() -> dict[str, Any]:
  """The work that the command line names, see prepare.py."""
  return json.loads(pathlib.Path(sys.argv[1]).read_text(encoding='utf-8'))


def records(work: dict[str, Any]) -> list[dict[str, str]]:
  """The texts of a work, in an order that its seed says."""
  lines = (pathlib.Path(work['folder']) / 'data.jsonl').read_text(encoding='utf-8').splitlines()
  random.Random(work['seed']).shuffle(lines)
  return [json.loads(line) for line in lines]


def report(seconds: list[float], units: list[float], **more: Any) -> None:
  """Prints the steps that count: how long each took, and how much of what is measured was done in it."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  print(json.dumps({'seconds': list(seconds), 'units': list(units), 'peak_rss_bytes': peak, **more}), flush=True)
