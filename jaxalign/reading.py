"""What a model that was loaded makes of responses: scores of its head, log-probabilities, or log-ratios."""

from collections.abc import Callable
import functools
from typing import NamedTuple

import jax
import numpy as np

from jaxalign import checkpoint
from jaxalign import forward
from jaxalign import recipe as recipe_lib
from jaxalign import sharding
from jaxalign import types
from jaxalign.data import scored
from jaxalign.rewards import modelled

NEITHER = 'it has no head that scores (train one with --algo=rm) and no reference'


class Reading(NamedTuple):
  """How responses are scored.

  Attributes:
    params: what `outputs` takes.
    outputs: (params, micro-batch) -> `[B, T, O]`, of which those are added up that the examples mark in a sequence.
    example_fn: makes examples of records.
    combine_fn: see `recipe.Recipe`.
  """

  params: types.PyTree
  outputs: Callable[[types.PyTree, types.Batch], jax.Array]
  example_fn: Callable
  combine_fn: Callable[[list[np.ndarray]], list[np.ndarray]] | None = None

  def run(self, mesh: jax.sharding.Mesh) -> Callable[[types.PyTree, types.Batch], jax.Array]:
    """The same of all micro-batches of a step, `[A, B, T, O]`, compiled; on every process."""
    scores = lambda params, batch: jax.lax.map(functools.partial(self.outputs, params), batch)
    return jax.jit(scores, out_shardings=sharding.named(mesh))


def of(
    spec: str,
    loaded: checkpoint.Loaded,
    mesh: jax.sharding.Mesh,
    *,
    per: str = 'response',
    own: modelled.Scoring | None = None,
) -> Reading:
  """How a model that was loaded scores responses, see `score.score`.

  Args:
    spec: where it is.
    loaded: the model.
    mesh: where it lies.
    per: what has a score, see `data.scored.responses`.
    own: of its recipe.

  Raises:
    UsageError: the model has neither a head that scores nor a reference, or does not score what `per` says.
    RunError: the reference cannot be read.
  """
  if own is not None and per != 'response':
    raise types.UsageError(f'--per={per}: {spec} judges whole responses (by its recipe.Recipe.scored_fn)')
  scored_fn, combine_fn = own or (None, None)
  if loaded.model.config.score_outputs and not loaded.run.get('writes'):
    head = functools.partial(forward.scores, model=loaded.model)
    return Reading(loaded.params, head, scored_fn or functools.partial(scored.responses, per=per), combine_fn)
  if scored_fn is not None and combine_fn is not None:
    logps = functools.partial(_logps, loaded.model)
    return Reading(loaded.params, lambda params, batch: logps(params, batch)[..., None], scored_fn, combine_fn)
  path = recipe_lib.model_directory(spec)
  if not checkpoint.is_checkpoint(path) or not loaded.run.get('base'):
    raise types.UsageError(f'{spec}: {NEITHER}')
  if per == 'step':
    raise types.UsageError(f'--per=step: {spec} has no head that scores; its implicit rewards are of tokens')
  ref = checkpoint.load_reference(path, loaded)

  def ratios(params, batch):
    """The log-ratio to the reference of the model's run, of each token that counts."""
    policy, base = params
    return (_logps(loaded.model, policy, batch) - _logps(ref.model, base, batch))[..., None]

  return Reading((loaded.params, ref.params), ratios, scored_fn or scored.plain)


def _logps(model, params, batch) -> jax.Array:
  return forward.target_stats(params, batch, model=model)['logps']
