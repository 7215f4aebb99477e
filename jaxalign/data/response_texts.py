"""Responses as texts, for what judges them without a model."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from jaxalign import types
from jaxalign.data import chat
from jaxalign.data import examples
from jaxalign.data import records
from jaxalign.data import scored


class Texts(NamedTuple):
  """A prompt (text, or messages) and the texts of the responses to it."""

  prompt: Any
  responses: list[str]


def read(record: records.Record) -> Texts:
  """The responses of a record, in the order in which a reward model scores them: see `data.scored.responses`.

  Of messages the text is what the assistant says; a conversation in one column is a prompt and its last response, two
  of them a prompt that both share and what follows in each.

  Raises:
    Dropped: there is nothing to score.
    RunError: a column is missing or of the wrong kind.
  """
  values = records.known(record, None)
  column, found = scored.unscored_list(record, None)
  if found:
    return Texts(values['prompt'], [_text({column: one}, column) for one in found])
  if {'chosen', 'rejected'} <= set(values):
    return _pair(values)
  if 'messages' in values:
    turns = records.messages(values, 'messages')
    last = max((i for i, turn in enumerate(turns) if turn['role'] == 'assistant'), default=None)
    if last is None:
      raise examples.Dropped('nothing to score: no turn of the assistant')
    return Texts(turns[:last], [_said(turns[last:], 'messages')])
  if 'prompt' in values and 'completion' in values:
    return Texts(values['prompt'], [_text(values, 'completion')])
  if 'text' in values:
    return Texts('', [records.text(values, 'text')])
  wanted = [(*more, name) for more, name in ((('prompt',), 'samples'), (('prompt',), 'completion'), ((), 'messages'))]
  raise records.missing(record, None, *wanted, ('prompt', 'chosen', 'rejected'), ('text',))


def _pair(values: Mapping[str, Any]) -> Texts:
  if values['chosen'] == values['rejected']:
    raise examples.Dropped('equal responses')
  names = ('chosen', 'rejected')
  if 'prompt' in values and not any(examples.is_conversation(values, name) for name in names):
    return Texts(values['prompt'], [_text(values, name) for name in names])
  both = [records.messages(values, name) for name in names]
  shared = min(examples.shared_items(*both), *(len(turns) - 1 for turns in both))
  return Texts(both[0][:shared], [_said(turns[shared:], name) for turns, name in zip(both, names)])


def _text(values: Mapping[str, Any], name: str) -> str:
  if isinstance(values[name], str):
    return values[name]
  return _said(records.messages(values, name, 'assistant'), name)


def _said(turns: Sequence[chat.Message], name: str) -> str:
  """What the assistant says in some turns, with empty lines between them."""
  said = [turn['content'] for turn in turns if turn['role'] == 'assistant']
  if not all(isinstance(one, str) for one in said):
    raise types.RunError(f'column {name}: the content of a message is no text')
  if not said:
    raise examples.Dropped('nothing to score: no turn of the assistant')
  return '\n\n'.join(said)
