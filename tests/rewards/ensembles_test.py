"""Combined scores of ensembles, against loops over members."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import types
from jaxalign.rewards import ensembles

SCORES_EN = np.random.default_rng(0).normal(0, 2, (4, 7))


class TestCombine:

  @pytest.mark.parametrize('module', [np, jnp])
  def test_is_the_mean_the_worst_or_the_mean_less_the_variance(self, module):
    of = {'mean': [], 'worst': [], 'uncertainty': []}
    for column in SCORES_EN.T.tolist():
      mean = sum(column) / 4
      of['mean'].append(mean)
      of['worst'].append(sorted(column)[0])
      of['uncertainty'].append(mean - 0.3 * sum((x - mean) ** 2 for x in column) / 4)
    for how, wanted in of.items():
      found = ensembles.combine(module.asarray(SCORES_EN), how=how, penalty=0.3)
      np.testing.assert_allclose(found, wanted, rtol=1e-5)

  def test_refuses_another_way(self):
    with pytest.raises(types.UsageError, match="how = 'best': it is one of mean, worst, uncertainty"):
      ensembles.combine(SCORES_EN, how='best')


class TestCentred:

  def test_makes_offsets_of_members_of_no_account(self):
    moved_EN = SCORES_EN + np.array([[5.0], [-3.0], [0.0], [100.0]])
    np.testing.assert_allclose(ensembles.centred(moved_EN), ensembles.centred(SCORES_EN), atol=1e-12)
    np.testing.assert_allclose(ensembles.centred(moved_EN).mean(axis=1), 0, atol=1e-12)
