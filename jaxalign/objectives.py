"""From a batch to the sum of a loss: forward pass, log-probabilities or scores, the loss, sums and weights.

An objective is made once per run, of a model and a loss, and never reduces to a mean: the step divides one global sum
by one global weight.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import forward
from jaxalign import masked
from jaxalign import tracing
from jaxalign import types
from jaxalign.models import transformer


class Sums(NamedTuple):
  """What an objective returns beside the summed loss: the weight to divide it by, metrics, and the new loss state."""

  weight: types.Array
  metrics: Mapping[str, masked.Sum]
  loss_state: types.PyTree


class Objective(NamedTuple):
  """What the step differentiates, in two halves.

  Attributes:
    stats: (params, frozen, batch, key, ref) -> what the model makes of a micro-batch's tokens, arrays `[B, T, ...]` by
      name. `params` is what is trained, `frozen` the rest of the model's weights (`lora.join` puts both together, `{}`
      is none), `key` for randomness in the forward pass. `ref` is what a live reference has in place of `params`, None
      where none is live.
    loss: (stats, batch, loss_state) -> the summed loss and its `Sums`.
    whole_step: whether `loss` is to see all micro-batches of a step at once.
  """

  stats: forward.StatsFn
  loss: Callable[[Mapping[str, jax.Array], types.Batch, types.PyTree], tuple[jax.Array, Sums]]
  whole_step: bool = False

  def of_micro(self, params, frozen, batch, key, loss_state, ref=None) -> tuple[jax.Array, Sums]:
    """Both halves, of one micro-batch."""
    return self.loss(self.stats(params, frozen, batch, key, ref), batch, loss_state)


def supervised(
    *,
    model: transformer.Transformer,
    loss_fn: tracing.LossFn,
    needs: tracing.Needs,
    ref_model: transformer.Transformer | None = None,
    dense=('entropy', 'correct'),
    rivals: int | None = None,
) -> Objective:
  """Objective of losses per token (`losses.supervised`): the weight is the number of counted targets.

  A rival of a target, where the loss reads one, is drawn from the `rivals` likeliest tokens, 5 where none are bound.
  """
  tracing.check('supervised', needs, of_tokens=True)

  def loss(stats, batch, loss_state):
    policy, ref = _policy(stats, batch), _reference(stats, batch)
    return _per_token(loss_fn(policy, ref, _labels(batch), state=loss_state), stats, batch)

  stats = forward.targets_fn(model, needs, _dense(dense, needs), ref_model, rivals)
  return Objective(stats, loss, needs.whole_step)


def policy_gradient(
    *,
    model: transformer.Transformer,
    loss_fn: tracing.LossFn,
    needs: tracing.Needs,
    ref_model: transformer.Transformer | None = None,
    critic_model: transformer.Transformer | None = None,
    aggregate: str = 'token',
    max_tokens: int | None = None,
    longest: int | None = None,
    temperature: float = 1.0,
    dense=('entropy',),
) -> Objective:
  """Objective of policy-gradient losses (`losses.policy`), averaged over the whole step as `aggregate` says.

    token     sum over all tokens / their number: a long response weighs more. DAPO, CISPO.
    sequence  mean over the tokens of each response, then over responses: a token of a long one weighs less. GRPO, GSPO.
    constant  sum over all tokens / (number of responses * `max_tokens`): each token weighs the same, at every step.
              Dr. GRPO in TRL; verl leaves the number of responses out. `max_tokens` is `longest`, what a run samples
              at most, unless it is bound.

  A response of which no token counts (it was cut off, and masked) counts as one whose loss is 0, as in TRL. Metrics are
  means over tokens that were sampled. Where the batch has no `old_logps`, those of the policy itself serve, for a
  rollout's only update: the ratio is then exactly 1. A loss that reads `scores_BTO` has values of `critic_model`, or of
  the policy's own head. Log-probabilities of policy and reference are those of logits divided by `temperature`, at
  which tokens were sampled.

  Raises:
    UsageError: there is no such `aggregate`, or `max_tokens` is not what it asks for.
  """
  if aggregate not in _AGGREGATES:
    raise types.UsageError(f'objectives.policy_gradient.aggregate = {aggregate!r}: one of {", ".join(_AGGREGATES)}')
  max_tokens = longest if aggregate == 'constant' and max_tokens is None else max_tokens
  if (aggregate == 'constant') != (max_tokens is not None) or (max_tokens is not None and max_tokens < 1):
    wanted = 'bind the most tokens that a response may have' if aggregate == 'constant' else 'it is for constant alone'
    raise types.UsageError(
        f'objectives.policy_gradient.max_tokens = {max_tokens} with aggregate = {aggregate!r}: {wanted}'
    )

  tracing.check('policy_gradient', needs, of_tokens=True, heads=frozenset({'policy.scores_BTO'}))

  def loss(stats, batch, loss_state):
    labels = _sampled(stats, batch)
    out = loss_fn(_policy(stats, batch), _reference(stats, batch), labels, state=loss_state)
    if 'sampler_logps' in labels:
      drift_BT = jnp.abs(labels['old_logps'] - labels['sampler_logps']) * (1 - labels.get('is_text', 0.0))
      out = dataclasses.replace(out, metrics={**out.metrics, 'sampling/sampling_logp_difference/mean': drift_BT})
    sampled = dataclasses.replace(batch, mask_BT=batch.mask_BT * (1 - labels.get('is_text', 0.0)))
    return _per_token(out, stats, sampled, _AGGREGATES[aggregate](out.per_item, batch, max_tokens))

  stats = forward.targets_fn(
      model, needs, _dense(dense, needs), ref_model, critic_model=critic_model, temperature=temperature
  )
  return Objective(stats, loss, needs.whole_step)


def _over_tokens(x_BT, batch: types.Batch, max_tokens) -> masked.Weighted:
  del max_tokens
  return masked.weighted(x_BT, batch.mask_BT)


def _over_responses(x_BT, batch: types.Batch, max_tokens) -> masked.Weighted:
  del max_tokens
  length_BT = masked.to_tokens(masked.totals(jnp.ones_like(x_BT), batch), batch)
  weight_BT = batch.mask_BT / jnp.maximum(length_BT, 1.0)
  return masked.Weighted(masked.weighted(x_BT, weight_BT).sum, jnp.sum(masked.valid(batch)))


def _over_places(x_BT, batch: types.Batch, max_tokens) -> masked.Weighted:
  return masked.Weighted(masked.weighted(x_BT, batch.mask_BT).sum, max_tokens * jnp.sum(masked.valid(batch)))


_AGGREGATES = {'token': _over_tokens, 'sequence': _over_responses, 'constant': _over_places}


def preference(
    *,
    model: transformer.Transformer,
    loss_fn: tracing.LossFn,
    needs: tracing.Needs,
    ref_model: transformer.Transformer | None = None,
    dense=('entropy', 'correct', 'mean_logit'),
    rivals: int | None = None,
    temperature: float = 1.0,
) -> Objective:
  """Objective of losses on the log-probabilities of whole responses (`losses.preference`): the weight counts groups.

  The batch carries `ref_logps_BT` where the loss reads a reference that is not live; for `rivals` see `supervised`,
  for `temperature` `policy_gradient`.
  """
  tracing.check('preference', needs, of_tokens=False)

  def loss(stats, batch, loss_state):
    policy, ref = _policy(stats, batch), _reference(stats, batch)
    out = loss_fn(policy, ref, _sampled(stats, batch), state=loss_state)
    metrics = _group_metrics(out, batch) | _token_metrics(stats, batch)
    if 'mean_logit' in stats and _is_of_pairs(out, batch):
      metrics |= _per_side(masked.per_response(stats['mean_logit'], batch), policy.tokens_GK, batch, 'logits')
    return _finish(out, metrics | _length_metrics(out, policy.tokens_GK, batch), batch)

  stats = forward.targets_fn(model, needs, _dense(dense, needs), ref_model, rivals, temperature=temperature)
  return Objective(stats, loss, needs.whole_step)


def _dense(dense, needs: tracing.Needs) -> tuple[str, ...]:
  """What is asked of every distribution: that for metrics, and what is computed only for a loss that reads it."""
  read = {'policy.sharpness_GK': 'sharpness', 'policy.entropy_BT': 'entropy'}
  return tuple({*dense, *(name for field, name in read.items() if field in needs.fields)})


def reward(*, model: transformer.Transformer, loss_fn: tracing.LossFn, needs: tracing.Needs) -> Objective:
  """Objective of losses on scores of responses (`losses.reward`, `losses.pointwise`): the weight counts groups.

  The data marks one position per response, where the model has just read its last token; the head is read there.
  """
  tracing.check('reward', needs, of_tokens=False, given=tracing.OF_RESPONSES)

  def loss(stats, batch, loss_state):
    # The position of its last token tells how long a response is, as all of a group follow the same prompt.
    length_GK = masked.totals(batch.positions_BT, batch)
    several = 'policy.outputs_GKO' in needs.fields and 'policy.rewards_GK' not in needs.fields
    policy = types.Stats(
        rewards_GK=None if several else _rewards(stats['scores'], batch),
        outputs_GKO=jax.vmap(lambda x_BT: masked.totals(x_BT, batch), -1, -1)(stats['scores']),
        tokens_GK=length_GK,
        valid_GK=masked.valid(batch),
        valid_G=masked.valid_groups(batch),
    )
    out = loss_fn(policy, types.Stats(), _labels(batch), state=loss_state)
    return _finish(out, _group_metrics(out, batch) | _length_metrics(out, length_GK, batch), batch)

  return Objective(forward.scores_fn(model), loss, needs.whole_step)


def process(*, model: transformer.Transformer, loss_fn: tracing.LossFn, needs: tracing.Needs) -> Objective:
  """Objective of losses on the scores of steps or tokens (`losses.pointwise`): the weight is how many there are.

  The data marks where the model has just read the token, or the last one of a step; the head is read there.
  """
  tracing.check('process', needs, of_tokens=True, given=tracing.OF_STEPS)

  def loss(stats, batch, loss_state):
    policy = types.Stats(scores_BTO=stats['scores'], mask_BT=batch.mask_BT)
    return _per_token(loss_fn(policy, types.Stats(), _labels(batch), state=loss_state), {}, batch)

  return Objective(forward.scores_fn(model), loss, needs.whole_step)


def _rewards(scores_BTO, batch: types.Batch) -> jax.Array:
  """Scores `[G, K]` of the responses, float32: the one output of the head where the mask marks their last token."""
  if scores_BTO.shape[-1] != 1:
    raise types.UsageError(f'recipe.Recipe.score_outputs = {scores_BTO.shape[-1]}: a reward is one number')
  return masked.totals(scores_BTO[..., 0], batch)


def _labels(batch: types.Batch) -> dict[str, jax.Array]:
  return {name: masked.to_table(x_BS, batch) for name, x_BS in batch.labels_BS.items()} | dict(batch.labels_BT)


def _sampled(stats, batch: types.Batch) -> dict[str, jax.Array]:
  """Labels, `old_logps` among them: the policy's own where the batch has none, being used for one update alone."""
  return {'old_logps': jax.lax.stop_gradient(stats['logps'])} | _labels(batch)


