"""From a record to token ids: what is prompt, what is response, and which tokens are to be predicted.

A text is tokenised in pieces, cut where the assistant begins and where it ends. So the tokens of a prompt do not depend
on the response (they are the ones that `prompt_ids` gives to the sampler), no token straddles the boundary, and the
tokens that count decode to exactly the response. Masks come from the pieces, never from ids.

Special tokens have one owner, this module: BOS comes first unless the chat template wrote it there, and EOS comes last
and is learned, even where it is also the padding, unless the template ended the response with it.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import hashlib
import inspect
import math
from typing import Any

import numpy as np

from jaxalign import types
from jaxalign.data import chat
from jaxalign.data import tokenizers

Record = Mapping[str, Any]

_COLUMNS = ('messages', 'prompt', 'completion', 'text', 'chosen', 'rejected', 'margin', 'append_eos')


@dataclasses.dataclass(frozen=True)
class Sequence:
  """A prompt and one response, not yet shifted.

  Attributes:
    ids: int32 [n], n >= 2; BOS first where the tokenizer has one.
    mask: bool [n], True where the token is to be predicted. The first is never True: nothing comes before it.
  """

  ids: np.ndarray
  mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
  """A prompt with its K responses.

  Attributes:
    sequences: K of them, chosen first in a pair.
    labels: numbers that belong to the group, such as `margin`.
    truncated: whether tokens were cut to fit the row.
    prompt_tokens: length of the prompt that the sequences share, BOS included, after any cut.
  """

  sequences: tuple[Sequence, ...]
  labels: Mapping[str, float]
  truncated: bool = False
  prompt_tokens: int = 0


class Dropped(Exception):
  """A record has nothing to learn from; the message is the reason, the same for all records dropped for it."""


@dataclasses.dataclass(frozen=True)
class _Text:
  """A text in pieces: the prompt, then pieces that are to be learned or not; `special` if a chat template wrote it."""

  prompt: str
  body: list[tuple[str, bool]]
  special: bool


@dataclasses.dataclass
class _Tokens:
  """A tokenised text; `first` is the length of the first piece of the body, the response to the prompt."""

  prompt: list[int]
  body: list[int]
  mask: list[bool]
  first: int


def supervised(
    record: Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    template: str | None = None,
    completion_only: bool = True,
    columns: Mapping[str, str] | None = None,
) -> Group:
  """A demonstration, K = 1.

  The record has `messages` (a list, or a dialogue as `chat.parse_transcript` reads it; every turn of the assistant is
  learned), or `prompt` and `completion` (strings, taken as they are, or lists of messages), or `text` (all of it is
  learned). `append_eos` (default true) is false where the response was cut off, so that its end is not learned.

  What is longer than the row loses later turns first, then the prompt from the left, then the response's end.

  Args:
    record: the columns above.
    tokenizer: turns text into ids.
    row_length: the longest sequence, in slots; a sequence of n tokens takes n - 1.
    template: see `chat.pick`; for messages only.
    completion_only: learn what the assistant says; otherwise the prompt too.
    columns: what the record calls the columns above, where it is something else.

  Raises:
    Dropped: there is nothing to learn.
    RunError: a column is missing or of the wrong kind, or the chat template fails.
  """
  values = _values(record, columns)
  if 'messages' in values:
    turns = _turns(values['messages'], 'messages')
    text = _chat_text(tokenizer, turns, template)
  elif 'prompt' in values and 'completion' in values:
    text = _prompted_text(tokenizer, values['prompt'], values['completion'], 'completion', template)
  elif 'text' in values:
    text = _Text('', [(_string(values['text'], 'text'), True)], special=False)
  else:
    raise _missing(record, columns, [['messages'], ['prompt', 'completion'], ['text']])
  if not completion_only:
    text = _Text('', [(text.prompt, True), *((piece, True) for piece, _ in text.body)], text.special)
  return _group([text], tokenizer, row_length, labels={}, append_eos=_append_eos(values))


def preference(
    record: Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Group:
  """A pair, K = 2 with chosen first, labelled with `margin`.

  The record has `chosen` and `rejected` with a `prompt`: strings, taken as they are, or lists of messages. Without a
  prompt they are whole conversations: lists of messages, or dialogues as `chat.parse_transcript` reads them. The turns
  that both share are then the prompt, and what the assistant says after them is learned. Optional columns are `margin`
  (default 0) and `append_eos` (see `supervised`). Both sides of a pair are cut alike to fit the row.

  Args:
    record: the columns above.
    tokenizer: turns text into ids.
    row_length: see `supervised`, which also says how longer sequences are cut.
    template: see `chat.pick`; for messages only.
    columns: what the record calls the columns above, where it is something else.

  Raises:
    Dropped: the responses are equal, or there is nothing to learn.
    RunError: a column is missing or of the wrong kind, or the chat template fails.
  """
  values = _values(record, columns)
  if 'chosen' not in values or 'rejected' not in values:
    raise _missing(record, columns, [['prompt', 'chosen', 'rejected'], ['chosen', 'rejected']])
  if values['chosen'] == values['rejected']:
    raise Dropped('equal responses')
  names = ('chosen', 'rejected')
  if 'prompt' in values and not any(_is_conversation(values[name]) for name in names):
    texts = [_prompted_text(tokenizer, values['prompt'], values[name], name, template) for name in names]
  else:
    chosen, rejected = (_turns(values[name], name) for name in names)
    shared = min(_shared(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    texts = [_chat_text(tokenizer, turns, template, first_turn=shared) for turns in (chosen, rejected)]
  labels = {'margin': _margin(values)}
  group = _group(texts, tokenizer, row_length, labels=labels, append_eos=_append_eos(values))
  if np.array_equal(group.sequences[0].ids, group.sequences[1].ids):
    raise Dropped('equal responses' + (' after truncation' if group.truncated else ''))
  return group


def prompt_ids(
    tokenizer: tokenizers.Tokenizer, prompt: str | list[chat.Message], template: str | None = None
) -> list[int]:
  """The ids that a response is sampled after: exactly those that precede it in training, BOS included.

  Args:
    tokenizer: turns text into ids.
    prompt: a string, taken as it is, or messages.
    template: see `chat.pick`; for messages only.
  """
  if isinstance(prompt, str):
    return _prompt_tokens(tokenizer, prompt, special=False)
  turns = _turns(prompt, 'prompt')
  text, _ = _render(tokenizer, turns, template, add_generation_prompt=True, first_turn=len(turns))
  return _prompt_tokens(tokenizer, text, special=True)


def describe(example_fn: Callable[..., Group], tokenizer: tokenizers.Tokenizer, *, row_length: int) -> str:
  """A hash of what an example function does, for the key of a cache of its results.

  It is taken from the function's source and from what it makes of a few records, errors included: options may be bound
  where nobody can read them, by gin for instance, but they cannot hide from that.
  """
  digest = hashlib.blake2b(inspect.getsource(inspect.unwrap(_unbound(example_fn))).encode(), digest_size=12)
  for record in _PROBES:
    try:
      group = example_fn(record, tokenizer, row_length=row_length)
      made = repr([(s.ids.tolist(), s.mask.tolist()) for s in group.sequences]) + repr(sorted(group.labels.items()))
    except (Dropped, types.RunError, LookupError, TypeError, ValueError) as err:
      made = repr(err)
    digest.update(made.encode())
  return digest.hexdigest()


def _unbound(fn: Callable[..., Any]) -> Callable[..., Any]:
  """The function under `functools.partial`."""
  while hasattr(fn, 'func'):
    fn = fn.func
  return fn


_TALK = [{'role': 'user', 'content': 'a b'}, {'role': 'assistant', 'content': 'c\n\nd'}]
_PROBES: tuple[Record, ...] = (
    {},
    {'messages': [*_TALK, *_TALK]},
    {'prompt': 'a b ', 'completion': ' c\n'},
    {'text': 'a b c'},
    {'prompt': 'a b', 'chosen': ' c', 'rejected': ' d', 'margin': 0.5, 'append_eos': False},
    {'chosen': _TALK, 'rejected': [_TALK[0], {'role': 'assistant', 'content': ''}]},
)


def _values(record: Record, columns: Mapping[str, str] | None) -> dict[str, Any]:
  """The record under the names that this module uses, without columns that are empty (None)."""
  columns = columns or {}
  unknown = sorted(set(columns) - set(_COLUMNS))
  if unknown:
    raise types.UsageError(f'columns: {unknown[0]!r} is not one of {", ".join(_COLUMNS)}')
  found = {name: record.get(columns.get(name, name)) for name in _COLUMNS}
  return {name: value for name, value in found.items() if value is not None}


def _missing(record: Record, columns: Mapping[str, str] | None, choices: list[list[str]]) -> types.RunError:
  columns = columns or {}
  wanted = '; or '.join(', '.join(columns.get(name, name) for name in choice) for choice in choices)
  present = ', '.join(name for name, value in record.items() if value is not None) or 'none'
  return types.RunError(f'a column is missing; wanted: {wanted}; present: {present} (`columns` renames)')


def _string(value: Any, name: str) -> str:
  if not isinstance(value, str):
    raise types.RunError(f'column {name} holds {type(value).__name__} where text is wanted')
  return value


def _turns(value: Any, name: str, role: str | None = None) -> list[chat.Message]:
  """Messages of a column: a list, or a string that is what `role` says, or without `role` a dialogue."""
  if isinstance(value, str) and role:
    return [{'role': role, 'content': value}]
  if isinstance(value, str):
    try:
      return list(chat.parse_transcript(value))
    except types.RunError as err:
      raise types.RunError(f'column {name}: {err}; a plain response needs a column prompt') from err
  if not isinstance(value, list | tuple) or not value:
    raise types.RunError(f'column {name} holds {type(value).__name__} where text or a list of messages is wanted')
  for i, message in enumerate(value):
    if not isinstance(message, Mapping) or not isinstance(message.get('role'), str) or 'content' not in message:
      raise types.RunError(f'column {name}: message {i} has no role and content')
  return list(value)


def _shared(a: list[Any], b: list[Any]) -> int:
  """How many leading items two lists share."""
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _is_conversation(value: Any) -> bool:
  """Whether a response is in truth a whole conversation, prompt included, as some data sets have it."""
  return not isinstance(value, str) and _turns(value, 'chosen')[0]['role'] != 'assistant'


def _append_eos(values: Mapping[str, Any]) -> bool:
  value = values.get('append_eos', True)
  if not isinstance(value, bool | np.bool_):
    raise types.RunError(f'column append_eos holds {value!r} where true or false is wanted')
  return bool(value)


def _margin(values: Mapping[str, Any]) -> float:
  value = values.get('margin', 0.0)
  if not isinstance(value, int | float | np.number) or not math.isfinite(value):
    raise types.RunError(f'column margin holds {value!r} where a finite number is wanted')
  return float(value)


def _render(tokenizer, turns: list[chat.Message], template: str | None, **options) -> tuple[str, list[chat.Span]]:
  return chat.render(
      _literal(turns, tokenizer),
      chat.pick(template, tokenizer.chat_template),
      bos_token=tokenizer.bos_token,
      eos_token=tokenizer.eos_token,
      **options,
  )


def _literal(value: Any, tokenizer: tokenizers.Tokenizer) -> Any:
  """Marks all text in messages as plain text: only the template writes special tokens."""
  if isinstance(value, str):
    return tokenizer.literal(value)
  if isinstance(value, Mapping):
    return {name: _literal(one, tokenizer) for name, one in value.items()}
  return [_literal(one, tokenizer) for one in value] if isinstance(value, list | tuple) else value


def _chat_text(tokenizer, turns: list[chat.Message], template: str | None, first_turn: int = 0) -> _Text:
  """A rendered conversation; what follows the assistant's last turn is left out, as nothing in it is learned."""
  text, spans = _render(tokenizer, turns, template, first_turn=first_turn)
  if not spans:
    raise Dropped('nothing to learn: no turn of the assistant')
  body, end = [], spans[0][0]
  for start, stop in spans:
    body += [(text[end:start], False), (text[start:stop], True)]
    end = stop
  return _Text(text[: spans[0][0]], body[1:], special=True)


