"""Which token comes next: from hidden states to logits, filters, and one uniform number."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import types
from jaxalign import vocab
from jaxalign.models import transformer

_BLOCK = 128  # tokens that are looked at as one first; it divides the padded vocabulary


class Rule(NamedTuple):
  """How a token is drawn; what is done to the logits, in this order.

  Attributes:
    repetition_penalty: above 1 makes tokens of prompt and response less likely: their logits are divided by it, or
      multiplied where they are negative. Keskar et al., 2019, https://arxiv.org/abs/1909.05858, Sec. 4.1; the case of
      negative ones as in transformers.
    temperature: divides the logits; 0 takes the most probable token.
    top_k: keep the k most probable tokens; 0 keeps all.
    top_p: of these keep the fewest whose probability reaches p. Holtzman et al., 2019, https://arxiv.org/abs/1904.09751.
    min_p: keep those that have at least this share of the most probable one's probability; 0 keeps all. Nguyen et al.,
      2024, https://arxiv.org/abs/2407.01082.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0

  def check(self, where: str = '') -> None:
    """Raises UsageError where a value has no meaning; `where` goes before its name."""
    wanted = {
        'temperature': ('at least 0', self.temperature >= 0),
        'top_k': ('at least 0', self.top_k >= 0),
        'top_p': ('above 0 and at most 1', 0 < self.top_p <= 1),
        'min_p': ('from 0 to 1', 0 <= self.min_p <= 1),
        'repetition_penalty': ('above 0', self.repetition_penalty > 0),
    }
    for name, (what, is_right) in wanted.items():
      if not is_right:
        raise types.UsageError(f'{where}{name} = {getattr(self, name)}: it must be {what}')


def logits(model: transformer.Transformer, params: types.PyTree, hidden_BD) -> types.Array:
  """Float32 logits `[B, V]` behind hidden states, very low where the vocabulary is padded."""
  # Without a head, of the embedding as it is: in a loop it would be transposed at each step.
  head, width = (params['head'], 0) if 'head' in params else (params['embed'], 1)
  axes = (((1,), (width,)), ((), ()))
  exactly = {'precision': types.precision(hidden_BD), 'preferred_element_type': jnp.float32}
  raw_BV = jax.lax.dot_general(hidden_BD, head.astype(model.dtype), axes, **exactly)
  raw_BV = vocab.soften(raw_BV, model.config.final_softcap)
  if raw_BV.shape[1] == model.config.vocab_size:
    return raw_BV
  return jnp.where(jnp.arange(raw_BV.shape[1])[None, :] < model.config.vocab_size, raw_BV, vocab.MASKED_LOGIT)


def penalise(rule: Rule, logits_BV, seen_BV):
  """The logits, those of tokens that were seen lowered; see `Rule`."""
  lowered_BV = jnp.where(logits_BV > 0, logits_BV / rule.repetition_penalty, logits_BV * rule.repetition_penalty)
  return jnp.where(seen_BV, lowered_BV, logits_BV)


def choose(rule: Rule, logits_BV, uniform_B) -> tuple[types.Array, types.Array]:
  """The token at which the cumulative probability, in the order of ids, passes the uniform number.

  Args:
    rule: how; the penalty is not applied here.
    logits_BV: float32.
    uniform_B: in [0, 1).

  Returns:
    int32 tokens, and their log-probabilities in nats under temperature and filters: 0 where temperature is 0.
  """
  if rule.temperature == 0:
    return jnp.argmax(logits_BV, axis=1).astype(jnp.int32), jnp.zeros_like(uniform_B)
  kept_BC, ids_BC = logits_BV / rule.temperature, None
  if 0 < rule.top_k < kept_BC.shape[1]:
    kept_BC, ids_BC = _top_k(kept_BC, rule.top_k)
    # By their ids, so that two that are almost as likely do not change places by rounding.
    ids_BC, kept_BC = jax.lax.sort((ids_BC, kept_BC), num_keys=1)
  if 0 < rule.top_p < 1:
    sorted_BC = -jnp.sort(-kept_BC, axis=1)
    p_BC = jax.nn.softmax(sorted_BC)
    least_B1 = jnp.min(
        jnp.where(jnp.cumsum(p_BC, axis=1) - p_BC < rule.top_p, sorted_BC, jnp.inf), axis=1, keepdims=True
    )
    kept_BC = jnp.where(kept_BC < least_B1, vocab.MASKED_LOGIT, kept_BC)
  if rule.min_p:
    least_B1 = jnp.max(kept_BC, axis=1, keepdims=True) + jnp.log(rule.min_p)
    kept_BC = jnp.where(kept_BC < least_B1, vocab.MASKED_LOGIT, kept_BC)
  place_B1 = _place(kept_BC, uniform_B)[:, None]
  logp_B = jnp.take_along_axis(kept_BC, place_B1, axis=1)[:, 0] - jax.nn.logsumexp(kept_BC, axis=1)
  token_B1 = place_B1 if ids_BC is None else jnp.take_along_axis(ids_BC, place_B1, axis=1)
  return token_B1[:, 0].astype(jnp.int32), logp_B


def _top_k(x_BC, k: int):
  """What `jax.lax.top_k` finds, equal values aside: the k largest lie in the k blocks with the largest maxima."""
  B, C = x_BC.shape
  if C % _BLOCK or k >= C // _BLOCK:
    return jax.lax.top_k(x_BC, k)
  x_BnK = x_BC.reshape(B, C // _BLOCK, _BLOCK)
  _, blocks_Bk = jax.lax.top_k(jnp.max(x_BnK, axis=2), k)
  blocks_Bk = jnp.sort(blocks_Bk, axis=1)
  of_blocks = jnp.take_along_axis(x_BnK, blocks_Bk[:, :, None], axis=1).reshape(B, k * _BLOCK)
  top_Bk, places_Bk = jax.lax.top_k(of_blocks, k)
  return top_Bk, jnp.take_along_axis(blocks_Bk, places_Bk // _BLOCK, axis=1) * _BLOCK + places_Bk % _BLOCK


def _place(logits_BC, uniform_B):
  """Where the cumulative probability passes the uniform number: in blocks first, as a long cumulative sum is slow."""
  B, C = logits_BC.shape
  p_BC = jnp.exp(logits_BC - jnp.max(logits_BC, axis=1, keepdims=True))
  if C % _BLOCK:
    return _passes(jnp.cumsum(p_BC, axis=1), uniform_B)[0]
  p_BnK = p_BC.reshape(B, C // _BLOCK, _BLOCK)
  block_B, rest_B = _passes(jnp.cumsum(jnp.sum(p_BnK, axis=2), axis=1), uniform_B)
  own_BK = jnp.cumsum(jnp.take_along_axis(p_BnK, block_B[:, None, None], axis=1)[:, 0], axis=1)
  return block_B * _BLOCK + _passes(own_BK, rest_B / own_BK[:, -1])[0]


def _passes(cumulative_BC, share_B):
  """The first place whose cumulative sum is above this share of the whole, and what the share has beyond the place.

  Rounding may have made of a share the whole sum or more, which nothing is above.
  """
  whole_B = cumulative_BC[:, -1]
  wanted_B = jnp.minimum(share_B * whole_B, jnp.nextafter(whole_B, jnp.zeros_like(whole_B)))
  place_B = jnp.sum(cumulative_BC <= wanted_B[:, None], axis=1)
  before_B1 = jnp.take_along_axis(cumulative_BC, jnp.maximum(place_B - 1, 0)[:, None], axis=1)
  return place_B, wanted_B - jnp.where(place_B > 0, before_B1[:, 0], 0.0)