def _policy(stats, batch: types.Batch) -> types.Stats:
  """What a loss may ask of the policy."""
  return dataclasses.replace(
      _response_stats(stats['logps'], batch),
      rows=masked.rows(batch),
      valid_GK=masked.valid(batch),
      valid_G=masked.valid_groups(batch),
      sharpness_GK=masked.totals(stats['sharpness'], batch) if 'sharpness' in stats else None,
      values_GK=_values(stats.get('scores'), batch),
      scores_BTO=stats.get('scores'),
      entropy_BT=stats.get('entropy'),
      rival_logps_BT=stats.get('rival_logps'),
      critic_logps_BT=stats.get('critic_logps'),
  )


def _reference(stats, batch: types.Batch) -> types.Stats:
  """What a loss may ask of the reference, live or from the batch."""
  logps_BT = stats.get('ref_logps', batch.ref_logps_BT)
  if logps_BT is None:
    return types.Stats()
  return dataclasses.replace(
      _response_stats(logps_BT, batch),
      logratios_GK=masked.totals(stats['logps'] - logps_BT, batch),
      kl_BT=stats.get('ref_kl'),
      entropy_GK=masked.totals(stats['ref_entropy'], batch) if 'ref_entropy' in stats else None,
  )


def _values(scores_BTO, batch: types.Batch) -> jax.Array | None:
  """A head's one output `[G, K]` where it has read the prompt of a response and nothing of that yet."""
  if scores_BTO is None or scores_BTO.shape[-1] != 1:
    return None
  first_BT = (masked.order(masked.rows(batch)) == 0).astype(jnp.float32)
  return masked.totals(scores_BTO[..., 0] * first_BT, batch)


