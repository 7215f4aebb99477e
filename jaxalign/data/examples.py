"""From a record to token ids: what is prompt, what is response, and which tokens are to be predicted.

A text is tokenised in pieces, cut where the assistant begins and where it ends. So the tokens of a prompt do not depend
on the response (they are the ones that `prompt_ids` gives to the sampler), no token straddles the boundary, and the
tokens that count decode to exactly the response. Masks come from the pieces, never from ids.

Special tokens have one owner, this module: BOS comes first unless the chat template wrote it there, and EOS comes last
and is learned, even where it is also the padding, unless the template ended the response with it.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from jaxalign import types
from jaxalign.data import chat
from jaxalign.data import records
from jaxalign.data import tokenizers


@dataclasses.dataclass(frozen=True)
class Sequence:
  """A prompt and one response, not yet shifted.

  Attributes:
    ids: int32 [n], n >= 2; BOS first where the tokenizer has one.
    mask: bool [n], True where the token is to be predicted. The first is never True: nothing comes before it.
    labels: by name, float32, a number for each token that the mask marks.
    experts: `[n - 1, L, k]`, see `types.Batch`.
  """

  ids: np.ndarray
  mask: np.ndarray
  labels: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  experts: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Group:
  """A prompt with its K responses.

  Attributes:
    sequences: K of them, chosen first in a pair.
    labels: numbers that belong to the group, such as `margin`, or lists of one for each response, such as `score`.
    truncated: whether tokens were cut to fit the row.
    prompt_tokens: of the prompt that the sequences share, BOS included, after any cut.
  """

  sequences: tuple[Sequence, ...]
  labels: Mapping[str, float | list[float]]
  truncated: bool = False
  prompt_tokens: int = 0


def shared_slots(sequences: tuple[Sequence, ...]) -> int:
  """How many leading token slots the sequences of a group have in common: the same inputs, and no target that counts.

  The last token of a prompt is not among them: what it predicts differs. At least one slot is left to each sequence.
  """
  if len(sequences) == 1:
    return 0
  length = min(len(one.ids) for one in sequences) - 2
  same = [(one.ids[:length] == sequences[0].ids[:length]) & ~one.mask[1 : length + 1] for one in sequences]
  return int(np.argmin(np.append(np.all(same, axis=0), False)))


class Dropped(Exception):
  """A record has nothing to learn from.

  Attributes:
    reason: the message, the same for all records dropped for it. (To str() of the exception gin may add lines.)
  """

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


@dataclasses.dataclass(frozen=True)
class Text:
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
    record: records.Record,
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
  values = records.known(record, columns)
  if 'messages' in values:
    text = _chat_text(tokenizer, records.messages(values, 'messages'), template)
  elif 'prompt' in values and 'completion' in values:
    text = prompted_text(tokenizer, values, 'completion', template)
  elif 'text' in values:
    text = Text('', [(records.text(values, 'text'), True)], special=False)
  else:
    raise records.missing(record, columns, ('messages',), ('prompt', 'completion'), ('text',))
  append_eos = records.append_eos(values)
  return of_texts([text], tokenizer, row_length, labels={}, append_eos=append_eos, learn_all=not completion_only)


def preference(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Group:
  """A pair, K = 2 with chosen first, labelled with `margin` and what else the record says of it.

  The record has `chosen` and `rejected` with a `prompt`: strings, taken as they are, or lists of messages. Without a
  prompt they are whole conversations: lists of messages, or dialogues as `chat.parse_transcript` reads them. The turns
  that both share are then the prompt, and what the assistant says after them is learned. Optional columns: `margin`
  (default 0), `append_eos` (see `supervised`), `probability` (that the chosen response is better), `group` (the number
  of a domain), and `chosen_score` with `rejected_score`, which become the label `score`. Both sides of a pair are cut
  alike to fit the row.

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
  values = records.known(record, columns)
  if 'chosen' not in values or 'rejected' not in values:
    raise records.missing(record, columns, ('prompt', 'chosen', 'rejected'), ('chosen', 'rejected'))
  if values['chosen'] == values['rejected']:
    raise Dropped('equal responses')
  names = ('chosen', 'rejected')
  if 'prompt' in values and not any(is_conversation(values, name) for name in names):
    texts = [prompted_text(tokenizer, values, name, template) for name in names]
  else:
    chosen, rejected = (records.messages(values, name) for name in names)
    shared = min(shared_items(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    texts = [_chat_text(tokenizer, turns, template, first_turn=shared) for turns in (chosen, rejected)]
  group = of_texts(texts, tokenizer, row_length, labels=_pair_labels(values), append_eos=records.append_eos(values))
  if np.array_equal(group.sequences[0].ids, group.sequences[1].ids):
    raise Dropped('equal responses' + (' after truncation' if group.truncated else ''))
  return group


def _pair_labels(values: Mapping[str, Any]) -> dict[str, float | list[float]]:
  labels: dict[str, float | list[float]] = {'margin': records.number({'margin': 0.0, **values}, 'margin')}
  if 'probability' in values:
    labels['probability'] = records.number(values, 'probability', 0.0, 1.0)
  if isinstance(values.get('group'), int | float):
    labels['group'] = records.number(values, 'group')
  scores = [name for name in ('chosen_score', 'rejected_score') if name in values]
  if len(scores) == 2:
    labels['score'] = [records.number(values, name) for name in scores]
  return labels


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
  turns = records.messages({'prompt': prompt}, 'prompt')
  text, _ = _render(tokenizer, turns, template, add_generation_prompt=True, first_turn=len(turns))
  return _prompt_tokens(tokenizer, text, special=True)


def shared_items(a: list[Any], b: list[Any]) -> int:
  """How many leading items two lists share."""
  return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def is_conversation(values: Mapping[str, Any], name: str) -> bool:
  """Whether a response is in truth a whole conversation, prompt included, as some data sets have it."""
  return not isinstance(values[name], str) and records.messages(values, name)[0]['role'] != 'assistant'


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


def _chat_text(tokenizer, turns: list[chat.Message], template: str | None, first_turn: int = 0) -> Text:
  """A rendered conversation; what follows the assistant's last turn is left out, as nothing in it is learned."""
  text, spans = _render(tokenizer, turns, template, first_turn=first_turn)
  if not spans:
    raise Dropped('nothing to learn: no turn of the assistant')
  body, end = [], spans[0][0]
  for start, stop in spans:
    body += [(text[end:start], False), (text[start:stop], True)]
    end = stop
  if body[-1][0].rstrip().endswith(tokenizer.eos_token):  # Some templates count a newline behind it.
    body[-1] = (body[-1][0].rstrip(), True)
  return Text(text[: spans[0][0]], body[1:], special=True)


def prompted_text(tokenizer, values: Mapping[str, Any], name: str, template: str | None) -> Text:
  """The column `prompt` with the response in the column `name`, both strings or messages."""
  if isinstance(values['prompt'], str) and isinstance(values[name], str):
    return Text(values['prompt'], [(values[name], True)], special=False)
  before, after = records.messages(values, 'prompt', 'user'), records.messages(values, name, 'assistant')
  return _chat_text(tokenizer, before + after, template, first_turn=len(before))


def of_texts(
    texts: list[Text], tokenizer, row_length: int, *, labels, append_eos: bool, learn_all: bool = False, whole=False
) -> Group:
  """A group of texts that are cut alike to fit the row; `whole` cuts prompts alone, and drops what is longer still.

  Raises:
    Dropped: there is nothing to learn, or it is not whole.
    RunError: a text is no Unicode.
  """
  prompts = {text.prompt: _prompt_tokens(tokenizer, text.prompt, text.special) for text in texts}
  tokens = [_tokens(tokenizer, text, prompts[text.prompt], append_eos) for text in texts]
  if whole:
    tokens = [dataclasses.replace(one, first=len(one.body)) for one in tokens]
  keep = int(all(one.prompt[:1] == [tokenizer.bos_id] for one in tokens))
  if learn_all:
    tokens = [_learn_prompt(one, keep) for one in tokens]
  fitted = _fit(tokens, row_length + 1, keep)
  if whole and any(len(a.body) < len(b.body) for a, b in zip(fitted, tokens)):
    raise Dropped('longer than a row without its prompt (loader.Packing.row_length)')
  sequences = tuple(_sequence(one) for one in fitted)
  if not all(sequence.mask.any() for sequence in sequences):
    raise Dropped('nothing to learn: empty response')
  prompt_tokens = shared_items(fitted[0].prompt, fitted[-1].prompt)
  return Group(sequences, labels, truncated=fitted is not tokens, prompt_tokens=prompt_tokens)


def to_ids(tokenizer, text: str, *, continuation: bool, special: bool) -> list[int]:
  """As `Tokenizer.encode`; raises RunError where the text is no Unicode."""
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as err:
    raise types.RunError(f'the text has half a character (a lone surrogate) near {text[:err.start][-20:]!r}') from err
  return tokenizer.encode(text, continuation=continuation, special=special)


def _prompt_tokens(tokenizer, prompt: str, special: bool) -> list[int]:
  ids = to_ids(tokenizer, prompt, continuation=False, special=special)
  return ids if tokenizer.bos_id is None or ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def _tokens(tokenizer, text: Text, prompt: list[int], append_eos: bool) -> _Tokens:
  tokens = _Tokens(prompt, [], [], 0)
  for piece, learned in text.body:
    continuation = bool(tokens.body) or any(i != tokenizer.bos_id for i in prompt)
    tokens.body += to_ids(tokenizer, piece, continuation=continuation, special=text.special)
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


def _learn_prompt(tokens: _Tokens, keep: int) -> _Tokens:
  """The same with all but the first `keep` tokens (BOS) as body."""
  body = tokens.prompt[keep:] + tokens.body
  return _Tokens(tokens.prompt[:keep], body, [True] * len(body), len(body))


def _fit(tokens: list[_Tokens], size: int, keep: int) -> list[_Tokens]:
  """Cuts all of a group alike to `size` tokens, or returns the list that was given where all fit.

  A prompt is cut only as far as the longest response to it wants, and never its first `keep` tokens (BOS) or its last.
  """
  if all(len(one.prompt) + len(one.body) <= size for one in tokens):
    return tokens
  room = max(size - max(one.first for one in tokens), keep, 1)
  fitted = []
  for one in tokens:
    prompt = one.prompt[:keep] + one.prompt[keep + max(0, len(one.prompt) - room) :]
    left = size - len(prompt)
    fitted.append(_Tokens(prompt, one.body[:left], one.mask[:left], one.first))
  return fitted


def _sequence(tokens: _Tokens) -> Sequence:
  mask = np.array([False] * len(tokens.prompt) + tokens.mask, bool)
  mask[:1] = False  # Nothing comes before the first token that could predict it.
  return Sequence(np.array(tokens.prompt + tokens.body, np.int32), mask)
