"""Rules that judge text without a model."""

from collections.abc import Hashable
from collections.abc import Sequence
import functools

from vaderSentiment import vaderSentiment


@functools.cache
def _analyser() -> vaderSentiment.SentimentIntensityAnalyzer:
  return vaderSentiment.SentimentIntensityAnalyzer()


def vader(texts: Sequence[str]) -> list[float]:
  """Sentiment of each text in [-1, 1]: VADER's compound score, a sum of word valences squashed by x / sqrt(x^2 + 15).

  The text is what is judged, no more: pass responses without their prompts.

  References:
    Hutto and Gilbert, 2014, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text".
  """
  return [_analyser().polarity_scores(text)['compound'] for text in texts]


def distinct(n: int, sequences: Sequence[Sequence[Hashable]]) -> float:
  """Distinct n-grams over all n-grams of all sequences, in [0, 1]; near 0 where a model repeats itself.

  It falls as the number of sequences grows, so compare equal numbers only. 0 where there is no n-gram.

  References:
    Li et al., 2016, https://arxiv.org/abs/1510.03055, Sec. 5.
  """
  grams = [tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)]
  return len(set(grams)) / len(grams) if grams else 0.0
