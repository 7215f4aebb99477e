"""Tests of masked sums and of the table of groups, against loops over rows in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import masked
from jaxalign import types
from tests import packed


def _batch(group_BS, slot_BS, responses_BT, mask_BT, num_groups, group_size):
  """A batch of which only the tables matter."""
  tokens = np.zeros(np.shape(mask_BT), np.int32)
  return types.Batch(
      inputs_BT=tokens,
      targets_BT=tokens,
      mask_BT=np.asarray(mask_BT, np.float32),
      positions_BT=tokens,
      segments_BT=tokens,
      responses_BT=np.asarray(responses_BT, np.int32),
      group_BS=np.asarray(group_BS, np.int32),
      slot_BS=np.asarray(slot_BS, np.int32),
      labels_BS={},
      num_groups=num_groups,
      group_size=group_size,
  )


def _random_batch(seed=0, rows=5, slots=4, tokens=23, groups=6, size=3):
  """Groups that spread over rows; some incomplete, some rows with unused slots, the last row empty."""
  rng = np.random.default_rng(seed)
  group_BS, slot_BS = np.full((rows, slots), -1), np.full((rows, slots), -1)
  responses_BT, mask_BT = np.full((rows, tokens), -1), np.zeros((rows, tokens))
  places = rng.permutation([(g, k) for g in range(groups) for k in range(size)])[:13]
  for i, (g, k) in enumerate(places):
    b, s = i % (rows - 1), i // (rows - 1)
    group_BS[b, s], slot_BS[b, s] = g, k
    start = 5 * s
    responses_BT[b, start + 2 : start + 5] = s
    mask_BT[b, start + 2 : start + 5] = rng.random(3) < 0.8
  return _batch(group_BS, slot_BS, responses_BT, mask_BT, groups, size)


class TestWeighted:

  def test_mean_is_sum_over_weight(self):
    x, weight = jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, 0.0, 3.0])
    pair = masked.weighted(x, weight)
    assert (float(pair.sum), float(pair.weight), float(pair.mean())) == (13.0, 4.0, 3.25)

  def test_mean_of_nothing_is_zero(self):
    pair = masked.weighted(jnp.array([jnp.nan, jnp.inf]), jnp.zeros(2))
    assert (float(pair.sum), float(pair.mean())) == (0.0, 0.0)

  def test_sums_of_parts_give_the_mean_of_the_whole(self):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=12).astype(np.float32), rng.integers(0, 3, 12).astype(np.float32)
    parts = [masked.weighted(jnp.asarray(x[i : i + 3]), jnp.asarray(weight[i : i + 3])) for i in range(0, 12, 3)]
    total = masked.Weighted(sum(p.sum for p in parts), sum(p.weight for p in parts))
    np.testing.assert_allclose(total.mean(), np.average(x.astype(np.float64), weights=weight), rtol=1e-6)

  def test_a_weight_per_row_counts_each_entry_of_the_row(self):
    pair = masked.weighted(jnp.array([[1.0, 2.0], [5.0, 7.0], [9.0, 9.0]]), jnp.array([[1.0], [1.0], [0.0]]))
    assert (float(pair.sum), float(pair.weight)) == (15.0, 4.0)

  @pytest.mark.parametrize('leak', [np.nan, np.inf, -np.inf])
  def test_what_weighs_nothing_leaks_neither_value_nor_gradient(self, leak):
    x, weight = jnp.array([1.0, leak, 2.0]), jnp.array([1.0, 0.0, 1.0])
    value, grads = jax.value_and_grad(lambda x: masked.weighted(x, weight).sum)(x)
    assert value == 3.0
    assert grads.tolist() == [1, 0, 1]


class TestPerResponse:

  @pytest.mark.parametrize('seed', range(3))
  def test_sums_the_counted_targets_of_each_response(self, seed):
    batch = _random_batch(seed)
    x_BT = np.random.default_rng(seed).normal(size=batch.mask_BT.shape).astype(np.float32)
    gold_BS = np.zeros(batch.group_BS.shape)
    for b, t in np.argwhere(batch.mask_BT > 0):
      gold_BS[b, batch.responses_BT[b, t]] += float(x_BT[b, t])
    np.testing.assert_allclose(masked.per_response(jnp.asarray(x_BT), batch), gold_BS, rtol=1e-6, atol=1e-6)

  def test_prompts_and_padding_belong_to_no_response(self):
    batch = _batch([[0, 1]], [[0, 0]], [[-1, 0, -1, 1, -1]], np.ones((1, 5)), 2, 1)
    assert masked.per_response(jnp.array([[1.0, 2, 4, 8, 16]]), batch).tolist() == [[2, 8]]

  def test_a_nan_that_does_not_count_does_not_leak(self):
    batch = _batch([[0]], [[0]], [[0, 0, 0]], [[1, 0, 1]], 1, 1)
    x_BT = jnp.array([[1.0, jnp.nan, 2.0]])
    value, grads_BT = jax.value_and_grad(lambda x: jnp.sum(masked.per_response(x, batch)))(x_BT)
    assert value == 3.0
    assert grads_BT.tolist() == [[1, 0, 1]]


class TestToTable:

  @pytest.mark.parametrize('seed', range(3))
  def test_puts_each_response_at_its_group_and_slot_wherever_its_row_is(self, seed):
    batch = _random_batch(seed)
    x_BS = np.random.default_rng(seed).normal(size=batch.group_BS.shape).astype(np.float32)
    gold_GK = np.zeros((6, 3), np.float32)
    for b, s in np.argwhere(batch.group_BS >= 0):
      gold_GK[batch.group_BS[b, s], batch.slot_BS[b, s]] = x_BS[b, s]
    np.testing.assert_array_equal(masked.to_table(jnp.asarray(x_BS), batch), gold_GK)

  def test_unused_slots_do_not_wrap_round_to_the_last_group(self):
    batch = _batch([[0, -1], [-1, -1]], [[0, -1], [-1, -1]], [[-1], [-1]], [[0], [0]], 2, 2)
    table_GK = masked.to_table(jnp.full((2, 2), 7.0), batch)
    assert table_GK.tolist() == [[7, 0], [0, 0]]

  def test_gradients_go_back_to_the_response_and_not_to_unused_slots(self):
    batch = _batch([[1, -1], [0, 1]], [[0, -1], [1, 1]], [[-1], [-1]], [[0], [0]], 2, 2)
    weight_GK = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    grads_BS = jax.grad(lambda x: jnp.sum(masked.to_table(x, batch) * weight_GK))(jnp.zeros((2, 2)))
    assert grads_BS.tolist() == [[3, 0], [2, 4]]


class TestValidGroups:

  @pytest.mark.parametrize('seed', range(3))
  def test_is_one_where_a_response_of_the_group_is_there(self, seed):
    batch = _random_batch(seed)
    found = set(zip(batch.group_BS[batch.group_BS >= 0].tolist(), batch.slot_BS[batch.group_BS >= 0].tolist()))
    gold_GK = [[float((g, k) in found) for k in range(3)] for g in range(6)]
    assert masked.valid(batch).tolist() == gold_GK
    assert masked.valid_groups(batch).tolist() == [max(row) for row in gold_GK]
    assert 0 < np.sum(gold_GK) < 18

  def test_of_a_pair_over_two_rows_and_of_a_short_list(self):
    batch = _batch([[0, 1], [0, -1]], [[0, 1], [1, -1]], [[-1], [-1]], [[0], [0]], 3, 2)
    assert masked.valid(batch).tolist() == [[1, 1], [0, 1], [0, 0]]
    assert masked.valid_groups(batch).tolist() == [1, 1, 0]


class TestTokens:

  @pytest.mark.parametrize('seed', range(3))
  def test_get_the_value_of_their_response_and_count_from_its_first(self, seed):
    batch = _random_batch(seed)
    table_GK = np.random.default_rng(seed).normal(size=(6, 3)).astype(np.float32)
    found_BT, order_BT = masked.to_tokens(table_GK, batch), masked.order(batch)
    for b, t in np.ndindex(batch.mask_BT.shape):
      rank = batch.responses_BT[b, t]
      used = rank >= 0 and batch.group_BS[b, rank] >= 0
      assert found_BT[b, t] == (table_GK[batch.group_BS[b, rank], batch.slot_BS[b, rank]] if used else 0)
      if rank >= 0 and batch.mask_BT[b, t]:
        assert order_BT[b, t] == np.sum(batch.mask_BT[b, :t] * (batch.responses_BT[b, :t] == rank))


class TestMerged:

  def test_has_the_tables_of_all_micro_batches_one_behind_the_other(self):
    micros = [_random_batch(seed) for seed in range(3)]
    whole = masked.merged(packed.stack(*micros))
    x_ABT = np.random.default_rng(0).normal(size=(3, *micros[0].mask_BT.shape)).astype(np.float32)
    found = masked.totals(x_ABT.reshape(-1, x_ABT.shape[-1]), whole)
    wanted = np.concatenate([masked.totals(x_BT, micro) for x_BT, micro in zip(x_ABT, micros)])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert whole.num_groups == 3 * micros[0].num_groups
