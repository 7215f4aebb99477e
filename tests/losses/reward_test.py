"""Tests of the losses of reward models, against float64 formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import types
from jaxalign.losses import parts
from jaxalign.losses import pointwise
from jaxalign.losses import reward


def _rewards(groups=6, seed=0):
  rng = np.random.default_rng(seed)
  rewards_GK = rng.normal(0, 3, (groups, 2)).astype(np.float32)
  margin_GK = np.repeat(rng.choice([0.0, 1 / 3, 1.0], (groups, 1)), 2, axis=1).astype(np.float32)
  return rewards_GK, margin_GK


def _bradley_terry(rewards_GK, margin_GK=None, **options):
  rewards_GK = jnp.asarray(rewards_GK)
  margin_GK = jnp.zeros_like(rewards_GK) if margin_GK is None else jnp.asarray(margin_GK)
  return reward.bradley_terry(types.Stats(rewards_GK=rewards_GK), types.Stats(), {'margin': margin_GK}, **options)


def _softplus(x):
  return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


class TestBradleyTerry:

  @pytest.mark.parametrize('centring', [0.0, 0.01, 1.0])
  def test_equals_the_formula_with_margin_and_centring(self, centring):
    rewards_GK, margin_GK = _rewards()
    chosen_G, rejected_G = rewards_GK.astype(np.float64).T
    gold_G = _softplus(-(chosen_G - rejected_G - margin_GK[:, 0])) + centring * (chosen_G + rejected_G) ** 2
    np.testing.assert_allclose(_bradley_terry(rewards_GK, margin_GK, centring=centring).per_item, gold_G, rtol=1e-5)

  def test_equals_a_number_worked_out_by_hand(self):
    # log(1 + e^-(2 - 0.5 - 1)) + 0.01 * 2.5^2 = 0.474076984 + 0.0625
    out = _bradley_terry([[2.0, 0.5]], [[1.0, 1.0]], centring=0.01)
    np.testing.assert_allclose(out.per_item, [0.536576984], rtol=1e-6)

  def test_is_log_2_where_rewards_are_equal(self):
    for value in (0.0, -3.0, 7.0):
      out = _bradley_terry(np.full((2, 2), value, np.float32))
      np.testing.assert_allclose(out.per_item, [np.log(2)] * 2, rtol=1e-6)

  def test_a_constant_added_to_both_rewards_changes_nothing_without_centring(self):
    rewards_GK, margin_GK = _rewards()
    rewards_GK = np.round(rewards_GK * 64) / 64  # so that adding 8 is exact
    here, there = _bradley_terry(rewards_GK, margin_GK), _bradley_terry(rewards_GK + np.float32(8), margin_GK)
    np.testing.assert_array_equal(here.per_item, there.per_item)

  def test_centring_pulls_the_mean_of_a_pair_to_zero(self):
    rewards_GK, _ = _rewards()
    loss = lambda centring: lambda x: jnp.sum(_bradley_terry(x, centring=centring).per_item)
    pull_GK = jax.grad(loss(0.5))(rewards_GK) - jax.grad(loss(0.0))(rewards_GK)
    np.testing.assert_allclose(pull_GK, np.repeat(rewards_GK.sum(1, keepdims=True), 2, axis=1), rtol=1e-4, atol=1e-5)

  def test_a_margin_asks_for_more_than_a_win(self):
    slope = lambda margin: jax.grad(lambda x: jnp.sum(_bradley_terry(x, np.full((1, 2), margin, np.float32)).per_item))(
        np.array([[1.0, 0.0]], np.float32)
    )[0, 0]
    np.testing.assert_allclose(slope(1.0), -0.5, rtol=1e-6)
    assert slope(3.0) < slope(1.0) < slope(0.0) < 0

  def test_a_step_downhill_raises_chosen_and_lowers_rejected(self):
    rewards_GK, margin_GK = _rewards()
    grads_GK = jax.grad(lambda x: jnp.sum(_bradley_terry(x, margin_GK).per_item))(rewards_GK)
    assert np.all(grads_GK[:, 0] < 0) and np.all(grads_GK[:, 1] > 0)

  @pytest.mark.parametrize('gap', [1e4, -1e4])
  def test_is_finite_at_extreme_rewards(self, gap):
    rewards_GK = np.array([[gap, 0.0]], np.float32)
    value, grads_GK = jax.value_and_grad(lambda x: jnp.sum(_bradley_terry(x).per_item))(rewards_GK)
    np.testing.assert_allclose(value, max(-gap, 0.0))
    np.testing.assert_array_equal(grads_GK, [[0, 0]] if gap > 0 else [[-1, 1]])

  def test_metrics_are_accuracy_margin_and_mean(self):
    rewards_GK, margin_GK = _rewards()
    metrics = _bradley_terry(rewards_GK, margin_GK).metrics
    np.testing.assert_array_equal(metrics['accuracy'], rewards_GK[:, 0] > rewards_GK[:, 1])
    np.testing.assert_allclose(metrics['margin'], rewards_GK[:, 0] - rewards_GK[:, 1])
    np.testing.assert_allclose(np.mean(metrics['mean_reward']), rewards_GK.mean(), rtol=1e-6)
    assert set(metrics) == {'accuracy', 'margin', 'mean_reward', 'brier', 'ece'}

  def test_a_tie_is_not_accurate(self):
    out = _bradley_terry(np.array([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0]], np.float32))
    assert out.metrics['accuracy'].tolist() == [0, 1, 0]

  def test_passes_the_loss_state_through(self):
    assert _bradley_terry(*_rewards(), state={'mean': 3}).state == {'mean': 3}


class TestPrefixes:

  def prefixes(self, scores_BTO, reward_BT):
    stats = types.Stats(scores_BTO=jnp.asarray(scores_BTO, jnp.float32))
    return pointwise.prefixes(stats, types.Stats(), {'reward': jnp.asarray(reward_BT, jnp.float32)})

  def test_are_half_the_squared_distance_to_the_reward(self):
    out = self.prefixes([[[2.0], [-1.0]], [[0.5], [0.0]]], [[1.5, 1.5], [0.5, -3.0]])
    np.testing.assert_allclose(out.per_item, [[0.125, 3.125], [0.0, 4.5]])
    np.testing.assert_allclose(out.metrics['mean_value'], [[2.0, -1.0], [0.5, 0.0]])

  def test_refuse_a_head_of_two_outputs(self):
    with pytest.raises(types.UsageError, match='score_outputs = 2: a value is one number'):
      self.prefixes(np.zeros((1, 1, 2)), [[1]])


class TestProcess:

  def process(self, scores_BTO, right_BT):
    stats = types.Stats(scores_BTO=jnp.asarray(scores_BTO, jnp.float32))
    return pointwise.process(stats, types.Stats(), {'step': jnp.asarray(right_BT, jnp.float32)})

  def test_is_the_cross_entropy_of_a_softmax_over_two_outputs(self):
    rng = np.random.default_rng(0)
    scores_BTO, right_BT = rng.normal(0, 3, (3, 5, 2)), rng.choice([0.0, 0.25, 1.0], (3, 5))
    p_BTO = np.exp(scores_BTO) / np.exp(scores_BTO).sum(-1, keepdims=True)
    gold_BT = -(right_BT * np.log(p_BTO[..., 1]) + (1 - right_BT) * np.log(p_BTO[..., 0]))
    np.testing.assert_allclose(self.process(scores_BTO, right_BT).per_item, gold_BT, rtol=2e-5)

  def test_of_one_output_is_that_of_two_whose_difference_it_is(self):
    scores_BTO = np.random.default_rng(1).normal(0, 3, (2, 4, 2))
    right_BT = np.array([[0, 1, 0.5, 1], [1, 1, 0, 0]])
    one = self.process(scores_BTO[..., 1:] - scores_BTO[..., :1], right_BT)
    np.testing.assert_allclose(one.per_item, self.process(scores_BTO, right_BT).per_item, rtol=1e-5)

  @pytest.mark.parametrize('outputs', [1, 2])
  def test_is_log_2_of_a_head_of_zeros(self, outputs):
    out = self.process(np.zeros((2, 3, outputs)), [[0, 1, 1], [0.5, 0, 1]])
    np.testing.assert_allclose(out.per_item, np.full((2, 3), np.log(2)), rtol=1e-6)

  def test_counts_a_score_on_the_side_of_its_label_as_accurate(self):
    out = self.process([[[2.0], [-1.0], [3.0], [-4.0], [0.0]]], [[1, 0, 0, 0.75, 1]])
    assert out.metrics['accuracy'].tolist() == [[1, 1, 0, 0, 0]]
    assert out.metrics['right'].tolist() == [[1, 0, 0, 0.75, 1]]

  def test_is_finite_for_extreme_scores_and_pulls_towards_the_label(self):
    loss = lambda scores: jnp.sum(self.process(scores, [[1.0, 0.0, 1.0]]).per_item)
    grads = jax.grad(loss)(jnp.array([[[-1e4], [1e4], [1e4]]]))
    np.testing.assert_allclose(grads[..., 0], [[-1, 1, 0]], atol=1e-6)
    assert float(loss(jnp.array([[[-1e4], [1e4], [1e4]]]))) == 2e4

  def test_refuses_a_head_of_three_outputs(self):
    with pytest.raises(types.UsageError, match='score_outputs = 3: a step is right or wrong, 1 or 2'):
      self.process(np.zeros((1, 1, 3)), [[1]])


def _lists(seed=0, groups=5, size=4):
  """Rewards and scores of lists, of which the last is shorter."""
  rng = np.random.default_rng(seed)
  rewards_GK, score_GK = (rng.normal(0, 1, (groups, size)).astype(np.float32) for _ in range(2))
  valid_GK = np.ones((groups, size), np.float32)
  valid_GK[-1, 2:] = 0
  stats = types.Stats(rewards_GK=jnp.asarray(rewards_GK), valid_GK=jnp.asarray(valid_GK))
  there = [[k for k in range(size) if valid_GK[g, k]] for g in range(groups)]
  return stats, {'score': jnp.asarray(score_GK)}, rewards_GK.astype(np.float64), score_GK, there


class TestLists:

  def test_all_pairs_are_averaged(self):
    stats, labels, r, score, there = _lists()
    wanted = []
    for g, ks in enumerate(there):
      pairs = [(i, j) for i in ks for j in ks if score[g, i] > score[g, j]]
      wanted.append(np.mean([_softplus(-(r[g, i] - r[g, j])) for i, j in pairs]))
    out = reward.all_pairs(stats, types.Stats(), labels)
    np.testing.assert_allclose(out.per_item, wanted, rtol=1e-5)
    right = [
        np.mean([r[g, i] > r[g, j] for i in ks for j in ks if score[g, i] > score[g, j]]) for g, ks in enumerate(there)
    ]
    np.testing.assert_allclose(out.metrics['accuracy'], right, rtol=1e-6)

  def test_plackett_luce_is_a_product_of_choices(self):
    stats, labels, r, score, there = _lists()
    wanted = []
    for g, ks in enumerate(there):
      order = sorted(ks, key=lambda k: -score[g, k])
      choices = [np.exp(r[g, order[i]]) / np.exp(r[g, order[i:]]).sum() for i in range(len(order))]
      wanted.append(-np.log(np.prod(choices)))
    np.testing.assert_allclose(reward.plackett_luce(stats, types.Stats(), labels).per_item, wanted, rtol=1e-5)

  def test_regression_is_the_mean_square(self):
    stats, labels, r, score, there = _lists()
    wanted = [np.mean([(r[g, k] - score[g, k]) ** 2 for k in ks]) for g, ks in enumerate(there)]
    np.testing.assert_allclose(pointwise.regression(stats, types.Stats(), labels).per_item, wanted, rtol=1e-5)

  @pytest.mark.parametrize('loss', [reward.all_pairs, reward.plackett_luce, pointwise.regression])
  def test_responses_that_are_not_there_get_no_gradient(self, loss):
    stats, labels, *_ = _lists()
    slope = jax.grad(lambda x: jnp.sum(loss(stats.replace(rewards_GK=x), types.Stats(), labels).per_item))
    slopes_GK = np.asarray(slope(stats.rewards_GK))
    np.testing.assert_array_equal(slopes_GK[-1, 2:], 0)
    assert np.all(np.any(slopes_GK != 0, axis=1))


class TestLabelNoise:

  def test_blends_both_labels(self):
    rewards_GK, _ = _rewards()
    x = (rewards_GK[:, 0] - rewards_GK[:, 1]).astype(np.float64)
    found = _bradley_terry(rewards_GK, label_smoothing=0.2).per_item
    np.testing.assert_allclose(found, 0.8 * _softplus(-x) + 0.2 * _softplus(x), rtol=1e-5)

  def test_robust_is_right_on_average_over_wrong_labels(self):
    rewards_GK, _ = _rewards()
    x = (rewards_GK[:, 0] - rewards_GK[:, 1]).astype(np.float64)
    run = lambda r: _bradley_terry(r, label_smoothing=0.2, smoothing=parts.robust).per_item
    np.testing.assert_allclose(run(rewards_GK), (0.8 * _softplus(-x) - 0.2 * _softplus(x)) / 0.6, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        0.8 * run(rewards_GK) + 0.2 * run(rewards_GK[:, ::-1].copy()), _softplus(-x), rtol=1e-4, atol=1e-5
    )

  def test_brier_score_is_the_squared_doubt(self):
    rewards_GK, _ = _rewards()
    x = (rewards_GK[:, 0] - rewards_GK[:, 1]).astype(np.float64)
    np.testing.assert_allclose(
        _bradley_terry(rewards_GK).metrics['brier'], (1 - 1 / (1 + np.exp(-x))) ** 2, rtol=1e-4, atol=1e-7
    )


class TestLengthDebiased:

  def run(self, rewards_GK, tokens_GK, penalty):
    valid_G = jnp.array([1.0] * (len(rewards_GK) - 1) + [0.0])
    stats = types.Stats(rewards_GK=jnp.asarray(rewards_GK), tokens_GK=jnp.asarray(tokens_GK), valid_G=valid_G)
    return reward.length_debiased(stats, types.Stats(), {}, penalty=penalty)

  def test_adds_the_squared_correlation_with_length(self):
    rewards_GK, _ = _rewards(groups=7)
    tokens_GK = np.random.default_rng(1).integers(1, 30, (7, 2)).astype(np.float32)
    x, n = (np.diff(a[:6].astype(np.float64), axis=1)[:, 0] for a in (rewards_GK, tokens_GK))
    wanted = _softplus(x) + 2.0 * np.corrcoef(x, n)[0, 1] ** 2
    np.testing.assert_allclose(self.run(rewards_GK, tokens_GK, 2.0).per_item[:6], wanted, rtol=1e-4)

  def test_is_finite_with_its_gradient_where_all_rewards_are_equal(self):
    loss = lambda x: jnp.sum(self.run(x, np.ones((4, 2), np.float32), 1.0).per_item)
    assert np.all(np.isfinite(jax.grad(loss)(jnp.zeros((4, 2)))))


class TestCorrectness:

  def test_is_the_cross_entropy_of_right_and_wrong(self):
    rewards_GK, right_GK = np.array([[2.0], [-1.0], [0.0]], np.float32), np.array([[1.0], [1.0], [0.0]], np.float32)
    out = pointwise.correctness(
        types.Stats(rewards_GK=jnp.asarray(rewards_GK)), types.Stats(), {'desirable': jnp.asarray(right_GK)}
    )
    np.testing.assert_allclose(out.per_item, [0.126928011, 1.313261688, 0.693147181], rtol=1e-6)
    assert out.metrics['accuracy'].tolist() == [1, 0, 1]
    # Squares of what is missing to the label: of sigmoid of 2, of -1, and of 0.
    np.testing.assert_allclose(out.metrics['brier'], [0.014209, 0.534447, 0.25], rtol=1e-4)


def _error_of_bins(confidence, right):
  """Guo et al.'s, Eq. 3, bin by bin."""
  total = 0.0
  for m in range(1, 11):
    inside = (confidence > (m - 1) / 10) & (confidence <= m / 10)
    if inside.any():
      total += inside.sum() * abs(right[inside].mean() - confidence[inside].mean())
  return total / len(confidence)


