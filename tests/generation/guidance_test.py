"""Guidance of single tokens, against its formulas in float64 numpy."""

import types as pytypes

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import types
from jaxalign.generation import guidance

RNG = np.random.default_rng(0)
POLICY, OTHER, THIRD = 3 * RNG.standard_normal((3, 4, 30))  # [B, V] each
NOW, AHEAD = RNG.standard_normal((4, 2)), RNG.standard_normal((4, 30, 2))  # scores of two outputs, so far and behind v


def view(logits=None):
  """What a guide would show; its head knows every next token's scores."""
  scores_of = lambda tokens_BC: jnp.asarray(AHEAD)[jnp.arange(4)[:, None], tokens_BC]
  return pytypes.SimpleNamespace(logits_BV=logits, scores_BO=jnp.asarray(NOW), scores_of=scores_of)


def p_of(logits):
  """Probabilities, which no constant changes; exactly 0 where nothing is drawn."""
  x = np.exp(np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True))
  return x / x.sum(axis=1, keepdims=True)


def among_top(k):
  return POLICY >= np.sort(POLICY, axis=1)[:, -k][:, None]


class TestProcesses:

  @pytest.mark.parametrize(
      ('found', 'wanted'),
      [
          (
              lambda x: guidance.rad(x, view(), beta=1.7, top_k=5),
              np.where(among_top(5), POLICY + 1.7 * AHEAD[..., 0], -np.inf),
          ),
          (lambda x: guidance.rad(x, view(), beta=0.3, top_k=99, output=1), POLICY + 0.3 * AHEAD[..., 1]),
          (lambda x: guidance.controlled(x, view(), lam=2.0), POLICY + 2.0 * AHEAD[..., 0]),
          (
              lambda x: guidance.controlled(x, view(), lam=2.0, top_k=7, output=1),
              POLICY + 2.0 * np.where(among_top(7), AHEAD[..., 1], NOW[:, 1:]),
          ),
          (lambda x: guidance.dera(x, view(OTHER), lam=1.5), 1.5 * OTHER - 0.5 * POLICY),
          (
              lambda x: guidance.contrastive(x, view(OTHER), alpha=0.1, beta=0.8),
              np.where(p_of(POLICY) >= 0.1 * p_of(POLICY).max(axis=1, keepdims=True), POLICY - 0.8 * OTHER, -np.inf),
          ),
          (lambda x: guidance.contrastive(x, view(OTHER), alpha=0.0, beta=1.0), POLICY - OTHER),
          (lambda x: guidance.proxy(x, view(OTHER), view(THIRD)), POLICY + OTHER - THIRD),
          (lambda x: guidance.in_context(x, view(OTHER)), OTHER),
      ],
      ids='rad rad_all cd cd_of_some dera contrastive contrastive_of_all proxy in_context'.split(),
  )
  def test_are_their_formulas(self, found, wanted):
    np.testing.assert_allclose(p_of(found(jnp.asarray(POLICY, jnp.float32))), p_of(wanted), atol=2e-5)

  @pytest.mark.parametrize(
      ('call', 'said'),
      [
          (lambda x: guidance.rad(x, view(), beta=1.0, top_k=0), 'rad.top_k = 0'),
          (lambda x: guidance.controlled(x, view(), lam=1.0, top_k=-1), 'controlled.top_k = -1'),
          (lambda x: guidance.rad(x, view(), beta=1.0, top_k=3, output=2), 'output = 2: the head of the guide has 2'),
          (lambda x: guidance.contrastive(x, view(OTHER), alpha=1.5, beta=1.0), 'alpha = 1.5'),
      ],
  )
  def test_refuse_what_has_no_meaning(self, call, said):
    with pytest.raises(types.UsageError, match=said):
      call(jnp.asarray(POLICY, jnp.float32))


class TestUrial:

  def test_puts_examples_before_what_was_said(self):
    turns = [
        {'role': 'user', 'content': 'Hi'},
        {'role': 'assistant', 'content': 'Ho'},
        {'role': 'user', 'content': '?'},
    ]
    assert guidance.urial(turns, instruction='Be kind.', examples=[('a', 'b')]) == (
        'Be kind.\n\n# Query:\na\n\n# Answer:\nb\n\n# Query:\nHi\n\n# Answer:\nHo\n\n# Query:\n?\n\n# Answer:\n'
    )
