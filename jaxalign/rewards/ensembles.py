"""Scores of several reward models as one: pure functions of arrays, of NumPy or of JAX."""

from jaxalign import types

HOW = ('mean', 'worst', 'uncertainty')


def combine(scores_EN: types.Array, *, how: str, penalty: float = 1.0) -> types.Array:
  """One score of each response, of those that the members of an ensemble give it.

    mean          mean_e r_e
    worst         min_e r_e
    uncertainty   mean_e r_e - penalty * var_e r_e, the variance being that of the members (divided by E)

  The last two compare members, whose scores then need the same zero and scale: see `centred`.

  Args:
    scores_EN: of E members, N responses.
    how: one of `HOW`.
    penalty: lambda of 'uncertainty', at least 0.

  Returns:
    `[N]`.

  Raises:
    UsageError: there is no such way.

  References:
    Coste et al., 2023, https://arxiv.org/abs/2310.02743, from its definition.
  """
  if how not in HOW:
    raise types.UsageError(f'how = {how!r}: it is one of {", ".join(HOW)}')
  if how == 'worst':
    return scores_EN.min(axis=0)
  mean_N = scores_EN.mean(axis=0)
  return mean_N - penalty * scores_EN.var(axis=0) if how == 'uncertainty' else mean_N


def centred(scores_EN: types.Array) -> types.Array:
  """The same less each member's mean: what is trained on differences alone has a zero of no meaning."""
  return scores_EN - scores_EN.mean(axis=1, keepdims=True)
