"""Examples for models that write responses of their own: prompts alone."""

from collections.abc import Mapping

import numpy as np

from jaxalign.data import examples
from jaxalign.data import records
from jaxalign.data import tokenizers


def alone(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    longest: int,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> examples.Group:
  """A prompt that responses are sampled to: one sequence, in which a token stands in for the first of the response.

  Args:
    record: with `prompt`, a string or messages, or `messages`, whose last turn is then left out where the assistant
      says it; other columns are for who scores the responses.
    tokenizer: turns text into ids.
    row_length: of the rows that responses are packed in; not read.
    longest: tokens of the longest prompt; a longer one is dropped, as no part of it can be left out.
    template: see `chat.pick`; for messages only.
    columns: what the record calls the columns above, where it is something else.

  Raises:
    Dropped: the prompt is too long, or empty.
    RunError: a column is missing or of the wrong kind, or the chat template fails.
  """
  del row_length
  values = records.known(record, columns)
  if 'prompt' in values:
    turns = values['prompt'] if isinstance(values['prompt'], str) else records.messages(values, 'prompt')
  elif 'messages' in values:
    turns = records.messages(values, 'messages')
    turns = turns[:-1] if turns[-1]['role'] == 'assistant' else turns
  else:
    raise records.missing(record, columns, ('prompt',), ('messages',))
  ids = examples.prompt_ids(tokenizer, turns, template)
  if not ids:
    raise examples.Dropped('an empty prompt')
  if len(ids) > longest:
    raise examples.Dropped(f'a prompt of more than {longest} tokens')
  stand_in = np.array([*ids, ids[-1]], np.int32)
  return examples.Group(
      (examples.Sequence(stand_in, np.arange(len(stand_in)) == len(ids)),), {}, prompt_tokens=len(ids)
  )
