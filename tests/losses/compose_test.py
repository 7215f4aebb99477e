"""Compositions written in gin alone, and what they share with the named losses."""

import functools

import numpy as np
import pytest

from jaxalign.cli import config
from jaxalign.losses import preference
from jaxalign.losses import reference_free
from jaxalign.losses import shaped
from tests.losses import world as world_lib

_of = functools.partial
# Bindings, and the named loss that they make.
CASES = {
    'dpo': (['compose.pairwise.beta = 0.3'], _of(preference.dpo, beta=0.3)),
    'ipo': (
        ['compose.pairwise.link = @parts.squared', 'parts.squared.target = 2.5'],
        _of(preference.ipo, tau=0.2),
    ),
    'simpo': (
        [
            'compose.pairwise.score = @parts.log_prob',
            'parts.log_prob.length_power = 1.0',
            'compose.pairwise.beta = 2.0',
            'compose.pairwise.offset = @parts.constant',
            'parts.constant.margin = 0.7',
        ],
        _of(reference_free.simpo, beta=2.0, margin=0.7),
    ),
    'rpo': (
        ['compose.pairwise.beta = 0.3', 'compose.pairwise.regularisers = [(0.2, @parts.nll)]'],
        _of(shaped.rpo, beta=0.3, eta=0.2),
    ),
    'dpop': (
        [
            'compose.pairwise.beta = 0.3',
            'compose.pairwise.offset = @parts.lost_likelihood',
            'parts.lost_likelihood.scale = 1.5',
        ],
        _of(shaped.dpop, beta=0.3, penalty=5.0),
    ),
    # One function twice, with different parameters, by gin's scopes.
    'soft and hard': (
        [
            'compose.mixture.losses = [(0.5, @low/preference.dpo), (0.5, @high/preference.dpo)]',
            'low/preference.dpo.beta = 0.1',
            'high/preference.dpo.beta = 0.9',
        ],
        None,
    ),
}


def made(bindings):
  """What `recipe.Recipe.loss_fn` is under these bindings of a user's."""
  name = 'mixture' if 'mixture' in bindings[0] else 'pairwise'
  config.parse('dpo', files=[], user_files=[], bindings=[f'recipe.Recipe.loss_fn = @compose.{name}', *bindings])
  return config.get('recipe.Recipe')().loss_fn


class TestGin:

  @pytest.mark.parametrize('name', [name for name, case in CASES.items() if case[1]])
  def test_makes_the_named_loss(self, name):
    bindings, named = CASES[name]
    w = world_lib.world(groups=6)
    found, wanted = w.run(made(bindings)), w.run(named)
    np.testing.assert_allclose(found.per_item, wanted.per_item, rtol=2e-6, atol=1e-6)

  def test_uses_a_function_twice_with_different_parameters(self):
    w = world_lib.world(groups=6)
    found = w.run(made(CASES['soft and hard'][0])).per_item
    wanted = [w.run(preference.dpo, beta=beta).per_item for beta in (0.1, 0.9)]
    np.testing.assert_allclose(found, 0.5 * (wanted[0] + wanted[1]), rtol=1e-6)
