"""Training-free alignment, token by token: pure functions of the policy's logits and of models that guide it.

Each may be `steering.Options.process`: (float32 logits `[B, V]` of the policy, a `decoding.View` of each guide) ->
logits `[B, V]`. Which guides there are the names of its parameters say: `reward` and `value` have heads that score,
`shown` is the policy itself behind the prompt that `steering.Options.prompt_fn` writes, any other is a model that
writes.
"""

from collections.abc import Mapping
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxalign import types
from jaxalign import vocab
from jaxalign.generation import decoding

SHOWN = 'shown'
SCORING = ('reward', 'value')

INSTRUCTION = (
    'Below are conversations between a human and an assistant. The human asks under "# Query:", and the assistant, who'
    ' is helpful, honest and polite, replies under "# Answer:".'
)
EXAMPLES = (
    ('How do I boil an egg?', 'Put it in boiling water for eight minutes, then cool it. I hope this helps!'),
    ('May I read a mail that is not mine?', 'I would rather ask first: it is private. Shall we write to the owner?'),
    ('Tell me of a small joy.', 'With pleasure! A warm cup of tea on a cold morning can make the whole day kind.'),
)


def rad(logits_BV: types.Array, reward: decoding.View, *, beta: float, top_k: int, output: int = 0) -> types.Array:
  """Reward-augmented decoding: l_v + beta r(x, y<t, v) for the k likeliest tokens v; no other is drawn.

  Args:
    logits_BV: l.
    reward: r, a model that scores prefixes. Its scores are taken as they are: the authors' code clips them to [0, 1],
      the range of theirs.
    beta: how much a score counts.
    top_k: k.
    output: of a head with several outputs, the one that counts.

  References:
    Deng and Raffel, 2023, https://arxiv.org/abs/2310.09520 (that no other is drawn: their code); Khanov et al., 2024,
    https://arxiv.org/abs/2402.01694 (ARGS: the same with log-probabilities, which draws as much).
  """
  if top_k < 1:
    raise types.UsageError(f'guidance.rad.top_k = {top_k}: it is at least 1')
  likely_BC, tokens_BC = jax.lax.top_k(logits_BV, min(top_k, logits_BV.shape[1]))
  steered_BC = likely_BC + beta * _of_output(reward.scores_of(tokens_BC), output)
  return jnp.full_like(logits_BV, vocab.MASKED_LOGIT).at[_rows(tokens_BC), tokens_BC].set(steered_BC)


def controlled(
    logits_BV: types.Array, value: decoding.View, *, lam: float, top_k: int = 0, output: int = 0
) -> types.Array:
  """Controlled decoding, token by token: log pi(v) + lam V(x, y<t, v).

  A pass for each token of the vocabulary is dear, so with `top_k` only the k likeliest are read; the others are given
  V(x, y<t), which by Bellman is the mean of V(x, y<t, v) under pi.

  Args:
    logits_BV: log pi but for a constant.
    value: V, a model that scores prefixes by the reward to come (as the head of a policy that PPO trained).
    lam: how much a value counts.
    top_k: tokens that are read; 0 for all.
    output: of a head with several outputs, the one that counts.

  References:
    Mudgal et al., 2023, https://arxiv.org/abs/2310.17022, Sec. 3, from its definition.
  """
  if top_k < 0:
    raise types.UsageError(f'guidance.controlled.top_k = {top_k}: it is at least 0')
  V = logits_BV.shape[1]
  _, tokens_BC = jax.lax.top_k(logits_BV, min(top_k or V, V))
  now_B1 = _of_output(value.scores_BO, output)[:, None]
  gain_BC = _of_output(value.scores_of(tokens_BC), output) - now_B1
  return logits_BV.at[_rows(tokens_BC), tokens_BC].add(lam * gain_BC)


def dera(logits_BV: types.Array, aligned: decoding.View, *, lam: float) -> types.Array:
  """Decoding-time realignment: lam l_aligned + (1 - lam) l_ref, as if the KL penalty had been beta / lam.

  Args:
    logits_BV: l_ref, of the model that the aligned one was trained from.
    aligned: l_aligned.
    lam: 0 is the reference, 1 the aligned model, more goes beyond it.

  References:
    Liu et al., 2024, https://arxiv.org/abs/2402.02992, from its definition.
  """
  return lam * aligned.logits_BV + (1 - lam) * logits_BV


def contrastive(logits_BV: types.Array, amateur: decoding.View, *, alpha: float, beta: float) -> types.Array:
  """Contrastive decoding: log p_expert - beta log p_amateur where p_expert >= alpha max p_expert; no other is drawn.

  Args:
    logits_BV: of the expert.
    amateur: a weaker model.
    alpha: the share of the most probable token's probability that makes a token plausible; 0 for all.
    beta: how much the amateur counts; 1 in the paper.

  References:
    Li et al., 2022, https://arxiv.org/abs/2210.15097, from its definition.
  """
  if not 0 <= alpha <= 1:
    raise types.UsageError(f'guidance.contrastive.alpha = {alpha}: it is from 0 to 1')
  expert_BV = jax.nn.log_softmax(logits_BV)
  contrast_BV = expert_BV - beta * jax.nn.log_softmax(amateur.logits_BV)
  is_plausible_BV = expert_BV >= jnp.log(alpha) + jnp.max(expert_BV, axis=1, keepdims=True)
  return jnp.where(is_plausible_BV, contrast_BV, vocab.MASKED_LOGIT)


def proxy(logits_BV: types.Array, tuned: decoding.View, base: decoding.View) -> types.Array:
  """Proxy tuning: l_big + (l_tuned - l_base), what tuning did to a small model carried over to a big one.

  Args:
    logits_BV: l_big.
    tuned: the small model, tuned.
    base: the small model as it was.

  References:
    Liu et al., 2024, https://arxiv.org/abs/2401.08565, from its definition.
  """
  return logits_BV + (tuned.logits_BV - base.logits_BV)


def in_context(logits_BV: types.Array, shown: decoding.View) -> types.Array:
  """The logits of the policy behind another prompt; the KL is then to the policy behind the prompt as it was given."""
  del logits_BV
  return shown.logits_BV


def urial(
    turns: Sequence[Mapping[str, str]],
    *,
    instruction: str = INSTRUCTION,
    examples: Sequence[tuple[str, str]] = EXAMPLES,
) -> str:
  """A prompt as plain text, with fixed examples of good answers in front: URIAL.

  Args:
    turns: messages; a prompt of text is what a user says.
    instruction: what comes first.
    examples: of a query and its answer each.

  References:
    Lin et al., 2023, https://arxiv.org/abs/2312.01552; the headings are theirs, the examples shorter and others.
  """
  headings = {'user': '# Query:\n', 'assistant': '# Answer:\n'}
  shown = [(role, text) for pair in examples for role, text in zip(headings, pair, strict=True)]
  said = [(turn['role'], turn['content']) for turn in turns]
  parts = [instruction, *(headings.get(role, '') + text for role, text in (*shown, *said)), headings['assistant']]
  return '\n\n'.join(part for part in parts if part)


def _rows(tokens_BC: types.Array) -> types.Array:
  return jnp.arange(len(tokens_BC))[:, None]


def _of_output(scores_O: types.Array, output: int) -> types.Array:
  """One of the outputs on the last axis."""
  if not 0 <= output < scores_O.shape[-1]:
    raise types.UsageError(f'output = {output}: the head of the guide has {scores_O.shape[-1]}, from 0 on')
  return scores_O[..., output]
