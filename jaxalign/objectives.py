"""From a batch to the sum of a loss: forward pass, log-probabilities or scores, the loss, sums and weights.

An objective is made once per run, of a model and a loss, and never reduces to a mean: the step divides one global sum
by one global weight.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
from typing import Any
from typing import NamedTuple

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
  metrics: Mapping[str, masked.Sum]
  loss_state: types.PyTree


class Needs(NamedTuple):
  """What a loss was found to need, by tracing it.

  Attributes:
    fields: that it reads: 'policy.logps_GK', 'ref.logratios_GK', 'labels.margin', ...
    state: its first state, zeros; `()` for most losses.
  """

  fields: frozenset[str] = frozenset()
  state: types.PyTree = ()

  @property
  def reference(self) -> bool:
    """Whether it compares with a reference."""
    return any(field.startswith('ref.') for field in self.fields)

  @property
  def whole_step(self) -> bool:
    """Whether what it makes of a group depends on the others of the step."""
    return 'policy.valid_G' in self.fields or bool(jax.tree.leaves(self.state))


class Objective(NamedTuple):
  """What the step differentiates, in two halves.

  Attributes:
    stats: (params, frozen, batch, key) -> what the model makes of a micro-batch's tokens, arrays `[B, T, ...]` by name.
      `params` is what is trained, `frozen` the rest of the model's weights (`lora.join` puts both together, `{}` is
      none), `key` for randomness in the forward pass.
    loss: (stats, batch, loss_state) -> the summed loss and its `Sums`.
    whole_step: whether `loss` is to see all micro-batches of a step at once.
  """

  stats: Callable[[types.PyTree, types.PyTree, types.Batch, jax.Array], dict[str, jax.Array]]
  loss: Callable[[Mapping[str, jax.Array], types.Batch, types.PyTree], tuple[jax.Array, Sums]]
  whole_step: bool = False

  def of_micro(self, params, frozen, batch, key, loss_state) -> tuple[jax.Array, Sums]:
    """Both halves, of one micro-batch."""
    return self.loss(self.stats(params, frozen, batch, key), batch, loss_state)


def supervised(
    *, model: transformer.Transformer, loss_fn: LossFn, needs: Needs, dense=('entropy', 'correct')
) -> Objective:
  """Objective of losses per token (`losses.supervised`): the weight is the number of counted targets."""

  def loss(stats, batch, loss_state):
    policy = types.Stats(logps_BT=stats['logps'], mask_BT=batch.mask_BT, rows=masked.rows(batch))
    return _per_token(loss_fn(policy, types.Stats(), _labels(batch), state=loss_state), stats, batch)

  return Objective(_stats_fn(model, dense), loss, needs.whole_step)


def preference(
    *, model: transformer.Transformer, loss_fn: LossFn, needs: Needs, dense=('entropy', 'correct', 'mean_logit')
) -> Objective:
  """Objective of losses on the log-probabilities of whole responses (`losses.preference`): the weight counts groups.

  The batch carries `ref_logps_BT` where the loss reads the reference.
  """
  wanted = {*dense, *(name for name, field in _DENSE.items() if field in needs.fields)}

  def loss(stats, batch, loss_state):
    policy = _response_stats(stats['logps'], batch)
    sharpness_GK = masked.totals(stats['sharpness'], batch) if 'sharpness' in stats else None
    policy = dataclasses.replace(
        policy,
        rows=masked.rows(batch),
        valid_GK=masked.valid(batch),
        valid_G=masked.valid_groups(batch),
        sharpness_GK=sharpness_GK,
    )
    ref = types.Stats()
    if batch.ref_logps_BT is not None:
      ratios_GK = masked.totals(stats['logps'] - batch.ref_logps_BT, batch)
      ref = dataclasses.replace(_response_stats(batch.ref_logps_BT, batch), logratios_GK=ratios_GK)
    out = loss_fn(policy, ref, _labels(batch), state=loss_state)
    metrics = _group_metrics(out, batch) | _token_metrics(stats, batch)
    if 'mean_logit' in stats and _is_of_pairs(out, batch):
      metrics |= _per_side(masked.per_response(stats['mean_logit'], batch), policy.tokens_GK, batch, 'logits')
    return _finish(out, metrics | _length_metrics(out, policy.tokens_GK, batch), batch)

  return Objective(_stats_fn(model, tuple(wanted)), loss, needs.whole_step)


# Dense statistics that are computed only for a loss that reads them.
_DENSE = {'sharpness': 'policy.sharpness_GK'}


def reward(*, model: transformer.Transformer, loss_fn: LossFn, needs: Needs) -> Objective:
  """Objective of losses on the scores of whole responses (`losses.reward`): the weight counts groups.

  The data marks one position per response, where the model has just read its last token; the head is read there.
  """

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

  return Objective(_scores_fn(model), loss, needs.whole_step)


def process(*, model: transformer.Transformer, loss_fn: LossFn, needs: Needs) -> Objective:
  """Objective of losses on the scores of steps (`losses.reward.process`): the weight is the number of steps.

  The data marks the position where the model has just read a step's last token; the head is read there.
  """

  def loss(stats, batch, loss_state):
    policy = types.Stats(scores_BTO=stats['scores'], mask_BT=batch.mask_BT)
    return _per_token(loss_fn(policy, types.Stats(), _labels(batch), state=loss_state), {}, batch)

  return Objective(_scores_fn(model), loss, needs.whole_step)


def _stats_fn(model: transformer.Transformer, dense):
  return lambda params, frozen, batch, key: target_stats(
      lora.join(params, frozen), batch, model=model, dense=dense, key=key
  )


def _scores_fn(model: transformer.Transformer):
  return lambda params, frozen, batch, key: {'scores': scores(lora.join(params, frozen), batch, model=model, key=key)}


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
  return _rewards(scores(params, batch, model=model, key=key), batch)


def _rewards(scores_BTO, batch: types.Batch) -> jax.Array:
  if scores_BTO.shape[-1] != 1:
    raise types.UsageError(f'recipe.Recipe.score_outputs = {scores_BTO.shape[-1]}: a reward is one number')
  return masked.totals(scores_BTO[..., 0], batch)


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


def trace(
    loss_fn: LossFn,
    *,
    group_size: int,
    labels: tuple[str, ...],
    token_labels: tuple[str, ...] = (),
    outputs: int = 1,
) -> Needs:
  """What a loss needs, found by tracing it on shapes.

  Args:
    loss_fn: the loss; given no state it begins with zeros of the shapes that it then returns.
    group_size: K, responses per group in the data.
    labels: names of the labels that the data has of responses.
    token_labels: names of those that it has of tokens.
    outputs: of the head that scores.

  Raises:
    UsageError: the loss reads a label or a response that the data lacks.
  """
  found: set[str] = set()
  number = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  index = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  table, tokens = number(2, group_size), number(2, 4)
  of = {'GK': table, 'BT': tokens, 'BTO': number(2, 4, outputs), 'G': number(2)}
  of['GKO'] = number(2, group_size, outputs)
  shapes: dict[str, Any] = {field: of.get(field.rpartition('_')[2]) for field in types.Stats.__dataclass_fields__}
  shapes['rows'] = types.Rows(tokens, index(2, 4), index(2, 2), index(2, 2), 2, group_size)
  given = dict.fromkeys(labels, table) | dict.fromkeys(token_labels, tokens)

  def run(policy, ref, given):
    recorders = (_Recorder(*one, found) for one in (('policy', policy), ('ref', ref), ('labels', given)))
    return loss_fn(*recorders, state=()).state

  try:
    state = jax.eval_shape(run, shapes, shapes, given)
  except KeyError as err:
    raise types.UsageError(
        f'the loss reads the label {err.args[0]!r}, but the data has only {", ".join(given) or "none"}'
    ) from err
  except IndexError as err:
    raise types.UsageError(f'the loss reads more responses to a prompt than the {group_size} of the data') from err
  return Needs(frozenset(found), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state))


def _labels(batch: types.Batch) -> dict[str, jax.Array]:
  return {name: masked.to_table(x_BS, batch) for name, x_BS in batch.labels_BS.items()} | dict(batch.labels_BT)


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


def _per_token(out: types.LossOut, stats, batch: types.Batch) -> tuple[jax.Array, Sums]:
  loss = masked.weighted(out.per_item, batch.mask_BT)
  metrics = {name: masked.weighted(x, batch.mask_BT) for name, x in out.metrics.items()}
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
