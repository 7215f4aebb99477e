"""From a batch to the sum of a loss: forward pass, log-probabilities or scores, the loss, sums and weights.

An objective has the contract of `Objective`. It is built once per run with `functools.partial(objective, model=model)`
and never reduces to a mean: the step divides one global sum by one global weight.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
from typing import NamedTuple
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxalign import logps
from jaxalign import masked
from jaxalign import types
from jaxalign.models import lora
from jaxalign.models import transformer

# (policy, ref, labels, *, state) -> LossOut
LossFn = Callable[..., types.LossOut]


class Sums(NamedTuple):
  """What an objective returns beside the summed loss: the weight to divide it by, metrics, and the new loss state."""

  weight: types.Array
  metrics: Mapping[str, masked.Weighted]
  loss_state: types.PyTree


class Objective(Protocol):
  """What the step differentiates."""

  def __call__(
      self, params: types.PyTree, frozen: types.PyTree, batch: types.Batch, key: jax.Array, loss_state: types.PyTree
  ) -> tuple[jax.Array, Sums]:
    """Sums the loss of a micro-batch.

    Args:
      params: what is trained.
      frozen: the rest of the model's weights, which get no gradient: `lora.join` puts both together; `{}` for none.
      batch: one micro-batch.
      key: for randomness in the forward pass.
      loss_state: of the loss.
    """


def supervised(params, frozen, batch, key, loss_state, *, model, loss_fn: LossFn, dense=('entropy', 'correct')):
  """Objective of losses per token (`losses.supervised`): the weight is the number of counted targets."""
  stats = target_stats(lora.join(params, frozen), batch, model=model, dense=dense, key=key)
  out = loss_fn(
      types.Stats(logps_BT=stats['logps'], mask_BT=batch.mask_BT), types.Stats(), _labels(batch), state=loss_state
  )
  loss = masked.weighted(out.per_item, batch.mask_BT)
  metrics = {name: masked.weighted(x, batch.mask_BT) for name, x in out.metrics.items()}
  return loss.sum, Sums(loss.weight, {'loss': loss, **metrics, **_token_metrics(stats, batch)}, out.state)


def preference(
    params, frozen, batch, key, loss_state, *, model, loss_fn: LossFn, dense=('entropy', 'correct', 'mean_logit')
):
  """Objective of losses on the log-probabilities of whole responses (`losses.preference`): the weight counts groups.

  The batch carries `ref_logps_BT` where the loss reads the reference.
  """
  stats = target_stats(lora.join(params, frozen), batch, model=model, dense=dense, key=key)
  policy = _response_stats(stats['logps'], batch)
  ref = types.Stats()
  if batch.ref_logps_BT is not None:
    ratios_GK = masked.to_table(masked.per_response(stats['logps'] - batch.ref_logps_BT, batch), batch)
    ref = dataclasses.replace(_response_stats(batch.ref_logps_BT, batch), logratios_GK=ratios_GK)
  out = loss_fn(policy, ref, _labels(batch), state=loss_state)
  metrics = _group_metrics(out, batch) | _token_metrics(stats, batch)
  if 'mean_logit' in stats:
    metrics |= _per_side(masked.per_response(stats['mean_logit'], batch), policy.tokens_GK, batch, 'logits')
  longer = policy.tokens_GK[:, :1] - policy.tokens_GK
  metrics |= _length_metrics(longer, batch)
  return _finish(out, metrics, batch)


def reward(params, frozen, batch, key, loss_state, *, model, loss_fn: LossFn):
  """Objective of losses on the scores of whole responses (`losses.reward`): the weight counts groups.

  The data marks one position per response, where the model has just read its last token; the head is read there.
  """
  policy = types.Stats(rewards_GK=rewards(lora.join(params, frozen), batch, model=model, key=key))
  out = loss_fn(policy, types.Stats(), _labels(batch), state=loss_state)
  metrics = _group_metrics(out, batch)
  # The position of its last token tells how long a response is, as both follow the same prompt.
  length_GK = masked.to_table(masked.per_response(batch.positions_BT, batch), batch)
  return _finish(out, metrics | _length_metrics(length_GK[:, :1] - length_GK, batch), batch)


def process(params, frozen, batch, key, loss_state, *, model, loss_fn: LossFn):
  """Objective of losses on the scores of steps (`losses.reward.process`): the weight is the number of steps.

  The data marks the position where the model has just read a step's last token; the head is read there.
  """
  scores_BTO = scores(lora.join(params, frozen), batch, model=model, key=key)
  policy = types.Stats(scores_BTO=scores_BTO, mask_BT=batch.mask_BT)
  out = loss_fn(policy, types.Stats(), _labels(batch), state=loss_state)
  loss = masked.weighted(out.per_item, batch.mask_BT)
  metrics = {name: masked.weighted(x, batch.mask_BT) for name, x in out.metrics.items()}
  return loss.sum, Sums(loss.weight, {'loss': loss, **metrics}, out.state)


def hidden_states(params, batch: types.Batch, *, model: transformer.Transformer, key=None) -> types.Array:
  """What the model makes of a micro-batch, `[B, T, D]`; `key` is for its dropout."""
  rngs = {} if key is None else {'dropout': key}
  return model.apply({'params': params}, batch.inputs_BT, batch.positions_BT, batch.segments_BT, rngs=rngs)


def target_stats(
    params, batch: types.Batch, *, model: transformer.Transformer, dense=(), key=None
) -> dict[str, jax.Array]:
  """Log-probabilities `logps` and dense statistics of the targets, `[B, T]` float32 (see `logps.token_stats`)."""
  return logps.token_stats(
      hidden_states(params, batch, model=model, key=key),
      transformer.output_matrix(params),
      batch.targets_BT,
      batch.mask_BT,
      vocab_size=model.config.vocab_size,
      dense=tuple(dense),
      softcap=model.config.final_softcap,
  )


def rewards(params, batch: types.Batch, *, model: transformer.Transformer, key=None) -> jax.Array:
  """Scores `[G, K]` of the responses, float32: the one output of the head where the mask marks their last token.

  Raises:
    UsageError: the head has several outputs.
  """
  if model.config.score_outputs != 1:
    raise types.UsageError(f'recipe.Recipe.score_outputs = {model.config.score_outputs}: a reward is one number')
  scores_BT1 = scores(params, batch, model=model, key=key)
  return masked.to_table(masked.per_response(scores_BT1[..., 0], batch), batch)


def scores(params, batch: types.Batch, *, model: transformer.Transformer, key=None) -> jax.Array:
  """What the head that scores makes of every token that was read, `[B, T, outputs]` float32."""
  return transformer.scores(params, hidden_states(params, batch, model=model, key=key))


def ref_logps(params, batch: types.Batch, *, model: transformer.Transformer) -> jax.Array:
  """Log-probabilities `[A, B, T]` of a whole step's targets under the reference, a micro-batch at a time."""
  return jax.lax.map(lambda micro: target_stats(params, micro, model=model)['logps'], batch)


