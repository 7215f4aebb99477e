"""Tests of advantages, against loops over groups and tokens in float64."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.rl import advantages

_of = functools.partial
RNG = np.random.default_rng(0)
REWARDS = RNG.normal(size=(7, 4)).astype(np.float32)
# Groups of four, three, two and one, and an empty place of the table; slots are missing anywhere.
VALID = np.array(
    [[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]], np.float32
)
TOKENS = RNG.integers(1, 9, (7, 4)).astype(np.float32)
GREEDY = RNG.normal(size=7).astype(np.float32)
REWARDS[6] = 0.9  # all alike, and the mean of three is another number in float32
REWARDS[0, 1] = REWARDS[2, 2] = 0.0


def _groups(of):
  """`of` the rewards and lengths that are there, group by group, with 0 elsewhere."""
  out = np.zeros(REWARDS.shape)
  for g, valid in enumerate(VALID > 0):
    if valid.any():
      out[g, valid] = of(REWARDS[g, valid].astype(np.float64), TOKENS[g, valid].astype(np.float64), g)
  return out


def _unless_alone(of):
  return lambda r, n, g: of(r) if len(r) > 1 else 0.0


def _others(r):
  return [x - np.delete(r, i).mean() for i, x in enumerate(r)]


def _best(r):
  out, order = np.zeros(len(r)), np.argsort(r)
  out[order[-1]] = (r[order[-1]] - r[order[-2]]) / (r.std(ddof=1) + 1e-6)
  return out


ALL = REWARDS[VALID > 0].astype(np.float64)
CENTRED = _groups(lambda r, n, g: r - r.mean())
CASES = {
    'mean_centred': (advantages.mean_centred, CENTRED),
    'group_norm': (
        advantages.group_norm,
        _groups(_unless_alone(lambda r: (r - r.mean()) / (r.std(ddof=1) + 1e-4))),
    ),
    'group_norm_population': (
        _of(advantages.group_norm, ddof=0, epsilon=0.1),
        _groups(lambda r, n, g: (r - r.mean()) / (r.std() + 0.1)),
    ),
    'batch_norm': (advantages.batch_norm, CENTRED / (ALL.std(ddof=1) + 1e-4)),
    'leave_one_out': (advantages.leave_one_out, _groups(_unless_alone(_others))),
    'length_weighted': (
        _of(advantages.length_weighted, tokens_GK=TOKENS),
        _groups(lambda r, n, g: r - (n * r).sum() / n.sum()),
    ),
    'best_only': (advantages.best_only, _groups(_unless_alone(_best))),
    'nonzero_scaled': (advantages.nonzero_scaled, CENTRED * len(ALL) / np.count_nonzero(ALL)),
    'greedy_baseline': (_of(advantages.greedy_baseline, greedy_G=GREEDY), _groups(lambda r, n, g: r - GREEDY[g])),
    'whitened': (advantages.whitened, _groups(lambda r, n, g: (r - ALL.mean()) / np.sqrt(ALL.var(ddof=1) + 1e-8))),
}


class TestOfGroups:

  @pytest.mark.parametrize('name', CASES)
  def test_are_the_formula_on_the_responses_that_are_there(self, name):
    function, wanted = CASES[name]
    np.testing.assert_allclose(function(jnp.asarray(REWARDS), jnp.asarray(VALID)), wanted, rtol=2e-5, atol=1e-6)

  @pytest.mark.parametrize('name', CASES)
  def test_do_not_see_what_stands_in_the_place_of_a_missing_response(self, name):
    function, _ = CASES[name]
    other = jnp.asarray(np.where(VALID > 0, REWARDS, np.nan))
    np.testing.assert_array_equal(
        function(other, jnp.asarray(VALID)), function(jnp.asarray(REWARDS), jnp.asarray(VALID))
    )

  @pytest.mark.parametrize('name', sorted(CASES.keys() - {'greedy_baseline', 'whitened'}))
  def test_are_exactly_zero_where_all_rewards_of_a_group_are_equal(self, name):
    function, _ = CASES[name]
    np.testing.assert_array_equal(function(jnp.asarray(REWARDS), jnp.asarray(VALID))[6], 0.0)

  @pytest.mark.parametrize('name', ['group_norm', 'leave_one_out', 'length_weighted', 'best_only'])
  def test_ignore_a_shift_of_the_rewards(self, name):
    function, wanted = CASES[name]
    np.testing.assert_allclose(function(jnp.asarray(REWARDS + 3), jnp.asarray(VALID)), wanted, rtol=2e-4, atol=2e-6)


class TestWhitened:

  def test_is_zero_for_a_batch_of_equal_numbers(self):
    np.testing.assert_array_equal(advantages.whitened(jnp.full((3, 5), 0.9), jnp.ones((3, 5))), np.zeros((3, 5)))


class TestBestOnly:

  def test_of_a_tie_is_zero(self):
    found = advantages.best_only(jnp.array([[1.0, 0.0, 1.0]]), jnp.ones((1, 3)))
    np.testing.assert_array_equal(found, np.zeros((1, 3)))

  def test_of_one_right_response_singles_it_out(self):
    found = advantages.best_only(jnp.array([[0.0, 1.0, 0.0]]), jnp.ones((1, 3)))
    np.testing.assert_allclose(found, [[0.0, np.sqrt(3), 0.0]], rtol=1e-5)


class TestNormaliseThenSum:

  def test_normalises_each_reward_in_its_group_and_the_sum_over_the_batch(self):
    rewards = RNG.normal(size=(2, 7, 4)).astype(np.float32) * np.array([[[1.0]], [[50.0]]], np.float32)
    each = np.zeros(rewards.shape)
    for i, table in enumerate(rewards.astype(np.float64)):
      for g, valid in enumerate(VALID > 0):
        r = table[g, valid]
        each[i, g, valid] = (r - r.mean()) / (r.std(ddof=1) + 1e-4) if len(r) > 1 else 0.0
    total = 0.25 * each[0] + 2.0 * each[1]
    there = total[VALID > 0]
    wanted = np.where(VALID > 0, (total - there.mean()) / (there.std(ddof=1) + 1e-4), 0.0)
    found = advantages.normalise_then_sum(
        jnp.asarray(rewards), jnp.stack([VALID, VALID]), weights_R=jnp.array([0.25, 2.0])
    )
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)

  def test_leaves_out_a_reward_that_abstains(self):
    rewards, valid = np.array([[[1.0, 2, 3]], [[5.0, 5, 0]]], np.float32), np.array(
        [[[1, 1, 1]], [[1, 1, 0]]], np.float32
    )
    one = _of(advantages.normalise_then_sum, weights_R=jnp.array([1.0, 1.0]))
    np.testing.assert_allclose(one(rewards, valid), one(rewards * valid + (1 - valid) * 9, valid), atol=1e-6)
    alone = advantages.normalise_then_sum(rewards[:1], valid[:1], weights_R=jnp.array([1.0]))
    np.testing.assert_allclose(one(rewards, valid), alone, atol=1e-6)  # the other says the same of both that it judges


class TestOptimalValues:

  def test_are_soft_maxima_of_the_rewards(self):
    found = advantages.optimal_values(jnp.asarray(REWARDS), jnp.asarray(VALID), beta=0.5)
    wanted = _groups(lambda r, n, g: 0.5 * np.log(np.exp(r / 0.5).mean())).max(axis=1, where=VALID > 0, initial=-9)
    wanted[VALID.sum(axis=1) == 0] = 0.0
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)

  def test_are_the_mean_where_beta_is_large_and_finite_where_it_is_small(self):
    rewards = jnp.array([[0.0, 1.0, 1.0]])
    value = lambda beta: float(advantages.optimal_values(rewards, jnp.ones((1, 3)), beta=beta)[0])
    np.testing.assert_allclose(value(1e4), 2 / 3, rtol=1e-3)
    np.testing.assert_allclose(value(1e-3), 1 + 1e-3 * np.log(2 / 3), rtol=1e-6)


class TestBandit:
  """One prompt, three answers, two or three samples: the expected gradient over every draw."""

  LOGITS = np.array([0.3, -0.5, 0.9])
  PAY = np.array([1.0, -0.4, 0.25])

  def expected(self, advantage, samples):
    """Expectation of the mean over samples of A grad log p, and the gradient of the expected reward."""
    p = np.exp(self.LOGITS) / np.exp(self.LOGITS).sum()
    draws = np.stack(np.meshgrid(*[range(3)] * samples, indexing='ij'), -1).reshape(-1, samples)
    found = np.asarray(advantage(jnp.asarray(self.PAY[draws], jnp.float32), jnp.ones(draws.shape)), np.float64)
    slopes = np.eye(3)[draws] - p  # of log p of each draw
    return np.einsum('g,gk,gkv->v', p[draws].prod(axis=1), found, slopes) / samples, p * (self.PAY - p @ self.PAY)

  @pytest.mark.parametrize('samples', [2, 3])
  def test_of_leave_one_out_is_the_true_gradient(self, samples):
    found, true = self.expected(advantages.leave_one_out, samples)
    np.testing.assert_allclose(found, true, atol=1e-6)

  @pytest.mark.parametrize('samples', [2, 3])
  def test_of_the_group_s_mean_is_short_by_one_over_the_group(self, samples):
    found, true = self.expected(advantages.mean_centred, samples)
    np.testing.assert_allclose(found, (samples - 1) / samples * true, atol=1e-6)

  def test_of_a_greedy_baseline_is_the_true_gradient(self):
    best = float(self.PAY[np.argmax(self.LOGITS)])
    greedy = lambda r, valid: advantages.greedy_baseline(r, valid, greedy_G=jnp.full(len(r), best))
    found, true = self.expected(greedy, 2)
    np.testing.assert_allclose(found, true, atol=1e-6)

  def test_of_a_greedy_response_that_nobody_judged_is_none(self):
    found = advantages.greedy_baseline(REWARDS, VALID, greedy_G=np.where(np.arange(7) == 3, np.nan, 0.5))
    np.testing.assert_allclose(found, VALID * (REWARDS - 0.5) * (np.arange(7) != 3)[:, None], rtol=1e-6)


class TestSoftOptimal:

  def test_gives_the_prompt_s_value_under_the_reference(self):
    of_ref = RNG.normal(size=(7, 5)).astype(np.float32)
    of_ref[2, 1:3] = of_ref[4] = np.nan  # nobody judged them
    known = VALID * (np.arange(7) != 4)[:, None]
    found = advantages.soft_optimal(REWARDS, VALID, of_ref, beta=0.5)
    of_ref[2] = of_ref[2][[0, 3, 4, 0, 3]]
    value_of_two = 0.5 * np.log(np.exp(of_ref[2, :3].astype(np.float64) / 0.5).mean())
    of_ref[4] = 0
    value = 0.5 * np.log(np.exp(of_ref.astype(np.float64) / 0.5).mean(axis=1))
    value[2] = value_of_two
    np.testing.assert_allclose(found['optimal_value'], np.repeat(value[:, None], 4, axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found['score_known'], known)
    np.testing.assert_array_equal(found['score'], advantages.scores(REWARDS, VALID)['score'])


class TestLagrangian:

  def test_weighs_cost_by_the_multiplier_of_the_loss(self):
    cost = RNG.uniform(size=(7, 4)).astype(np.float32)
    both, plain = np.stack([REWARDS, cost]), lambda r, valid: np.where(valid, r, 0)
    known = np.stack([VALID, VALID])
    known[0, 1, 0] = known[1, 2, 1] = 0
    for state, weight in (((), 1.0), ({'log_lambda': jnp.float32(1.5)}, np.exp(1.5))):
      found = advantages.lagrangian(both, known, state, advantage_fn=plain)
      wanted = known[0] * known[1] * (REWARDS - weight * cost) / (1 + weight)
      np.testing.assert_allclose(found['advantages'], wanted, rtol=1e-5, atol=1e-6)
      np.testing.assert_array_equal(found['cost'], cost)
      np.testing.assert_array_equal(found['cost_known'], known[1])
