"""Episodes of several turns: the policy says something, an environment answers, and so on.

The ids that were sampled stay as they are; what the environment says is tokenised by itself and put behind them. It is
read by the policy and never learned from.
"""

from collections.abc import Callable
from collections.abc import Sequence
import copy
import inspect
import math
from typing import Any
from typing import NamedTuple

import numpy as np

from jaxalign import types
from jaxalign.data import prompts as prompts_lib
from jaxalign.data import tokenizers
from jaxalign.generation import sampling
from jaxalign.rewards import calling
from jaxalign.rewards import functions
from jaxalign.rewards import verdicts

# (prompts, responses to each, number of the turn, experts of their tokens or None, see `sampling.sample`) -> responses,
# one prompt's behind another's
Draw = Callable[[list[list[int]], int, int, list[np.ndarray | None] | None], list[sampling.Sampled]]


class Episode(NamedTuple):
  """All that follows a prompt.

  Attributes:
    ids: the tokens, sampled or observed.
    logps: log-probabilities of those that were sampled, in nats.
    finished: whether the environment called it done, or the last turn ended by itself.
    sampled: which of the tokens were.
    reward: the sum of those of its turns.
    turns: how often the policy spoke.
    cut: how many observations were cut.
    experts: see `sampling.Sampled`; those of earlier turns are taken again by later ones.
  """

  ids: list[int]
  logps: list[float]
  finished: bool
  sampled: list[bool]
  reward: float
  turns: int
  cut: int
  experts: np.ndarray | None = None


Response = sampling.Sampled | Episode


class Environment:
  """What answers the policy: a function `step(state, text) -> (observation, reward, done)`.

  `state` is a dict of the columns of the record that the prompt came from, for each episode a copy of its own, in which
  the function may keep what it likes; `text` is what the policy said in this turn. `observation` is a text, `reward` a
  number, and `done` ends the episode. With a prompt of messages the observation is what the user says next, written by
  the chat template; with one of text it is put behind what was said as it is. Every process of a job plays: it must
  answer alike in all of them.
  """

  def __init__(self, spec: str, *, turns: int, observation_tokens: int, template: str | None = None):
    """Loads the function.

    Args:
      spec: MODULE:FUNCTION or path/to/file.py:FUNCTION, options in parentheses, as for `--reward`.
      turns: the most that an episode has.
      observation_tokens: the most that an observation has; what is longer is cut.
      template: see `chat.pick`; for messages only.

    Raises:
      UsageError: there is no such function, or it cannot be called so, or a number is below 1.
    """
    found = functions.parse(spec, flag='environment')
    if not isinstance(found, functions.Reward):
      raise types.UsageError(f'--environment={spec}: it is a function: write MODULE:FUNCTION')
    if found.weight != 1.0 or found.processes:
      raise types.UsageError(f'--environment={spec}: a weight, processes and timeout are for rewards')
    try:
      inspect.signature(found.fn).bind({}, '')
    except TypeError as err:
      raise types.UsageError(f'--environment={spec}: it is called as step(state, text): {err}') from err
    for name, value in ('turns', turns), ('observation_tokens', observation_tokens):
      if value < 1:
        raise types.UsageError(f'rollouts.Options.{name} = {value}: it must be at least 1')
    self.name, self.title, self.turns, self.observation_tokens = found.name, found.title, turns, observation_tokens
    self._fn, self.template = found.fn, template

  def longest(self, max_new_tokens: int) -> int:
    """Tokens of the longest episode whose turns have so many."""
    return self.turns * max_new_tokens + (self.turns - 1) * self.observation_tokens

  def step(self, state: dict[str, Any], text: str, where: str) -> tuple[str, float, bool]:
    """One turn.

    Raises:
      RunError: the function failed, or returned something else; it names the function and the record.
    """
    try:
      with calling.to_stderr():
        return _checked(self._fn(state, text))
    except calling.FAILURES as err:
      raise types.RunError(f'environment {self.name}, {where}: {calling.told(err, self._fn)}') from err

  def play(
      self, prompts: Sequence[verdicts.Prompt], count: int, tokenizer: tokenizers.Tokenizer, draw: Draw
  ) -> list[Episode]:
    """Episodes behind each prompt, all at once, turn by turn.

    Args:
      prompts: what they begin with.
      count: episodes of each.
      tokenizer: of the model.
      draw: samples; after the first turn it is called with a number of prompts that is a power of two, so that few
        programs are compiled.
    """
    first = [prompt.ids for prompt in prompts]
    prompts = [prompt for prompt in prompts for _ in range(count)]
    states = [copy.deepcopy(dict(prompt.record)) for prompt in prompts]
    episodes = [Episode([], [], False, [], 0.0, 0, 0) for _ in prompts]
    live = list(range(len(prompts)))
    for turn in range(self.turns):
      behind = [prompts[n].ids + episodes[n].ids for n in live]
      experts = [episodes[n].experts for n in live]
      more = (1 << (len(live) - 1).bit_length()) - len(live)
      behind, experts = behind + behind[:1] * more, experts + experts[:1] * more
      drawn = draw(behind, 1, turn, experts) if turn else draw(first, count, 0, None)
      going = []
      for n, said in zip(live, drawn):  # Those that fill it up are let go.
        text = tokenizer.decode(said.ids, continuation=True)
        observation, reward, done = self.step(states[n], text, prompts[n].where)
        episodes[n] = _longer(episodes[n], said, reward, done)
        if not done and turn + 1 < self.turns:
          answer = prompts_lib.answer(tokenizer, observation, said.ids, prompts[n].is_chat, self.template)
          episodes[n] = _answered(episodes[n], answer, self.observation_tokens)
          going.append(n)
      live = going
      if not live:
        break
    return episodes


