"""A world that can be enumerated: six responses to each of three prompts, one or two tokens long.

Responses 0 and 1 are the tokens 0 and 1; 2 to 5 are two tokens, 2 or 3 and then 0 or 1. A policy is a table of logits,
and of a value for each prompt, so that a loss on all data, each as frequent as a model of preferences says, is exact,
and so is its gradient.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import reference
from jaxalign import types

PROMPTS, RESPONSES = 3, 6
N = np.array([1, 1, 2, 2, 2, 2], np.float64)
RNG = np.random.default_rng(0)
# Logits of a first token, of a second one behind 2, and behind 3; the value of the prompt is last. Token 3 begins with
# most of the probability, so that the responses 0 to 3, if shown alone, may become likelier freely.
START = np.concatenate(
    [RNG.normal(0, 0.3, (3, 4)) + [0, 0, 0, 2], RNG.normal(0, 0.5, (3, 4)), np.zeros((PROMPTS, 1))], axis=1
)
# Which responses begin alike.
ALIKE = np.equal.outer([0, 1, 2, 2, 3, 3], [0, 1, 2, 2, 3, 3]).astype(np.float64)
R = RNG.uniform(-0.8, 0.8, (PROMPTS, RESPONSES))
SHOWN = (0, 1, 2, 3)
# Pairs without a response in common, so that the margin of each is free, and how often in ten the first was chosen.
MATCHED = ((0, 2), (1, 4))
TENTHS = np.array([[7, 4], [8, 6], [3, 9]])


def sig(x):
  return 1 / (1 + np.exp(-x))


def logit(p):
  return np.log(p / (1 - p))


def log_softmax(x):
  return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


# P(i is better than j) by Bradley and Terry, `[P, R, R]`.
WINS = sig(R[:, :, None] - R[:, None, :])
P = TENTHS / 10
# How often a response is desirable.
SHARE = RNG.uniform(0.25, 0.6, (PROMPTS, RESPONSES))


def split(s):
  """Log-probabilities `[P, R, 2]` of the tokens of responses that have the log-probabilities `s` `[P, R]`."""
  first = np.log(np.exp(s) @ ALIKE)
  return np.stack([first, s - first], axis=2)


def expected(s, x):
  """The mean of x `[P, R, 2]` over the tokens that may stand in the place of each, by the distribution of `s`."""
  first = np.sum(np.exp(s) * x[..., 0], axis=1, keepdims=True)
  return np.stack([np.broadcast_to(first, s.shape), (np.exp(split(s)[..., 1]) * x[..., 1]) @ ALIKE], axis=2)


def _of_tokens(logits, ref):
  """What a model makes of the responses' tokens: statistics `[P, R, 2]` by name, 0 where there is no token.

  They are log-probabilities, log sum_v p_v^2, the divergence KL(ref || policy), the entropy of the reference in shares
  of log 4, and the log-probability of the likeliest other token.
  """
  shares = lambda x: (jax.nn.log_softmax(x[:, :4]), jax.nn.log_softmax(x[:, 4:8].reshape(-1, 2, 2)))

  def spread(of_first, of_second):
    short = jnp.stack([of_first[:, :2], jnp.zeros_like(of_first[:, :2])], axis=2)
    long = jnp.stack([jnp.broadcast_to(of_first[:, 2:, None], of_second.shape), of_second], axis=3)
    return jnp.concatenate([short, long.reshape(-1, 4, 2)], axis=1)

  def rival(p):
    best, second = jnp.split(jax.lax.top_k(p, 2)[0], 2, axis=-1)
    return jnp.where(p == best, second, best)

  # Of log-probabilities of the policy and the reference, in one place.
  one = {
      'logps': lambda p, q: p,
      'sharpness': lambda p, q: jax.nn.logsumexp(2 * p, axis=-1, keepdims=True),
      'kl': lambda p, q: jnp.sum(jnp.exp(q) * (q - p), axis=-1, keepdims=True),
      'entropy': lambda p, q: -jnp.sum(jnp.exp(q) * q, axis=-1, keepdims=True) / np.log(4),
      'rival': lambda p, q: rival(p),
  }
  places = list(zip(shares(logits), shares(ref)))
  return {name: spread(*(jnp.broadcast_to(of(p, q), p.shape) for p, q in places)) for name, of in one.items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
  """G groups of K responses: their prompts `[G]`, which they are `[G, K]`, how often each group occurs, and labels."""

  prompt: np.ndarray
  which: np.ndarray
  often: np.ndarray
  labels: dict = dataclasses.field(default_factory=dict)

  def labelled(self, **labels):
    """With more labels, each broadcast to `[G, K]`, or to `[G K, 2]` for those of tokens."""
    shapes = {'weight': (self.which.size, 2), 'step': (self.which.size, 2)}
    full = {k: np.broadcast_to(np.asarray(x, np.float32), shapes.get(k, self.which.shape)) for k, x in labels.items()}
    return dataclasses.replace(self, labels=self.labels | full)


def _data(rows):
  prompt, which, often = zip(*rows)
  return Data(np.array(prompt), np.array(which), np.array(often, np.float32))


def pairs(among=range(RESPONSES), gold=()):
  """All ordered pairs, chosen first, as often as Bradley and Terry say; `gold` stands behind both."""
  return _data([(p, (i, j, *gold), WINS[p, i, j]) for p in range(3) for i in among for j in among if i != j])


def matched(among=MATCHED, tenths=TENTHS):
  """Each pair ten times for each prompt, in the one order or the other as `tenths` `[P, pairs]` says, chosen first."""
  rows = []
  for p, counts in enumerate(tenths):
    for (i, j), count in zip(among, counts, strict=True):
      rows += [(p, (i, j), 1)] * count + [(p, (j, i), 1)] * (10 - count)
  return _data(rows)


def lists(among=range(RESPONSES)):
  """One list a prompt, with its rewards as scores."""
  among = list(among)
  return _data([(p, among, 1) for p in range(PROMPTS)]).labelled(score=R[:, among])


def rankings():
  """Every order of `SHOWN`, as often as Plackett and Luce say, best of the highest score."""
  rows, scores = [], []
  for p in range(PROMPTS):
    for order in itertools.permutations(SHOWN):
      left = np.exp(R[p, list(order)])
      rows.append((p, SHOWN, np.prod(left / np.cumsum(left[::-1])[::-1])))
      scores.append([-float(order.index(i)) for i in SHOWN])
  return _data(rows).labelled(score=scores)


def singles(share=SHARE, among=SHOWN, other=False):
  """Each response, desirable with the frequency `share` `[P, R]`; `other` puts one of another prompt behind."""
  rows, desirable = [], []
  for p, i in itertools.product(range(PROMPTS), among):
    for label in (1, 0):
      rows.append((p, (i, (i + 1) % 4) if other else (i,), share[p, i] if label else 1 - share[p, i]))
      desirable.append([label])
  step = np.repeat(desirable, len(rows[0][1]), axis=0)
  return _data(rows).labelled(desirable=desirable, step=step)


def ratings(often):
  """Lists whose every score is right but for a shift, `{shift: frequency}`."""
  shifts = np.array(list(often))
  data = _data([(p, range(RESPONSES), often[x]) for x in often for p in range(PROMPTS)])
  return data.labelled(score=np.concatenate([R + x for x in shifts]))


def demonstrations(often):
  """Every response, as often as `often` `[..., P, R]` says, in the order of that."""
  return _data([(place[-2], place[-1:], x) for place, x in np.ndenumerate(often)])


def rejections(often):
  """Every response as often as `often` `[P, R]` says, all others behind it."""
  everyone = range(RESPONSES)
  return _data([(p, (i, *(j for j in everyone if j != i)), often[p, i]) for p in range(PROMPTS) for i in everyone])


def _stats(logits, data, ref=START):
  G, K = data.which.shape
  pick = lambda x_PRT: x_PRT[data.prompt[:, None], data.which]
  mask = pick(np.broadcast_to(np.arange(2) < N[:, None], (PROMPTS, RESPONSES, 2)).astype(np.float32))
  flat = lambda x_GKT: x_GKT.reshape(G * K, 2)
  ref = jnp.asarray(ref, jnp.float32)
  new, old = ({name: pick(x) for name, x in _of_tokens(x, ref).items()} for x in (logits, ref))
  place = np.indices((G, K)).reshape(2, -1, 1)
  rows = types.Rows(flat(mask), np.where(flat(mask) > 0, 0, -1), place[0], place[1], G, K)
  policy = types.Stats(
      logps_BT=flat(new['logps']),
      mask_BT=rows.mask_BT,
      logps_GK=new['logps'].sum(axis=2),
      tokens_GK=jnp.asarray(mask.sum(axis=2)),
      sharpness_GK=jax.lax.stop_gradient(new['sharpness'].sum(axis=2)),
      rival_logps_BT=flat(new['rival']),
      values_GK=jnp.broadcast_to(logits[data.prompt, 8:], (G, K)),
      rows=rows,
      valid_GK=jnp.ones((G, K)),
      valid_G=jnp.ones(G),
  )
  return policy, types.Stats(
      logps_BT=flat(old['logps']),
      logps_GK=old['logps'].sum(axis=2),
      logratios_GK=(new['logps'] - old['logps']).sum(axis=2),
      kl_BT=flat(new['kl']),
      entropy_GK=new['entropy'].sum(axis=2),
  )


def _mean(out, data):
  if out.per_item.ndim == 1:
    return jnp.sum(data.often * out.per_item) / data.often.sum()
  mask = np.arange(2) < N[data.which.reshape(-1), None]
  return jnp.sum(np.where(mask, np.repeat(data.often, data.which.shape[1])[:, None], 0) * out.per_item)


def _minimum(total, start, steps):
  """Where Adam, slowed to a stop, ends."""
  tx = optax.adam(optax.cosine_decay_schedule(0.05, steps))

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(total)(params), state)
    return (optax.apply_updates(params, updates), state), None

  # Every loss is compiled once and runs for milliseconds.
  run = jax.jit(
      lambda start: jax.lax.scan(step, (start, tx.init(start)), None, steps)[0][0],
      compiler_options={'xla_backend_optimization_level': 0},
  )
  with jax.numpy_dtype_promotion('standard'):  # Adam's count is an integer.
    return run(jnp.asarray(start, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Policy:
  """What became of a policy: tokens' log-probabilities `[P, R, 2]`, the same under the reference, and values `[P]`."""

  tokens: np.ndarray
  ref_tokens: np.ndarray
  value: np.ndarray

  @property
  def s(self):
    return self.tokens.sum(axis=2)

  @property
  def ref(self):
    return self.ref_tokens.sum(axis=2)

  @property
  def z(self):
    return self.s - self.ref

  @property
  def a(self):
    return self.s / N

  @property
  def pi(self):
    return np.exp(self.s)


