"""Rollouts: what they are, and the models that they are made with, see `collect`."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax.numpy as jnp

from jaxalign import sharding
from jaxalign import types
from jaxalign.data import tokenizers
from jaxalign.generation import next_token
from jaxalign.generation import sampling
from jaxalign.models import transformer
from jaxalign.rewards import functions
from jaxalign.rewards import modelled
from jaxalign.rl import credit as credit_lib
from jaxalign.rl import multi_turn


@dataclasses.dataclass(frozen=True)
class Options:
  """What a rollout is, and what becomes of it.

  Attributes:
    prompts: of a rollout.
    samples: responses to each prompt, K.
    max_new_tokens: length at which a response is cut.
    rewards: what scores responses, each as `--reward` names it, see `rewards.functions.parse`; with an environment
      there may be none.
    scorings: of models among them, by directory, what their own runs say of how they score; nothing binds it.
    combine: of several rewards, see `rewards.functions.combine`.
    advantage_fn: from `advantages`, or any function that `credit` can call: what it reads its parameters name.
    replay_experts: whether the policy, when it is trained, and the reference send each token of prompt and response to
      the experts that it took when it was sampled: where router logits are close, rounding would send it elsewhere, and
      ratios would tell of that. None does it for a policy with experts that computes, or keeps keys and values, in
      less than float32. Texts, and a critic of another shape or with a head, are left to their routers.
      Rollout routing replay, R3: Ma et al., 2025, https://arxiv.org/abs/2510.11370, Sec. 3. They are kept with the
      rollout, 4/3 bytes for each layer, expert and token, or twice as many from 256 experts on.
    temperature: of sampling.
    top_k: see `sampling.sample`.
    top_p: see `sampling.sample`.
    min_p: see `sampling.sample`.
    stop: texts that end a response, which holds them.
    cache_dtype: of keys and values, see `sampling.sample`.
    sampling_rules: of sharding for the policy's weights while it writes, in place of some of `sharding.RULES`. With
      {'embed': ()} each device of `fsdp` keeps them whole, in the precision of the model: they are gathered once a
      rollout and not for every token. None leaves them where they are trained.
    rows: responses that are written at once, see `sampling.sample`: no id depends on it, but speed and memory do.
    epochs: passes over a rollout.
    minibatches: optimizer steps of a pass.
    ref_samples: responses of the reference to each prompt, for an `advantage_fn` that reads `ref_rewards_GN`.
    refill: how often prompts whose responses all have the same reward are replaced by others, sampled anew; prompts
      that are replaced stay where that is not enough. DAPO's dynamic sampling (Yu et al., 2025, arXiv:2503.14476).
    max_kl: nats a token from the policy that was sampled from, by a minibatch, beyond which it makes no update, see
      `step.make_step`; TRL's `target_kl` of old, times 1.5.
    mask_truncated: whether a response that was cut at `max_new_tokens` is not trained on; its reward still counts in
      its group. DAPO's overlong filtering, TRL's `mask_truncated_completions`.
    asynchronous: whether a rollout is sampled before the updates by the one before it, and judged while those are made
      (before them in a job of several processes, or by models): it is one rollout old when it is trained on.
      `policy_parts.truncated_importance` weighs that.
    texts: how many groups of a step are not prompts but texts of `texts_data`, for `actor_critic.with_pretraining`.
    texts_data: as for `--data`, read by `texts_fn`.
    texts_fn: makes an example of a record, as `recipe.Recipe.example_fn`.
    environment: what answers the policy, see `multi_turn.Environment`; '' for nothing, and a single turn. Its rewards
      are added up, and come first among `rewards`, which read a whole episode, what was answered included.
    turns: the most of an episode, each of up to `max_new_tokens`.
    observation_tokens: the most that an answer of the environment has.
    template: of prompts that are messages, and of what answers the policy in such a chat, see `chat.pick`.
  """

  prompts: int
  samples: int
  max_new_tokens: int
  rewards: tuple[str, ...]
  advantage_fn: Callable[..., Any]
  scorings: Mapping[str, modelled.Scoring] = dataclasses.field(default_factory=dict)
  combine: str = 'sum'
  replay_experts: bool | None = None
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  stop: tuple[str, ...] = ()
  cache_dtype: str | None = None
  sampling_rules: Mapping[str, tuple[str, ...]] | None = None
  rows: int = sampling.ROWS
  epochs: int = 1
  minibatches: int = 1
  ref_samples: int = 0
  refill: int = 0
  max_kl: float | None = None
  mask_truncated: bool = False
  asynchronous: bool = False
  texts: int = 0
  texts_data: str = ''
  texts_fn: Callable[..., Any] | None = None
  environment: str = ''
  turns: int = 4
  observation_tokens: int = 64
  template: str | None = None

  def __post_init__(self):
    if not self.rewards and not self.environment:
      raise types.UsageError(
          'rollouts.Options.rewards: nothing scores the responses; give --reward=MODULE:FUNCTION or DIR'
      )
    functions.check_how(self.combine)
    counts = 'prompts', 'samples', 'max_new_tokens', 'rows', 'epochs', 'minibatches', 'turns', 'observation_tokens'
    for name in counts:
      if getattr(self, name) < 1:
        raise types.UsageError(f'rollouts.Options.{name} = {getattr(self, name)}: it must be at least 1')
    for name in ('ref_samples', 'refill', 'texts'):
      if getattr(self, name) < 0:
        raise types.UsageError(f'rollouts.Options.{name} = {getattr(self, name)}: it must be at least 0')
    if self.temperature <= 0:
      raise types.UsageError(
          f'rollouts.Options.temperature = {self.temperature}: it must be above 0, or nothing varies'
      )
    next_token.Rule(self.temperature, self.top_k, self.top_p, self.min_p).check('rollouts.Options.')
    sampling.check_cache_dtype(self.cache_dtype)
    sharding.check_rules(self.sampling_rules or {}, 'rollouts.Options.sampling_rules')
    if self.max_kl is not None and (self.max_kl <= 0 or self.updates == 1):
      problem = (
          'it must be above 0' if self.updates > 1 else 'a rollout has a single update, before which nothing moved'
      )
      raise types.UsageError(f'rollouts.Options.max_kl = {self.max_kl}: {problem}')
    if self.prompts % self.minibatches:
      raise types.UsageError(
          f'rollouts.Options.minibatches = {self.minibatches}: it must divide the {self.prompts} prompts of a rollout'
      )
    if ('ref_rewards_GN' in self.credit.reads) != (self.ref_samples > 0):
      problem = f'rollouts.Options.advantage_fn reads {"none" if self.ref_samples else "responses"} of the reference'
      raise types.UsageError(f'rollouts.Options.ref_samples = {self.ref_samples}: {problem}')
    reads = self.credit.reads
    if self.combine != 'sum' and 'rewards_RGK' in reads and not reads & {'rewards_GK', 'outcomes_GK'}:
      problem = 'rollouts.Options.advantage_fn reads each reward, and combines them itself; leave it out'
      raise types.UsageError(f'rollouts.Options.combine = {self.combine!r}: {problem}')
    if reads & {'greedy_G', 'ref_rewards_GN'}:
      self._check_scale()
    if not isinstance(self.stop, tuple | list) or not all(isinstance(text, str) and text for text in self.stop):
      raise types.UsageError(f'rollouts.Options.stop = {self.stop!r}: a tuple of texts that are not empty')
    if self.refill and self.credit.reads & {'greedy_G', 'ref_rewards_GN'}:
      problem = 'prompts are replaced only where nothing else is sampled to them; leave one of both out'
      raise types.UsageError(f'rollouts.Options.refill = {self.refill}: {problem}')
    if self.asynchronous and (self.refill or self.environment):
      problem = 'what is sampled next then depends on what was judged; leave out refill and environment'
      raise types.UsageError(f'rollouts.Options.asynchronous = True: {problem}')
    if len({self.texts > 0, bool(self.texts_data), self.texts_fn is not None}) > 1:
      problem = 'texts, texts_data and texts_fn belong together; bind all of them or none'
      raise types.UsageError(f'rollouts.Options.texts = {self.texts}: {problem}')

  def _check_scale(self) -> None:
    """Raises UsageError where rewards of other responses would be on another scale than those of the policy's."""
    problem = (
        'it makes numbers of one set of responses, and rollouts.Options.advantage_fn compares with those of another'
    )
    if self.combine == 'normalised':
      raise types.UsageError(f'rollouts.Options.combine = {self.combine!r}: {problem}')
    for reward in map(functions.parse, self.rewards):
      if isinstance(reward, modelled.Model) and reward.centre:
        raise types.UsageError(f'--reward={reward.name}: centre=True: {problem}')

  @functools.cached_property
  def credit(self) -> credit_lib.Credit:
    """What makes labels of what was sampled."""
    return credit_lib.Credit(self.advantage_fn)

  @functools.cached_property
  def world(self) -> multi_turn.Environment | None:
    """The environment, None where there is none."""
    limits = {'turns': self.turns, 'observation_tokens': self.observation_tokens}
    return multi_turn.Environment(self.environment, template=self.template, **limits) if self.environment else None

  def ways(self, tokenizer: tokenizers.Tokenizer) -> dict[str, Any]:
    """How tokens are drawn, temperature and length aside: arguments of `sampling.sample`."""
    stop = sampling.Stop(self.stop, functools.partial(tokenizer.decode, continuation=True))
    named = {name: getattr(self, name) for name in ('top_k', 'top_p', 'min_p', 'cache_dtype', 'rows')}
    return named | {'stop': stop}

  def replays(self, policy: transformer.Transformer) -> bool:
    """Whether experts are, see `replays`."""
    return replays(self.replay_experts, policy, self.cache_dtype)

  @property
  def longest(self) -> int:
    """Tokens of the longest response, answers of the environment included."""
    return self.max_new_tokens if self.world is None else self.world.longest(self.max_new_tokens)

  @property
  def most_sampled(self) -> int:
    """Those of them that are sampled."""
    return self.max_new_tokens * (1 if self.world is None else self.world.turns)

  @property
  def updates(self) -> int:
    """Optimizer steps that a rollout is used for."""
    return self.epochs * self.minibatches

  @property
  def annotations(self) -> set[str]:
    """What the training program is to make of sampled tokens before the first update, by name."""
    return set(self.credit.reads & credit_lib.OF_PROGRAM) | ({'logps_BT'} if self.updates > 1 else set())


