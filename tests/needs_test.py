"""What loss and advantages of a recipe read, and what is refused before anything is loaded."""

import dataclasses
import functools
import types as pytypes

import pytest

from jaxalign import needs as needs_lib
from jaxalign import objectives
from jaxalign import sharding
from jaxalign import tracing
from jaxalign import types
from jaxalign.losses import actor_critic
from jaxalign.losses import policy
from jaxalign.models import architecture
from jaxalign.models import transformer
from jaxalign.rl import advantages
from jaxalign.rl import returns
from jaxalign.rl import rollouts

TINY = architecture.Config(512, 1, 16, 2, 1, 8, 32, 64)


class TestOfRollouts:

  def needs(self, loss_fn, **options):
    """What is found of a loss without a model, for two prompts of two responses each."""
    of_critic = {name: options.pop(name, '') for name in ('critic', 'critic_writes')}
    of_critic['value_outputs'] = options.pop('outputs', 0)
    recipe = pytypes.SimpleNamespace(loss_fn=loss_fn, score_outputs=0, sync=None, **of_critic)
    advantage_fn = options.pop('advantage_fn', advantages.mean_centred)
    rewards = options.pop('rewards', ('tests.runs:vowels',))
    made = rollouts.Options(2, options.pop('samples', 2), 4, rewards, advantage_fn, **options)
    return needs_lib.of_rollouts(recipe, made)

  @pytest.mark.parametrize('options', [{'epochs': 2}, {'minibatches': 2}], ids=str)
  def test_of_several_updates_want_a_loss_that_knows_who_sampled(self, options):
    with pytest.raises(types.UsageError, match='epochs x minibatches = 2: the loss has no ratio'):
      self.needs(policy.reinforce, **options)
    assert 'labels.old_logps' in self.needs(functools.partial(policy.ppo, clip_eps=0.2), **options).fields
    assert 'labels.advantages' in self.needs(policy.reinforce).fields

  def test_of_one_response_a_prompt_want_nothing_to_compare(self):
    with pytest.raises(types.UsageError, match='samples = 1: rollouts.Options.advantage_fn compares'):
      self.needs(policy.reinforce, samples=1)
    for fn in (lambda rewards_GK: rewards_GK, lambda rewards_GK, finished_GK: (rewards_GK > 3.0) * (finished_GK == 1)):
      assert self.needs(policy.reinforce, samples=1, advantage_fn=fn).fields

  def test_say_which_critic_is_not_there(self):
    prime = functools.partial(returns.prime, beta=0.1)
    learning = functools.partial(actor_critic.implicit_rewards, beta=0.1)
    both = functools.partial(actor_critic.actor_critic, loss=policy.reinforce, value_loss=learning, value_coef=1.0)
    with pytest.raises(types.UsageError, match='read a critic that writes; bind'):
      self.needs(both, advantage_fn=prime)
    with pytest.raises(types.UsageError, match='read a critic that writes; bind'):
      self.needs(policy.reinforce, advantage_fn=prime, critic='policy')
    with pytest.raises(types.UsageError, match="critic = 'policy': neither loss nor advantages read its log-prob"):
      self.needs(policy.reinforce, critic='policy', critic_writes=True)
    found = self.needs(both, advantage_fn=prime, critic='policy', critic_writes=True)
    assert found.reference and 'policy.critic_logps_BT' in found.fields

  def test_say_how_many_values_are_read(self):
    one, two = (functools.partial(fn, beta=0.1, lam=1.0) for fn in (returns.actor_critic, returns.lagrangian))
    with pytest.raises(types.UsageError, match='reads values_BTO of a critic: bind recipe.Recipe.critic'):
      self.needs(policy.reinforce, advantage_fn=two)
    with pytest.raises(types.UsageError, match='reads values_BT of a critic with one output, and this one has 2'):
      self.needs(policy.reinforce, advantage_fn=one, outputs=2)
    with pytest.raises(types.UsageError, match='the critic has 1 outputs, and returns.lagrangian reads values of a'):
      self.needs(policy.reinforce, advantage_fn=two, outputs=1)
    assert self.needs(policy.reinforce, advantage_fn=one, outputs=1, critic='policy').fields

  def test_say_what_a_bound_on_the_divergence_is_read_from(self):
    options = {'epochs': 2, 'max_kl': 0.1}
    blind = lambda policy, ref, labels, *, state: types.LossOut(labels['advantages'] * labels['old_logps'], {}, state)
    with pytest.raises(types.UsageError, match='max_kl = 0.1: the loss has no metric policy/approxkl_avg'):
      self.needs(blind, **options)
    assert self.needs(functools.partial(policy.ppo, clip_eps=0.2), **options).metrics

  def test_want_a_model_where_rewards_of_tokens_are_read(self, tmp_path):
    with pytest.raises(types.UsageError, match='reads rewards of tokens, which models give: give --reward=DIR'):
      self.needs(policy.reinforce, advantage_fn=returns.process_supervised)
    found = self.needs(policy.reinforce, advantage_fn=returns.process_supervised, rewards=(str(tmp_path),))
    assert 'labels.advantages' in found.fields

  def test_of_several_updates_want_it_of_what_texts_are_put_around(self):
    options = {'epochs': 2, 'texts': 1, 'texts_data': 'builtin:stories', 'texts_fn': print}
    mixed = functools.partial(actor_critic.with_pretraining, loss=policy.reinforce, weight=1.0)
    with pytest.raises(types.UsageError, match='the loss has no ratio'):
      self.needs(mixed, **options)


