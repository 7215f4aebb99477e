"""Examples for other feedback than pairs: single responses, scored lists, triples; and what becomes of what."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import records
from jaxalign.data import tokenizers

# The column in which `token_cache.build` gives a record another one of its source.
OTHER = 'other_record'


def binary(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[examples.Group]:
  """Single responses, K = 1, with the label `desirable`.

  The record has `prompt`, `completion` and `label` (true or false, or 1 or 0), or is a pair, as `examples.preference`
  reads it, of which both responses are taken: the chosen one is desirable, the rejected one is not. A column
  `density_ratio` (at least 0) beside `label` is a label too, see `losses.unpaired.bco_udm`.

  Args:
    record: the columns above.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`.
    template: see `chat.pick`; for messages only.
    columns: what the record calls the columns above, where it is something else.

  Raises:
    Dropped: see there.
    RunError: a column is missing or of the wrong kind, or the chat template fails.
  """
  values = records.known(record, columns)
  if 'label' in values:
    group = examples.supervised(record, tokenizer, row_length=row_length, template=template, columns=columns)
    own = {'desirable': records.truth(values, 'label')}
    if 'density_ratio' in values:
      own['density_ratio'] = records.number(values, 'density_ratio', 0.0)
    return [dataclasses.replace(group, labels=own)]
  pair = examples.preference(record, tokenizer, row_length=row_length, template=template, columns=columns)
  labels = {'desirable': 1.0}, {'desirable': 0.0}
  return [dataclasses.replace(pair, sequences=(one,), labels=own) for one, own in zip(pair.sequences, labels)]


def mismatched(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[examples.Group]:
  """As `binary`, K = 2: behind each response one that was given to another prompt, for KTO's estimate of the KL.

  `recipe.Recipe.mismatched` gives each record another one, half the data set away, or the next with another prompt.

  Args:
    record: see `binary`.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`.
    template: see `chat.pick`; for messages only.
    columns: see `binary`.

  Raises:
    SamePrompt: the other record has this one's prompt.
    Dropped: see `binary`.
    RunError: see `binary`.
  """
  if OTHER not in record:
    raise types.RunError('no other record: feedback.mismatched needs recipe.Recipe.mismatched = True')
  values, other_values = (records.known(one, columns) for one in (record, record[OTHER]))
  here, there, groups = responses(values), responses(other_values), []
  if here[0][0] == there[0][0]:
    raise SamePrompt('the other record has the same prompt')
  for (prompt, response, desirable), (_, other, _) in zip(here, there * 2):
    if isinstance(response, str) != isinstance(other, str):
      raise types.RunError('responses are text in one record and messages in another')
    texts = [examples.prompted_text(tokenizer, {'prompt': prompt, '': r}, '', template) for r in (response, other)]
    eos, labels = records.append_eos(values), {'desirable': desirable}
    groups.append(examples.of_texts(texts, tokenizer, row_length, labels=labels, append_eos=eos))
  return groups


class SamePrompt(examples.Dropped):
  """Another record is wanted, whose prompt is another."""


def responses(values: Mapping[str, Any]) -> list[tuple[Any, Any, float]]:
  """(prompt, response, whether it is desirable) of each response of a record; whole conversations are taken apart.

  Raises:
    RunError: a column is missing or of the wrong kind.
  """
  if 'label' in values:
    if not {'prompt', 'completion'} <= set(values):
      raise records.missing(values, None, ('prompt', 'completion', 'label'))
    desirable = records.truth(values, 'label')
    if examples.is_conversation(values, 'completion'):
      turns = records.messages(values, 'completion')
      return [(turns[:-1], turns[-1:], desirable)]
    return [(values['prompt'], values['completion'], desirable)]
  if not {'chosen', 'rejected'} <= set(values):
    raise records.missing(values, None, ('prompt', 'completion', 'label'), ('prompt', 'chosen', 'rejected'))
  names = {'chosen': 1.0, 'rejected': 0.0}
  if 'prompt' in values and not any(examples.is_conversation(values, name) for name in names):
    return [(values['prompt'], values[name], desirable) for name, desirable in names.items()]
  both = [records.messages(values, name) for name in names]
  shared = min(examples.shared_items(*both), *(len(turns) - 1 for turns in both)) or -1
  return [(turns[:shared], turns[shared:], desirable) for turns, desirable in zip(both, names.values())]


def ranked(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    most: int = 8,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> examples.Group:
  """A list of responses with the label `score` of each, higher being better.

  The record has `prompt`, `completions` or `samples` (texts or lists of messages) and `scores` (numbers, as
  `--mode=score` gives them) or `ranks` (1 is the best; the score is then minus the rank). Of more than `most` responses
  those are taken whose places in the ranking are spread evenly, the best and the worst among them.

  Args:
    record: the columns above.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`.
    most: responses of the longest list, K.
    template: see `chat.pick`; for messages only.
    columns: what the record calls the columns above, where it is something else.

  Raises:
    Dropped: there are fewer than two responses, or all have the same score.
    RunError: a column is missing or of the wrong kind, or the chat template fails.
  """
  prompt, found, scores, eos = scored_list(record, columns)
  order = np.argsort(-scores, kind='stable')
  chosen = order[np.unique(np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int))]
  texts = [examples.prompted_text(tokenizer, {'prompt': prompt, '': found[i]}, '', template) for i in sorted(chosen)]
  labels = {'score': [float(scores[i]) for i in sorted(chosen)]}
  return examples.of_texts(texts, tokenizer, row_length, labels=labels, append_eos=eos)


def pairs_of_list(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    which: str = 'extremes',
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[examples.Group]:
  """Pairs of a scored list, see `ranked`, labelled with `margin`, the difference of scores.

  Args:
    record: see `ranked`.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`.
    which: 'extremes' pairs the best with the worst response, 'all' every two of different scores.
    template: see `chat.pick`; for messages only.
    columns: see `ranked`.

  Raises:
    Dropped: see `ranked`.
    RunError: see `ranked`.
  """
  if which not in ('extremes', 'all'):
    raise types.UsageError(f"feedback.pairs_of_list.which = {which!r}: it is 'extremes' or 'all'")
  prompt, found, scores, eos = scored_list(record, columns)
  order = [int(i) for i in np.argsort(-scores, kind='stable')]
  every = [(i, j) for place, i in enumerate(order) for j in order[place + 1 :] if scores[i] > scores[j]]
  groups = []
  for i, j in every if which == 'all' else [(order[0], order[-1])]:
    pair = {'prompt': prompt, 'chosen': found[i], 'rejected': found[j], 'append_eos': eos}
    pair['margin'] = float(scores[i] - scores[j])
    groups.append(examples.preference(pair, tokenizer, row_length=row_length, template=template))
  return groups


def triple(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> examples.Group:
  """A pair and a better response, K = 3: chosen, rejected, gold.

  The record has `prompt`, `chosen`, `rejected` and `gold`, or is a scored list, see `ranked`: its best is gold, the
  next chosen, the worst rejected, where their scores differ.

  Args:
    record: the columns above.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`.
    template: see `chat.pick`; for messages only.
    columns: what the record calls the columns above, where it is something else.

  Raises:
    Dropped: there is nothing to learn, or the list has not three different scores.
    RunError: a column is missing or of the wrong kind, or the chat template fails.
  """
  values = records.known(record, columns)
  if 'gold' in values:
    if not {'prompt', 'chosen', 'rejected'} <= set(values):
      raise records.missing(record, columns, ('prompt', 'chosen', 'rejected', 'gold'))
    eos = records.append_eos(values)
  else:
    prompt, found, scores, eos = scored_list(record, columns)
    order = np.argsort(-scores, kind='stable')
    if len(order) < 3 or not scores[order[0]] > scores[order[1]] > scores[order[-1]]:
      raise examples.Dropped('not three responses of different scores')
    of = {'gold': order[0], 'chosen': order[1], 'rejected': order[-1]}
    values = {'prompt': prompt} | {name: found[i] for name, i in of.items()}
  texts = [examples.prompted_text(tokenizer, values, name, template) for name in ('chosen', 'rejected', 'gold')]
  return examples.of_texts(texts, tokenizer, row_length, labels={}, append_eos=eos)


def selected(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    threshold: float = -math.inf,
    most: int = 1,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[examples.Group]:
  """Demonstrations out of a scored list: the best responses of it, K = 1 each, with the label `score`.

  The best one alone is RAFT, or best-of-n sampling (Dong et al., 2023, https://arxiv.org/abs/2304.06767); those that
  reach a threshold are the Improve step of ReST (Gulcehre et al., 2023, https://arxiv.org/abs/2308.08998, Sec. 3).
  Equal texts are taken once.

  Args:
    record: see `ranked`; responses may all have the same score.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`.
    threshold: the least score of what is taken.
    most: responses that are taken of a list, at most; of equally good ones the first.
    template: see `chat.pick`; for messages only.
    columns: see `ranked`.

  Raises:
    Dropped: no response reaches the threshold, or there is nothing to learn.
    RunError: see `ranked`.
  """
  prompt, found, scores, eos = listed(record, columns)
  order = [int(i) for i in np.argsort(-scores, kind='stable') if scores[i] >= threshold]
  taken = [i for place, i in enumerate(order) if found[i] not in [found[j] for j in order[:place]]][:most]
  if not taken:
    # The threshold is told, as two of them could take the same of all records that `probes` knows.
    raise examples.Dropped(f'no response with a score of {threshold!r} or more')
  groups = []
  for i in taken:
    text = examples.prompted_text(tokenizer, {'prompt': prompt, '': found[i]}, '', template)
    labels = {'score': float(scores[i])}
    groups.append(examples.of_texts([text], tokenizer, row_length, labels=labels, append_eos=eos))
  return groups


def negative(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    most: int = 11,
    template: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> examples.Group:
  """A response that nobody wants, and behind it the model's own samples, which stand in for what is wanted.

  The record has `prompt`, `rejected` and `samples` (a list, as `--mode=sample --samples_per_prompt` makes it), or is a
  scored list, see `ranked`, whose worst response is the rejected one and whose others are the samples. It is the data
  of D2O (Duan et al., 2024, https://arxiv.org/abs/2403.03419), where 11 samples are taken.

  Args:
    record: the columns above.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`.
    most: samples of a group, the first of the list; the group has one response more.
    template: see `chat.pick`; for messages only.
    columns: what the record calls the columns above, where it is something else.

  Raises:
    Dropped: no sample differs from the rejected response, or there is nothing to learn.
    RunError: a column is missing or of the wrong kind, or the chat template fails.
  """
  values = records.known(record, columns)
  if {'prompt', 'rejected', 'samples'} <= set(values):
    prompt, rejected, eos = values['prompt'], values['rejected'], records.append_eos(values)
    samples = records.responses(values, 'samples')
    if examples.is_conversation(values, 'rejected'):
      turns = records.messages(values, 'rejected')
      prompt, rejected = turns[:-1], turns[-1:]
    if not isinstance(rejected, str):
      samples = [[{'role': 'assistant', 'content': x}] if isinstance(x, str) else x for x in samples]
  elif records.list_column(values):
    prompt, found, scores, eos = scored_list(record, columns)
    worst = int(np.argmin(scores))
    rejected, samples = found[worst], found[:worst] + found[worst + 1 :]
  else:
    raise records.missing(record, columns, ('prompt', 'rejected', 'samples'), ('prompt', 'completions', 'scores'))
  samples = [sample for sample in samples if sample != rejected][:most]
  if not samples:
    raise examples.Dropped('no sample that differs from the rejected response')
  both = [rejected, *samples]
  texts = [examples.prompted_text(tokenizer, {'prompt': prompt, '': one}, '', template) for one in both]
  return examples.of_texts(texts, tokenizer, row_length, labels={}, append_eos=eos)


def scored_list(record: records.Record, columns: Mapping[str, str] | None) -> tuple[Any, list[Any], np.ndarray, bool]:
  """As `listed`; raises Dropped where there are fewer than two responses, or all have the same score."""
  prompt, found, scores, eos = listed(record, columns)
  if len(found) < 2 or np.all(scores == scores[0]):
    raise examples.Dropped('nothing to rank: fewer than two responses, or equal scores')
  return prompt, found, scores, eos


def listed(record: records.Record, columns: Mapping[str, str] | None) -> tuple[Any, list[Any], np.ndarray, bool]:
  """Prompt, responses and scores of a list, and whether their ends are learned; see `ranked`.

  Raises:
    RunError: a column is missing or of the wrong kind.
  """
  values = records.known(record, columns)
  column = records.list_column(values) or 'completions'
  if not {'prompt', column} <= set(values) or not {'scores', 'ranks'} & set(values):
    raise records.missing(record, columns, ('prompt', column, 'scores'), ('prompt', column, 'ranks'))
  found = records.responses(values, column)
  name = 'scores' if 'scores' in values else 'ranks'
  scores = records.numbers(values, name, len(found)) * (1.0 if name == 'scores' else -1.0)
  return values['prompt'], found, scores, records.append_eos(values)
