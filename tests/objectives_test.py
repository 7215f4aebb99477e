"""Objectives on a tiny model: what changes no number, what a loss is found to need, the names of metrics."""

import dataclasses
import functools

import gin
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import forward
from jaxalign import objectives
from jaxalign import sharding
from jaxalign import tracing
from jaxalign import types
from jaxalign.losses import pointwise
from jaxalign.losses import preference
from jaxalign.losses import reference_free
from jaxalign.losses import reward
from jaxalign.losses import supervised
from jaxalign.losses import unpaired
from jaxalign.models import architecture
from jaxalign.models import transformer
from tests import packed

CONFIG = architecture.Config(50, 1, 16, 2, 1, 8, 24, 64, tie_embeddings=False)
MESH = sharding.make_mesh('', devices=jax.devices()[:1])
MODEL = transformer.build(CONFIG, MESH, length=32)


def params_of(seed):
  """Larger than a fresh model's: far from uniform logits, and embeddings near 1, which the norm need not amplify."""
  params = jax.tree.map(lambda x: 3 * x, transformer.init_params(MODEL, jax.random.key(seed), MESH))
  return params | {'embed': 17 * params['embed']}


PARAMS, OTHER = params_of(0), params_of(1)
KEY = jax.random.key(0)
DPO = functools.partial(preference.dpo, beta=0.5)
PAIRS = packed.pairs(0, 3)


def rows_of(pairs, order):
  """Rows of single sequences: `order` gives (group, slot)."""
  return [[(g, k, pairs[g][0], pairs[g][1 + k])] for g, k in order]


ALONE = rows_of(PAIRS, [(g, k) for g in range(3) for k in range(2)])


def batch_of(rows, length=32, **more):
  return packed.micro_batch(rows, groups=3, size=2, length=length, **more)


@functools.partial(jax.jit, static_argnums=(0, 3))
def reference(model, params, batch, stacked=False):
  return forward.ref_logps(params, batch if stacked else jax.tree.map(lambda x: x[None], batch), model=model)


def with_ref(batch, params=OTHER, model=MODEL):
  return dataclasses.replace(batch, ref_logps_BT=reference(model, params, batch)[0])


def run(objective, batch, *, loss_fn, params=PARAMS, model=MODEL):
  made = objective(model=model, loss_fn=loss_fn, needs=tracing.Needs())
  return jax.jit(made.of_micro)(params, {}, batch, KEY, ())


@jax.jit
def hidden_of(params, ids):
  """Hidden states of one sequence, in a row of its own behind which nothing matters."""
  row = jnp.zeros((1, 12), jnp.int32).at[0, : len(ids)].set(ids)
  return MODEL.apply({'params': params}, row, jnp.arange(12)[None], jnp.ones_like(row))[0]


def padded(ids):
  return np.pad(np.array(ids), (0, 12 - len(ids)))


def logps_of(params, prompt, response):
  """Log-probabilities of a response's tokens, from the full logits of its sequence alone, in float64."""
  hidden = np.asarray(hidden_of(params, padded([*prompt, *response])), np.float64)
  logits = (hidden @ np.asarray(params['head'], np.float64))[:, : CONFIG.vocab_size]
  logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  return np.array([logp[len(prompt) - 1 + i, token] for i, token in enumerate(response)])