class TestBind:

  @pytest.mark.parametrize('make', [objectives.reward, objectives.process, functools.partial(objectives.reward)])
  @pytest.mark.parametrize('live', [False, True])
  def test_refuses_a_reference_to_an_objective_of_scores(self, make, live):
    model = transformer.build(TINY, sharding.make_mesh(), length=32)
    needs = tracing.Needs(frozenset({'policy.rewards_GK', 'ref.logratios_GK'}))
    recipe = pytypes.SimpleNamespace(objective=make, rollouts=None)
    with pytest.raises(types.UsageError, match='the loss reads ref.logratios_GK, but .* of scores, which have no ref'):
      needs_lib.bind(recipe, model, needs, model if live else None)


class TestFlopsPerToken:

  # In passes of a body and of a head, 1 forward and 2 backward, of the policy and of the critic.
  @pytest.mark.parametrize(
      'fields,live,head_of_critic,bodies,heads',
      [
          ({'policy.rewards_GK'}, False, None, 3, 0),
          ({'policy.logps_GK'}, False, None, 3, 3),
          ({'policy.logps_GK', 'ref.logratios_GK'}, True, None, 4, 4),
          ({'policy.logps_BT'}, True, None, 3, 3),  # the reference is read once a rollout, and not in the step
          ({'policy.logps_BT', 'policy.scores_BTO'}, False, 1, 6, 3),
          ({'policy.logps_BT', 'policy.critic_logps_BT'}, False, 0, 6, 6),
          ({'policy.logps_BT'}, False, 1, 3, 3),  # advantages alone read the critic
      ],
  )
  def test_are_those_of_what_the_loss_reads(self, fields, live, head_of_critic, bodies, heads):
    of = lambda config: pytypes.SimpleNamespace(config=config, lora=None)
    critic = None if head_of_critic is None else of(dataclasses.replace(TINY, score_outputs=head_of_critic))
    body = 2 * (16 * 8 * (2 * 2 + 2 * 1) + 3 * 16 * 32) + 4 * 2 * 8 * 10 / 2
    found = needs_lib.flops_per_token(tracing.Needs(frozenset(fields)), of(TINY), critic, 10, live=live)
    assert found == bodies * body + heads * 2 * 16 * 512

  def test_of_adapters_lack_gradients_of_what_is_frozen(self):
    model = pytypes.SimpleNamespace(config=TINY, lora='any')
    critic = pytypes.SimpleNamespace(config=dataclasses.replace(TINY, score_outputs=1), lora='any')
    needs = tracing.Needs(frozenset({'policy.logps_BT', 'policy.scores_BTO'}))
    matrices, attention = 2 * (16 * 8 * (2 * 2 + 2 * 1) + 3 * 16 * 32), 4 * 2 * 8 * 10 / 2
    wanted = 2 * (2 * matrices + 3 * attention) + 2 * 2 * 16 * 512
    assert needs_lib.flops_per_token(needs, model, critic, 10, live=False) == wanted