def _response_stats(logps_BT, batch: types.Batch) -> types.Stats:
  return types.Stats(
      logps_BT=logps_BT,
      mask_BT=batch.mask_BT,
      logps_GK=masked.totals(logps_BT, batch),
      tokens_GK=masked.totals(jnp.ones_like(logps_BT), batch),
  )


def _token_metrics(stats, batch: types.Batch) -> dict[str, masked.Weighted]:
  names = {'entropy': 'entropy', 'correct': 'mean_token_accuracy'}
  return {name: masked.weighted(stats[key], batch.mask_BT) for key, name in names.items() if key in stats}


def _per_token(out: types.LossOut, stats, batch: types.Batch, loss=None) -> tuple[jax.Array, Sums]:
  """The sums of a loss per token; `loss` is its own sum, where that is another than over the tokens that count."""
  loss = masked.weighted(out.per_item, batch.mask_BT) if loss is None else loss
  weigh = lambda x: masked.Weighted(*map(jnp.sum, x)) if isinstance(x, tuple) else masked.weighted(x, batch.mask_BT)
  metrics = {name: weigh(x) for name, x in out.metrics.items()}
  return loss.sum, Sums(loss.weight, {'loss': loss, **metrics, **_token_metrics(stats, batch)}, out.state)


def _group_metrics(out: types.LossOut, batch: types.Batch) -> dict[str, masked.Sum]:
  valid_G, valid_GK = masked.valid_groups(batch), masked.valid(batch)

  def weigh(x):
    if isinstance(x, tuple):
      there = lambda part: valid_G.reshape(-1, *[1] * (part.ndim - 1)) > 0
      return type(x)(*(jnp.sum(jnp.where(there(part), part, 0.0), axis=0) for part in x))
    return masked.weighted(x, valid_G if x.ndim == 1 else valid_GK)

  return {'loss': weigh(out.per_item)} | {name: weigh(x) for name, x in out.metrics.items()}


