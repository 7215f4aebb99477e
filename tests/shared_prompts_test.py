"""A prompt that stands once for its responses gives the numbers of one that is repeated."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from jaxalign import forward
from jaxalign import objectives
from jaxalign import sharding
from jaxalign import tracing
from jaxalign.data import examples
from jaxalign.data import loader as loader_lib
from jaxalign.losses import listwise
from jaxalign.losses import policy
from jaxalign.losses import preference
from jaxalign.losses import reward
from jaxalign.models import architecture
from jaxalign.models import transformer
from jaxalign.rl import experience
from tests import packed

SIZES = {'vocab_size': 50, 'num_layers': 2, 'embed_dim': 16, 'num_heads': 2, 'num_kv_heads': 1, 'head_size': 8}
SIZES |= {'mlp_dim': 24, 'max_length': 64, 'score_outputs': 1}
FAMILIES = {
    'llama': architecture.Config(**SIZES),
    'gemma': architecture.Config(**SIZES, pattern=('local', 'global'), window=5, attn_softcap=3.0, final_softcap=9.0),
    'moe': architecture.Config(**SIZES, num_experts=4, experts_per_token=2),
}
LABELS = ('advantages', 'old_logps')


def groups(count, size, *, whole=True, marks=False):
  """Prompts with responses of ragged lengths; `marks` count the last token alone, lists that are not `whole` differ."""
  random = np.random.default_rng(0)
  found = []
  for n in range(count):
    prompt, sequences = random.integers(1, 50, random.integers(2, 16)), []
    for _ in range(size if whole or not n % 2 else size - 1):
      ids = np.concatenate([prompt, random.integers(1, 50, random.integers(2, 14))]).astype(np.int32)
      mask = np.arange(len(ids)) >= (len(ids) - 1 if marks else len(prompt))
      labels = {name: random.normal(size=mask.sum()).astype(np.float32) for name in LABELS}
      sequences.append(examples.Sequence(ids, mask, labels))
    scores = random.normal(size=len(sequences)).tolist()
    labels = {'score': scores, 'margin': [0.0] * len(sequences)}
    found.append(examples.Group(tuple(sequences), labels, prompt_tokens=len(prompt)))
  return experience.Groups(found)


def loader_of(data, mesh, share, *, rows, row_length=32):
  packing = loader_lib.Packing(rows=rows, row_length=row_length, max_responses=8, share_prompts=share)
  return loader_lib.Loader([data], [1.0], packing=packing, mesh=mesh, seed=0)


def totals(make, loss_fn, data, *, family='llama', mesh='', rows=8):
  """Loss, weight, metrics and gradient summed over all groups, packed with each prompt repeated and shared."""
  mesh = sharding.make_mesh(mesh, devices=None if mesh else jax.devices()[:1])
  model = transformer.build(FAMILIES[family], mesh, length=32)
  params, ref = (
      jax.tree.map(lambda x: 2 * x, transformer.init_params(model, jax.random.key(seed), mesh)) for seed in (0, 1)
  )
  score = jax.random.normal(jax.random.key(2), params['score'].shape)
  params = params | {'score': score}
  needs = tracing.trace(loss_fn, group_size=data.group_size, labels=('score', 'margin'), token_labels=LABELS, outputs=1)
  more = {'ref_model': model} if needs.reference else {}
  objective = make(model=model, loss_fn=loss_fn, needs=needs, **more)
  run = jax.jit(jax.value_and_grad(objective.of_micro, has_aux=True))
  found, slots = [], []
  with jax.set_mesh(mesh):
    for share in (False, True):
      batches = list(loader_of(data, mesh, share, rows=rows).ordered(range(len(data))))
      micros = [jax.tree.map(lambda x: x[0], batch) for _, batch in batches]
      assert all((micro.branches_BT is not None) == share for micro in micros)
      each = [run(params, {}, micro, jax.random.key(0), needs.state, ref) for micro in micros]
      metrics = [{**sums.metrics, 'weight': sums.weight, 'value': loss} for (loss, sums), _ in each]
      found.append(jax.tree.map(lambda *x: sum(map(np.asarray, x)), *[(m, g) for m, (_, g) in zip(metrics, each)]))
      slots.append(sum(int((micro.segments_BT > 0).sum()) for micro in micros))
  assert slots[1] < slots[0]
  return found


def assert_same(both):
  repeated, shared = both
  assert float(repeated[0]['weight']) > 0
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(repeated), jax.tree.leaves(shared)):
    scale = max(1.0, float(np.abs(a).max()))
    np.testing.assert_allclose(b / scale, a / scale, atol=1e-5, err_msg=jax.tree_util.keystr(path))


DPO = functools.partial(preference.dpo, beta=0.5)
GRPO = functools.partial(policy.grpo, clip_eps=0.2, beta=0.1)


class TestSharedPrompts:

  @pytest.mark.parametrize('family', FAMILIES)
  def test_give_pairs_the_loss_metrics_and_gradient_of_repeated_ones(self, family):
    assert_same(totals(objectives.preference, DPO, groups(12, 2), family=family))

  @pytest.mark.parametrize('mesh', ['data:2,fsdp:2,tensor:2', 'fsdp:4,context:2', 'fsdp:4,expert:2'])
  def test_do_so_on_every_mesh(self, mesh):
    assert_same(
        totals(objectives.preference, DPO, groups(12, 2), mesh=mesh, family='moe' if 'expert' in mesh else 'llama')
    )

  def test_give_groups_those_of_a_policy_gradient_where_they_spread_over_rows(self):
    data = groups(6, 7)
    assert any(sum(len(one.ids) for one in data[i].sequences) > 64 for i in range(len(data)))
    assert_same(totals(objectives.policy_gradient, GRPO, data))

  def test_give_lists_of_unequal_lengths_theirs(self):
    assert_same(
        totals(objectives.preference, functools.partial(listwise.pro, sft_weight=0.5), groups(8, 3, whole=False))
    )

  def test_give_the_head_that_scores_the_same_last_tokens(self):
    assert_same(totals(objectives.reward, reward.bradley_terry, groups(12, 2, marks=True)))

  def test_give_each_target_its_log_probability(self):
    mesh, data = sharding.make_mesh('', devices=jax.devices()[:1]), groups(9, 3)
    model = transformer.build(FAMILIES['llama'], mesh, length=32)
    params = transformer.init_params(model, jax.random.key(0), mesh)
    run = jax.jit(functools.partial(forward.ref_logps, model=model))
    found = []
    for share in (False, True):
      loader, of = loader_of(data, mesh, share, rows=4), {}
      for placements, batch in loader.ordered(range(len(data))):
        logps = np.asarray(run(params, batch))
        for place in loader.places(placements):
          of[place.record, place.slot] = logps[place.micro, place.row, place.targets]
      found.append(of)
    assert found[0].keys() == found[1].keys() and len(found[0]) == 27
    for key, logps in found[0].items():
      np.testing.assert_allclose(found[1][key], logps, atol=1e-5)
      ids, mask = (getattr(data[key[0]].sequences[key[1]], name) for name in ('ids', 'mask'))
      assert len(logps) == mask.sum() and np.all(logps < 0) and math.isfinite(logps.sum()), ids


class TestExperts:

  def named(self, random):
    """Groups whose tokens name experts, those of a prompt the same ones."""
    named = []
    for group in groups(6, 3):
      whole, sequences = random.integers(0, 4, (64, FAMILIES['moe'].num_layers, 2)), []
      for one in group.sequences:
        experts = whole[: len(one.ids) - 1].copy()
        experts[group.prompt_tokens - 1 :] = random.integers(0, 4, experts[group.prompt_tokens - 1 :].shape)
        sequences.append(dataclasses.replace(one, experts=experts.astype(np.uint8)))
      named.append(dataclasses.replace(group, sequences=tuple(sequences)))
    return experience.Groups(named)

  def test_of_texts_are_chosen_by_the_routers(self):
    mesh, text = sharding.make_mesh('', devices=jax.devices()[:1]), groups(1, 1)[0]
    data = self.named(np.random.default_rng(1)).with_texts([text])
    loader = loader_of(data, mesh, False, rows=4)
    ((placements, batch),) = loader.ordered([0, len(data) - 1])
    chosen = {0: [], len(data) - 1: []}
    for place in loader.places(placements):
      chosen[place.record] += np.asarray(batch.experts_BTLk)[place.micro, place.row, place.targets].ravel().tolist()
    assert set(chosen[0]) == {0, 1, 2, 3} and set(chosen[len(data) - 1]) == {255}

  @pytest.mark.parametrize('num_experts, replays', [(4, True), (2, False)])
  def test_are_taken_by_critics_of_the_same_shape_without_a_head_alone(self, num_experts, replays):
    mesh, c = sharding.make_mesh('', devices=jax.devices()[:1]), dataclasses.replace(FAMILIES['moe'], score_outputs=0)
    loader = loader_of(self.named(np.random.default_rng(1)), mesh, False, rows=4)
    (_, batch), *_ = loader.ordered([0])
    free = dataclasses.replace(batch, experts_BTLk=np.full_like(batch.experts_BTLk, 255))
    model = transformer.build(c, mesh, length=32)
    params = transformer.init_params(model, jax.random.key(0), mesh)
    for head in (0, 1):
      critic_model = transformer.build(
          dataclasses.replace(c, num_experts=num_experts, score_outputs=head), mesh, length=32
      )
      critic = transformer.init_params(critic_model, jax.random.key(1), mesh)
      if head:
        critic['score'] += 1.0
      run = functools.partial(forward.annotations, params, critic, None, model=model, critic_model=critic_model)
      of_named, of_free = (jax.jit(functools.partial(run, ref_model=None))(one) for one in (batch, free))
      name = 'values_0' if head else 'critic_logps'
      assert np.any(of_free[name]) and np.all(np.isfinite(of_free[name]))
      assert np.array_equal(of_named[name], of_free[name]) == (head == 1 or not replays)
      assert not np.array_equal(of_named['logps'], of_free['logps'])

  def test_of_tokens_are_those_that_sequences_name_in_policy_and_reference(self):
    mesh, random = sharding.make_mesh('', devices=jax.devices()[:1]), np.random.default_rng(1)
    model, c = transformer.build(FAMILIES['moe'], mesh, length=32), FAMILIES['moe']
    policy, ref = (transformer.init_params(model, jax.random.key(seed), mesh) for seed in (0, 1))
    data = self.named(random)
    run = jax.jit(
        lambda batch: forward.annotations(policy, None, ref, batch, model=model, critic_model=None, ref_model=model)
    )
    for share in (False, True):
      loader = loader_of(data, mesh, share, rows=4)
      for placements, batch in loader.ordered(range(len(data))):
        assert (np.asarray(batch.experts_BTLk)[np.asarray(batch.segments_BT) == 0] == 255).all()
        found = run(batch)
        for place in loader.places(placements):
          one = data[place.record].sequences[place.slot]
          for name, params in (('logps', policy), ('ref_logps', ref)):
            hidden_TD = packed.hidden_states(model, params, one.ids[:-1], one.experts, length=32)
            logits = hidden_TD @ np.asarray(transformer.output_matrix(params), np.float64)
            logp = logits - np.log(np.exp(logits[:, : c.vocab_size]).sum(axis=1, keepdims=True))
            wanted = logp[np.arange(len(logp)), one.ids[1:]][one.mask[1:]]
            np.testing.assert_allclose(found[name][place.micro, place.row, place.targets], wanted, atol=1e-4)


class TestSharedSlots:

  def test_are_those_before_the_last_token_of_the_prompt(self):
    sequence = lambda ids, first: examples.Sequence(np.array(ids), np.arange(len(ids)) >= first)
    assert examples.shared_slots((sequence([1, 2, 3, 4, 5], 3), sequence([1, 2, 3, 4, 6, 7], 3))) == 2
    assert examples.shared_slots((sequence([1, 2, 3, 4, 5], 3), sequence([1, 9, 3, 4, 5], 3))) == 1
    assert examples.shared_slots((sequence([1, 2, 3], 1), sequence([1, 2, 4], 1))) == 0
    assert examples.shared_slots((sequence([1, 2, 3], 2),)) == 0

  def test_leave_each_sequence_one(self):
    sequence = lambda ids: examples.Sequence(np.array(ids), np.zeros(len(ids), bool))
    assert examples.shared_slots((sequence([1, 2, 3, 4]), sequence([1, 2, 3]))) == 1
