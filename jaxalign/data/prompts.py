"""What models need that write responses of their own: prompts alone, where a response ends, what is answered to it."""

from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from jaxalign.data import chat
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
    raise examples.Dropped(f'a prompt of more than prompts.alone.longest = {longest} tokens')
  stand_in = np.array([*ids, ids[-1]], np.int32)
  return examples.Group(
      (examples.Sequence(stand_in, np.arange(len(stand_in)) == len(ids)),), {}, prompt_tokens=len(ids)
  )


def stop_ids(tokenizer: tokenizers.Tokenizer, is_chat: bool, template: str | None = None) -> tuple[int, ...]:
  """EOS and, in a chat, the special token with which the template ends a turn, where that is another.

  Raises:
    RunError: the chat template fails.
  """
  if not is_chat:
    return (tokenizer.eos_id,)
  picked = chat.pick(template, tokenizer.chat_template)
  text = chat.end_of_turn(picked, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
  ends = tokenizer.encode(text, continuation=True, special=True)[:1]
  return tuple({tokenizer.eos_id, *(i for i in ends if i in tokenizer.special_tokens.values())})


def answer(
    tokenizer: tokenizers.Tokenizer, text: str, response: Sequence[int], is_chat: bool, template: str | None = None
) -> list[int]:
  """The ids of what is answered to a sampled response, up to where the model speaks again.

  In a chat the template writes it as what the user says; a token that ends the turn is not written again where the
  response has it already.

  Args:
    tokenizer: of the model.
    text: the answer.
    response: ids of what was said before.
    is_chat: whether the prompt is of messages.
    template: see `chat.pick`.

  Raises:
    RunError: the chat template fails.
  """
  if not is_chat:
    return examples.to_ids(tokenizer, text, continuation=True, special=False)
  picked = chat.pick(template, tokenizer.chat_template)
  written = chat.answer(picked, text, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
  ids = examples.to_ids(tokenizer, written, continuation=True, special=True)
  return ids[1:] if response and ids[:1] == [response[-1]] else ids
