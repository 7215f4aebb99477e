"""Examples that say more in their text than a response: tags, hindsight, spans that count more, earlier steps."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import feedback
from jaxalign.data import records
from jaxalign.data import tokenizers


def tagged(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    good: str = 'Good: ',
    bad: str = 'Bad: ',
    columns: Mapping[str, str] | None = None,
) -> list[examples.Group]:
  """Responses behind a tag that says whether they are desirable, and the prompt: sample behind the good one.

  Records are of text, see `feedback.binary`; the label `desirable` stays. It is conditional supervised fine-tuning (as
  in HALOs), and with `supervised.class_weighted` C-RLFT (Wang et al., 2023, https://arxiv.org/abs/2309.11235).

  Args:
    record: see `feedback.binary`.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`.
    good: what precedes the prompt of a desirable response.
    bad: what precedes that of another.
    columns: see `feedback.binary`.

  Raises:
    Dropped: there is nothing to learn.
    RunError: a column is missing or of the wrong kind.
  """
  values, groups = records.known(record, columns), []
  for prompt, response, desirable in feedback.responses(values):
    _check_text(prompt, response)
    text = examples.Text((good if desirable else bad) + prompt, [(response, True)], special=False)
    labels, eos = {'desirable': desirable}, records.append_eos(values)
    groups.append(examples.of_texts([text], tokenizer, row_length, labels=labels, append_eos=eos))
  return groups


def quantiled(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    edges: Sequence[float],
    tag: str = 'Reward {} of {}: ',
    columns: Mapping[str, str] | None = None,
) -> list[examples.Group]:
  """Responses behind a tag that says in which range their score lies, and the prompt: sample behind the best one.

  The tags of Quark (Lu et al., 2022, https://arxiv.org/abs/2205.13636), where the ranges are quantiles of the rewards;
  those of five are `numpy.quantile(scores, (0.2, 0.4, 0.6, 0.8))`. The label `score` stays.

  Args:
    record: `prompt`, `completion` and `score`, or a scored list, see `feedback.ranked`; of text.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`.
    edges: where ranges meet, increasing; a score at an edge is in the range above it.
    tag: what precedes a prompt: written with the number of the range, 1 for the lowest, and how many there are.
    columns: what the record calls the columns above, where it is something else.

  Raises:
    UsageError: the edges do not increase.
    Dropped: there is nothing to learn.
    RunError: a column is missing or of the wrong kind.
  """
  if not edges or any(not low < high for low, high in zip(edges, [*edges[1:], math.inf])):
    raise types.UsageError(f'texts.quantiled.edges = {edges!r}: numbers that increase are wanted')
  try:
    tag.format(1, 1)
  except (LookupError, ValueError) as err:
    raise types.UsageError(f'texts.quantiled.tag = {tag!r}: it may have two fields, written {{}} and {{}}') from err
  values = records.known(record, columns)
  if {'prompt', 'completion', 'score'} <= set(values):
    found, eos = [values['completion']], records.append_eos(values)
    scores = np.array([records.number(values, 'score')])
  elif records.list_column(values):
    _, found, scores, eos = feedback.listed(record, columns)
  else:
    # The edges are told, as others could put all records that `probes` knows into the same ranges.
    wanted = records.missing(record, columns, ('prompt', 'completion', 'score'), ('prompt', 'completions', 'scores'))
    raise types.RunError(f'{wanted}; scores are wanted for the edges {edges!r}')
  groups = []
  for response, score in zip(found, scores):
    _check_text(values['prompt'], response)
    prompt = tag.format(int(np.searchsorted(edges, score, 'right')) + 1, len(edges) + 1) + values['prompt']
    text = examples.Text(prompt, [(response, True)], special=False)
    groups.append(examples.of_texts([text], tokenizer, row_length, labels={'score': float(score)}, append_eos=eos))
  return groups


def hindsight(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    bad: str = '\n\nA bad answer:',
    good: str = '\n\nA good answer:',
    columns: Mapping[str, str] | None = None,
) -> examples.Group:
  """Chain of hindsight: the rejected response and then the chosen one, each behind what it is; both are learned.

  Liu et al., 2023, https://arxiv.org/abs/2302.02676, Sec. 3, without the masking of random past tokens.

  Args:
    record: a pair of text with a prompt, see `examples.preference`, or a scored list, whose worst and best are taken.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`.
    bad: what precedes the rejected response.
    good: what precedes the chosen one.
    columns: see `examples.preference`.

  Raises:
    Dropped: there is nothing to learn, or both responses do not fit a row.
    RunError: a column is missing or of the wrong kind.
  """
  values = records.known(record, columns)
  if {'prompt', 'chosen', 'rejected'} <= set(values):
    prompt, worst, best, eos = values['prompt'], values['rejected'], values['chosen'], records.append_eos(values)
  elif records.list_column(values):
    prompt, found, scores, eos = feedback.scored_list(record, columns)
    worst, best = found[int(np.argmin(scores))], found[int(np.argmax(scores))]
  else:
    raise records.missing(record, columns, ('prompt', 'chosen', 'rejected'), ('prompt', 'completions', 'scores'))
  _check_text(prompt, worst, best)
  text = examples.Text(prompt, [(bad, False), (worst, True), (good, False), (best, True)], special=False)
  return examples.of_texts([text], tokenizer, row_length, labels={}, append_eos=eos, whole=True)


def weighted(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    outside: float = 1.0,
    columns: Mapping[str, str] | None = None,
) -> examples.Group:
  """A pair with the label `weight` of each token, taken from spans of its text.

  The record is a pair of text with a prompt, see `examples.preference`; `chosen_spans` and `rejected_spans` are lists
  of [start, end, weight] in characters of the response. A token has the weight of the last span that holds its first
  character.

  Args:
    record: the columns above.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`.
    outside: weight of tokens that no span holds; 0 compares spans alone.
    columns: what the record calls the columns above, where it is something else.

  Raises:
    Dropped: see `examples.preference`.
    RunError: see there; or a span is none.
  """
  values = records.known(record, columns)
  group = examples.preference(record, tokenizer, row_length=row_length, columns=columns)
  sequences = []
  for name, sequence in zip(('chosen', 'rejected'), group.sequences):
    _check_text(values.get('prompt'), values[name])
    weights = _weights(tokenizer, sequence, _spans(values, f'{name}_spans'), outside)
    sequences.append(dataclasses.replace(sequence, labels={'weight': weights}))
  return dataclasses.replace(group, sequences=tuple(sequences))


def _weights(tokenizer, sequence: examples.Sequence, spans: list[tuple[float, float, float]], outside: float):
  found = []
  for start in _starts(tokenizer, sequence.ids[sequence.mask].tolist()):
    inside = [weight for low, high, weight in spans if low <= start < high]
    found.append(inside[-1] if inside else outside)
  return np.array(found, np.float32)


def _starts(tokenizer, ids: list[int]) -> list[int]:
  """The place in the text of each token's first character, of which it may be only some bytes."""
  found, whole, first = [], 0, 0  # whole characters before the token `first`
  for count in range(len(ids)):
    text = tokenizer.decode(ids[first:count], continuation=True)
    if not text.endswith('\ufffd'):  # as which bytes of an unfinished character are decoded
      whole, first, text = whole + len(text), count, ''
    found.append(whole + len(text.rstrip('\ufffd')))
  return found


def _spans(values: Mapping[str, Any], name: str) -> list[tuple[float, float, float]]:
  found = values.get(name, [])
  if not isinstance(found, list | tuple):
    raise types.RunError(f'column {name}: a list of [start, end, weight] is wanted')
  for i, span in enumerate(found):
    if not isinstance(span, list | tuple) or len(span) != 3 or not all(map(_is_number, span)):
      raise types.RunError(f'column {name}: item {i} is {span!r} where [start, end, weight] is wanted')
  return [(span[0], span[1], span[2]) for span in found]


def _is_number(x: Any) -> bool:
  return isinstance(x, int | float) and math.isfinite(x)


def next_step(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    columns: Mapping[str, str] | None = None,
) -> examples.Group:
  """A pair of next steps behind steps that are right: `prompt`, `steps` (texts), `chosen` and `rejected`.

  A newline ends each step, those of the prompt and the two that are compared. EOS is learned only where the column
  `append_eos` is true: a step is seldom the last. Lai et al., 2024 (Step-DPO), https://arxiv.org/abs/2406.18629.

  Args:
    record: the columns above.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`.
    columns: what the record calls the columns above, where it is something else.

  Raises:
    Dropped: see `examples.preference`.
    RunError: a column is missing or of the wrong kind.
  """
  values = records.known(record, columns)
  if not {'prompt', 'steps', 'chosen', 'rejected'} <= set(values):
    raise records.missing(record, columns, ('prompt', 'steps', 'chosen', 'rejected'))
  steps = values['steps']
  if not isinstance(steps, list | tuple):
    raise types.RunError('column steps: a list of texts is wanted')
  _check_text(values['prompt'], *steps, values['chosen'], values['rejected'])
  line = lambda step: step.rstrip('\n') + '\n'
  pair = {'append_eos': False} | values | {name: line(values[name]) for name in ('chosen', 'rejected')}
  pair['prompt'] = values['prompt'] + ''.join(map(line, steps))
  return examples.preference(pair, tokenizer, row_length=row_length)


def _check_text(*values: Any) -> None:
  for value in values:
    if not isinstance(value, str):
      raise types.RunError(f'{type(value).__name__} where text is wanted: prompt and responses are plain text here')
