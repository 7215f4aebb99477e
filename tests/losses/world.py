"""Random responses with token log-probabilities, as a loss sees them and as plain numbers in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import masked
from jaxalign import types
from tests import packed


@dataclasses.dataclass(frozen=True)
class World:
  """G groups of K responses, and a batch that holds them.

  Attributes:
    policy: token log-probabilities of each response, `[G][K]` arrays.
    ref: the same under the reference.
    weights: of each token.
    labels: by name, `[G, K]`.
    batch: where their tokens stand.
    policy_BT: the policy's in that batch.
    ref_BT: the reference's.
    weights_BT: the weights.
    dense_BT: by name, random statistics of the tokens that only whole distributions give.
    values_GK: random values of prompts.
  """

  policy: list
  ref: list
  weights: list
  labels: dict
  batch: types.Batch
  policy_BT: np.ndarray
  ref_BT: np.ndarray
  weights_BT: np.ndarray
  dense_BT: dict
  values_GK: np.ndarray

  def _sum(self, of):
    return np.array([[np.sum(x, dtype=np.float64) for x in group] for group in of])

  @functools.cached_property
  def s(self):
    """Summed log-probabilities `[G, K]`."""
    return self._sum(self.policy)

  @functools.cached_property
  def s_ref(self):
    return self._sum(self.ref)

  @functools.cached_property
  def n(self):
    """Numbers of tokens."""
    return np.array([[len(x) for x in group] for group in self.policy], np.float64)

  @property
  def z(self):
    return self.s - self.s_ref

  @property
  def a(self):
    return self.s / self.n

  def _label(self, name):
    return np.asarray(self.labels[name], np.float32).astype(np.float64)[: len(self.policy)]

  @property
  def score(self):
    return self._label('score')

  @property
  def margin(self):
    return self._label('margin')[:, 0]

  @property
  def p(self):
    return self._label('probability')[:, 0]

  @property
  def desirable(self):
    return self._label('desirable')[:, 0]

  @property
  def h(self):
    return self.z[:, 0] - self.z[:, 1]

  def stats(self, policy_BT=None):
    """What a loss reads: policy and reference."""
    batch, rows = self.batch, masked.rows(self.batch)
    n_GK = masked.totals(jnp.ones_like(self.ref_BT), batch)
    policy_BT = jnp.asarray(self.policy_BT if policy_BT is None else policy_BT)
    sums = lambda x: masked.totals(x, batch)
    policy = types.Stats(
        logps_BT=policy_BT,
        mask_BT=batch.mask_BT,
        logps_GK=sums(policy_BT),
        tokens_GK=sums(jnp.ones_like(policy_BT)),
        sharpness_GK=-0.3 * n_GK,
        rival_logps_BT=jnp.asarray(self.dense_BT['rival']),
        values_GK=jnp.asarray(self.values_GK),
        rows=rows,
        valid_GK=masked.valid(batch),
        valid_G=masked.valid_groups(batch),
    )
    ref = types.Stats(
        logps_BT=jnp.asarray(self.ref_BT),
        logps_GK=sums(self.ref_BT),
        logratios_GK=sums(policy_BT - self.ref_BT),
        kl_BT=jnp.asarray(self.dense_BT['kl']),
        entropy_GK=sums(self.dense_BT['entropy']),
    )
    return policy, ref

  def given(self):
    """Labels as a loss reads them."""
    labels = {name: jnp.asarray(x, jnp.float32) for name, x in self.labels.items()}
    return labels | {'weight': jnp.asarray(self.weights_BT)}

  def run(self, loss, policy_BT=None, **options):
    """The loss of every group."""
    policy, ref = self.stats(policy_BT)
    return loss(policy, ref, self.given(), **options)

  def total(self, loss, policy_BT=None, **options):
    """Their mean, as the step takes it."""
    out = self.run(loss, policy_BT, **options)
    return masked.weighted(out.per_item, masked.valid_groups(self.batch)).mean()

  def slopes(self, loss, **options):
    """Its derivative with respect to the summed log-probability of each response, times G: `[G, K]`."""
    slope_BT = jax.grad(lambda x: self.total(loss, x, **options))(jnp.asarray(self.policy_BT))
    return len(self.policy) * np.asarray(masked.totals(slope_BT, self.batch))[: len(self.policy)] / self.n


def world(groups=5, size=2, seed=0, spread=0.5, same=False, empty=2, longest=6, per_row=2):
  """Random responses of 1 to `longest` tokens; `same` has policy equal reference; `empty` places of the table."""
  rng = np.random.default_rng(seed)
  lengths = rng.integers(1, longest + 1, (groups, size))
  draw = lambda: [[-rng.uniform(0.1, 2.0, n).astype(np.float32) for n in row] for row in lengths]
  ref = draw()
  policy = ref if same else [[np.minimum(x + rng.normal(0, spread, len(x)).astype('f'), -0.01) for x in g] for g in ref]
  weights = [[rng.uniform(0, 2, n).astype(np.float32) for n in row] for row in lengths]
  places = rng.permutation([(g, k) for g in range(groups) for k in range(size)]).tolist()
  sequence = lambda g, k: (g, k, [1, 2], [3] * int(lengths[g][k]))
  rows = [[sequence(*x) for x in places[i : i + per_row]] for i in range(0, len(places), per_row)]
  batch = packed.micro_batch(rows, groups=groups + empty, size=size, length=10 * per_row)
  own = np.random.default_rng(seed + 100)
  ranges = {'kl': (0.01, 1.0), 'entropy': (0.01, 1.0), 'rival': (-3.0, -0.1)}
  uniform = lambda low, high: [[own.uniform(low, high, n).astype(np.float32) for n in row] for row in lengths]
  dense = {name: uniform(*bounds) for name, bounds in ranges.items()}
  arrays = [np.zeros(batch.mask_BT.shape, np.float32) for _ in range(3 + len(dense))]
  for b, row in enumerate(rows):
    for rank, (g, k, _, _) in enumerate(row):
      where = (b, np.flatnonzero(batch.responses_BT[b] == rank))
      for array, of in zip(arrays, (policy, ref, weights, *dense.values())):
        array[where] = of[g][k]
  pad = lambda x: np.concatenate([x, np.zeros((empty, size))])
  score = rng.uniform(0, 1, (groups, size))
  score = np.sort(score, axis=1)[:, ::-1] if size == 2 else score  # of a pair the chosen one is first
  labels = {
      'score': score,
      'margin': np.repeat(rng.uniform(0, 1, (groups, 1)), size, axis=1),
      'probability': np.repeat(rng.uniform(0, 1, (groups, 1)), size, axis=1),
      'desirable': np.repeat(rng.integers(0, 2, (groups, 1)), size, axis=1),
      'group': np.repeat(np.arange(groups)[:, None] % 3, size, axis=1),
  }
  labels = {name: pad(x) for name, x in labels.items()}
  dense_BT = dict(zip(dense, arrays[3:]))
  values_GK = own.normal(size=(groups + empty, size)).astype(np.float32)
  return World(policy, ref, weights, labels, batch, *arrays[:3], dense_BT, values_GK)


def sums(w, x_BT):
  """Of each response, in float64."""
  batch, found = w.batch, np.zeros(w.s.shape)
  for b, t in np.argwhere(np.asarray(batch.responses_BT) >= 0):
    place = int(batch.responses_BT[b, t])
    found[batch.group_BS[b, place], batch.slot_BS[b, place]] += np.float64(x_BT[b, t])
  return found
