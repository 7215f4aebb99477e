"""What sampled responses are trained on: labels, by a function of what is known of them.

What such a function reads is what its parameters are named, of those below, and nothing else is computed. It returns
advantages, `returns.Estimates`, or labels by name: `[G, K]`, of responses, or `[B, T]`, of tokens. Advantages of
responses become those of all of their tokens.

  rewards_GK        all rewards of a response as one number, 0 where every one abstained
  valid_GK          1 where not every one abstained
  rewards_RGK       each of the R rewards, 0 where it abstained
  valid_RGK         1 where it did not
  weights_R         theirs
  outcomes_GK       those of the rewards that tell no tokens apart, as one number
  token_rewards_BT  what rewards of tokens or steps give, with their weights; 0 where they say nothing
  token_marks_BT    1 where they say something
  tokens_GK         lengths
  finished_GK       1 where the response ended by itself
  greedy_G          the reward of the response that temperature 0 gives to the prompt, NaN where all abstained
  ref_rewards_GN    rewards of `rollouts.Options.ref_samples` responses of the reference, likewise
  logps_BT          log-probabilities by the program that trains, under the policy that updates begin with: the one that
                    wrote them, but of asynchronous rollouts a later one
  sampler_logps_BT  those that the sampler gave, under the policy that wrote them
  log_ratio_BT      `logps_BT` less those under the reference
  critic_ratio_BT   log-probabilities under a critic that writes, less those under the reference
  values_BT         what the critic gives where it has read what comes before a token
  values_BTO        the same of a critic with several outputs
  rows              which response tokens belong to: here a row is one response, T tokens long
  loss_state        of the loss
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import masked
from jaxalign import tracing
from jaxalign import types
from jaxalign.rl import returns

FIELDS = frozenset(
    'rewards_GK valid_GK rewards_RGK valid_RGK weights_R outcomes_GK token_rewards_BT token_marks_BT tokens_GK'
    ' finished_GK greedy_G ref_rewards_GN logps_BT sampler_logps_BT log_ratio_BT critic_ratio_BT values_BT values_BTO'
    ' rows loss_state'.split()
)
_ARE_ONE = ('valid_GK', 'valid_RGK', 'finished_GK', 'token_marks_BT')  # where it matters
OF_REFERENCE = frozenset({'log_ratio_BT', 'critic_ratio_BT', 'ref_rewards_GN'})
OF_CRITIC = frozenset({'critic_ratio_BT', 'values_BT', 'values_BTO'})
# What the training program makes of tokens.
OF_PROGRAM = frozenset({'logps_BT', 'log_ratio_BT'}) | OF_CRITIC


class Credit:
  """A function that makes labels, and what it was found to read.

  Attributes:
    reads: names of fields.
  """

  def __init__(self, fn: Callable[..., Any]):
    self._fn = fn
    self.reads = FIELDS & set(inspect.signature(fn).parameters)
    self._made = jax.jit(self._make)

  def _make(self, fields: Mapping[str, Any]) -> dict[str, types.Array]:
    found = self._fn(**{name: fields[name] for name in self.reads})
    if isinstance(found, returns.Estimates):
      found = found._asdict()
    made = dict(found) if isinstance(found, Mapping) else {'advantages': found}
    if 'values_BT' in self.reads:
      made['values'] = fields['values_BT']
    if 'log_ratio_BT' in self.reads:
      made['kl'] = masked.totals(fields['log_ratio_BT'], fields['rows'])
    valid_GK, rows = fields['valid_GK'], fields['rows']
    for name in self.reads & {'greedy_G', 'ref_rewards_GN'}:
      valid_GK = valid_GK * ~jnp.any(jnp.isnan(fields[name].reshape(len(valid_GK), -1)), axis=1, keepdims=True)
    counts = lambda x: valid_GK if x.shape == valid_GK.shape else rows.mask_BT * masked.to_tokens(valid_GK, rows)
    if 'advantages' in made:
      made['advantages'] = jnp.where(counts(made['advantages']) > 0, made['advantages'], 0.0)
    return made

  def labels(self, fields: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """By name float32 `[G, K]` or `[B, T]`; advantages are 0 where a reward that they compare with is not there.

    With values of a critic they are a label too, and with a log-ratio to the reference its sum over a response, `kl`.

    Args:
      fields: `rows`, `valid_GK` and those that are read, by name.
    """
    wanted = self.reads | {'rows', 'valid_GK'}
    return {name: np.asarray(x) for name, x in self._made({name: fields[name] for name in wanted}).items()}

  def compares(self, rewards: int, outputs: int = 1) -> bool:
    """Whether a response without others to the same prompt has the advantage 0, whatever its rewards are.

    Args:
      rewards: R.
      outputs: of the critic.
    """
    random, shapes = np.random.default_rng(0), self._shapes(1, rewards, outputs)
    for scale in (1.0, 10.0, 100.0):
      fields = jax.tree.map(lambda x, scale=scale: jnp.asarray(random.normal(0, scale, x.shape), x.dtype), shapes)
      fields |= {name: jnp.ones(shapes[name].shape) for name in _ARE_ONE} | {'rows': rows([3, 3], 1, 3)}
      made = self._make(fields)
      if 'advantages' not in made or np.any(made['advantages']):
        return False
    return True

  def names(self, samples: int, rewards: int, outputs: int = 1) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the labels that it makes of responses, and of tokens.

    Args:
      samples: K.
      rewards: R.
      outputs: of the critic.

    Raises:
      UsageError: it reads more rewards than there are.
    """
    try:
      with tracing.checked_indices():
        made = jax.eval_shape(self._make, self._shapes(samples, rewards, outputs))
    except IndexError as err:
      raise types.UsageError(
          f'rollouts.Options.advantage_fn reads more rewards than the {rewards} that there are; give another --reward'
      ) from err
    of_tokens = tuple(sorted(name for name, x in made.items() if name == 'advantages' or x.shape != (2, samples)))
    return tuple(sorted(made.keys() - set(of_tokens))), of_tokens

  def _shapes(self, samples: int, rewards: int, outputs: int) -> dict[str, Any]:
    """All fields of two prompts and three tokens."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, np.float32)
    fields: dict[str, Any] = {name: shape(2, samples) for name in FIELDS if name.endswith('_GK')}
    fields |= {name: shape(2 * samples, 3) for name in FIELDS if name.endswith('_BT')}
    fields |= {name: shape(rewards, 2, samples) for name in FIELDS if name.endswith('_RGK')}
    fields |= {'greedy_G': shape(2), 'ref_rewards_GN': shape(2, 2), 'weights_R': shape(rewards)}
    fields |= {'values_BTO': shape(2 * samples, 3, outputs)}
    return fields | {'rows': rows([1] * 2 * samples, samples, 3), 'loss_state': ()}


def rows(lengths: Sequence[int], samples: int, width: int) -> types.Rows:
  """Responses a row each, so many tokens long, `samples` of a group one behind the other."""
  count = len(lengths)
  mask_BT = (np.arange(width) < np.array(lengths)[:, None]).astype(np.float32)
  responses_BT = np.where(mask_BT > 0, 0, -1).astype(np.int32)
  index_B1 = np.arange(count, dtype=np.int32)[:, None]
  return types.Rows(mask_BT, responses_BT, index_B1 // samples, index_B1 % samples, count // samples, samples)


def table(values: Sequence[np.ndarray | Sequence[float]], width: int) -> np.ndarray:
  """Numbers of the tokens of each response, as rows `[B, T]` have them."""
  found = np.zeros((len(values), width), np.float32)
  for row, one in enumerate(values):
    found[row, : len(one)] = one
  return found
