"""What models make of a batch's tokens: log-probabilities of targets, scores, and what only a live reference gives."""

from collections.abc import Callable
import math

import jax

from jaxalign import divergence
from jaxalign import logps
from jaxalign import tracing
from jaxalign import types
from jaxalign.models import lora
from jaxalign.models import transformer

# (params, frozen, batch, key, ref) -> arrays [B, T, ...] by name
StatsFn = Callable[..., dict[str, jax.Array]]

CRITIC = 'critic'  # among the trained parameters: those of a critic that shares none with the policy
_AMONG = 5  # tokens that a rival is drawn from


def hidden_states(
    params, batch: types.Batch, *, model: transformer.Transformer, key=None, replays: bool = True
) -> types.Array:
  """What the model makes of a micro-batch, `[B, T, D]`.

  Args:
    params: of the model.
    batch: the micro-batch.
    model: what reads it.
    key: for its dropout.
    replays: whether tokens take the experts that the batch names, which are the policy's.
  """
  rngs = {} if key is None else {'dropout': key}
  tokens = batch.inputs_BT, batch.positions_BT, batch.segments_BT
  experts_BTLk = batch.experts_BTLk if replays else None
  return model.apply({'params': params}, *tokens, branches_BT=batch.branches_BT, experts_BTLk=experts_BTLk, rngs=rngs)


def target_stats(
    params,
    batch: types.Batch,
    *,
    model: transformer.Transformer,
    dense=(),
    key=None,
    temperature: float = 1.0,
    replays: bool = True,
) -> dict[str, jax.Array]:
  """Log-probabilities `logps` and dense statistics of the targets, `[B, T]` float32 (see `logps.token_stats`)."""
  hidden_BTD = hidden_states(params, batch, model=model, key=key, replays=replays)
  return _of_targets(hidden_BTD, params, batch, batch.targets_BT, model, dense, temperature)


def _of_targets(
    hidden_BTD, params, batch: types.Batch, targets_BT, model: transformer.Transformer, dense=(), temperature=1.0
):
  return logps.token_stats(
      hidden_BTD,
      transformer.output_matrix(params),
      targets_BT,
      batch.mask_BT,
      vocab_size=model.config.vocab_size,
      chunk=model.chunk,
      dense=tuple(dense),
      softcap=model.config.final_softcap,
      temperature=temperature,
      kept_bytes=model.kept_logits << 20,
  )


def _critic_logps(params, batch: types.Batch, *, model: transformer.Transformer, policy, temperature: float):
  """Those of a critic without a head, whose tokens take the policy's experts where it is of the policy's shape."""
  replays = model.config == policy.config
  return target_stats(params, batch, model=model, temperature=temperature, replays=replays)['logps']


def ref_logps(params, batch: types.Batch, *, model: transformer.Transformer) -> jax.Array:
  """Log-probabilities `[A, B, T]` of a whole step's targets under the reference, a micro-batch at a time."""
  return jax.lax.map(lambda micro: target_stats(params, micro, model=model)['logps'], batch)


def scores(params, batch: types.Batch, *, model: transformer.Transformer, key=None) -> jax.Array:
  """What the head that scores makes of every token that was read, `[B, T, outputs]` float32.

  Its model has routers of its own: what the policy's chose is nothing to it.
  """
  return transformer.scores(params, hidden_states(params, batch, model=model, key=key, replays=False))


def divided(params: types.PyTree) -> tuple[types.PyTree, types.PyTree | None]:
  """What is trained of the policy, and of a critic that has parameters of its own, None where there is none."""
  if CRITIC not in params:
    return params, None
  return {name: value for name, value in params.items() if name != CRITIC}, params[CRITIC]


def annotations(
    params: types.PyTree,
    critic: types.PyTree | None,
    ref: types.PyTree | None,
    batch: types.Batch,
    *,
    model: transformer.Transformer,
    critic_model: transformer.Transformer | None,
    ref_model: transformer.Transformer | None,
    temperature: float = 1.0,
) -> dict[str, jax.Array]:
  """What the training program makes of a whole step's targets, `[A, B, T]` by name, a micro-batch at a time.

  Args:
    params: of the policy.
    critic: of a critic with parameters of its own.
    ref: of the reference.
    batch: what was sampled.
    model: of the policy; a head that it has gives values.
    critic_model: of `critic`, None where there is none.
    ref_model: of `ref`, None where none is wanted.
    temperature: that divides the logits of policy and reference.

  Returns:
    `logps`, `ref_logps` where there is a reference, and where there is a critic `values_0`, `values_1`, ... of its
    outputs, `critic_logps` of one without a head.
  """
  by_output = lambda scores_BTO: {f'values_{i}': scores_BTO[..., i] for i in range(scores_BTO.shape[-1])}

  def one(micro):
    hidden_BTD = hidden_states(params, micro, model=model)
    found = _of_targets(hidden_BTD, params, micro, micro.targets_BT, model, temperature=temperature)
    if ref_model is not None:
      found['ref_logps'] = target_stats(ref, micro, model=ref_model, temperature=temperature)['logps']
    if critic_model is not None and not critic_model.config.score_outputs:
      found['critic_logps'] = _critic_logps(critic, micro, model=critic_model, policy=model, temperature=temperature)
    elif critic_model is not None:
      found |= by_output(scores(critic, micro, model=critic_model))
    elif model.config.score_outputs:
      found |= by_output(transformer.scores(params, hidden_BTD))
    return found

  return jax.lax.map(one, batch)