def _per_side(total_BS, tokens_GK, batch: types.Batch, name: str) -> dict[str, masked.Weighted]:
  """Mean over response tokens of a dense statistic, for chosen and rejected apart."""
  total_GK = masked.to_table(total_BS, batch)
  sides = ('chosen', 'rejected') if batch.group_size == 2 else ()
  return {
      f'{name}/{side}': masked.Weighted(jnp.sum(total_GK[:, k]), jnp.sum(tokens_GK[:, k]))
      for k, side in enumerate(sides)
  }


def _is_of_pairs(out: types.LossOut, batch: types.Batch) -> bool:
  """Whether a group is a chosen response and a rejected one: two responses may be something else."""
  return batch.group_size == 2 and bool({'rewards/margins', 'margin'} & set(out.metrics))


def _length_metrics(out: types.LossOut, length_GK, batch: types.Batch) -> dict[str, masked.Weighted]:
  """What a judge of length alone would score (ties counting half), and the accuracy where it is right and wrong."""
  if not _is_of_pairs(out, batch):
    return {}
  valid_G, longer_G = masked.valid_groups(batch), length_GK[:, 0] - length_GK[:, 1]
  metrics = {'length_only/accuracies': masked.weighted(0.5 * (1 + jnp.sign(longer_G)), valid_G)}
  for name in ('rewards/accuracies', 'accuracy'):
    if name in out.metrics:
      metrics['accuracy/chosen_longer'] = masked.weighted(out.metrics[name], valid_G * (longer_G > 0))
      metrics['accuracy/chosen_shorter'] = masked.weighted(out.metrics[name], valid_G * (longer_G < 0))
  return metrics


def _finish(out: types.LossOut, metrics, batch: types.Batch) -> tuple[jax.Array, Sums]:
  loss = masked.weighted(out.per_item, masked.valid_groups(batch))
  return loss.sum, Sums(loss.weight, metrics, out.state)