class _Recorder:
  """Stands for an argument of a loss and writes down which of its fields are read."""

  def __init__(self, name: str, fields: Mapping[str, types.Array], needs: set[str]):
    self._name, self._fields, self._needs = name, fields, needs

  def __getattr__(self, field: str):
    if field not in self._fields:
      raise AttributeError(f'{self._name} has no field {field!r}; there are {", ".join(self._fields)}')
    return self[field]

  def __getitem__(self, field: str):
    self._needs.add(f'{self._name}.{field}')
    return self._fields[field]


def needs(
    loss_fn: LossFn,
    *,
    group_size: int,
    labels: tuple[str, ...],
    token_labels: tuple[str, ...] = (),
    outputs: int = 1,
) -> set[str]:
  """The fields that a loss reads, found by tracing it: 'policy.logps_GK', 'ref.logratios_GK', 'labels.margin', ...

  Args:
    loss_fn: the loss.
    group_size: K, responses per group in the data.
    labels: names of the labels that the data has of responses.
    token_labels: names of those that it has of tokens.
    outputs: of the head that scores.

  Raises:
    UsageError: the loss reads a label that the data lacks.
  """
  found: set[str] = set()
  table = jax.ShapeDtypeStruct((2, group_size), jnp.float32)
  tokens = jax.ShapeDtypeStruct((2, 4), jnp.float32)
  of = {'GK': table, 'BT': tokens, 'BTO': jax.ShapeDtypeStruct((2, 4, outputs), jnp.float32)}
  shapes = {field: of[field.rpartition('_')[2]] for field in types.Stats.__dataclass_fields__}
  given = dict.fromkeys(labels, table) | dict.fromkeys(token_labels, tokens)

  def run(policy, ref, given):
    return loss_fn(
        _Recorder('policy', policy, found), _Recorder('ref', ref, found), _Recorder('labels', given, found), state=()
    )

  try:
    jax.eval_shape(run, shapes, shapes, given)
  except KeyError as err:
    raise types.UsageError(
        f'the loss reads the label {err}, but the data has only {", ".join(given) or "none"}'
    ) from err
  return found


