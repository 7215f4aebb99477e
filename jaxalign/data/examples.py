"""From a record to token ids: what is prompt, what is response, and which tokens are to be predicted."""

from collections.abc import Mapping
import dataclasses

import numpy as np


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