class TestPreference:

  def test_is_the_formula_on_sums_over_response_tokens(self):
    total, sums = run(objectives.preference, with_ref(batch_of(ALONE)), loss_fn=DPO)
    margins = []
    for prompt, *responses in PAIRS:
      ratios = [(logps_of(PARAMS, prompt, r) - logps_of(OTHER, prompt, r)).sum() for r in responses]
      margins.append(0.5 * (ratios[0] - ratios[1]))
    np.testing.assert_allclose(total, np.log1p(np.exp(-np.array(margins))).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.weight, 3)
    np.testing.assert_allclose(sums.metrics['rewards/margins'].mean(), np.mean(margins), rtol=1e-4)
    chosen = np.mean([logps_of(PARAMS, p, c).sum() for p, c, _ in PAIRS])
    np.testing.assert_allclose(sums.metrics['logps/chosen'].mean(), chosen, rtol=1e-5)

  @pytest.mark.parametrize('dtype,tolerance', [('float32', 1e-6), ('bfloat16', 1e-2)])
  def test_is_log_2_without_margins_where_policy_equals_reference(self, dtype, tolerance):
    model = transformer.build(CONFIG, MESH, length=32, dtype=dtype)
    batch = with_ref(batch_of(ALONE), params=PARAMS, model=model)
    total, sums = run(objectives.preference, batch, loss_fn=DPO, model=model)
    np.testing.assert_allclose(total / sums.weight, np.log(2), atol=tolerance)
    np.testing.assert_allclose(sums.metrics['rewards/margins'].mean(), 0, atol=tolerance)

  @pytest.mark.parametrize(
      'layout',
      [
          [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(2, 0), (2, 1)]],
          [[(2, 1), (0, 0), (1, 1)], [(1, 0), (2, 0), (0, 1)]],
          [[(g, k) for g in range(3) for k in range(2)], []],
      ],
      ids=['a pair a row', 'groups over rows', 'one row and an empty one'],
  )
  def test_does_not_depend_on_how_sequences_are_packed(self, layout):
    rows = [[(g, k, PAIRS[g][0], PAIRS[g][1 + k]) for g, k in row] for row in layout]
    grad = lambda batch: jax.grad(lambda p: run(objectives.preference, batch, loss_fn=DPO, params=p), has_aux=True)(
        PARAMS
    )
    found, sums = grad(with_ref(batch_of(rows, length=64, slots=6)))
    wanted, other = grad(with_ref(batch_of(ALONE)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5), found, wanted)
    for name, pair in other.metrics.items():
      np.testing.assert_allclose(sums.metrics[name].mean(), pair.mean(), atol=1e-5, err_msg=name)

  def test_leaves_out_groups_that_are_not_there(self):
    some = packed.micro_batch(ALONE[:2] + [[], []], groups=3, size=2, length=32)
    total, sums = run(objectives.preference, with_ref(some), loss_fn=DPO)
    alone, _ = run(
        objectives.preference, with_ref(packed.micro_batch(ALONE[:2], groups=1, size=2, length=32)), loss_fn=DPO
    )
    assert float(sums.weight) == 1
    np.testing.assert_allclose(total, alone, rtol=1e-6)

  def test_of_an_empty_batch_is_zero_with_zero_gradient(self):
    empty = with_ref(batch_of([[], []]))
    fn = jax.value_and_grad(lambda p: run(objectives.preference, empty, loss_fn=DPO, params=p), has_aux=True)
    (total, sums), grads = fn(PARAMS)
    assert (float(total), float(sums.weight)) == (0, 0)
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))

  def test_has_the_metrics_of_trl(self):
    _, sums = run(objectives.preference, with_ref(batch_of(ALONE)), loss_fn=DPO)
    assert set(sums.metrics) == {
        'loss',
        'rewards/chosen',
        'rewards/rejected',
        'rewards/margins',
        'rewards/accuracies',
        'logps/chosen',
        'logps/rejected',
        'logits/chosen',
        'logits/rejected',
        'entropy',
        'mean_token_accuracy',
        'length_only/accuracies',
        'accuracy/chosen_longer',
        'accuracy/chosen_shorter',
    }

  def test_counts_how_often_the_longer_response_was_chosen(self):
    pairs = [([1], [2, 3], [4]), ([1], [2], [4, 5, 6]), ([1], [2], [3])]
    rows = rows_of(pairs, [(g, k) for g in range(3) for k in range(2)])
    _, sums = run(objectives.preference, with_ref(batch_of(rows)), loss_fn=DPO)
    np.testing.assert_allclose(sums.metrics['length_only/accuracies'].mean(), (1 + 0 + 0.5) / 3)


