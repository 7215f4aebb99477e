"""Reading the columns of a record: they hold whatever a file held."""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from jaxalign import types
from jaxalign.data import chat

Record = Mapping[str, Any]

_TEXTS = ('messages', 'prompt', 'completion', 'completions', 'text', 'chosen', 'rejected', 'gold', 'steps', 'samples')
_OF_PAIRS = ('margin', 'chosen_score', 'rejected_score', 'probability', 'group', 'chosen_spans', 'rejected_spans')
COLUMNS = (*_TEXTS, *_OF_PAIRS, 'label', 'labels', 'density_ratio', 'class', 'score', 'scores', 'ranks', 'append_eos')


def known(record: Record, columns: Mapping[str, str] | None) -> dict[str, Any]:
  """The values of `COLUMNS` that the record has, those that are empty (None) left out.

  Args:
    record: any columns.
    columns: what the record calls some of `COLUMNS`.

  Raises:
    UsageError: a key of `columns` is none of `COLUMNS`.
  """
  columns = columns or {}
  unknown = sorted(set(columns) - set(COLUMNS))
  if unknown:
    raise types.UsageError(f'columns of an example function: {unknown[0]!r} is not one of {", ".join(COLUMNS)}')
  values = {name: record.get(columns.get(name, name)) for name in COLUMNS}
  return {name: value for name, value in values.items() if value is not None}


def missing(record: Record, columns: Mapping[str, str] | None, *choices: tuple[str, ...]) -> types.RunError:
  """The error that says which columns were wanted, in one of several choices, and which there are."""
  columns = columns or {}
  wanted = ' or '.join(' + '.join(columns.get(name, name) for name in choice) for choice in choices)
  present = ', '.join(sorted(name for name, value in record.items() if value is not None)) or 'none'
  return types.RunError(f'a column is missing: wanted {wanted}, found {present}; rename them with `columns`')


def text(values: Mapping[str, Any], name: str) -> str:
  """A column of text.

  Raises:
    RunError: it is something else.
  """
  if not isinstance(values[name], str):
    raise types.RunError(f'column {name}: {type(values[name]).__name__} where text is wanted')
  return values[name]


def messages(values: Mapping[str, Any], name: str, role: str | None = None) -> list[chat.Message]:
  """A column of messages.

  Args:
    values: see `known`.
    name: a list of messages, or a string.
    role: whose message a string is; without it a string is a dialogue, see `chat.parse_transcript`.

  Raises:
    RunError: it is something else.
  """
  value = values[name]
  if isinstance(value, str) and role:
    return [{'role': role, 'content': value}]
  if isinstance(value, str):
    try:
      return list(chat.parse_transcript(value))
    except types.RunError as err:
      raise types.RunError(f'column {name}: {err}; other responses need a column prompt') from err
  if not isinstance(value, list | tuple) or not value:
    raise types.RunError(f'column {name}: {type(value).__name__} where text or a list of messages is wanted')
  for i, message in enumerate(value):
    if not isinstance(message, Mapping) or not isinstance(message.get('role'), str) or 'content' not in message:
      raise types.RunError(f'column {name}: message {i} has no role and content')
  return list(value)


def list_column(values: Mapping[str, Any]) -> str:
  """The column that is a list of responses: `samples`, a model's own, or `completions`; '' where there is neither.

  Raises:
    RunError: there are both, so that scores could be of either.
  """
  names = [name for name in ('samples', 'completions') if name in values]
  if len(names) == 2 and values['samples'] is not values['completions']:  # which `columns` may have made one
    raise types.RunError('columns samples and completions: scores belong to one list of responses; leave the other out')
  return names[0] if names else ''


def responses(values: Mapping[str, Any], name: str) -> list[Any]:
  """A column of a list of responses.

  Raises:
    RunError: it is something else.
  """
  if not isinstance(values[name], list | tuple):
    raise types.RunError(f'column {name}: a list of responses is wanted')
  return list(values[name])


def append_eos(values: Mapping[str, Any]) -> bool:
  """The column `append_eos`, by default true.

  Raises:
    RunError: it is something else.
  """
  value = values.get('append_eos', True)
  if not isinstance(value, bool | np.bool_):
    raise types.RunError(f'column append_eos: {value!r} where true or false is wanted')
  return bool(value)


def number(values: Mapping[str, Any], name: str, low: float = -math.inf, high: float = math.inf) -> float:
  """A column of a number.

  Raises:
    RunError: it is not a finite number, or not within [low, high].
  """
  value = values[name]
  if not isinstance(value, int | float | np.number) or not math.isfinite(value) or not low <= value <= high:
    bounds = f' from {low:g} to {high:g}' if math.isfinite(low) and math.isfinite(high) else ''
    raise types.RunError(f'column {name}: {value!r} where a finite number{bounds} is wanted')
  return float(value)


def truth(values: Mapping[str, Any], name: str) -> float:
  """A column of true or false, or 1 or 0, as 1.0 or 0.0.

  Raises:
    RunError: it is something else.
  """
  value = values[name]
  if not isinstance(value, bool | int | float | np.number | np.bool_) or value not in (0, 1):
    raise types.RunError(f'column {name}: {value!r} where true or false is wanted')
  return float(value)


def numbers(values: Mapping[str, Any], name: str, count: int) -> np.ndarray:
  """A column of `count` finite numbers: `[count]` float64.

  Raises:
    RunError: it is something else.
  """
  return np.array([number({name: value}, name) for value in _items(values, name, count)], np.float64)


def shares(values: Mapping[str, Any], name: str, count: int) -> np.ndarray:
  """A column of `count` truth values, or numbers from 0 to 1: `[count]` float32.

  Raises:
    RunError: it is something else.
  """
  found = _items(values, name, count)
  for i, value in enumerate(found):
    if not isinstance(value, bool | int | float | np.number | np.bool_) or not 0 <= value <= 1:
      raise types.RunError(f'column {name}: item {i} is {value!r}; true, false, or a number from 0 to 1 is wanted')
  return np.array(found, np.float32)


def _items(values: Mapping[str, Any], name: str, count: int) -> list[Any]:
  found = values[name]
  if not isinstance(found, list | tuple) or len(found) != count:
    kind = f'{len(found)} values' if isinstance(found, list | tuple) else type(found).__name__
    raise types.RunError(f'column {name}: {kind} where a list of {count} is wanted')
  return list(found)
