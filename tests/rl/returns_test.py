"""Tests of what tokens earn, against loops over responses in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import masked
from jaxalign import types
from jaxalign.losses import parts
from jaxalign.losses import policy_parts
from jaxalign.rl import advantages
from jaxalign.rl import returns
from tests import packed

RNG = np.random.default_rng(0)
LENGTHS = [[5, 1, 3], [2, 4, 6]]
PLACES = [(g, k) for g in range(2) for k in range(3)]


def _batch(per_row):
  """Six responses, so many to a row; of those with more than two tokens the second is a tool's and does not count."""
  sequence = lambda g, k: (g, k, [1, 2, 3], [4] * LENGTHS[g][k])
  rows = [[sequence(*x) for x in PLACES[i : i + per_row]] for i in range(0, 6, per_row)]
  batch = packed.micro_batch([*rows, []], groups=3, size=3, length=24)
  for b, row in enumerate(rows):
    for rank, (_, k, _, response) in enumerate(row):
      if len(response) > 2:
        at = np.flatnonzero(batch.responses_BT[b] == rank)[1]
        batch.mask_BT[b, at] = 0.0
        batch.responses_BT[b, at] = -1 if k else rank  # whether it is the response's or nobody's
  return batch


def _spread(batch, numbers):
  """Numbers of tokens, by group and slot, where they stand; something else where nothing counts."""
  out = np.full(batch.mask_BT.shape, 77.0, np.float32)
  for b, s in np.argwhere(batch.group_BS >= 0):
    where = np.flatnonzero((batch.responses_BT[b] == s) & (batch.mask_BT[b] > 0))
    out[b, where] = numbers[batch.group_BS[b, s], batch.slot_BS[b, s]][: len(where)]
  return out


def _gold(numbers, values, discount, lam):
  """Advantages by the definition: the sum over all later tokens of (discount lam)^l delta."""
  out = {}
  for (g, k), r in numbers.items():
    n = LENGTHS[g][k] - (LENGTHS[g][k] > 2)
    r, v = r[:n].astype(np.float64), np.append(values[g, k][:n].astype(np.float64), 0.0)
    delta = r + discount * v[1:] - v[:-1]
    out[g, k] = np.array([sum((discount * lam) ** (j - t) * delta[j] for j in range(t, n)) for t in range(n)])
  return out


REWARDS_T = {place: RNG.normal(size=6).astype(np.float32) for place in PLACES}
VALUES_T = {place: RNG.normal(size=6).astype(np.float32) for place in PLACES}


def _read(batch, x_BT):
  """What a response's tokens that count have, by group and slot."""
  return {
      (int(batch.group_BS[b, s]), int(batch.slot_BS[b, s])): np.asarray(x_BT)[b][
          (batch.responses_BT[b] == s) & (batch.mask_BT[b] > 0)
      ]
      for b, s in np.argwhere(batch.group_BS >= 0)
  }


@pytest.mark.parametrize('per_row', [1, 3])
class TestGae:

  def test_is_the_definition_within_each_response(self, per_row):
    batch = _batch(per_row)
    rewards_BT, values_BT = (jnp.asarray(_spread(batch, x)) for x in (REWARDS_T, VALUES_T))
    found = returns.gae(rewards_BT, values_BT, batch, discount=0.9, lam=0.8)
    wanted = _gold(REWARDS_T, VALUES_T, 0.9, 0.8)
    for place, x in _read(batch, found.advantages).items():
      np.testing.assert_allclose(x, wanted[place], rtol=1e-5, atol=1e-6)
    for place, x in _read(batch, found.returns).items():
      np.testing.assert_allclose(x, wanted[place] + VALUES_T[place][: len(x)], rtol=1e-5, atol=2e-6)
    assert not np.any(np.where(batch.mask_BT > 0, 0, found.advantages)) and found.advantages.shape[1] == 24
    assert not np.any(np.where(batch.mask_BT > 0, 0, found.returns))

  def test_of_lambda_1_returns_what_follows_whatever_the_critic(self, per_row):
    batch = _batch(per_row)
    rewards_BT = jnp.asarray(_spread(batch, REWARDS_T))
    found = returns.gae(rewards_BT, jnp.asarray(_spread(batch, VALUES_T)), batch, discount=0.9, lam=1.0).returns
    np.testing.assert_allclose(found, returns.returns_to_go(rewards_BT, batch, discount=0.9), rtol=1e-4, atol=1e-5)


