"""What loss and advantages of a recipe read, and the objective that gives the loss what it reads."""

import inspect
from typing import Any

from absl import logging

from jaxalign import objectives
from jaxalign import recipe as recipe_lib
from jaxalign import step
from jaxalign import tracing
from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import transformer
from jaxalign.rewards import functions
from jaxalign.rl import credit as credit_lib
from jaxalign.rl import rollouts as rollouts_lib

# What losses read of a critic: of one with a head, and of one that writes.
_VALUES = frozenset({'policy.scores_BTO', 'policy.values_GK'})
_CRITIC_LOGPS = frozenset({'policy.critic_logps_BT'})


def labels_of(recipe: recipe_lib.Recipe, options: rollouts_lib.Options) -> tuple[tuple[str, ...], tuple[str, ...]]:
  """Names of the labels of responses, and of tokens, that advantages make."""
  return options.credit.names(options.samples, _rewards(options), recipe.value_outputs)


def _rewards(options: rollouts_lib.Options) -> int:
  return len(options.rewards) + bool(options.environment)


def of_rollouts(recipe: recipe_lib.Recipe, options: rollouts_lib.Options) -> tracing.Needs:
  """What the loss reads; raises UsageError where it and advantages read what there is not, or not what there is."""
  outputs, valued = recipe.value_outputs, sorted(options.credit.reads & {'values_BT', 'values_BTO'})
  if valued and not outputs:
    problem = 'of a critic: bind recipe.Recipe.critic, or recipe.Recipe.score_outputs = 1 for a head'
    raise types.UsageError(f'rollouts.Options.advantage_fn reads {valued[0]} {problem}')
  if 'values_BT' in valued and outputs > 1:
    problem = (
        f'reads values_BT of a critic with one output, and this one has {outputs}; values_BTO are those of several'
    )
    raise types.UsageError(f'rollouts.Options.advantage_fn {problem}')
  of_responses, of_tokens = labels_of(recipe, options)
  if options.samples == 1 and options.credit.compares(_rewards(options), outputs):
    problem = 'rollouts.Options.advantage_fn compares the responses to a prompt, and of one makes 0; it takes 2 or more'
    raise types.UsageError(f'rollouts.Options.samples = 1: {problem}')
  needs = tracing.trace(
      recipe.loss_fn,
      group_size=options.samples,
      labels=of_responses,
      token_labels=(*of_tokens, 'sampler_logps', 'old_logps', *(['is_text'] if options.texts else [])),
      outputs=outputs,
  )
  values = needs.fields & _VALUES or valued
  writes = needs.fields & _CRITIC_LOGPS or 'critic_ratio_BT' in options.credit.reads
  if writes and not recipe.critic_writes:
    problem = "read a critic that writes; bind recipe.Recipe.critic = 'policy' and recipe.Recipe.critic_writes = True"
    raise types.UsageError(f'loss or advantages {problem}')
  if recipe.critic and not (writes if recipe.critic_writes else values):
    what = 'log-probabilities' if recipe.critic_writes else 'values'
    raise types.UsageError(f'recipe.Recipe.critic = {recipe.critic!r}: neither loss nor advantages read its {what}')
  if options.updates > 1 and 'labels.advantages' in needs.fields and 'labels.old_logps' not in needs.fields:
    problem = 'the loss has no ratio to the policy that sampled, which the first update changes; bind 1, or policy.ppo'
    raise types.UsageError(f'rollouts.Options.epochs x minibatches = {options.updates}: {problem}')
  if options.max_kl is not None and step.DRIFT not in needs.metrics:
    problem = f'the loss has no metric {step.DRIFT}; choose one with a ratio'
    raise types.UsageError(f'rollouts.Options.max_kl = {options.max_kl}: {problem}')
  if 'token_rewards_BT' in options.credit.reads and not any(map(functions.is_model, options.rewards)):
    problem = 'reads rewards of tokens, which models give: give --reward=DIR, a run of dpo or of prm'
    raise types.UsageError(f'rollouts.Options.advantage_fn {problem}')
  if recipe.sync is not None and not (needs.reference or options.credit.reads & credit_lib.OF_REFERENCE):
    raise types.UsageError('recipe.Recipe.sync: neither loss nor advantages compare with a reference; leave it out')
  if options.asynchronous and 'labels.sampler_logps' not in needs.fields:
    wanted = 'policy.regularised with policy_parts.truncated_importance weighs it'
    logging.warning('the loss does not know that an asynchronous rollout is of an earlier policy; %s', wanted)
  if options.texts and 'labels.is_text' not in needs.fields:
    problem = 'the loss reads no texts; put actor_critic.with_pretraining around it'
    raise types.UsageError(f'rollouts.Options.texts = {options.texts}: {problem}')
  return needs


def flops_per_token(
    needs: tracing.Needs,
    model: transformer.Transformer,
    critic_model: transformer.Transformer | None,
    length: int,
    *,
    live: bool,
) -> float:
  """FLOPs of a step on a token of rows of `length`, of policy, critic and `live` reference, by what the loss reads.

  See `architecture.flops_per_token`.
  """
  frozen, live = model.lora is not None, live and needs.reference
  flops = architecture.flops_per_token(model.config, length, frozen=frozen, live=live, head=needs.writes)
  if critic_model is not None and needs.fields & (_VALUES | _CRITIC_LOGPS):
    of = {'frozen': critic_model.lora is not None, 'head': not critic_model.config.score_outputs}
    flops += architecture.flops_per_token(critic_model.config, length, **of)
  return flops


def bind(
    recipe: recipe_lib.Recipe,
    model: transformer.Transformer,
    needs: tracing.Needs,
    ref_model: transformer.Transformer | None = None,
    critic_model: transformer.Transformer | None = None,
) -> objectives.Objective:
  """The recipe's objective for `model`, as the step takes it.

  Args:
    recipe: the algorithm.
    model: of the policy.
    needs: of the loss.
    ref_model: of a live reference, None where there is none.
    critic_model: of a critic with parameters of its own, None where there is none.

  Raises:
    UsageError: the loss reads a reference, but the objective takes no `ref_model`; or the objective refuses more.
  """
  if needs.reference and 'ref_model' not in inspect.signature(recipe.objective).parameters:
    fields = ', '.join(sorted(name for name in needs.fields if name.startswith('ref.')))
    problem = 'but the objective is of scores, which have no reference; bind objectives.preference or supervised'
    raise types.UsageError(f'the loss reads {fields}, {problem}')
  others = {'ref_model': ref_model if needs.reference else None, 'critic_model': critic_model}
  given: dict[str, Any] = {name: other for name, other in others.items() if other is not None}
  if recipe.rollouts is not None and 'longest' in inspect.signature(recipe.objective).parameters:
    given['longest'] = recipe.rollouts.most_sampled
  if recipe.rollouts is not None and recipe.rollouts.temperature != 1:
    given['temperature'] = recipe.rollouts.temperature
  return recipe.objective(model=model, loss_fn=recipe.loss_fn, needs=needs, **given)