class TestSupervised:

  def test_is_the_negative_log_likelihood_of_counted_targets(self):
    total, sums = run(objectives.supervised, batch_of(ALONE), loss_fn=supervised.cross_entropy)
    logps = [logps_of(PARAMS, p, r) for p, *responses in PAIRS for r in responses]
    np.testing.assert_allclose(total, -sum(x.sum() for x in logps), rtol=1e-5)
    assert float(sums.weight) == sum(map(len, logps))

  def test_has_the_metrics_of_trl(self):
    _, sums = run(objectives.supervised, batch_of(ALONE), loss_fn=supervised.cross_entropy)
    assert set(sums.metrics) == {'loss', 'entropy', 'mean_token_accuracy'}


class TestMeansOverSome:

  def test_are_divided_by_their_own_weight(self):
    batch = batch_of(rows_of(PAIRS, [(g, 0) for g in range(3)]))
    labels_BS = {'desirable': np.where(batch.group_BS == 1, 0.0, 1.0).astype(np.float32)}
    batch = with_ref(dataclasses.replace(batch, labels_BS=labels_BS))
    loss_fn = functools.partial(unpaired.apo_zero_unpaired, beta=0.5)
    _, sums = run(objectives.preference, batch, loss_fn=loss_fn)
    logps = [logps_of(PARAMS, PAIRS[g][0], PAIRS[g][1]).sum() for g in range(3)]
    np.testing.assert_allclose(sums.metrics['logps/chosen'].mean(), (logps[0] + logps[2]) / 2, rtol=1e-5)
    np.testing.assert_allclose(sums.metrics['logps/rejected'].mean(), logps[1], rtol=1e-5)


class TestReward:
  MODEL = transformer.build(dataclasses.replace(CONFIG, score_outputs=1), MESH, length=32)

  def params(self):
    return PARAMS | {'score': jax.random.normal(jax.random.key(3), (16, 1))}

  def batch(self):
    """As for log-probabilities, but only the last target of each response counts."""
    batch = batch_of(ALONE, labels=('margin', 'length'))
    last = np.roll(batch.mask_BT, -1, axis=1) < batch.mask_BT
    return dataclasses.replace(batch, mask_BT=last.astype(np.float32))

  def test_reads_scores_where_the_mask_marks_them(self):
    loss_fn = functools.partial(reward.bradley_terry, centring=0.0)
    total, sums = run(objectives.reward, self.batch(), loss_fn=loss_fn, params=self.params(), model=self.MODEL)
    margins = []
    for prompt, *responses in PAIRS:
      scores = []
      for response in responses:
        hidden = np.asarray(hidden_of(PARAMS, padded([*prompt, *response])), np.float64)
        read = hidden[len(prompt) + len(response) - 2]  # where the last target is predicted
        scores.append(float(read @ np.asarray(self.params()['score'])[:, 0]))
      margins.append(scores[0] - scores[1])
    np.testing.assert_allclose(total, np.log1p(np.exp(-np.array(margins))).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums.metrics['margin'].mean(), np.mean(margins), rtol=1e-4)

  def test_has_the_metrics_of_trl(self):
    _, sums = run(objectives.reward, self.batch(), loss_fn=reward.bradley_terry, params=self.params(), model=self.MODEL)
    assert {'loss', 'accuracy', 'margin', 'mean_reward'} <= set(sums.metrics)