def _mean(metric):
  """Of groups that are all there."""
  return float(type(metric)(*(np.sum(part, axis=0) for part in metric)).mean())


class TestCalibrationError:

  def test_of_pairs_is_that_of_the_side_that_is_said(self):
    rewards_GK = np.random.default_rng(3).normal(0.3, 1.5, (400, 2)).astype(np.float32)
    p = 1 / (1 + np.exp(-(rewards_GK[:, 0].astype(np.float64) - rewards_GK[:, 1])))
    wanted = _error_of_bins(np.maximum(p, 1 - p), (p > 0.5).astype(np.float64))
    assert wanted > 0.02
    assert _mean(_bradley_terry(rewards_GK).metrics['ece']) == pytest.approx(wanted, abs=1e-5)

  def test_of_right_and_wrong_follows_the_label(self):
    rng = np.random.default_rng(4)
    rewards_GK, right_GK = rng.normal(0, 2, (300, 1)).astype(np.float32), rng.integers(0, 2, (300, 1)).astype('f')
    stats = types.Stats(rewards_GK=jnp.asarray(rewards_GK))
    out = pointwise.correctness(stats, types.Stats(), {'desirable': jnp.asarray(right_GK)})
    p = 1 / (1 + np.exp(-rewards_GK[:, 0].astype(np.float64)))
    wanted = _error_of_bins(np.maximum(p, 1 - p), ((p > 0.5) == (right_GK[:, 0] > 0.5)).astype(np.float64))
    assert _mean(out.metrics['ece']) == pytest.approx(wanted, abs=1e-5)

  def test_is_zero_where_nothing_is_known_and_said(self):
    assert _mean(_bradley_terry(np.zeros((5, 2))).metrics['ece']) == 0

  def test_is_the_miss_where_all_is_sure_and_a_quarter_wrong(self):
    rewards_GK = np.array([[40.0, 0.0]] * 3 + [[0.0, 40.0]], np.float32)
    assert _mean(_bradley_terry(rewards_GK).metrics['ece']) == pytest.approx(0.25)