def _prompted_text(tokenizer, prompt: Any, response: Any, name: str, template: str | None) -> _Text:
  if isinstance(prompt, str) and isinstance(response, str):
    return _Text(prompt, [(response, True)], special=False)
  before, after = _turns(prompt, 'prompt', role='user'), _turns(response, name, role='assistant')
  return _chat_text(tokenizer, before + after, template, first_turn=len(before))


def _group(texts, tokenizer, row_length: int, *, labels: Mapping[str, float], append_eos: bool) -> Group:
  prompts = {text.prompt: _prompt_tokens(tokenizer, text.prompt, text.special) for text in texts}
  tokens = [_tokens(tokenizer, text, prompts[text.prompt], append_eos) for text in texts]
  keep = int(all(one.prompt[:1] == [tokenizer.bos_id] for one in tokens))
  fitted = _fit(tokens, row_length + 1, keep)
  sequences = tuple(_sequence(one) for one in fitted)
  if not all(sequence.mask.any() for sequence in sequences):
    raise Dropped('nothing to learn: empty response')
  prompt_tokens = _shared(fitted[0].prompt, fitted[-1].prompt)
  return Group(sequences, labels, truncated=fitted is not tokens, prompt_tokens=prompt_tokens)


def _to_ids(tokenizer, text: str, *, continuation: bool, special: bool) -> list[int]:
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as err:
    raise types.RunError(f'the text has half a character (a lone surrogate) near {text[:err.start][-20:]!r}') from err
  return tokenizer.encode(text, continuation=continuation, special=special)