def _policy(logits):
  start = jnp.asarray(START, jnp.float32)
  of = lambda x: np.asarray(_of_tokens(x, start)['logps'], np.float64)
  return Policy(of(logits), of(start), np.asarray(logits[:, 8], np.float64))


REF = _policy(jnp.asarray(START, jnp.float32)).ref


def trained(loss, data, steps=3000, follows=()) -> Policy:
  """The policy that a loss on responses or tokens leads to from the reference.

  `follows` has a share of the policy for each time that the reference is moved and training goes on.
  """
  labels = {name: jnp.asarray(x) for name, x in data.labels.items()}
  total = lambda logits, ref: _mean(loss(*_stats(logits, data, ref), labels), data)
  ref = jnp.asarray(START, jnp.float32)
  logits = _minimum(functools.partial(total, ref=ref), ref, steps)
  for alpha in follows:
    ref = reference.Sync(every=1, alpha=alpha).moved(ref, logits, jnp.int32(1))
    logits = _minimum(functools.partial(total, ref=ref), logits, steps)
  return _policy(logits)


def scored(loss, data, steps=3000, outputs=1):
  """The rewards `[P, R]` that a loss of reward models leads to from 0; with `outputs` those of a head, `[P, R, O]`."""
  labels = {name: jnp.asarray(x) for name, x in data.labels.items()}
  policy, ref = _stats(jnp.asarray(START, jnp.float32), data)

  def total(table):
    picked = table[data.prompt[:, None], data.which]
    per_token = jnp.broadcast_to(picked.reshape(-1, 1, outputs), (picked.size // outputs, 2, outputs))
    scores = {'rewards_GK': picked[..., 0], 'outputs_GKO': picked, 'scores_BTO': per_token}
    return _mean(loss(policy.replace(**scores), ref, labels), data)

  return np.asarray(_minimum(total, np.zeros((PROMPTS, RESPONSES, outputs)), steps), np.float64)
