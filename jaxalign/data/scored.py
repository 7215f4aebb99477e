"""Examples for models that score whole responses, made of the examples for models that write them."""

from collections.abc import Mapping
import dataclasses

import numpy as np

from jaxalign.data import examples
from jaxalign.data import records
from jaxalign.data import tokenizers


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
  return dataclasses.replace(pair, sequences=tuple(map(_scored, pair.sequences)))


def _scored(sequence: examples.Sequence) -> examples.Sequence:
  mask = np.zeros(len(sequence.ids) + 1, bool)
  mask[-1] = True
  return examples.Sequence(np.append(sequence.ids, sequence.ids[-1]), mask)