def _prompt_tokens(tokenizer, prompt: str, special: bool) -> list[int]:
  ids = _to_ids(tokenizer, prompt, continuation=False, special=special)
  return ids if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def _tokens(tokenizer, text: _Text, prompt: list[int], append_eos: bool) -> _Tokens:
  tokens = _Tokens(prompt, [], [], 0)
  for piece, learned in text.body:
    continuation = bool(tokens.body) or any(i != tokenizer.bos_id for i in prompt)
    tokens.body += _to_ids(tokenizer, piece, continuation=continuation, special=text.special)
    tokens.mask += [learned] * (len(tokens.body) - len(tokens.mask))
    tokens.first = tokens.first or len(tokens.body)
  if append_eos and tokens.body[-1:] != [tokenizer.eos_id]:
    tokens.body.append(tokenizer.eos_id)
    tokens.mask.append(True)
  while not append_eos and tokens.body and tokens.body[-1] in tokenizer.special_tokens.values():
    del tokens.body[-1], tokens.mask[-1]
  if len(text.body) == 1:
    tokens.first = len(tokens.body)
  return tokens


def _fit(tokens: list[_Tokens], size: int, keep: int) -> list[_Tokens]:
  """Cuts all of a group alike to `size` tokens, or returns the list that was given where all fit.

  A prompt is cut only as far as the longest response to it wants, and never its first `keep` tokens (BOS) or its last.
  """
  if all(len(one.prompt) + len(one.body) <= size for one in tokens):
    return tokens
  room = max(size - max(one.first for one in tokens), keep, 1)
  fitted = []
  for one in tokens:
    prompt = one.prompt
    if len(prompt) > room:
      prompt = prompt[:keep] + prompt[len(prompt) - (room - keep) :]
    left = size - len(prompt)
    fitted.append(_Tokens(prompt, one.body[:left], one.mask[:left], one.first))
  return fitted


def _sequence(tokens: _Tokens) -> Sequence:
  mask = np.array([False] * len(tokens.prompt) + tokens.mask, bool)
  mask[:1] = False  # Nothing comes before the first token that could predict it.
  return Sequence(np.array(tokens.prompt + tokens.body, np.int32), mask)