def replays(asked: bool | None, policy: transformer.Transformer, cache_dtype: str | None = None) -> bool:
  """Whether experts are replayed, see `Options`; UsageError where they are to be, and the policy has none."""
  has_experts = policy.config.num_experts > 0
  if asked and not has_experts:
    raise types.UsageError('rollouts.Options.replay_experts = True: the model has no experts; leave it out')
  rounds = jnp.dtype(policy.dtype) != 'float32' or cache_dtype is not None
  return has_experts and rounds if asked is None else asked


class Models(NamedTuple):
  """Those that a rollout is made with.

  Attributes:
    policy: without dropout; a head that it has gives values.
    critic: gives values where it has parameters of its own; None where there is none.
    ref: the reference; None where none is wanted.
  """

  policy: transformer.Transformer
  critic: transformer.Transformer | None
  ref: transformer.Transformer | None

  def making(self, annotations: set[str]) -> 'Models':
    """The same without those that these `Options.annotations` do not need."""
    critic = self.critic if annotations & credit_lib.OF_CRITIC else None
    return self._replace(critic=critic, ref=self.ref if annotations & credit_lib.OF_REFERENCE else None)


class Params(NamedTuple):
  """The parameters of `Models` at one moment, None for those that are not there, and the state of the loss.

  `version` counts the optimizer steps that led to them.
  """

  policy: types.PyTree
  critic: types.PyTree | None = None
  ref: types.PyTree | None = None
  loss_state: types.PyTree = ()
  version: int = 0
