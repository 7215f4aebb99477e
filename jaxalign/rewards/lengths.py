"""Rewards of how long a response is, and of how often it repeats itself.

Each is a reward, see `functions.Reward`. Rewards of tokens read `ids`, so that from the command line they want a
`--tokenizer`.
"""

from collections.abc import Sequence

from jaxalign import types
from jaxalign.rewards import rules

_UNITS = ('words', 'characters', 'tokens')


def near_length(
    responses: Sequence[str],
    ids: Sequence[Sequence[int]] | None = None,
    *,
    wanted_length: float,
    tolerated: float,
    unit: str = 'words',
) -> list[float]:
  """A ramp around a length: max(0, 1 - |n - wanted_length| / tolerated), in [0, 1].

  Args:
    responses: texts.
    ids: token ids of the responses, for tokens alone.
    wanted_length: the length that has 1.
    tolerated: how far from it the reward ends, above 0.
    unit: of length: 'words' (between spaces), 'characters' or 'tokens'.

  Raises:
    UsageError: `tolerated` or `unit` is something else, or tokens are wanted and there are no `ids`.
  """
  if tolerated <= 0:
    raise types.UsageError(f'near_length(tolerated={tolerated!r}): it is above 0')
  if unit not in _UNITS:
    raise types.UsageError(f'near_length(unit={unit!r}): it is one of {", ".join(_UNITS)}')
  if unit == 'tokens' and ids is None:
    raise types.UsageError("near_length(unit='tokens'): there are no tokens; give --tokenizer")
  counted = {'words': [text.split() for text in responses], 'characters': responses, 'tokens': ids}[unit]
  return [max(0.0, 1.0 - abs(len(one) - wanted_length) / tolerated) for one in counted or ()]


def overlong(ids: Sequence[Sequence[int]], *, max_tokens: int, cache_tokens: int) -> list[float]:
  """DAPO's soft punishment of overlong responses, in [-1, 0], a ramp over the last `cache_tokens` before the limit.

      0                                                where n <= max_tokens - cache_tokens
      ((max_tokens - cache_tokens) - n) / cache_tokens  from there to max_tokens
      -1                                               where n > max_tokens

  Args:
    ids: token ids of the responses.
    max_tokens: L_max, the paper's 20480.
    cache_tokens: L_cache, the paper's 4096.

  Raises:
    UsageError: `cache_tokens` is not above 0, or above `max_tokens`.

  References:
    Yu et al., 2025, https://arxiv.org/abs/2503.14476, Eq. 13.
  """
  if not 0 < cache_tokens <= max_tokens:
    raise types.UsageError(f'overlong: cache_tokens={cache_tokens} is not from 1 to max_tokens={max_tokens}')
  free = max_tokens - cache_tokens
  return [min(0.0, max(-1.0, (free - len(one)) / cache_tokens)) for one in ids]


def repetition(responses: Sequence[str], *, ngram_size: int = 3, max_penalty: float = -1.0) -> list[float]:
  """A penalty of repeated n-grams of words, whatever their case: max_penalty * (1 - distinct n-grams / all n-grams).

  0 where no n-gram comes twice, or the response has fewer than `ngram_size` words.

  Args:
    responses: texts.
    ngram_size: n, at least 1.
    max_penalty: what it approaches where all are the same; at most 0.

  Raises:
    UsageError: an option is something else.

  References:
    The share of repeated n-grams, as a penalty of whole responses: Yeo et al., 2025, https://arxiv.org/abs/2502.03373,
    which punishes tokens by it; from its definition.
  """
  if ngram_size < 1 or max_penalty > 0:
    raise types.UsageError(f'repetition: ngram_size={ngram_size} is below 1, or max_penalty={max_penalty:g} above 0')
  words = [text.lower().split() for text in responses]
  return [max_penalty * (1.0 - rules.distinct(ngram_size, [one])) if len(one) >= ngram_size else 0.0 for one in words]