class TestSeveralOutputs:
  MODEL = transformer.build(dataclasses.replace(CONFIG, score_outputs=3), MESH, length=32)

  def params(self):
    return PARAMS | {'score': jax.random.normal(jax.random.key(3), (16, 3))}

  def run(self, layout):
    rows = [[(g, 0, PAIRS[g][0], PAIRS[g][1]) for g in row] for row in layout]
    batch = packed.micro_batch(rows, groups=4, size=1, length=64)
    last = np.roll(batch.mask_BT, -1, axis=1) < batch.mask_BT
    labels_BS = {'class': np.where(batch.group_BS == 1, 2.0, 1.0).astype(np.float32)}
    batch = dataclasses.replace(batch, mask_BT=last.astype(np.float32), labels_BS=labels_BS)
    needs = tracing.trace(pointwise.classification, group_size=1, labels=('class',), outputs=3)
    made = objectives.reward(model=self.MODEL, loss_fn=pointwise.classification, needs=needs)
    return jax.jit(made.of_micro)(self.params(), {}, batch, KEY, ())

  @pytest.mark.parametrize('layout', [[[0], [1], [2]], [[2, 0, 1], []]], ids=['alone', 'one row and an empty one'])
  def test_are_read_at_the_last_token_of_each_response(self, layout):
    total, sums = self.run(layout)
    losses, sure = [], []
    for g in range(3):
      ids = [*PAIRS[g][0], *PAIRS[g][1]]
      outputs = np.asarray(hidden_of(PARAMS, padded(ids)), np.float64)[len(ids) - 2] @ np.asarray(
          self.params()['score']
      )
      losses.append(np.log(np.exp(outputs).sum()) - outputs[2 if g == 1 else 1])
      sure.append(np.exp(outputs).max() / np.exp(outputs).sum())
    np.testing.assert_allclose(total, sum(losses), rtol=1e-5)
    assert float(sums.weight) == float(sums.metrics['ece'].count.sum()) == 3
    right = 3 * float(sums.metrics['accuracy'].mean())
    np.testing.assert_allclose(sums.metrics['ece'].gap.sum(), sum(sure) - right, rtol=1e-5)
    np.testing.assert_array_equal(sums.metrics['largest_class'].count, [0, 2, 1])

  @pytest.mark.parametrize('has_critic', [False, True])
  def test_are_a_value_each_where_what_comes_before_a_token_was_read(self, has_critic):
    batch = batch_of(ALONE)
    models = (MODEL, self.MODEL) if has_critic else (self.MODEL, None)
    given = (OTHER, self.params(), None) if has_critic else (self.params(), None, None)
    annotate = functools.partial(forward.annotations, model=models[0], critic_model=models[1], ref_model=None)
    found = jax.jit(annotate)(*given, jax.tree.map(lambda x: x[None], batch))
    assert set(found) == {'logps', 'values_0', 'values_1', 'values_2'}
    for row, [(_, _, prompt, response)] in enumerate(ALONE):
      hidden = np.asarray(hidden_of(PARAMS, padded([*prompt, *response])), np.float64)
      wanted = hidden[len(prompt) - 1 :][: len(response)] @ np.asarray(self.params()['score'], np.float64)
      for i in range(3):
        x_T = np.asarray(found[f'values_{i}'])[0, row][np.asarray(batch.mask_BT)[row] > 0]
        np.testing.assert_allclose(x_T, wanted[:, i], rtol=1e-4, atol=1e-5)

  def test_are_no_reward(self):
    needs = tracing.trace(reward.bradley_terry, group_size=2, labels=('margin',), outputs=3)
    made = objectives.reward(model=self.MODEL, loss_fn=reward.bradley_terry, needs=needs)
    with pytest.raises(types.UsageError, match='score_outputs = 3: a reward is one number'):
      made.of_micro(self.params(), {}, TestReward().batch(), KEY, ())


class TestProcess:

  def test_reads_the_head_where_steps_end_and_weighs_each_alike(self):
    model = transformer.build(dataclasses.replace(CONFIG, score_outputs=2, score_bias=True), MESH, length=32)
    params = PARAMS | {'score': jax.random.normal(jax.random.key(3), (16, 2)), 'score_bias': jnp.array([0.5, -0.25])}
    batch = TestReward().batch()
    right_BT = np.where(np.arange(batch.mask_BT.shape[1]) % 2, 1.0, 0.0) * batch.mask_BT
    batch = dataclasses.replace(batch, labels_BT={'step': right_BT.astype(np.float32)})
    total, sums = run(objectives.process, batch, loss_fn=pointwise.process, params=params, model=model)
    losses = []
    for b, t in zip(*np.nonzero(batch.mask_BT)):
      first = t - int(batch.positions_BT[b, t])
      hidden = np.asarray(hidden_of(PARAMS, padded(batch.inputs_BT[b, first : t + 1].tolist())), np.float64)[t - first]
      outputs = hidden @ np.asarray(params['score'], np.float64) + [0.5, -0.25]
      losses.append(np.log(np.exp(outputs).sum()) - outputs[int(right_BT[b, t])])
    np.testing.assert_allclose(total, sum(losses), rtol=1e-5)
    assert float(sums.weight) == len(losses) == float(sums.metrics['accuracy'].weight)