def _outputs(seed=0, groups=5, size=2, outputs=3):
  """Outputs of a head and ratings, of which some are missing; the last group has one response."""
  rng = np.random.default_rng(seed)
  outputs_GKO, ratings_GKO = (rng.normal(0, 1, (groups, size, outputs)).astype(np.float32) for _ in range(2))
  ratings_GKO[rng.random(ratings_GKO.shape) < 0.3] = np.nan
  ratings_GKO[0, 0], ratings_GKO[0, 0, 1] = np.nan, 2.0
  valid_GK = np.ones((groups, size), np.float32)
  valid_GK[-1, 1:] = 0
  return outputs_GKO, ratings_GKO, valid_GK


class TestAttributes:
  NAMES = 'help', 'truth', 'tone'

  def run(self, outputs_GKO, ratings_GKO, valid_GK):
    stats = types.Stats(outputs_GKO=jnp.asarray(outputs_GKO), valid_GK=jnp.asarray(valid_GK))
    labels = {name: jnp.asarray(ratings_GKO[..., i]) for i, name in enumerate(self.NAMES)}
    return pointwise.attributes(stats, types.Stats(), labels, attributes=self.NAMES)

  def test_is_the_mean_square_over_the_ratings_that_there_are(self):
    x_GKO, y_GKO, valid_GK = _outputs()
    wanted, errors = [], {name: [] for name in self.NAMES}
    for g, k in np.ndindex(valid_GK.shape):
      for i, name in enumerate(self.NAMES):
        if valid_GK[g, k] and not np.isnan(y_GKO[g, k, i]):
          errors[name].append((g, (float(x_GKO[g, k, i]) - float(y_GKO[g, k, i])) ** 2))
    for group in range(len(valid_GK)):
      wanted.append(np.mean([e for found in errors.values() for g, e in found if g == group]))
    out = self.run(x_GKO, y_GKO, valid_GK)
    np.testing.assert_allclose(out.per_item, wanted, rtol=1e-5)
    for i, name in enumerate(self.NAMES):
      assert _mean(out.metrics[f'mse/{name}']) == pytest.approx(np.mean([e for _, e in errors[name]]), rel=1e-5)
      there = np.where(valid_GK > 0, y_GKO[..., i], np.nan)
      assert _mean(out.metrics[f'mean_rating/{name}']) == pytest.approx(np.nanmean(there), rel=1e-4)

  def test_has_no_gradient_where_a_rating_is_missing(self):
    x_GKO, y_GKO, valid_GK = _outputs()
    slopes_GKO = np.asarray(jax.grad(lambda x: jnp.sum(self.run(x, y_GKO, valid_GK).per_item))(jnp.asarray(x_GKO)))
    there_GKO = ~np.isnan(y_GKO) & (valid_GK[..., None] > 0)
    assert np.all(np.isfinite(slopes_GKO))
    np.testing.assert_array_equal(slopes_GKO != 0, there_GKO)

  def test_refuses_a_head_of_another_size(self):
    x_GKO, y_GKO, valid_GK = _outputs(outputs=4)
    with pytest.raises(types.UsageError, match='score_outputs = 4, but pointwise.attributes.attributes names 3'):
      self.run(x_GKO, y_GKO, valid_GK)


