"""Examples for models that score whole responses, made of the examples for models that write them."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import numpy as np

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import feedback
from jaxalign.data import records
from jaxalign.data import tokenizers

PER = ('response', 'token', 'step')


def comparison(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> examples.Group:
  """A pair for a reward model: what `examples.preference` makes, but one slot counts in each response.

  It is the one where the model reads the response's last token (EOS, unless `append_eos` is false). Inputs end before
  the last token of a sequence, so another is added behind it, which no loss reads.

  Args:
    record: see `examples.preference`.
    tokenizer: turns text into ids.
    row_length: the longest sequence, in slots; here a sequence of n tokens takes n.
    template: see `chat.pick`; for messages only.
    columns: see `examples.preference`.

  Raises:
    Dropped: as `examples.preference` does.
    RunError: as `examples.preference` does.
  """
  pair = examples.preference(record, tokenizer, row_length=row_length - 1, template=template, columns=columns)
  return dataclasses.replace(pair, sequences=tuple(map(at_end, pair.sequences)))


def ranked(record: records.Record, tokenizer: tokenizers.Tokenizer, *, row_length: int, **options) -> examples.Group:
  """A scored list for a reward model, see `feedback.ranked`, of which one slot counts in each response."""
  group = feedback.ranked(record, tokenizer, row_length=row_length - 1, **options)
  return dataclasses.replace(group, sequences=tuple(map(at_end, group.sequences)))


def prefixes(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[examples.Group]:
  """All responses of a scored list, each alone, for a model of values.

  Every token of a response counts, where it has been read, and carries the label `reward`: the score of the response.

  Args:
    record: `prompt`, `completions` or `samples`, and `scores`, see `feedback.ranked`.
    tokenizer: turns text into ids.
    row_length: the longest sequence, in slots; here a sequence of n tokens takes n.
    template: see `chat.pick`; for messages only.
    columns: what the record calls the columns above, where it is something else.

  Raises:
    Dropped: there is no response.
    RunError: a column is missing or of the wrong kind, or the chat template fails.
  """
  prompt, found, scores, eos = feedback.listed(record, columns)
  if 'scores' not in records.known(record, columns):
    raise records.missing(record, columns, ('prompt', 'completions', 'scores'))
  if not found:
    raise examples.Dropped('no response')
  texts = [examples.prompted_text(tokenizer, {'prompt': prompt, '': one}, '', template) for one in found]
  group = examples.of_texts(texts, tokenizer, row_length - 1, labels={}, append_eos=eos)
  groups = []
  for sequence, score in zip(group.sequences, scores, strict=True):
    reward = np.full(np.count_nonzero(sequence.mask), score, np.float32)
    marked = dataclasses.replace(_marked(sequence.ids, sequence.mask), labels={'reward': reward})
    groups.append(dataclasses.replace(group, sequences=(marked,)))
  return groups


def binary(record: records.Record, tokenizer: tokenizers.Tokenizer, *, row_length: int, **options):
  """Responses that are right or not for a reward model, see `feedback.binary`, of which one slot counts in each."""
  groups = feedback.binary(record, tokenizer, row_length=row_length - 1, **options)
  return [dataclasses.replace(group, sequences=tuple(map(at_end, group.sequences))) for group in groups]


def attributes(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    attributes: tuple[str, ...],
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> examples.Group:
  """A response with several ratings, for a reward model: a label of the name of each, NaN where it is missing.

  Args:
    record: a demonstration, see `examples.supervised`, with a column for each attribute: a number, or null (or NaN)
      where it was not rated.
    tokenizer: turns text into ids.
    row_length: the longest sequence, in slots; here a sequence of n tokens takes n.
    attributes: columns of ratings, as the record calls them.
    template: see `chat.pick`; for messages only.
    columns: what the record calls the columns of a demonstration, where it is something else.

  Raises:
    Dropped: none of them was rated, or as `examples.supervised` does.
    RunError: a column is missing or of the wrong kind, or the chat template fails.
  """
  absent = [name for name in attributes if name not in record]
  if absent:
    raise types.RunError(
        f'column {absent[0]} is missing (scored.attributes.attributes); null says that it was not rated'
    )
  isnan = lambda value: value is None or isinstance(value, float | np.floating) and math.isnan(value)
  labels = {name: math.nan if isnan(record[name]) else records.number(record, name) for name in attributes}
  if all(map(math.isnan, labels.values())):
    raise examples.Dropped('no rating')
  return _labelled(record, tokenizer, row_length, template, columns, labels)


def classified(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    classes: int,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> examples.Group:
  """A response with the label `class`, for a classifier.

  Args:
    record: a demonstration, see `examples.supervised`, with `class`, a whole number from 0 on.
    tokenizer: turns text into ids.
    row_length: see `attributes`.
    classes: how many there are.
    template: see `chat.pick`; for messages only.
    columns: what the record calls these columns, where it is something else.

  Raises:
    Dropped: as `examples.supervised` does.
    RunError: a column is missing or of the wrong kind, or the chat template fails.
  """
  values = records.known(record, columns)
  if 'class' not in values:
    raise records.missing(record, columns, ('prompt', 'completion', 'class'))
  label = records.number(values, 'class', 0, classes - 1)
  if label != int(label):
    raise types.RunError(f'column class: {label:g} where a whole number is wanted')
  return _labelled(record, tokenizer, row_length, template, columns, {'class': label})


def _labelled(record, tokenizer, row_length: int, template, columns, labels) -> examples.Group:
  group = examples.supervised(record, tokenizer, row_length=row_length - 1, template=template, columns=columns)
  return dataclasses.replace(group, sequences=tuple(map(at_end, group.sequences)), labels=labels)


def responses(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    per: str = 'response',
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> examples.Group:
  """Responses to be scored: of a list, or else a pair, or else a single one.

  A list is the column `samples` or `completions` (texts or lists of messages) beside `prompt`. Its sequences are in its
  order; like those of a pair they are cut alike to fit the row, or the record is dropped as a whole.

  Args:
    record: a list, or see `examples.preference` and `examples.supervised`; for 'step' see `steps`.
    tokenizer: turns text into ids.
    row_length: the longest sequence, in slots; here a sequence of n tokens takes n.
    per: what has a score: the 'response' (where its last token has been read), each 'token' of it, or each 'step'
      (where its last token has been read).
    template: see `chat.pick`; for messages only.
    columns: what the record calls the columns above, where it is something else.

  Raises:
    Dropped: there is nothing to score.
    RunError: a column is missing or of the wrong kind, or the chat template fails.
  """
  if per == 'step':
    return steps(record, tokenizer, row_length=row_length, template=template, columns=columns, labelled=False)
  group = plain(record, tokenizer, row_length=row_length - 1, template=template, columns=columns)
  marked = at_end if per == 'response' else lambda sequence: _marked(sequence.ids, sequence.mask)
  return dataclasses.replace(group, sequences=tuple(map(marked, group.sequences)))


def plain(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> examples.Group:
  """Responses as a policy reads them, without labels: a list, a pair, or a single one; see `responses`."""
  values = records.known(record, columns)
  column, found = unscored_list(record, columns)
  if found:
    both = [{'prompt': values['prompt'], column: one} for one in found]
    texts = [examples.prompted_text(tokenizer, one, column, template) for one in both]
    return examples.of_texts(texts, tokenizer, row_length, labels={}, append_eos=records.append_eos(values))
  is_pair = {'chosen', 'rejected'} <= set(values)
  read = examples.preference if is_pair else examples.supervised
  group = read(record, tokenizer, row_length=row_length, template=template, columns=columns)
  return dataclasses.replace(group, labels={})


def unscored_list(record: records.Record, columns: Mapping[str, str] | None) -> tuple[str, list[Any]]:
  """The column of a record that is a list of responses, and the responses; ('', []) where there is none.

  Raises:
    Dropped: the list is empty.
    RunError: there is no prompt, or the column is no list, or there are two.
  """
  values = records.known(record, columns)
  column = records.list_column(values)
  if column and 'prompt' not in values:
    raise records.missing(record, columns, ('prompt', column))
  found = records.responses(values, column) if column else []
  if column and not found:
    raise examples.Dropped('no response')
  return column, found


def steps(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
    labelled: bool = True,
) -> examples.Group:
  """A response in steps, for a process reward model: one slot counts a step, where its last token has been read.

  The record has `prompt`, `completions` (a list of texts, each a step) and `labels` (for each step true, false, or how
  probably it is right). A newline follows every step and belongs to it. What does not fit the row is left out.

  Args:
    record: the columns above.
    tokenizer: turns text into ids.
    row_length: the longest sequence, in slots; here a sequence of n tokens takes n.
    template: see `chat.pick`; for messages only.
    columns: what the record calls the columns above, where it is something else.
    labelled: whether the steps are labelled; otherwise `labels` is not read.

  Returns:
    One sequence, with the label `step` of each token that counts.

  Raises:
    Dropped: not even the first step fits the row.
    RunError: a column is missing or of the wrong kind, or the chat template fails.
  """
  values = records.known(record, columns)
  wanted = ('prompt', 'completions', *(['labels'] if labelled else []))
  if not set(wanted) <= set(values):
    raise records.missing(record, columns, wanted)
  texts, prompt = values['completions'], values['prompt']
  if not isinstance(texts, list | tuple) or not texts or not all(isinstance(step, str) for step in texts):
    raise types.RunError('column completions: a list of texts is wanted')
  labels = records.shares(values, 'labels', len(texts)) if labelled else None
  turns = prompt if isinstance(prompt, str) else records.messages(values, 'prompt')
  ids = examples.prompt_ids(tokenizer, turns, template)
  prompt_tokens, ends = len(ids), []
  for step in texts:
    continuation = any(i != tokenizer.bos_id for i in ids)
    more = examples.to_ids(tokenizer, step.rstrip('\n') + '\n', continuation=continuation, special=False)
    if len(ids) + len(more) > row_length:
      break
    ids += more
    ends.append(len(ids) - 1)
  if not ends:
    raise examples.Dropped('the prompt and its first step are longer than a row')
  mask = np.zeros(len(ids), bool)
  mask[ends] = True
  sequence = _marked(np.array(ids, np.int32), mask)
  if labels is not None:
    sequence = dataclasses.replace(sequence, labels={'step': labels[: len(ends)]})
  return examples.Group((sequence,), {}, truncated=len(ends) < len(texts), prompt_tokens=prompt_tokens)


def sampled_steps(
    prompt: Sequence[int], ids: Sequence[int], tokenizer: tokenizers.Tokenizer
) -> tuple[examples.Sequence, np.ndarray]:
  """A response that was sampled as the steps that its lines are; one slot counts a step, as in `steps`.

  A step ends with the token that has the first line break behind its words. A last one that has none is given one, in
  place of EOS.

  Args:
    prompt: ids.
    ids: of the response, which stay as they are.
    tokenizer: turns ids into text.

  Returns:
    The sequence, and which of `ids` end a step, increasing: none where nothing is said.
  """
  ids = ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids
  ends, has_words, piece_of = [], False, functools.cache(lambda i: tokenizer.decode([i], continuation=True))
  for place, piece in enumerate(map(piece_of, ids)):
    before, broken, after = piece.partition('\n')
    has_words |= bool(before.strip())
    if broken and has_words:
      ends.append(place)
      has_words = False
    has_words |= bool(after.strip())
  places, more = [len(prompt) + place for place in ends], []
  if has_words:
    more = tokenizer.encode('\n', continuation=True)
    places, ends = [*places, len(prompt) + len(ids) + len(more) - 1], [*ends, len(ids) - 1]
  whole = np.array([*prompt, *ids, *more], np.int32)
  return _marked(whole, np.isin(np.arange(len(whole)), places)), np.array(ends, int)


def at_end(sequence: examples.Sequence) -> examples.Sequence:
  """The same sequence with a score where its last token has been read, behind which another is added."""
  return _marked(sequence.ids, np.arange(len(sequence.ids)) == len(sequence.ids) - 1)


def _marked(ids: np.ndarray, mask: np.ndarray) -> examples.Sequence:
  """A sequence with a score where each token of `mask` has been read: one slot later, as targets are."""
  return examples.Sequence(np.append(ids, ids[-1]), np.append(False, mask))