class TestRefLogps:

  def test_are_those_of_the_policy_micro_batch_by_micro_batch(self):
    micro = batch_of(ALONE), batch_of(ALONE[::-1])
    found = reference(MODEL, PARAMS, packed.stack(*micro), True)
    for got, one in zip(found, micro):
      logps = forward.target_stats(PARAMS, jax.tree.map(jnp.asarray, one), model=MODEL)['logps']
      np.testing.assert_allclose(got, logps, atol=1e-6)


class TestTemperature:

  @pytest.mark.parametrize('softcap', [0.0, 2.0])
  def test_divides_logits_behind_the_soft_cap(self, softcap):
    model = transformer.build(dataclasses.replace(CONFIG, final_softcap=softcap), MESH, length=32)
    batch = jax.tree.map(jnp.asarray, batch_of(ALONE))
    found = forward.target_stats(PARAMS, batch, model=model, temperature=0.6)['logps']
    hidden = np.asarray(forward.hidden_states(PARAMS, batch, model=model), np.float64)
    logits = (hidden @ np.asarray(transformer.output_matrix(PARAMS), np.float64))[..., :50]
    logits = (softcap * np.tanh(logits / softcap) if softcap else logits) / 0.6
    wanted = np.take_along_axis(logits, np.asarray(batch.targets_BT)[..., None], 2)[..., 0]
    wanted -= np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    np.testing.assert_allclose(found, wanted * np.asarray(batch.mask_BT), rtol=1e-4, atol=1e-4)


class TestKeptLogits:

  # 1,152 tokens are four and a half chunks of 256, and logits of one for the padded vocabulary, 2,048 wide, are 2 MiB.
  @pytest.mark.parametrize('bound,size', [(0, 0), (1, 0), (2, 256), (5, 2 * 256), (400, 5 * 256)])
  def test_of_a_model_are_there_for_the_backward_pass(self, bound, size):
    config = dataclasses.replace(CONFIG, vocab_size=2000)
    model = transformer.build(config, MESH, length=32, kept_logits=bound)
    params = transformer.abstract_params(model, MESH)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of(36 * ALONE[:1]))

    def backward(params, batch):
      return jax.vjp(lambda params: forward.target_stats(params, batch, model=model)['logps'], params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, params, batch))
    shapes = [x.shape for x in kept if x.shape[1:] == params['head'].shape[1:] and x.shape != params['head'].shape]
    assert sum(rows for rows, _ in shapes) == size