def _labels(batch: types.Batch) -> dict[str, jax.Array]:
  return {name: masked.to_table(x_BS, batch) for name, x_BS in batch.labels_BS.items()} | dict(batch.labels_BT)


def _response_stats(logps_BT, batch: types.Batch) -> types.Stats:
  return types.Stats(
      logps_BT=logps_BT,
      mask_BT=batch.mask_BT,
      logps_GK=masked.to_table(masked.per_response(logps_BT, batch), batch),
      tokens_GK=masked.to_table(masked.per_response(jnp.ones_like(logps_BT), batch), batch),
  )


def _token_metrics(stats, batch: types.Batch) -> dict[str, masked.Weighted]:
  names = {'entropy': 'entropy', 'correct': 'mean_token_accuracy'}
  return {name: masked.weighted(stats[key], batch.mask_BT) for key, name in names.items() if key in stats}


def _group_metrics(out: types.LossOut, batch: types.Batch) -> dict[str, masked.Weighted]:
  valid_G = masked.valid_groups(batch)
  weigh = lambda x: masked.weighted(x, valid_G if x.ndim == 1 else valid_G[:, None])
  return {'loss': weigh(out.per_item)} | {name: weigh(x) for name, x in out.metrics.items()}


def _per_side(total_BS, tokens_GK, batch: types.Batch, name: str) -> dict[str, masked.Weighted]:
  """Mean over response tokens of a dense statistic, for chosen and rejected apart."""
  total_GK = masked.to_table(total_BS, batch)
  sides = ('chosen', 'rejected') if batch.group_size == 2 else ()
  return {
      f'{name}/{side}': masked.Weighted(jnp.sum(total_GK[:, k]), jnp.sum(tokens_GK[:, k]))
      for k, side in enumerate(sides)
  }


def _length_metrics(longer_GK, batch: types.Batch) -> dict[str, masked.Weighted]:
  """How often the chosen response is the longer one, ties counting half: what a judge of length alone would score."""
  if batch.group_size != 2:
    return {}
  right_G = 0.5 * (1 + jnp.sign(longer_GK[:, 1]))
  return {'length_only/accuracies': masked.weighted(right_G, masked.valid_groups(batch))}


def _finish(out: types.LossOut, metrics, batch: types.Batch) -> tuple[jax.Array, Sums]:
  loss = masked.weighted(out.per_item, masked.valid_groups(batch))
  return loss.sum, Sums(loss.weight, metrics, out.state)
