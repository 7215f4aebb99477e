"""Examples for models that judge in words of their own: two responses in one text, or a question about one of them."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import feedback
from jaxalign.data import records
from jaxalign.data import scored
from jaxalign.data import tokenizers


def both_orders(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    first: str = '\n\nResponse A:',
    second: str = '\n\nResponse B:',
    labelled: bool = True,
    columns: Mapping[str, str] | None = None,
) -> examples.Group | list[examples.Group]:
  """Two responses to a prompt in one text, for a model of whether the first is better; in both orders.

  The text is PROMPT `first` RESPONSE `second` RESPONSE; one slot counts in it, where its last token has been read. No
  chat template is used: messages count as their contents, and where there are several, each behind its role.

  Args:
    record: a pair, see `examples.preference`, or a scored list, see `feedback.ranked`, of which every two responses of
      different scores are taken.
    tokenizer: turns text into ids.
    row_length: the longest sequence, in slots; here a sequence of n tokens takes n. Prompts alone are cut.
    first: what precedes the first response.
    second: what precedes the second one.
    labelled: whether to train; otherwise lists are refused: of n responses each would be read in 2 (n - 1) texts, for
      a score that depends on the others.
    columns: what the record calls the columns above, where it is something else.

  Returns:
    Two groups a pair, K = 1, the better response first with the label `desirable` 1, and second with 0; where not
    `labelled` one group without labels, K = 2.

  Raises:
    Dropped: the responses are equal, or do not fit a row together.
    RunError: a column is missing or of the wrong kind.
  """
  values, groups = records.known(record, columns), []
  for prompt, better, worse in _pairs(values, record, columns, lists=labelled):
    orders = (better, worse), (worse, better)
    texts = [examples.Text(prompt, [(first, True), (a, True), (second, True), (b, True)], False) for a, b in orders]
    eos = records.append_eos(values)
    group = examples.of_texts(texts, tokenizer, row_length - 1, labels={}, append_eos=eos, whole=True)
    groups.append(dataclasses.replace(group, sequences=tuple(map(scored.at_end, group.sequences))))
  if not labelled:
    return groups[0]
  return [
      dataclasses.replace(group, sequences=(sequence,), labels={'desirable': label})
      for group in groups
      for sequence, label in zip(group.sequences, (1.0, 0.0))
  ]


def _pairs(values, record, columns, *, lists: bool) -> list[tuple[str, str, str]]:
  """Prompt, better and worse response of the pairs of a record, as text."""
  is_pair, column = {'chosen', 'rejected'} <= set(values), records.list_column(values)
  if column and not lists:
    raise types.RunError(f'column {column}: this model compares two responses, chosen and rejected; it scores no list')
  if column and ({'scores', 'ranks'} & set(values) or not is_pair):
    prompt, found, scores, _ = feedback.scored_list(record, columns)
    count = range(len(found))
    pairs = [(prompt, found[i], found[j]) for i in count for j in count if scores[i] > scores[j]]
  elif is_pair:
    (prompt, better, _), (_, worse, _) = feedback.responses({k: v for k, v in values.items() if k != 'label'})
    pairs = [(prompt, better, worse)]
  else:
    raise records.missing(record, columns, ('prompt', 'chosen', 'rejected'))
  texts = [(_text(prompt, 'prompt'), _text(a, 'response'), _text(b, 'response')) for prompt, a, b in pairs]
  if any(a == b for _, a, b in texts):
    raise examples.Dropped('equal responses')
  return texts


def answered(
    record: records.Record,
    tokenizer: tokenizers.Tokenizer,
    *,
    row_length: int,
    before: str = '\n\nResponse:',
    question: str = '\n\nIs this response good (Yes/No)?',
    answers: tuple[str, ...] = (' Yes', ' No'),
    labelled: bool = True,
    columns: Mapping[str, str] | None = None,
) -> examples.Group | list[examples.Group]:
  """A response, a question about it and the answer in one word, for a judge that is a language model.

  The text is PROMPT `before` RESPONSE `question` ANSWER, and ends with the first token in which the two answers differ,
  the only one that is learned: log p of one less log p of the other is the judge's score. No chat template is used, see
  `both_orders`. Zhang et al., 2024 (GenRM), https://arxiv.org/abs/2408.15240, without rationales, from its definition.

  Args:
    record: a response with a label, or a pair, see `feedback.binary`.
    tokenizer: turns text into ids.
    row_length: see `examples.supervised`; prompts alone are cut.
    before: what precedes the response.
    question: what follows it.
    answers: of a desirable response, and of another one.
    labelled: whether to train; otherwise single responses need no label, and lists are read, see `scored.responses`.
    columns: see `feedback.binary`.

  Returns:
    A group a response, K = 1; where not `labelled` one group, in which both answers follow each response.

  Raises:
    Dropped: question and response do not fit a row.
    UsageError: both answers are the same tokens, or one begins with the other.
    RunError: a column is missing or of the wrong kind.
  """
  values = records.known(record, columns)
  if not labelled and {'prompt', 'completion'} <= set(values):
    values['label'] = True
  several = [] if labelled else scored.unscored_list(record, columns)[1]
  found = [(values['prompt'], one, 1.0) for one in several] or feedback.responses(values)
  asked = lambda response: [(before, False), (_text(response, 'response'), False), (question, False)]
  texts = [
      examples.Text(_text(prompt, 'prompt'), [*asked(response), (answer, True)], False)
      for prompt, response, _ in found
      for answer in answers
  ]
  group = examples.of_texts(texts, tokenizer, row_length, labels={}, append_eos=False, whole=True)
  made = group.sequences
  pairs = [_deciding(yes, no, answers) for yes, no in zip(made[::2], made[1::2])]
  if not labelled:
    return dataclasses.replace(group, sequences=tuple(sequence for pair in pairs for sequence in pair))
  return [
      dataclasses.replace(group, sequences=(pair[0] if desirable else pair[1],))
      for pair, (_, _, desirable) in zip(pairs, found)
  ]


def _deciding(yes: examples.Sequence, no: examples.Sequence, answers) -> tuple[examples.Sequence, examples.Sequence]:
  """Both up to the first token in which they differ, which alone is to be predicted."""
  at = examples.shared_items(yes.ids.tolist(), no.ids.tolist())
  if at == min(len(yes.ids), len(no.ids)):
    raise types.UsageError(
        f'judged.answered.answers = {tuple(answers)}: the tokens of one begin with those of the other'
    )
  cut = lambda sequence: examples.Sequence(sequence.ids[: at + 1], np.arange(at + 1) == at)
  return cut(yes), cut(no)


def _text(value: Any, name: str) -> str:
  """A text as it is; the content of a message; of several messages each behind its role."""
  if isinstance(value, str):
    return value
  turns = records.messages({name: value}, name)
  for turn in turns:
    if not isinstance(turn['content'], str):
      raise types.RunError(f'column {name}: {type(turn["content"]).__name__} where the text of a message is wanted')
  if len(turns) == 1:
    return turns[0]['content']
  return '\n\n'.join(f'{turn["role"].capitalize()}: {turn["content"]}' for turn in turns)