def respond(
    world: Environment | None,
    prompts: Sequence[verdicts.Prompt],
    count: int,
    tokenizer: tokenizers.Tokenizer,
    draw: Draw,
) -> Sequence[Response]:
  """Responses to each prompt: episodes with `world`, or what is drawn where there is none."""
  if world is None:
    return draw([one.ids for one in prompts], count, 0, None)
  return world.play(prompts, count, tokenizer, draw)


def rewards_of(responses: Sequence[Response]) -> np.ndarray | None:
  """Rewards `[N]` of episodes, None of other responses."""
  found = [one.reward for one in responses if isinstance(one, Episode)]
  return np.array(found) if found else None


def sampled_of(response: Response) -> list[bool]:
  """Which tokens of a response were sampled: all where there is no environment."""
  return response.sampled if isinstance(response, Episode) else [True] * len(response.ids)


def said(episodes: Sequence[Episode]) -> dict[str, float]:
  """What is logged of episodes, by name."""
  mean = lambda values: sum(values) / len(episodes)
  return {
      'episodes/turns': mean([one.turns for one in episodes]),
      'episodes/observed_tokens': mean([one.sampled.count(False) for one in episodes]),
      'episodes/cut_observations': float(sum(one.cut for one in episodes)),
  }


def _longer(episode: Episode, said: sampling.Sampled, reward: float, done: bool) -> Episode:
  return episode._replace(
      ids=episode.ids + said.ids,
      logps=episode.logps + said.logps,
      finished=done or said.finished,
      sampled=episode.sampled + [True] * len(said.ids),
      reward=episode.reward + reward,
      turns=episode.turns + 1,
      experts=said.experts,
  )


def _answered(episode: Episode, answer: list[int], most: int) -> Episode:
  kept = answer[:most]
  sampled = episode.sampled + [False] * len(kept)
  return episode._replace(ids=episode.ids + kept, sampled=sampled, cut=episode.cut + (len(answer) > most))


def _checked(found: Any) -> tuple[str, float, bool]:
  """What a function returned; raises Unusable where it is no step."""
  wanted = 'where (observation, reward, done) is wanted'
  if not isinstance(found, tuple) or len(found) != 3:
    raise calling.Unusable(f'it returned {found!r:.80} {wanted}')
  observation, reward, done = found
  if not isinstance(observation, str):
    raise calling.Unusable(f'its observation is {observation!r:.80} {wanted}, the first a text')
  if not isinstance(reward, int | float | np.integer | np.floating) or not math.isfinite(reward):
    raise calling.Unusable(f'its reward is {reward!r:.80} {wanted}, the second a finite number')
  if not isinstance(done, bool | np.bool_):
    raise calling.Unusable(f'its done is {done!r:.80} {wanted}, the third True or False')
  return observation, float(reward), bool(done)