def scores_fn(model: transformer.Transformer) -> StatsFn:
  """Builds the first half of an objective on scores: `scores`, see above."""

  def stats(params, frozen, batch, key, ref=None):
    del ref
    return {'scores': scores(lora.join(params, frozen), batch, model=model, key=key)}

  return stats


def targets_fn(
    model: transformer.Transformer,
    needs: tracing.Needs,
    dense: tuple[str, ...],
    ref_model: transformer.Transformer | None,
    rivals: int | None = None,
    critic_model: transformer.Transformer | None = None,
    temperature: float = 1.0,
) -> StatsFn:
  """Builds the first half of an objective on log-probabilities.

  Args:
    model: of the policy.
    needs: what the loss reads, beyond which nothing is computed.
    dense: further statistics of the policy, see `logps.token_stats`.
    ref_model: of a live reference, whose own parameters are then given as `ref`; None where there is none.
    rivals: how many of the likeliest tokens a rival is drawn from; None for the 5 of the papers on CRINGE.
    critic_model: of a critic whose parameters are its own, see `divided`; None where the policy's head gives values.
    temperature: that divides the logits of policy and reference.

  Returns:
    (params, frozen, batch, key, ref) -> `logps` and each of `dense`; where the loss reads them `scores` of the head,
    `critic_logps`, `rival_logps` and, of the reference, `ref_logps`, `ref_entropy` and `ref_kl`.

  Raises:
    UsageError: `rivals` are given to a loss that reads none, or are more than there are.
  """
  reads = needs.fields.__contains__
  if rivals is not None and not reads('policy.rival_logps_BT'):
    raise types.UsageError(f'rivals = {rivals}: bound, but the loss reads no rivals; leave it out')
  among = _AMONG if rivals is None else rivals
  if reads('policy.rival_logps_BT') and not 1 <= among < model.config.vocab_size:
    raise types.UsageError(f'rivals = {among}: the model has {model.config.vocab_size} tokens, of which one is right')

  def of_critic(fn, critic, frozen, batch, **options):
    assert critic_model is not None
    return fn(lora.join(critic, frozen), batch, model=critic_model, **options)

  def stats(params, frozen, batch, key, ref=None):
    params, critic = divided(params)
    policy = lora.join(params, frozen)
    hidden_BTD = hidden_states(policy, batch, model=model, key=key)
    found = _of_targets(hidden_BTD, policy, batch, batch.targets_BT, model, dense, temperature)
    if reads('policy.values_GK') or reads('policy.scores_BTO'):
      own = critic is None
      found['scores'] = transformer.scores(policy, hidden_BTD) if own else of_critic(scores, critic, frozen, batch)
    if reads('policy.critic_logps_BT'):
      how = {'policy': model, 'temperature': temperature}
      found['critic_logps'] = of_critic(_critic_logps, critic, frozen, batch, **how)
    if reads('policy.rival_logps_BT'):
      rivals_BT = _rivals(hidden_BTD, policy, batch, model, key, among)
      found['rival_logps'] = _of_targets(hidden_BTD, policy, batch, rivals_BT, model)['logps']
    if ref_model is not None:
      found |= _of_reference(hidden_BTD, policy, lora.join(ref, frozen), batch, ref_model, reads, temperature)
    return found

  return stats


def _rivals(hidden_BTD, params, batch: types.Batch, model: transformer.Transformer, key, among: int):
  return divergence.rivals(
      hidden_BTD,
      transformer.output_matrix(params),
      batch.targets_BT,
      jax.random.uniform(jax.random.fold_in(key, 1), batch.targets_BT.shape),
      batch.mask_BT,
      vocab_size=model.config.vocab_size,
      chunk=model.chunk,
      among=among,
      softcap=model.config.final_softcap,
  )


def _of_reference(
    hidden_BTD, policy, params, batch: types.Batch, model: transformer.Transformer, reads, temperature: float
):
  ref_hidden_BTD = hidden_states(params, batch, model=model)
  dense = ('entropy',) if reads('ref.entropy_GK') else ()
  found = _of_targets(ref_hidden_BTD, params, batch, batch.targets_BT, model, dense, temperature)
  found = {f'ref_{name}': x_BT for name, x_BT in found.items()}
  if 'ref_entropy' in found:
    found['ref_entropy'] /= math.log(model.config.vocab_size)
  if reads('ref.kl_BT'):
    heads = transformer.output_matrix(policy), transformer.output_matrix(params)
    found['ref_kl'] = divergence.kl(
        hidden_BTD,
        heads[0],
        ref_hidden_BTD,
        heads[1],
        batch.mask_BT,
        vocab_size=model.config.vocab_size,
        chunk=model.chunk,
        softcap=model.config.final_softcap,
        temperature=temperature,
    )
  return found