class TestReturnsToGo:

  @pytest.mark.parametrize('discount', [1.0, 0.7])
  def test_are_discounted_sums_of_what_follows(self, discount):
    batch = _batch(2)
    found = returns.returns_to_go(jnp.asarray(_spread(batch, REWARDS_T)), batch, discount=discount)
    wanted = _gold(REWARDS_T, {place: np.zeros(6) for place in PLACES}, discount, 1.0)
    for place, x in _read(batch, found).items():
      np.testing.assert_allclose(x, wanted[place], rtol=1e-5, atol=1e-6)


class TestShapedRewards:

  @pytest.mark.parametrize('kl,formula', [(policy_parts.k1, lambda x: x), (policy_parts.k2, lambda x: x**2 / 2)])
  def test_pay_at_the_last_token_and_charge_at_each(self, kl, formula):
    batch = _batch(3)
    scores = np.zeros((3, 3), np.float32)
    scores[:2] = RNG.normal(size=(2, 3))
    found = returns.shaped_rewards(jnp.asarray(scores), jnp.asarray(_spread(batch, REWARDS_T)), batch, beta=0.3, kl=kl)
    for place, x in _read(batch, found).items():
      wanted = -0.3 * formula(REWARDS_T[place][: len(x)].astype(np.float64))
      wanted[-1] += scores[place]
      np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=1e-6)
    assert not np.any(np.where(batch.mask_BT > 0, 0, found))

  def test_add_up_to_the_response_s_own_less_the_divergence(self):
    batch = _batch(2)
    scores = jnp.asarray(RNG.normal(size=(3, 3)).astype(np.float32)) * masked.valid(batch)
    ratio_BT = jnp.asarray(_spread(batch, REWARDS_T))
    found = masked.totals(returns.shaped_rewards(scores, ratio_BT, batch, beta=0.3), batch)
    np.testing.assert_allclose(found, scores - 0.3 * masked.totals(ratio_BT, batch), rtol=1e-5, atol=1e-6)


VALID = np.array([[1, 1, 1], [1, 0, 1], [0, 0, 0]], np.float32)
SCORES = RNG.normal(size=(3, 3)).astype(np.float32)


def _shaped(beta):
  """Rewards of tokens of `_batch`, REWARDS_T being log-ratios, by group and slot."""
  out = {}
  for g, k in PLACES:
    n = LENGTHS[g][k] - (LENGTHS[g][k] > 2)
    out[g, k] = -beta * REWARDS_T[g, k][:n].astype(np.float64)
    out[g, k][-1] += SCORES[g, k]
  return out


def _white(tokens):
  """Whitened over the tokens of responses that have a reward."""
  every = np.concatenate([x for place, x in tokens.items() if VALID[place]])
  return {place: (x - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8) for place, x in tokens.items()}


def _assert_tokens(batch, x_BT, wanted):
  for place, x in _read(batch, x_BT).items():
    np.testing.assert_allclose(x, wanted[place] if VALID[place] else 0.0, rtol=2e-5, atol=2e-6)