class TestNeeds:

  def test_are_the_fields_that_a_loss_reads(self):
    find = lambda loss, **more: set(tracing.trace(loss, group_size=2, labels=('margin',), **more).fields)
    assert find(DPO) == {'policy.logps_GK', 'ref.logratios_GK'}
    assert find(supervised.cross_entropy) == {'policy.logps_BT'}
    assert find(reward.bradley_terry) == {'policy.rewards_GK', 'labels.margin'}
    assert find(pointwise.process, token_labels=('step',), outputs=2) == {'policy.scores_BTO', 'labels.step'}

  def test_name_a_label_though_gin_hides_what_an_error_holds(self):
    def loss(policy, ref, labels, *, state):
      return labels['stars']

    with gin.unlock_config():
      wrapped = gin.external_configurable(loss, 'loss_of_a_test')
    with pytest.raises(types.UsageError, match="reads the label 'stars', but the data has only margin"):
      tracing.trace(wrapped, group_size=2, labels=('margin',))

  @pytest.mark.parametrize(
      'field,said',
      [
          (lambda policy, ref: policy.kl_BT, 'policy.kl_BT, but policy has .*logps_GK'),
          (lambda policy, ref: ref.values_GK, 'ref.values_GK, but ref has .*logratios_GK'),
          (lambda policy, ref: policy.values_GK, 'policy.values_GK of a head: bind recipe.Recipe.score_outputs = 1'),
      ],
  )
  def test_name_what_a_model_does_not_give(self, field, said):
    loss = lambda policy, ref, labels, *, state: types.LossOut(field(policy, ref), {}, state)
    with pytest.raises(types.UsageError, match=f'the loss reads {said}'):
      tracing.trace(loss, group_size=2, labels=(), outputs=0)

  def test_of_a_prompt_s_value_want_a_head_with_one_output(self):
    loss = lambda policy, ref, labels, *, state: types.LossOut(policy.values_GK, {}, state)
    with pytest.raises(types.UsageError, match='reads policy.values_GK of a head with one output, and this one has 2'):
      tracing.trace(loss, group_size=2, labels=(), outputs=2)

  def test_leave_errors_of_the_loss_itself_as_they_are(self):
    def loss(policy, ref, labels, *, state):
      return {}['own']

    with pytest.raises(KeyError, match='own'):
      tracing.trace(loss, group_size=2, labels=())

  def test_name_the_label_that_the_data_lack(self):
    def loss(policy, ref, labels, *, state):
      return types.LossOut(policy.logps_GK[:, 0] * labels['stars'][:, 0], {}, state)

    with pytest.raises(types.UsageError, match="reads the label 'stars', but the data has only margin"):
      tracing.trace(loss, group_size=2, labels=('margin',))

  @pytest.mark.parametrize('loss,size', [(DPO, 1), (functools.partial(reference_free.tpo, beta=1.0, alpha=1.0), 2)])
  def test_say_that_the_data_have_fewer_responses_than_the_loss_reads(self, loss, size):
    with pytest.raises(types.UsageError, match=f'reads more responses to a prompt than the {size} of the data'):
      tracing.trace(loss, group_size=size, labels=())
    assert jax.eval_shape(lambda x: x[1], jax.ShapeDtypeStruct((1,), jnp.float32)).shape == ()  # as it was

  @pytest.mark.parametrize('label,size', [('score', 2), ('score', 4), ('desirable', 1), ('desirable', 2)])
  def test_are_which_responses_are_better_where_the_data_say_it(self, label, size):
    loss = lambda policy, ref, labels, *, state: types.LossOut(policy.logps_GK[:, 0], {}, state)
    with pytest.raises(types.UsageError, match=f'the data have labels.{label}, by which responses are better, and the'):
      tracing.check_read(tracing.trace(loss, group_size=size, labels=(label,)), (label, 'other'), size)
    tracing.check_read(tracing.trace(loss, group_size=2, labels=('score',)), ('score', 'margin'), 2)  # a pair


class TestKinds:

  @pytest.mark.parametrize(
      'make,loss,said',
      [
          (objectives.reward, DPO, 'reward, which is of scores of responses: it reads policy.logps_GK'),
          (
              objectives.process,
              reward.bradley_terry,
              'process, which is of scores of steps: it reads policy.rewards_GK',
          ),
          (objectives.preference, reward.bradley_terry, 'preference, .*: it reads policy.rewards_GK'),
          (objectives.preference, supervised.cross_entropy, 'preference, .*: it gives a value per token'),
          (objectives.supervised, DPO, 'supervised, which is of tokens of demonstrations: it gives a value per group'),
          (objectives.policy_gradient, DPO, 'policy_gradient, .*: it gives a value per group'),
      ],
  )
  def test_of_loss_and_objective_have_to_agree(self, make, loss, said):
    needs = tracing.trace(loss, group_size=2, labels=('margin',))
    with pytest.raises(types.UsageError, match=f'of another kind than recipe.Recipe.objective = @objectives.{said}'):
      make(model=MODEL, loss_fn=loss, needs=needs)
