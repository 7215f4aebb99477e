"""Training-free alignment in `--mode=sample`: other models guide the policy, or the best of several responses is kept.

What is done is `Options`, bound by the files in gin_configs/decode; its parts are functions of `guidance` (token by
token) and `candidates` (response by response).
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import inspect
from typing import Any

from absl import flags
from absl import logging
import jax
import numpy as np

from jaxalign import checkpoint
from jaxalign import recipe as recipe_lib
from jaxalign import respond
from jaxalign import scorers
from jaxalign import types
from jaxalign.cli import catalog
from jaxalign.cli import command
from jaxalign.cli import config
from jaxalign.data import examples
from jaxalign.data import records
from jaxalign.generation import blocks
from jaxalign.generation import candidates
from jaxalign.generation import guidance
from jaxalign.generation import sampling
from jaxalign.rewards import functions
from jaxalign.rewards import modelled
from jaxalign.rewards import panels
from jaxalign.rewards import verdicts


@dataclasses.dataclass(frozen=True)
class Options:
  """What is done to the policy's samples.

  Attributes:
    process: makes the logits that are drawn from, see `guidance`; None draws from the policy's own.
    guides: directories of the models that it reads, in the order of its parameters, as `--guide` gives them; then one
      of a `value` where `choose_fn` reads that.
    prompt_fn: writes the prompt (text) that the policy reads as its own guide `shown`: (messages) -> text.
    stop: texts that end a response, besides those of `--stop`.
    n: candidates that are drawn for each response that is kept.
    block: tokens after which one of n continuations is kept, and the next n go on from it; 0 for whole responses.
    choose_fn: keeps one of them, see `candidates`.
    rewards: what judges candidates, as `--reward` names it; without a `choose_fn` for the report alone.
    combine: of several rewards, see `rewards.functions.combine`.
  """

  process: Callable[..., types.Array] | None = None
  guides: tuple[str, ...] = ()
  prompt_fn: Callable[..., str] | None = None
  stop: tuple[str, ...] = ()
  n: int = 1
  block: int = 0
  choose_fn: Callable[..., int] | None = None
  rewards: tuple[str, ...] = ()
  combine: str = 'sum'

  def __post_init__(self):
    for name in ('guides', 'stop', 'rewards'):
      if isinstance(getattr(self, name), str):
        raise types.UsageError(f"steering.Options.{name} = {getattr(self, name)!r}: write a list, ('...',)")
    for spec in self.rewards:
      functions.parse(spec)
    functions.check_how(self.combine)
    if self.combine != 'sum' and not self.rewards:
      raise types.UsageError(f'--combine={self.combine}: it goes with --reward')
    if self.n < 1 or (self.n > 1 and self.choose_fn is None):
      problem = 'nothing chooses one of them (steering.Options.choose_fn)' if self.n > 1 else 'it is at least 1'
      raise types.UsageError(f'steering.Options.n = {self.n}: {problem}')
    if self.block < 0 or self.block and (self.choose_fn is None or self.process is not None):
      problem = 'it is at least 0' if self.block < 0 else 'it goes with a choice (steering.Options.choose_fn) alone'
      raise types.UsageError(f'steering.Options.block = {self.block}: {problem}')
    self._check_guides()
    if self.choose_fn is not None:
      self._check_choice(self.choose_fn)

  @property
  def roles(self) -> list[str]:
    """What each guide is to `process`."""
    if self.process is None:
      return []
    kinds = inspect.Parameter
    found = list(inspect.signature(self.process).parameters.values())[1:]
    return [one.name for one in found if one.kind is kinds.POSITIONAL_OR_KEYWORD and one.default is kinds.empty]

  @property
  def has_value(self) -> bool:
    """Whether a choice is made by values, of the last of the guides."""
    return self.choose_fn is not None and 'values_N' in candidates.reads(self.choose_fn)

  def _check_guides(self) -> None:
    roles = [role for role in self.roles if role != guidance.SHOWN] + ['value'] * self.has_value
    if (guidance.SHOWN in self.roles) != (self.prompt_fn is not None):
      raise types.UsageError(f'steering.Options.prompt_fn: it goes with a process that reads `{guidance.SHOWN}`')
    if len(self.guides) != len(roles) or not all(self.guides):
      given = ', '.join(self.guides) or 'none'
      wanted = f'one --guide=DIR for each of {" and ".join(roles)}, in this order' if roles else 'no --guide'
      raise types.UsageError(f'--guide: {wanted} is wanted; given: {given}')

  def _check_choice(self, choose_fn: Callable[..., int]) -> None:
    """Raises UsageError where there is no reward to choose by, or the function cannot be called."""
    read = candidates.reads(choose_fn)
    if 'rewards_N' in read and not self.rewards:
      raise types.UsageError('--reward: candidates are chosen by it; give --reward=MODULE:FUNCTION or --reward=DIR')
    one: dict[str, Any] = {'rewards_N': np.zeros(1), 'values_N': np.zeros(1), 'texts': [''], 'tokens': [[]]}
    choose_fn(**{name: one[name] for name in read})


def configured(
    args: flags.FlagValues,
    options: respond.Options,
    scorings: Callable[[Sequence[str]], Mapping[str, modelled.Scoring]],
) -> tuple[respond.Options, respond.Draw]:
  """How `--mode=sample` samples under `--decode` and `--reward`: its options, and what draws.

  Args:
    args: the flags.
    options: what they say of sampling.
    scorings: what the recipes of models among rewards say of how they score; it takes what is bound away.

  Raises:
    UsageError: there is no such method, a binding is wrong, or something that the method needs is missing.
  """
  if not args.decode and not args.reward:
    return options, respond.plainly
  if not args.decode:
    own = Options(rewards=tuple(args.reward), combine=args.combine)
    return options, Steered(own, scorings(own.rewards))
  catalog.check_decoding(args.decode)
  bindings = [*args.gin, *command.reward_bindings(args, 'steering.Options')]
  if args.guide:
    bindings.append(f'steering.Options.guides = {tuple(args.guide)!r}')
  parse = functools.partial(config.parse, f'decode/{args.decode}', files=(), user_files=args.gin_file)
  parse(bindings=bindings)
  config.check_reachable('steering.Options')
  own = config.get('steering.Options')()
  if own.n > 1 and options.temperature == 0:
    raise types.UsageError(f'--temperature=0 draws the same {own.n} times; --decode={args.decode} wants it above 0')
  known = scorings(own.rewards)
  if known:  # Their recipes have taken the place of this one.
    parse(bindings=bindings)
    own = config.get('steering.Options')()
  options = dataclasses.replace(options, stop=(*options.stop, *own.stop))
  return options, Steered(own, known, args.decode, config.checked_operative)


@dataclasses.dataclass(frozen=True)
class Steered:
  """Draws responses as options say, and logs rewards and the KL from the policy: a `respond.Draw`.

  Attributes:
    own: the options.
    scorings: see `scorers.checked`.
    name: of the method.
    done: called at the end.
  """

  own: Options
  scorings: Mapping[str, modelled.Scoring]
  name: str = ''
  done: Callable[[], Any] = lambda: None

  def __call__(
      self, loaded: checkpoint.Loaded, asked: respond.Asked, options: respond.Options, seed: int
  ) -> respond.Drawn:
    """Draws; columns are log_ratios (of the draw to the policy, in nats) and, with rewards, scores.

    Raises:
      UsageError: a guide is not what is wanted, or a prompt is too long for it.
      RunError: a reward fails.
    """
    rewards = [functions.parse(spec) for spec in self.own.rewards]
    models, value = self._scorers(rewards, loaded, asked, options), self._value(loaded, asked, options)
    with panels.Panel(rewards, models, together=True) as panel:

      def rewards_of(asked: respond.Asked, drawn: Sequence[sampling.Sampled]) -> np.ndarray | None:
        values = [one.values for one in panel(_judged(loaded, asked, options, drawn)).values()]
        return functions.combine(values, [one.weight for one in rewards], self.own.combine) if rewards else None

      choose = functools.partial(self._kept, loaded, options, value)
      if self.own.block:
        drawn, choices = self._in_blocks(loaded, asked, options, seed, rewards_of, choose)
        rewards_N, kept = rewards_of(asked, drawn), list(range(len(drawn)))
      else:
        many = dataclasses.replace(options, per_prompt=options.per_prompt * self.own.n)
        steered = self._guidance(loaded, asked, options)
        drawn, choices = respond.draw(loaded, asked.ids, many, seed, asked.is_chat, guidance=steered), 1.0
        rewards_N = rewards_of(asked, drawn)
        kept = choose(asked, drawn, rewards_N)
    ratios = np.array([sum(drawn[i].processed_logps) - sum(drawn[i].logps) for i in kept])  # of the draw as filtered
    self._report(kept, ratios, rewards_N, choices)
    self.done()
    columns: dict[str, list[Any]] = {'log_ratios': ratios.tolist()}
    if rewards_N is not None:
      columns['scores'] = [None if np.isnan(rewards_N[i]) else float(rewards_N[i]) for i in kept]
    return respond.Drawn([drawn[i] for i in kept], columns)

  def _in_blocks(
      self, loaded: checkpoint.Loaded, asked: respond.Asked, options: respond.Options, seed: int, rewards_of, choose
  ) -> tuple[list[sampling.Sampled], float]:
    """Responses that are chosen block by block, and the mean number of choices."""
    prompts = [prompt for prompt in asked.prompts for _ in range(options.per_prompt)]
    of = lambda numbers: respond.Asked([prompts[i] for i in numbers], asked.is_chat)

    def draw(ids, numbers, longest: int, turn: int) -> list[sampling.Sampled]:
      some = dataclasses.replace(options, per_prompt=self.own.n, max_new_tokens=longest)
      own = int(np.random.SeedSequence([seed % 2**32, turn]).generate_state(1)[0]) if turn else seed
      return respond.draw(loaded, ids, some, own, asked.is_chat, requests=numbers)

    def chosen(numbers, drawn) -> list[int]:
      rewards_N = rewards_of(of(numbers), drawn) if self._reads('rewards_N') else None
      return choose(of(numbers), drawn, rewards_N)

    responses, counts = blocks.grow(
        [prompt.ids for prompt in prompts],
        block=self.own.block,
        longest=options.max_new_tokens,
        draw_fn=draw,
        choose_fn=chosen,
        stop=respond.stop_of(loaded, options, asked.is_chat),
    )
    return responses, float(np.mean(counts))

  def _reads(self, name: str) -> bool:
    return self.own.choose_fn is not None and name in candidates.reads(self.own.choose_fn)

  def _value(self, loaded: checkpoint.Loaded, asked: respond.Asked, options: respond.Options) -> sampling.Guide | None:
    """The guide by whose values a choice is made."""
    if not self.own.has_value:
      return None
    guide = _guide(self.own.guides[-1], 'value', loaded)
    if guide.model.config.score_outputs != 1:
      outputs = guide.model.config.score_outputs
      raise types.UsageError(f'--guide={self.own.guides[-1]}: a choice is by one value, and its head has {outputs}')
    self._check_context('value', guide, asked, options)
    return guide

  def _check_context(self, role: str, guide: sampling.Guide, asked: respond.Asked, options: respond.Options) -> None:
    longest, context = max(map(len, guide.prompts or asked.ids)), guide.model.config.max_length
    if longest + options.max_new_tokens > context:
      raise types.UsageError(
          f'--decode={self.name}: {longest} tokens of a prompt and --max_new_tokens={options.max_new_tokens} exceed'
          f' the context of `{role}`, {context}'
      )

  def _guidance(
      self, loaded: checkpoint.Loaded, asked: respond.Asked, options: respond.Options
  ) -> sampling.Guidance | None:
    """The guides, loaded."""
    process, prompt_fn = self.own.process, self.own.prompt_fn
    if process is None:
      return None
    directories = iter(self.own.guides)
    guides = []
    for role in self.own.roles:
      if role == guidance.SHOWN and prompt_fn is not None:
        guides.append(_shown(prompt_fn, loaded, asked))
      else:
        guides.append(_guide(next(directories), role, loaded))
    for role, guide in zip(self.own.roles, guides):
      self._check_context(role, guide, asked, options)
    # Another function at each run: programs are kept by it, and what is bound may have changed.
    return sampling.Guidance(lambda logits_BV, views: process(logits_BV, *views), tuple(guides))

  def _scorers(self, rewards, loaded, asked, options) -> dict[str, functions.Scorer]:
    """The models among rewards, loaded."""
    longest = max(map(len, asked.ids))
    row_length = longest + options.max_new_tokens
    sampled = scorers.Sampled(loaded.tokenizer, longest, options.max_new_tokens, row_length)
    return scorers.checked(rewards, jax.sharding.get_mesh(), own=self.scorings, sampled=sampled)()

  def _kept(
      self,
      loaded: checkpoint.Loaded,
      options: respond.Options,
      value: sampling.Guide | None,
      asked: respond.Asked,
      drawn: Sequence[sampling.Sampled],
      rewards_N: np.ndarray | None,
  ) -> list[int]:
    """Which of the candidates are kept, one of each n."""
    choose, n = self.own.choose_fn, self.own.n
    if choose is None:
      return list(range(len(drawn)))
    tokens = [one.ids[:-1] if one.stop_reason == 'eos' else one.ids for one in drawn]
    texts = [respond.text_of(loaded.tokenizer, one, options, asked.is_chat) for one in drawn]
    known: dict[str, Any] = {'rewards_N': rewards_N, 'texts': texts, 'tokens': tokens}
    if value is not None:
      prompts = [ids for ids in asked.ids for _ in range(len(drawn) // len(asked.ids))]
      read = [[*prompt, *one.ids] for prompt, one in zip(prompts, drawn, strict=True)]
      known['values_N'] = blocks.values(value, read)[:, 0]
    fields = {name: known[name] for name in candidates.reads(choose)}
    groups = [slice(start, start + n) for start in range(0, len(drawn), n)]
    return [own.start + choose(**{name: values[own] for name, values in fields.items()}) for own in groups]

  def _report(self, kept: Sequence[int], ratios: np.ndarray, rewards_N: np.ndarray | None, choices: float) -> None:
    """Logs how many, the mean reward, and the KL."""
    said = [f'{len(kept)} kept'] + [f'each of {self.own.n} candidates'] * (self.own.choose_fn is not None)
    if self.own.block:
      said.append(f'in {choices:.4g} blocks')
    if rewards_N is not None:
      mean = lambda values: 'none' if np.isnan(values).all() else f'{np.nanmean(values):.4g}'
      said.append(f'mean reward {mean(rewards_N[kept])}')
      said += [f'of all candidates {mean(rewards_N)}'] * (len(kept) < len(rewards_N))
    # A choice adds its own, at most, in each block; so the divergences add up by the chain rule.
    limit = 0.0 if self.own.choose_fn is None else choices * candidates.bound(self.own.choose_fn, self.own.n)
    said.append(f'KL from the policy {"at most " * (limit > 0)}{ratios.mean() + limit:.4g} nats a response')
    logging.info('%s: %s', self.name or 'samples', ', '.join(said))


def _guide(spec: str, role: str, loaded: checkpoint.Loaded) -> sampling.Guide:
  """A model of `--guide`; raises UsageError where it is not what its role wants."""
  mesh = jax.sharding.get_mesh()
  if role in guidance.SCORING:
    guide = recipe_lib.load(spec, mesh)
    if not guide.model.config.score_outputs:
      raise types.UsageError(f'--guide={spec}: `{role}` has a head that scores (train one with --algo=rm)')
  else:
    guide = respond.policy(spec, mesh, flag='--guide=')
  if not scorers.have_same_ids(guide.tokenizer, loaded.tokenizer):
    raise types.UsageError(f'--guide={spec}: its tokenizer has other ids than that of the model that is guided')
  return sampling.Guide(guide.model, guide.params)


def _shown(prompt_fn: Callable[..., str], loaded: checkpoint.Loaded, asked: respond.Asked) -> sampling.Guide:
  """The policy behind the prompts that a function writes."""
  turns = [records.messages(prompt.record, 'prompt', 'user') for prompt in asked.prompts]
  return sampling.Guide(
      loaded.model, loaded.params, [examples.prompt_ids(loaded.tokenizer, prompt_fn(one)) for one in turns]
  )


def _judged(
    loaded: checkpoint.Loaded, asked: respond.Asked, options: respond.Options, drawn: Sequence[sampling.Sampled]
) -> functions.Responses:
  """Candidates as rewards read them: of one that a text has ended, what stands before it, and its ids."""
  tokenizer = loaded.tokenizer
  texts = [respond.text_of(tokenizer, one, options, asked.is_chat) for one in drawn]
  encode = lambda text: tokenizer.encode(text, continuation=True)
  ids = [encode(text) if one.stop_reason == 'stop' else one.ids for one, text in zip(drawn, texts, strict=True)]
  return dataclasses.replace(verdicts.responses(asked.prompts, tokenizer, drawn), responses=texts, ids=ids)