class TestActorCritic:

  @pytest.mark.parametrize('state,factor', [((), 1.0), ({'log_coefficient': jnp.float32(0.7)}, np.exp(0.7))])
  def test_is_gae_of_rewards_with_the_reference_s_part_whitened(self, state, factor):
    batch = _batch(2)
    given = [jnp.asarray(_spread(batch, x)) for x in (VALUES_T, REWARDS_T)]
    found = returns.actor_critic(SCORES, VALID, *given, masked.rows(batch), state, beta=0.3, lam=0.8, discount=0.9)
    gold = _gold(_shaped(0.3 * factor), VALUES_T, 0.9, 0.8)
    _assert_tokens(batch, found.advantages, _white(gold))
    for place, x in _read(batch, found.returns).items():
      own = VALUES_T[place][: len(x)]
      np.testing.assert_allclose(x, gold[place] + own if VALID[place] else own, rtol=1e-5, atol=2e-6)


class TestLagrangian:
  COST = RNG.normal(size=(3, 3)).astype(np.float32)
  COSTS_T = {place: RNG.normal(size=6).astype(np.float32) for place in PLACES}
  COST_VALID = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 0]], np.float32)

  def run(self, batch, state):
    values_BTO = jnp.asarray(np.stack([_spread(batch, x) for x in (VALUES_T, self.COSTS_T)], axis=-1))
    both, known = np.stack([SCORES, self.COST]), np.stack([VALID, self.COST_VALID])
    ratio_BT = jnp.asarray(_spread(batch, REWARDS_T))
    options = {'beta': 0.3, 'lam': 0.8, 'discount': 0.9}
    return returns.lagrangian(both, known, values_BTO, ratio_BT, masked.rows(batch), state, **options)

  @pytest.mark.parametrize('state,weight', [((), 1.0), ({'log_lambda': jnp.float32(0.7)}, np.exp(0.7))])
  def test_weighs_gae_of_a_reward_and_of_a_cost_each_with_half_of_the_divergence(self, state, weight):
    batch = _batch(2)
    found = self.run(batch, state)
    gold, cost = _gold(_shaped(0.15), VALUES_T, 0.9, 0.8), {}
    for g, k in PLACES:
      n = LENGTHS[g][k] - (LENGTHS[g][k] > 2)
      cost[g, k] = 0.15 * REWARDS_T[g, k][:n].astype(np.float64)  # the divergence is a cost
      cost[g, k][-1] += self.COST[g, k]
    cost = _gold(cost, self.COSTS_T, 0.9, 0.8)
    for place, x in _read(batch, found['advantages']).items():
      known = VALID[place] * self.COST_VALID[place]
      wanted = known * (gold[place] - weight * cost[place]) / (1 + weight)
      np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=2e-6)
    assert not np.any(np.where(batch.mask_BT > 0, 0, found['advantages']))
    kinds = ('returns', gold, VALUES_T, VALID), ('cost_returns', cost, self.COSTS_T, self.COST_VALID)
    for name, advantage, values, known in kinds:
      for place, x in _read(batch, found[name]).items():
        own = values[place][: len(x)]
        np.testing.assert_allclose(x, advantage[place] + own if known[place] else own, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(found['values'], _spread(batch, VALUES_T))
    np.testing.assert_array_equal(found['cost_values'], _spread(batch, self.COSTS_T))
    np.testing.assert_array_equal(found['cost'], self.COST)
    np.testing.assert_array_equal(found['cost_known'], self.COST_VALID)

  def test_at_lambda_0_is_ppo_of_the_reward_alone(self):
    batch = _batch(3)
    found = self.run(batch, {'log_lambda': jnp.float32(-np.inf)})
    given = [jnp.asarray(_spread(batch, x)) for x in (VALUES_T, REWARDS_T)]
    options = {'beta': 0.15, 'lam': 0.8, 'discount': 0.9, 'whiten': False}
    alone = returns.actor_critic(SCORES, VALID, *given, masked.rows(batch), **options)
    both_BT = masked.to_tokens(VALID * self.COST_VALID, masked.rows(batch))
    np.testing.assert_array_equal(found['advantages'], np.where(both_BT > 0, alone.advantages, 0))
    np.testing.assert_array_equal(found['returns'], alone.returns)

  def test_wants_two_values(self):
    batch = _batch(1)
    one_BTO = jnp.asarray(_spread(batch, VALUES_T))[..., None]
    both, rows = np.stack([SCORES, SCORES]), masked.rows(batch)
    with pytest.raises(types.UsageError, match='the critic has 1 outputs, .* bind recipe.Recipe.critic_outputs = 2'):
      returns.lagrangian(both, both, one_BTO, one_BTO[..., 0], rows, beta=0.1, lam=1.0)


class TestReinforcePlusPlus:

  def test_is_what_follows_whitened(self):
    batch = _batch(3)
    ratio_BT = jnp.asarray(_spread(batch, REWARDS_T))
    found = returns.reinforce_plus_plus(SCORES, VALID, ratio_BT, masked.rows(batch), beta=0.2)
    follows = {place: x[::-1].cumsum()[::-1] for place, x in _shaped(0.2).items()}
    _assert_tokens(batch, found, _white(follows))

  def test_of_a_baseline_whitens_what_is_above_the_group_s_mean(self):
    batch = _batch(2)
    found = returns.whitened_baseline(SCORES, VALID, masked.rows(batch))
    above = {}
    for g, k in PLACES:
      mean = SCORES[g][VALID[g] > 0].astype(np.float64).mean()
      above[g, k] = np.full(LENGTHS[g][k] - (LENGTHS[g][k] > 2), SCORES[g, k] - mean)
    _assert_tokens(batch, found, _white(above))


TOKENS_T = {place: RNG.normal(size=6).astype(np.float32) for place in PLACES}


class TestRto:

  def test_adds_what_tokens_earn_to_what_ppo_gives_them(self):
    batch = _batch(2)
    values_BT, ratio_BT, own_BT = (jnp.asarray(_spread(batch, x)) for x in (VALUES_T, REWARDS_T, TOKENS_T))
    found = returns.rto(own_BT, SCORES, VALID, values_BT, ratio_BT, masked.rows(batch), beta=0.3, lam=0.8)
    shaped = {place: x + TOKENS_T[place][: len(x)] for place, x in _shaped(0.3).items()}
    _assert_tokens(batch, found.advantages, _white(_gold(shaped, VALUES_T, 1.0, 0.8)))


class TestPrime:

  def test_compares_outcomes_and_tokens_with_the_other_responses(self):
    batch = _batch(3)
    found = returns.implicit_rewards(
        jnp.asarray(_spread(batch, TOKENS_T)), SCORES, VALID, masked.rows(batch), discount=0.9
    )
    own = {(g, k): TOKENS_T[g, k][: LENGTHS[g][k] - (LENGTHS[g][k] > 2)].astype(np.float64) for g, k in PLACES}
    wanted = {}
    for g, k in PLACES:
      others = [j for j in range(3) if j != k and VALID[g, j]]
      left = own[g, k] - np.mean([own[g, j].mean() for j in others])
      follows = np.array([sum(0.9 ** (s - t) * left[s] for s in range(t, len(left))) for t in range(len(left))])
      wanted[g, k] = follows + SCORES[g, k] - np.mean([SCORES[g, j] for j in others])
    learning = returns.prime(
        jnp.asarray(_spread(batch, TOKENS_T)) / 0.05, SCORES, VALID, masked.rows(batch), beta=0.05, discount=0.9
    )
    np.testing.assert_allclose(learning['advantages'], found, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(learning['outcome'], np.where(VALID > 0, np.clip(SCORES, 0, 1), -1))
    for place, x in _read(batch, found).items():
      if VALID[place]:
        np.testing.assert_allclose(x, wanted[place], rtol=1e-4, atol=1e-5)


class TestProcessSupervised:

  def test_adds_up_the_normalised_steps_to_come(self):
    batch = _batch(2)
    marks = {place: (np.arange(6) % 2).astype(np.float32) for place in PLACES}
    given = (jnp.asarray(_spread(batch, x)) for x in (TOKENS_T, marks))
    found = returns.process_supervised(*given, VALID, masked.rows(batch))
    length = lambda place: LENGTHS[place[0]][place[1]] - (LENGTHS[place[0]][place[1]] > 2)
    steps = {p: [(t, float(TOKENS_T[p][t])) for t in range(1, length(p), 2)] for p in PLACES}
    for place, x in _read(batch, found).items():
      every = [r for k in range(3) if VALID[place[0], k] for _, r in steps[place[0], k]]
      scaled = lambda r, every=every: (r - np.mean(every)) / (np.std(every, ddof=1) + 1e-4)
      wanted = [sum(scaled(r) for s, r in steps[place] if s >= t) for t in range(len(x))]
      np.testing.assert_allclose(x, wanted if VALID[place] else np.zeros(len(x)), rtol=1e-4, atol=1e-5)


class TestPenalised:

  def test_takes_the_divergence_off_the_reward(self):
    batch = _batch(2)
    ratio_BT = jnp.asarray(_spread(batch, REWARDS_T))
    plain = lambda r, valid: r * valid
    found = returns.penalised(SCORES, VALID, ratio_BT, masked.rows(batch), beta=0.4, advantage_fn=plain)
    for place, x in _shaped(0.4).items():
      np.testing.assert_allclose(found[place], x.sum() * VALID[place], rtol=1e-5, atol=1e-6)


class TestDistributionMatching:
  """One prompt whose four answers of one token are sampled in proportion to the policy."""

  P, REF = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
  R, BETA = np.array([0.2, -0.3, 0.4, 0.1]), 0.7

  def target(self):
    target = self.REF * np.exp(self.R / self.BETA)
    return target / target.sum()

  def found(self, sampler, divergence):
    """Answers, each as often as the sampler gives it, so that means are exact, and their pseudo-rewards."""
    drawn = np.repeat(np.arange(4), (10 * sampler).round().astype(int))
    of = lambda p: jnp.asarray(np.log(p)[drawn].astype(np.float32)[:, None])
    index = np.arange(10, dtype=np.int32)[:, None]
    rows = types.Rows(np.ones((10, 1), np.float32), 0 * index, 0 * index, index, 1, 10)
    rewards, valid = self.R[drawn].astype(np.float32)[None], jnp.ones((1, 10))
    made = returns.distribution_matching(
        rewards, valid, of(self.P) - of(self.REF), of(self.P), of(sampler), rows, beta=self.BETA, divergence=divergence
    )
    return drawn, np.asarray(made, np.float64)[0]

  def test_knows_the_target_from_responses_of_an_earlier_policy(self):
    drawn, found = self.found(np.array([0.1, 0.4, 0.1, 0.4]), parts.jensen_shannon)
    t = (self.P / self.target())[drawn]
    pseudo = -np.log(2 * t / (t + 1))
    np.testing.assert_allclose(found, (pseudo - pseudo.mean()) * 10 / 9, atol=1e-5)

  @pytest.mark.parametrize(
      'divergence,f',
      [
          (parts.identity, lambda t: t * np.log(t)),
          (parts.forward_kl, lambda t: -np.log(t)),
          (parts.jensen_shannon, lambda t: t * np.log(2 * t / (t + 1)) + np.log(2 / (t + 1))),
          (parts.total_variation, lambda t: 0.5 * abs(t - 1)),
      ],
  )
  def test_has_the_gradient_of_the_f_divergence(self, divergence, f):
    drawn, found = self.found(self.P, divergence)
    target = self.target()
    total = lambda p: (target * f(p / target)).sum()
    logits, step = np.log(self.P), 1e-6
    softmax = lambda x: np.exp(x) / np.exp(x).sum()
    slopes = [(total(softmax(logits + step * e)) - total(softmax(logits - step * e))) / (2 * step) for e in np.eye(4)]
    # The mean over samples of A grad log p, less what leaving one out makes larger.
    own = (found[:, None] * (np.eye(4)[drawn] - self.P)).mean(axis=0) * 9 / 10
    np.testing.assert_allclose(own, -np.array(slopes), atol=2e-5)


class TestBandit:
  """One prompt, answers of one token, two samples: the expected gradient over every draw."""

  REF = np.array([0.45, 0.3, 0.2, 0.05])
  GOLD = np.array([0.0, 0.6, 1.0, -2.0])
  PROXY = np.array([0.0, 0.6, 1.0, 3.0])  # right but for an answer that the reference hardly gives

  def expected(self, logits, pay, beta):
    """Expectation of the mean over samples of A grad log p, A being `penalised` and compared with the other sample."""
    p = np.exp(logits) / np.exp(logits).sum()
    draws = np.stack(np.meshgrid(range(4), range(4), indexing='ij'), -1).reshape(-1, 2)
    index = np.arange(32, dtype=np.int32)[:, None]
    rows = types.Rows(np.ones((32, 1), np.float32), 0 * index, index // 2, index % 2, 16, 2)
    ratio_BT = jnp.asarray(np.log(p / self.REF)[draws].reshape(-1, 1), jnp.float32)
    given = jnp.asarray(pay[draws], jnp.float32), jnp.ones((16, 2)), ratio_BT
    found = returns.penalised(*given, rows, beta=beta, advantage_fn=advantages.leave_one_out)
    slopes = np.eye(4)[draws] - p
    return np.einsum('g,gk,gkv->v', p[draws].prod(axis=1), np.asarray(found, np.float64), slopes) / 2

  def test_of_a_penalised_reward_is_the_gradient_of_reward_less_divergence(self):
    logits = np.array([0.2, -0.4, 0.1, 0.6])
    p = np.exp(logits) / np.exp(logits).sum()
    worth = self.GOLD - 0.3 * np.log(p / self.REF)
    np.testing.assert_allclose(self.expected(logits, self.GOLD, 0.3), p * (worth - p @ worth), atol=1e-6)

  def test_leads_to_the_reference_tilted_by_the_reward(self):
    best = np.log(self.REF) + self.GOLD / 0.3
    np.testing.assert_allclose(self.expected(best, self.GOLD, 0.3), 0.0, atol=1e-6)
    logits = np.log(self.REF)
    for _ in range(200):
      logits = logits + 4.0 * self.expected(logits, self.GOLD, 0.3)
    normal = lambda x: np.exp(x) / np.exp(x).sum()
    np.testing.assert_allclose(normal(logits), normal(best), atol=2e-3)

  def test_of_a_proxy_the_gold_reward_rises_and_then_falls(self):
    logits, gold, proxy = np.log(self.REF), [], []
    for _ in range(80):
      p = np.exp(logits) / np.exp(logits).sum()
      gold.append(p @ self.GOLD)
      proxy.append(p @ self.PROXY)
      logits = logits + 1.0 * self.expected(logits, self.PROXY, 0.0)
    assert np.all(np.diff(proxy) > 0)
    best = int(np.argmax(gold))
    assert 0 < best < 79 and gold[best] > gold[0] + 0.02 and gold[-1] < gold[0] - 0.5


def test_compile_under_jit():
  batch = jax.tree.map(jnp.asarray, _batch(3))
  scores, ratio_BT = jnp.asarray(SCORES), jnp.asarray(_spread(_batch(3), REWARDS_T))

  def whole(scores, batch):
    shaped_BT = returns.shaped_rewards(scores, ratio_BT, batch, beta=0.1)
    return advantages.whitened(returns.returns_to_go(shaped_BT, batch), batch.mask_BT)

  np.testing.assert_allclose(jax.jit(whole)(scores, batch), whole(scores, batch), rtol=1e-4, atol=1e-5)
