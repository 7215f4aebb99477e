"""What functions that give credit read, and the labels that they make."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import types
from jaxalign.rl import advantages
from jaxalign.rl import credit
from jaxalign.rl import returns


class TestCredit:

  def test_reads_what_its_parameters_name(self):
    fn = lambda rewards_GK, tokens_GK, *, scale=2.0: rewards_GK * scale
    assert credit.Credit(fn).reads == {'rewards_GK', 'tokens_GK'}

  def test_gives_labels_of_responses_and_of_tokens(self):
    of = credit.Credit(lambda rewards_GK, logps_BT: {'score': rewards_GK, 'advantages': logps_BT, 'old': logps_BT})
    assert of.names(samples=2, rewards=1) == (('score',), ('advantages', 'old'))
    rows = credit.rows([2, 3], samples=2, width=4)
    fields = {'rewards_GK': np.ones((1, 2), np.float32), 'logps_BT': credit.table([np.ones(2), 2 * np.ones(3)], 4)}
    fields |= {'rows': rows, 'valid_GK': np.array([[1, 0]], np.float32)}
    found = of.labels(fields)
    np.testing.assert_array_equal(found['advantages'], [[1, 1, 0, 0], [0, 0, 0, 0]])  # the second has no reward
    np.testing.assert_array_equal(found['old'], [[1, 1, 0, 0], [2, 2, 2, 0]])

  def test_tells_the_critic_s_values_and_the_divergence_too(self):
    fn = lambda rewards_GK, valid_GK, values_BT, log_ratio_BT, rows: returns.actor_critic(
        rewards_GK, valid_GK, values_BT, log_ratio_BT, rows, beta=0.1, lam=1.0, whiten=False
    )
    of = credit.Credit(fn)
    assert of.names(samples=2, rewards=1) == (('kl',), ('advantages', 'returns', 'values'))
    fields = {'rewards_GK': jnp.array([[1.0, 3.0]]), 'valid_GK': jnp.ones((1, 2)), 'rows': credit.rows([2, 1], 2, 3)}
    fields |= {'values_BT': credit.table([np.array([0.5, 0.25]), np.array([1.0])], 3)}
    fields |= {'log_ratio_BT': credit.table([np.array([0.2, 0.4]), np.array([-1.0])], 3)}
    found = of.labels(fields)
    np.testing.assert_allclose(found['kl'], [[0.6, -1.0]], rtol=1e-6)
    np.testing.assert_allclose(found['returns'], [[1 - 0.06, 1 - 0.04, 0], [3 + 0.1, 0, 0]], rtol=1e-5)
    np.testing.assert_array_equal(found['values'], fields['values_BT'])

  def test_gives_the_values_of_each_output_to_what_reads_several(self):
    of = credit.Credit(functools.partial(returns.lagrangian, beta=0.1, lam=0.9))
    of_tokens = 'advantages', 'cost_returns', 'cost_values', 'returns', 'values'
    assert of.names(samples=2, rewards=2, outputs=2) == (('cost', 'cost_known', 'kl'), of_tokens)

  @pytest.mark.parametrize(
      'fn,wanted',
      [
          (advantages.group_norm, True),
          (advantages.leave_one_out, True),
          (advantages.batch_norm, True),
          (functools.partial(advantages.lagrangian), True),
          (functools.partial(returns.penalised, beta=0.1, advantage_fn=advantages.leave_one_out), True),
          (advantages.greedy_baseline, False),
          (functools.partial(returns.actor_critic, beta=0.1, lam=0.9), False),
          (functools.partial(returns.lagrangian, beta=0.1, lam=0.9), False),
          (advantages.scores, False),
      ],
  )
  def test_knows_whether_a_lone_response_is_told_anything(self, fn, wanted):
    assert credit.Credit(fn).compares(2, 2) == wanted

  def test_gives_nothing_where_what_is_compared_with_has_no_reward(self):
    made = credit.Credit(lambda rewards_GK, greedy_G: rewards_GK - greedy_G[:, None])
    fields = {'rewards_GK': np.ones((2, 2), np.float32), 'valid_GK': np.ones((2, 2), np.float32)}
    fields |= {'greedy_G': np.array([np.nan, 0.25], np.float32), 'rows': credit.rows([2] * 4, 2, 3)}
    np.testing.assert_array_equal(made.labels(fields)['advantages'], [[0, 0], [0.75, 0.75]])

  def test_refuses_to_read_a_reward_that_is_not_there(self):
    with pytest.raises(types.UsageError, match='reads more rewards than the 1 that there are; give another --reward'):
      credit.Credit(lambda rewards_RGK, valid_GK, loss_state: advantages.lagrangian(rewards_RGK, valid_GK, ())).names(
          2, 1
      )