class TestClassification:

  def run(self, outputs_GO, class_G):
    stats = types.Stats(outputs_GKO=jnp.asarray(outputs_GO, jnp.float32)[:, None])
    labels = {'class': jnp.asarray(class_G, jnp.float32)[:, None]}
    return pointwise.classification(stats, types.Stats(), labels)

  def test_is_the_cross_entropy_with_accuracy_baseline_and_calibration(self):
    rng = np.random.default_rng(0)
    outputs_GO, class_G = rng.normal(0, 2, (50, 3)).astype('f'), rng.choice(3, 50, p=[0.2, 0.2, 0.6])
    p_GO = np.exp(outputs_GO.astype(np.float64))
    p_GO /= p_GO.sum(axis=1, keepdims=True)
    out = self.run(outputs_GO, class_G)
    np.testing.assert_allclose(out.per_item, -np.log(p_GO[np.arange(50), class_G]), rtol=1e-5)
    right_G = p_GO.argmax(axis=1) == class_G
    np.testing.assert_array_equal(out.metrics['accuracy'], right_G)
    assert _mean(out.metrics['largest_class']) == pytest.approx(np.bincount(class_G).max() / 50)
    assert _mean(out.metrics['ece']) == pytest.approx(_error_of_bins(p_GO.max(axis=1), right_G.astype(float)), abs=1e-5)

  def test_is_not_finite_for_a_class_without_an_output(self):
    assert np.isnan(self.run([[0.0, 1.0], [0.0, 1.0]], [1, 2]).per_item).tolist() == [False, True]
