"""Means over held-out batches, from sums."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import held_out
from jaxalign import masked


def weighted(total, weight):
  return masked.Weighted(jnp.float32(total), jnp.float32(weight))


class TestMeans:

  def run(self, *batches):
    return held_out.means(lambda params, batch: batch, {}, iter(batches))

  def test_divides_one_sum_by_one_weight(self):
    values = self.run({'loss': weighted(2.0, 1.0)}, {'loss': weighted(1.0, 3.0)})
    assert values['eval/loss'] == pytest.approx(3 / 4)
    assert values['eval/n'] == 4

  def test_weighs_each_metric_by_its_own_weight(self):
    batch = {'loss': weighted(2.0, 1.0), 'entropy': weighted(30.0, 10.0), 'never': weighted(0.0, 0.0)}
    values = self.run(batch, batch)
    assert (values['eval/entropy'], values['eval/never']) == (3.0, 0.0)

  def test_says_how_sure_an_accuracy_is(self):
    names = 'rewards/accuracies', 'accuracy', 'length_only/accuracies'
    values = self.run({'loss': weighted(1.0, 50.0), **{name: weighted(40.0, 50.0) for name in names}})
    for name in names:
      assert values[f'eval/{name}_stderr'] == pytest.approx(math.sqrt(0.8 * 0.2 / 50))
    assert 'eval/loss_stderr' not in values

  def test_counts_beyond_what_float32_can(self):
    values = self.run(*[{'loss': weighted(2**24, 2**24)}, *[{'loss': weighted(0.0, 1.0)}] * 3])
    assert values['eval/n'] == 2**24 + 3

  def test_adds_bins_over_batches_before_it_takes_their_gaps(self):
    of = lambda gap, count: {
        'loss': weighted(0.0, sum(count)),
        'ece': masked.Calibration(np.float32(gap), np.float32(count)),
        'largest_class': masked.Largest(np.float32(count)),
    }
    values = self.run(of([0.5, -1.0], [2, 2]), of([-0.5, -1.0], [4, 0]))
    assert values['eval/ece'] == pytest.approx((0.0 + 2.0) / 8)
    assert values['eval/largest_class'] == pytest.approx(6 / 8)

  def test_holds_two_batches_at_a_time(self):
    made = []

    def batches():
      for n in range(50):
        made.append(n)
        yield n

    for done, batch in enumerate(held_out._one_behind(batches())):
      assert batch == done
      assert len(made) - done <= 2
    assert len(made) == 50
