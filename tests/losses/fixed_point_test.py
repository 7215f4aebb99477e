"""Where every loss leads in a world that can be enumerated, against what theory says: a table of all algorithms.

Data come from a Bradley-Terry model of rewards r (`tree.pairs`, p_ij how often i beats j), from pairs without a
response in common (`tree.matched`, where the margin of each is free), or from lists and single responses. Where only
some responses are shown, the others can give up their probability, so that z of each is free. A reference that follows
the policy has no fixed point: what is checked is where training ends between two of its moves.

In the derivations x is the argument of a loss's link f, of which p f(x) + (1 - p) f(-x) is least for a pair that is
labelled either way; h, z, s, a and n are those of the losses' docstrings; P_i is the share of the others that i beats.
"""

from collections.abc import Callable
import functools
import itertools
import re
from typing import Any
from typing import NamedTuple

import numpy as np
import pytest

from jaxalign.cli import catalog
from jaxalign.losses import batchwise
from jaxalign.losses import listwise
from jaxalign.losses import parts
from jaxalign.losses import pointwise
from jaxalign.losses import preference
from jaxalign.losses import reference_free as free
from jaxalign.losses import reward
from jaxalign.losses import rewarded
from jaxalign.losses import shaped
from jaxalign.losses import supervised
from jaxalign.losses import unpaired
from tests.losses import tree

_of = functools.partial
R, N, REF, P, WINS, SHARE = tree.R, tree.N, tree.REF, tree.P, tree.WINS, tree.SHARE
SHOWN = list(tree.SHOWN)
# How many others, and which share of the other responses shown, a response beats.
WON, WON_SHOWN = WINS.sum(axis=2) - 0.5, (WINS[:, SHOWN][:, :, SHOWN].sum(axis=2) - 0.5) / 3
sig, logit = tree.sig, tree.logit


class Case(NamedTuple):
  """Why, the loss, its data, what of the trained policy (or of its rewards) is to be what, how nearly, and moves.

  `follows` has a share of the policy for each time that the reference moves, see `tree.trained`.
  """

  why: str
  loss: Callable
  data: tree.Data
  check: Callable[[Any], tuple]
  atol: float = 3e-3
  follows: tuple[float, ...] = ()


def tilted(x):
  """The policy ref e^x / Z."""
  return lambda policy: (policy.s, tree.log_softmax(REF + x))


def gap(x):
  """First less second of the matched pairs."""
  return np.stack([x[:, i] - x[:, j] for i, j in tree.MATCHED], axis=1)


def centred(x):
  return x - x.mean(axis=1, keepdims=True)


def shown(x):
  return x[:, SHOWN]


def outer(x):
  return x[:, :, None] - x[:, None, :]


def pull(x):
  """How far the pairs of a response pull its own x up: sum_j p_ij sigmoid(-x_ij) - p_ji sigmoid(-x_ji)."""
  return (WINS * sig(-x)).sum(axis=2) - (WINS * sig(-x)).sum(axis=1)


def balanced(pull):
  """Where -d loss / d s_i = `pull` and probabilities add up to 1, pull_i is in proportion to pi_i."""
  return lambda policy: (policy.pi, pull(policy) / pull(policy).sum(axis=1, keepdims=True))


def moved(policy, alpha=1.0):
  """z + alpha D of every response."""
  return policy.z + alpha * tree.expected(policy.ref, policy.ref_tokens - policy.tokens).sum(axis=2)


def held(policy, beta, alpha):
  """How far D of rejected responses pulls up each response, where those that are chosen are held."""
  lost = (WINS * sig(-beta * outer(moved(policy, alpha)))).sum(axis=1) - 0.25
  (first, second), (ref_first, ref_second) = (np.exp(np.moveaxis(x, 2, 0)) for x in (policy.tokens, policy.ref_tokens))
  of_first = lost.sum(axis=1, keepdims=True) * (ref_first - first) * second
  return beta * alpha * (of_first + (lost @ tree.ALIKE) * (ref_second - second))


def rivalry(policy, up, down):
  """First and second tokens, and what is to become of them, where responses are wanted `up`, and unwanted `down`.

  The rival of a second token is the other one, so that a response has what it is wanted and the other is unwanted. Of
  first tokens it is the likeliest other, and what pulls each is in proportion to its probability.
  """
  first, wanted, unwanted = (x[:, [0, 1, 2, 4]] for x in (policy.tokens[..., 0], up @ tree.ALIKE, down @ tree.ALIKE))
  *_, second_best, best = np.argsort(first, axis=1).T[..., None]
  rival = np.where(np.arange(4) == best, second_best, best)
  push = unwanted * sig(first - np.take_along_axis(first, rival, axis=1))
  pull = wanted - push
  np.add.at(pull, (np.arange(len(pull))[:, None], rival), push)
  other = [3, 2, 5, 4]
  second = (up[:, 2:] + down[:, other]) / (up + down)[:, [[2, 3], [2, 3], [4, 5], [4, 5]]].sum(axis=2)
  return np.exp([first, policy.tokens[:, 2:, 1]]), [pull / wanted.sum(axis=1, keepdims=True), second]


def gated(policy, alpha, gate_margin, temperature):
  """The same of pairs whose gate closes."""
  gate = WINS * sig((gate_margin - outer(policy.s)) / temperature) * (1 - np.eye(tree.RESPONSES))
  return rivalry(policy, gate.sum(axis=2), alpha * gate.sum(axis=1))


def only(winners):
  """What is left to responses other than these."""
  return lambda policy: (np.where(winners, 0, policy.pi), 0)


def offset(p, d):
  """x + d where p log(1 + e^-x) is balanced by (1 - p) log(1 + e^(x + 2 d)): a root of a quadratic in e^(x + d)."""
  shrink = np.exp(-d)
  root = np.sqrt((2 * p - 1) ** 2 + 4 * p * (1 - p) * shrink**2)
  return np.log((2 * p - 1 + root) / (2 * (1 - p) * shrink))


def odds(a):
  return np.log(np.exp(a) / (1 - np.exp(a)))


def discovered(x, tau):
  gate = sig(x / tau)
  return (1 - gate) * np.log1p(np.exp(-x)) + gate * np.exp(-x)


def least(link):
  """The x of the matched pairs that is best for a link, on a grid."""
  x = np.linspace(-8, 8, 16001)
  return np.array([[x[np.argmin(p * link(x) + (1 - p) * link(-x))] for p in row] for row in P])


def best_of(x):
  return x == x.max(axis=1, keepdims=True)


# The reference's, a token's mean, as a share of log 4, of the matched pairs.
_ENTROPY = -tree.expected(REF, tree.split(REF)).sum(axis=2) / N / np.log(4)
ENTROPY_OF_BOTH = np.stack([_ENTROPY[:, list(both)].mean(axis=1) for both in tree.MATCHED], axis=1)
# How much likelier a prompt is among desirable responses.
RATIO = np.array([[0.5], [1.0], [2.5]])
ALL, SOME, MATCHED = tree.pairs(), tree.pairs(SHOWN), tree.matched()
TRIPLES = tree.pairs(gold=(2,))
GOLD = 15 * (np.arange(tree.RESPONSES) == 2)  # of the weight of all pairs
OTHER = tree.RNG.uniform(-1, 1, R.shape)  # rewards of another objective
OFTEN = tree.RNG.uniform(1, 3, R.shape)
GAP = {'score': [[2.0, 0.0]]}
ONE = tree.matched(((0, 2),), [[8]])  # of the first prompt alone
# Every label is that of the majority.
CERTAIN = tree.matched(tenths=np.where(P > 0.5, 10, 0))
CASES: dict[str, Case] = {}


def case(name, *args, **options):
  for each in name.split():
    CASES[each] = Case(*args, **options)


# Links whose best x is log p / (1 - p) = r_i - r_j: the regularised optimum.
TO_REWARD = 'sigmoid(x) = p, so beta h is the difference of rewards: pi = ref e^(r / beta) / Z'
case('dpo step_dpo', TO_REWARD, _of(preference.dpo, beta=0.5), ALL, tilted(R / 0.5))
case('rso', TO_REWARD, _of(preference.rso, gamma=0.5), ALL, tilted(R / 0.5))
case(
    'soft_dpo',
    TO_REWARD + ', of probabilities in place of frequent labels',
    _of(preference.soft, beta=0.5),
    tree.Data(ALL.prompt, ALL.which, np.ones_like(ALL.often)).labelled(probability=ALL.often[:, None]),
    tilted(R / 0.5),
)
case('wpo', TO_REWARD + '; both orders weigh alike', _of(shaped.wpo, beta=0.5, clamp=False), ALL, tilted(R / 0.5))
case(
    'robust',
    'of labels turned with probability eps the loss of clean ones is left: ' + TO_REWARD,
    _of(preference.robust, beta=0.5, label_smoothing=0.2),
    tree.Data(ALL.prompt, ALL.which, 0.8 * ALL.often + 0.2 * (1 - ALL.often)),
    tilted(R / 0.5),
)
case(
    'gpo_savage',
    'q^2 p + (1 - q)^2 (1 - p) of q = sigmoid(-x) is least at q = 1 - p: ' + TO_REWARD,
    _of(preference.gpo, beta=0.5, link=parts.savage),
    ALL,
    tilted(R / 0.5),
)
case(
    'gpo_exponential',
    'p e^-x = (1 - p) e^x: x is half the difference of rewards',
    _of(preference.gpo, beta=0.5, link=parts.exponential_loss),
    ALL,
    tilted(R / 1.0),
)
case(
    'dr_dpo',
    'most of p sigmoid(x)^k + (1 - p) sigmoid(-x)^k, k = 1 / beta_prime < 1: x (1 - k) = log p / (1 - p)',
    _of(batchwise.dr_dpo, beta=0.5, beta_prime=2.0),
    MATCHED,
    lambda policy: (gap(policy.z), 2 * logit(P) / 0.5),
)
case(
    'beta_dpo',
    'of all pairs, in the first step: beta is beta_0, as the mean margin is its own running mean; DPO',
    _of(batchwise.beta_dpo, beta=0.5, alpha=0.6, keep=1.0),
    MATCHED,
    lambda policy: (gap(policy.z), logit(P) / 0.5),
)
case(
    'group_robust',
    'weights of groups are positive, and each prompt is a group of its own: DPO',
    _of(batchwise.group_robust, beta=0.5, groups=3, rate=0.5),
    MATCHED.labelled(group=MATCHED.prompt[:, None]),
    lambda policy: (gap(policy.z), logit(P) / 0.5),
)
case(
    'aot',
    'of one pair that the reference has in the right order sorting keeps the order: DPO',
    _of(batchwise.aot, beta=0.5),
    ONE,
    lambda policy: (gap(policy.z)[:1, :1], logit(0.8) / 0.5),
)
case(
    'aot_unpaired',
    'of one pair sorting leaves as many comparisons of a response with itself as it lost; the others have no optimum',
    _of(batchwise.aot_unpaired, beta=0.5),
    ONE,
    lambda policy: (np.exp(-0.5 * gap(policy.z)[0, 0]), 0),
    atol=0.02,
)

# Links with another best x, on pairs whose margins are free.
case(
    'cdpo',
    'the frequency of a label is (1 - eps) p + eps (1 - p); sigmoid(x) is that',
    _of(preference.cdpo, beta=0.5, label_smoothing=0.1),
    MATCHED,
    lambda policy: (gap(policy.z), logit(0.9 * P + 0.1 * (1 - P)) / 0.5),
)
case(
    'ipo',
    'least squares of h_ij to (2 p_ij - 1) / (2 tau): z_i = mean of p_ij over all j / tau, up to a constant',
    _of(preference.ipo, tau=0.5),
    ALL,
    tilted(WINS.mean(axis=2) / 0.5),
)
case(
    'ipo_averaged',
    'as ipo, for z / n',
    _of(preference.ipo_averaged, tau=0.5),
    ALL,
    lambda policy: (centred(policy.z / N), centred(WINS.mean(axis=2) / 0.5)),
)
case(
    'hinge',
    'p max(0, 1 - x) + (1 - p) max(0, 1 + x) falls up to x = 1 if p > 1/2, and rises then',
    _of(preference.hinge, beta=0.5),
    MATCHED,
    lambda policy: (gap(policy.z), np.sign(P - 0.5) / 0.5),
    atol=0.02,
)
case(
    'gpo_quadratic',
    'p (1 - x) = (1 - p) (1 + x), within |x| <= 1',
    _of(preference.gpo, beta=0.5, link=parts.truncated_quadratic),
    MATCHED,
    lambda policy: (gap(policy.z), (2 * P - 1) / 0.5),
)
case(
    'exo_pair',
    'p KL(q, 1 - eps) + (1 - p) KL(q, eps): log q / (1 - q) = (2 p - 1) log (1 - eps) / eps',
    _of(preference.exo_pair, beta=0.5, label_smoothing=0.2),
    MATCHED,
    lambda policy: (gap(policy.z), (2 * P - 1) * logit(0.8) / 0.5),
)
case(
    'discopop',
    'not convex, no closed form: the best x on a grid',
    _of(preference.discopop, beta=0.5, tau=0.7),
    MATCHED,
    lambda policy: (0.5 * gap(policy.z), least(_of(discovered, tau=0.7))),
)
case(
    'sigmoid_norm',
    'as dpo, for z / n',
    _of(preference.sigmoid_norm, beta=0.5),
    ALL,
    lambda policy: (centred(0.5 * policy.z / N), centred(R)),
)

case(
    'mallows_dpo',
    'as dpo, with phi beta, phi = -scale log of the mean entropy of the reference on both, a share of log 4',
    _of(shaped.mallows_dpo, beta=0.5, scale=0.8),
    MATCHED,
    lambda policy: (gap(policy.z), logit(P) / (0.5 * -0.8 * np.log(ENTROPY_OF_BOTH))),
)

# A reference that follows the policy: at its last move it is where DPO ended before.
case(
    'sdpo',
    'three stages, each of which adds r / beta to log pi, up to a constant',
    _of(preference.dpo, beta=1.0),
    ALL,
    tilted(3 * R),
    follows=(1.0, 1.0),
)
case(
    'tr_dpo',
    'the reference has gained 0.6 r / beta twice, and the policy gains r / beta on it; logits are mixed, which is exact'
    ' for responses that differ in one token',
    _of(preference.dpo, beta=1.0),
    ALL,
    lambda policy: (policy.z[:, [0, 2, 4]] - policy.z[:, [1, 3, 5]], 2.2 * (R[:, [0, 2, 4]] - R[:, [1, 3, 5]])),
    follows=(0.6, 0.6),
)

# Divergences: beta f'(pi / ref) is the reward, up to a constant.
DIVERGES = "sigmoid(x) = p, so beta f'(pi / ref) is r up to a constant"
case(
    'f_dpo_forward_kl',
    DIVERGES + ": f' = -1 / u",
    _of(preference.f_dpo, beta=1.0, divergence=parts.forward_kl),
    ALL,
    lambda policy: (centred(-np.exp(-policy.z)), centred(R)),
)
case(
    'f_dpo_jensen_shannon',
    DIVERGES + ": f' = log 2 u / (1 + u)",
    _of(preference.f_dpo, beta=1.0, divergence=parts.jensen_shannon),
    ALL,
    lambda policy: (centred(np.log(2 / (1 + np.exp(-policy.z)))), centred(R)),
)
case(
    'f_dpo_alpha',
    DIVERGES + ": f' = (1 - u^-alpha) / alpha",
    _of(preference.f_dpo, beta=1.0, divergence=_of(parts.alpha_divergence, alpha=0.4)),
    ALL,
    lambda policy: (centred((1 - np.exp(-0.4 * policy.z)) / 0.4), centred(R)),
)
case(
    'chi_po',
    DIVERGES + ": f' = u + log u, differences within the clip",
    _of(preference.chi_po, beta=1.0, max_reward=1.0),
    ALL,
    lambda policy: (centred(policy.z + np.exp(policy.z)), centred(R)),
)

# Shifted or weighed margins.
case(
    'dpop',
    'the penalty only adds to the loss and is 0 where nothing is less likely than before: DPO, and no z < 0',
    _of(shaped.dpop, beta=2.0, penalty=5.0),
    MATCHED,
    lambda policy: (
        np.append(gap(policy.z), np.minimum(policy.z[:, [0, 1, 2, 4]], 0)),
        np.append(logit(P) / 2, [0] * 12),
    ),
    atol=0.02,
)
OFFSET = 'p sigmoid(-(x - d)) = (1 - p) sigmoid(x + d), d the offset, in either order of the pair'
case(
    'odpo',
    OFFSET,
    _of(shaped.odpo, beta=0.5, alpha=0.5),
    MATCHED.labelled(**GAP),
    lambda policy: (0.5 * gap(policy.z), offset(P, 0.5 * np.log(2))),
)
case(
    'margin_dpo',
    OFFSET,
    _of(shaped.margin_dpo, beta=0.5, scale=2.0),
    MATCHED.labelled(margin=0.3),
    lambda policy: (0.5 * gap(policy.z), offset(P, 0.6)),
)
case(
    'simpo', OFFSET, _of(free.simpo, beta=2.0, margin=0.7), MATCHED, lambda policy: (2 * gap(policy.a), offset(P, 0.7))
)
case(
    'alphapo',
    OFFSET,
    _of(free.alphapo, beta=2.0, margin=0.3, alpha=0.25),
    MATCHED,
    lambda policy: (2 * gap((1 - np.exp(-0.25 * policy.a)) / 0.25), offset(P, 0.3)),
)
case(
    'modpo',
    'beta h = w (r_i - r_j) + (1 - w) (score_i - score_j)',
    _of(shaped.modpo, beta=0.5, weight=0.6),
    ALL.labelled(score=OTHER[ALL.prompt[:, None], ALL.which]),
    tilted((0.6 * R + 0.4 * OTHER) / 0.5),
)
case('r_dpo', 'beta z + alpha n is r', _of(shaped.r_dpo, beta=0.5, alpha=0.3), ALL, tilted((R - 0.3 * N) / 0.5))
case(
    'ld_dpo',
    'as dpo; the second token, beyond the length of the other, counts alpha',
    _of(shaped.ld_dpo, beta=0.5, alpha=0.3),
    MATCHED,
    lambda policy: (gap((policy.tokens - policy.ref_tokens) @ [1, 0.3]), logit(P) / 0.5),
)
case(
    'tis_dpo',
    'as dpo, with weighted tokens',
    _of(shaped.tis_dpo, beta=0.5),
    MATCHED.labelled(weight=[1.5, 0.4]),
    lambda policy: (gap((policy.tokens - policy.ref_tokens) @ [1.5, 0.4]), logit(P) / 0.5),
)
case(
    'cal_dpo',
    'sigmoid(h) - p + 2 c (z_i - (2 p - 1) / (2 beta)) = 0, and the same for -z_j',
    _of(shaped.cal_dpo, beta=1.0, calibration=0.5),
    MATCHED,
    lambda policy: (
        [sig(gap(policy.z)) + sign * policy.z[:, side] for sign, side in ((1, [0, 1]), (-1, [2, 4]))],
        [P + (2 * P - 1) * 0.5] * 2,
    ),
)

TILT = tree.log_softmax(REF + R / 0.5)
case(
    'tdpo1',
    'beta (z + D) is r up to a constant: D is the same behind one first token, and moves with the second ones alone,'
    ' which are those of ref e^(r / beta) therefore; then pi = ref e^(r / beta - D) / Z',
    _of(shaped.tdpo1, beta=0.5),
    ALL,
    tilted(R / 0.5 - tree.expected(REF, tree.split(REF) - tree.split(TILT))[..., 1]),
)
case(
    'tdpo2',
    'no closed form: pairs pull as far as the divergence of rejected responses, of first tokens too, pulls back',
    _of(shaped.tdpo2, beta=0.5, alpha=0.6),
    ALL,
    lambda policy: (0.5 * pull(0.5 * outer(moved(policy, 0.6))), -held(policy, 0.5, 0.6)),
)

# Responses each for itself: z is free, as others give up their probability.
case(
    'sppo_hard',
    'the mean of targets +-1 / (2 beta): z_i = (2 P_i - 1) / (2 beta), which is eta (P_i - 1/2)',
    _of(preference.sppo_hard, beta=0.5),
    SOME,
    lambda policy: (shown(policy.z), (2 * WON_SHOWN - 1) / (2 * 0.5)),
)
case(
    'bco_pair',
    'up as often as it wins, down as often as it loses: sigmoid(beta z_i) = P_i',
    _of(preference.bco_pair, beta=1.0),
    SOME,
    lambda policy: (shown(policy.z), logit(WON_SHOWN)),
)
case(
    'nca_pair',
    'up P_i, down P_i / 2 + (1 - P_i) / 2: e^(beta z_i) = 2 P_i',
    _of(preference.nca_pair, beta=1.0),
    SOME,
    lambda policy: (shown(policy.z), np.log(2 * WON_SHOWN)),
)
ALL_OR_NOTHING = (
    'in proportion to sigmoid(beta z_i), so without an inner optimum: what is up less often than down vanishes'
)
WINNERS = np.isin(np.arange(tree.RESPONSES), SHOWN) & (np.pad(WON_SHOWN, ((0, 0), (0, 2))) > 0.5)
case('apo_zero', ALL_OR_NOTHING, _of(preference.apo_zero, beta=0.5), SOME, only(WINNERS), atol=0.02)
case(
    'apo_down',
    'both responses of a pair sink, the one that wins less often further: all that is shown vanishes, in order',
    _of(preference.apo_down, beta=0.5),
    SOME,
    lambda policy: (
        [shown(policy.pi).sum(axis=1), (np.sign(outer(shown(policy.z))) != np.sign(outer(shown(R)))).sum(axis=(1, 2))],
        0,
    ),
    atol=0.02,
)
case(
    'apo_zero_unpaired',
    ALL_OR_NOTHING,
    _of(unpaired.apo_zero_unpaired, beta=0.5),
    tree.singles(),
    only((SHARE > 0.5) & np.isin(np.arange(6), SHOWN)),
    atol=0.02,
)
case(
    'kto',
    ALL_OR_NOTHING + ', by their weights',
    _of(unpaired.kto, beta=0.5, desirable_weight=1.5),
    tree.singles(other=True),
    only((SHARE > 0.4) & np.isin(np.arange(6), SHOWN)),
    atol=0.02,
)
case(
    'bco',
    'after many steps, whose mean d stays: sigmoid(beta z - d) is the share of desirable',
    _of(unpaired.bco, beta=1.0, state=(np.float32(-0.3), np.float32(1e9))),
    tree.singles(),
    lambda policy: (shown(policy.z), logit(shown(SHARE)) - 0.3),
)
case(
    'bco_udm',
    'as bco; what is undesirable counts by the ratio: the share is q / (q + ratio (1 - q))',
    _of(unpaired.bco_udm, beta=1.0, state=(np.float32(-0.3), np.float32(1e9))),
    tree.singles().labelled(density_ratio=RATIO[tree.singles().prompt]),
    lambda policy: (shown(policy.z), logit(shown(SHARE)) - np.log(RATIO) - 0.3),
)
case(
    'npo',
    '2 (1 - q) sigmoid(beta z) = q retain / n, q the share of desirable',
    _of(unpaired.npo, beta=0.5, retain=0.6),
    tree.singles(),
    lambda policy: (sig(0.5 * shown(policy.z)), shown(0.6 * SHARE / (2 * N * (1 - SHARE)))),
)

# Sums of terms.
BALANCE = 'no closed form: what each response is pulled by is in proportion to its probability'
case(
    'rpo iterative_rpo',
    BALANCE,
    _of(shaped.rpo, beta=0.5, eta=0.2),
    ALL,
    balanced(lambda policy: 0.5 * pull(0.5 * outer(policy.z)) + 0.2 * WON / N),
)
case(
    'mpo',
    BALANCE,
    _of(shaped.mpo, beta=0.5, weights=(0.8, 0.3, 1.0)),
    ALL,
    balanced(lambda policy: 0.4 * pull(0.5 * outer(policy.z)) + 0.15 * (WON - 5 * sig(0.5 * policy.z)) + WON / N),
)
case(
    'cpo',
    BALANCE,
    _of(free.cpo, beta=0.5, alpha=0.4),
    ALL,
    balanced(lambda policy: 0.5 * pull(0.5 * outer(policy.s)) + 0.4 * WON / N),
)
case(
    'orpo',
    BALANCE,
    _of(free.orpo, lam=0.3),
    ALL,
    balanced(lambda policy: (WON + 0.3 * pull(outer(odds(policy.a))) / (1 - np.exp(policy.a))) / N),
)
case(
    'tpo',
    BALANCE,
    _of(free.tpo, beta=0.5, alpha=0.1),
    TRIPLES,
    balanced(lambda policy: 0.5 * pull(0.5 * outer(policy.s)) + 0.1 * GOLD / N),
)
case(
    'tpo_l',
    BALANCE,
    _of(free.tpo_l, beta=0.8, alpha=0.1, margin=0.3),
    TRIPLES,
    balanced(lambda policy: (0.8 * pull(0.8 * outer(policy.a) - 0.3) + 0.1 * GOLD) / N),
)
SURE = np.maximum(P, 1 - P)
case(
    'slic_hf',
    'of s_i - s_j, p > 1/2: up to delta, and on to where lam (p - sigmoid) = 1 - p if that is farther',
    _of(free.slic_hf, delta=0.3, lam=2.0),
    MATCHED,
    lambda policy: (gap(policy.s), np.sign(P - 0.5) * np.maximum(0.3, logit(SURE - (1 - SURE) / 2))),
    atol=0.02,
)
case(
    'simper',
    'linear in e^a, which is pi of a single token: all to the response that is chosen most often',
    free.simper,
    tree.pairs((0, 1)),
    only(best_of(R[:, :2])[:, [0, 1, 0, 0, 0, 0]] & (np.arange(6) < 2)),
    atol=0.02,
)

# Lists.
case(
    'infonca',
    'softmax(beta z) = softmax(r / alpha)',
    _of(listwise.infonca, beta=0.5, alpha=0.8),
    tree.lists(),
    tilted(R / 0.4),
)
case(
    'exo',
    'softmax(beta z) = softmax(r / b)',
    _of(listwise.exo, beta=0.5, reward_beta=0.8),
    tree.lists(),
    tilted(R / 0.4),
)
case('dro', 'r - tau z is the same for all', _of(listwise.dro, tau=0.5), tree.lists(), tilted(R / 0.5))
case(
    'dro_v',
    'r - tau z is V: ref e^(r / tau) / Z, V = tau log Z',
    _of(listwise.dro_v, tau=0.5),
    tree.lists(),
    lambda policy: (
        np.column_stack([policy.s, policy.value]),
        np.column_stack([tree.log_softmax(REF + R / 0.5), 0.5 * np.log(np.exp(REF + R / 0.5).sum(axis=1))]),
    ),
)
case(
    'd2o',
    BALANCE + '; with a response rejected the five others rise, as much as beta is above alpha',
    _of(listwise.d2o, beta=0.8, alpha=0.5),
    tree.rejections(OFTEN),
    lambda policy: (policy.pi, d2o(policy) / d2o(policy).sum(axis=1, keepdims=True)),
)
case(
    'dpo_pl',
    'the likelihood of a Plackett-Luce model of beta z, of data from one of r',
    _of(listwise.dpo_pl, beta=0.5),
    tree.rankings(),
    lambda policy: (centred(0.5 * shown(policy.z)), centred(shown(R))),
)
case(
    'nca',
    'up q_i = softmax(r / alpha)_i, down 1 / K: e^(beta z_i) = K q_i',
    _of(listwise.nca, beta=1.0, alpha=0.8),
    tree.lists(SHOWN),
    lambda policy: (shown(policy.z), np.log(4) + tree.log_softmax(shown(R) / 0.8)),
)
case(
    'lipo_lambda',
    'of two the weight is the same in either order: sigmoid(beta h) = p',
    _of(listwise.lipo_lambda, beta=0.5),
    MATCHED.labelled(**GAP),
    lambda policy: (0.5 * gap(policy.z), logit(P)),
)
case(
    'pro',
    BALANCE + '; of two it is logistic in the gap of scores times a_i - a_j',
    _of(listwise.pro, sft_weight=0.5),
    MATCHED.labelled(**GAP),
    lambda policy: (policy.pi, pro(policy) / pro(policy).sum(axis=1, keepdims=True)),
)
TO_BEST = 'all to the best response'
case('rrhf', TO_BEST, _of(listwise.rrhf, weight=2.0), tree.lists(), only(best_of(R)), atol=0.02)
case(
    'lire',
    'minus the mean score: ' + TO_BEST,
    _of(listwise.lire, temperature=1.0),
    tree.lists(),
    only(best_of(R)),
    atol=0.02,
)

case(
    'a_lol',
    'weights max(r - mean r, 0), the ratio being held at 1: in proportion to them',
    _of(rewarded.a_lol, clip_eps=0.0),
    tree.lists(),
    lambda policy: (policy.pi, share(np.maximum(centred(R), 0.0))),
    atol=0.02,
)


def d2o(policy):
  others = (policy.z.sum(axis=1, keepdims=True) - policy.z) / 5
  miss = OFTEN * sig(-(0.8 * others - 0.5 * policy.z))
  return 0.8 * (miss.sum(axis=1, keepdims=True) - miss) / 5 - 0.5 * miss


def pro(policy):
  pull = np.zeros_like(R)
  up = 2 * (P - sig(2 * gap(policy.a)))
  for m, (i, j) in enumerate(tree.MATCHED):
    pull[:, i], pull[:, j] = up[:, m] + 0.5 * P[:, m], -up[:, m] + 0.5 * (1 - P[:, m])
  return pull / N


def mode():
  """The responses whose first token is the commonest, and whose second is the commoner behind it."""
  first = np.concatenate(
      [OFTEN[:, :2], OFTEN[:, 2:4].sum(axis=1, keepdims=True), OFTEN[:, 4:].sum(axis=1, keepdims=True)], axis=1
  )
  begins = best_of(first)[:, [0, 1, 2, 2, 3, 3]]
  return begins & np.concatenate([np.ones((3, 2), bool), best_of(OFTEN[:, 2:4]), best_of(OFTEN[:, 4:])], axis=1)


# Tokens.
EMPIRICAL = 'the likelihood of the data is greatest at their distribution'
share = lambda x: x / x.sum(axis=1, keepdims=True)


def reached(x):
  """How likely the reference stays at or below each x."""
  return (np.exp(REF)[:, None, :] * (x[:, None, :] <= x[:, :, None])).sum(axis=2)


def best_of_draws(count):
  """How often each response is the best of so many draws from the reference."""
  often = np.zeros_like(R)
  for draw in map(list, itertools.product(range(tree.RESPONSES), repeat=count)):
    best = np.take(draw, R[:, draw].argmax(axis=1))
    often[np.arange(len(R)), best] += np.exp(REF[:, draw].sum(axis=1))
  return often


case(
    'sft csft hindsight',
    EMPIRICAL,
    supervised.cross_entropy,
    tree.demonstrations(OFTEN),
    lambda policy: (policy.pi, share(OFTEN)),
)
case(
    'raft',
    EMPIRICAL + ': the best of three draws from the reference is i where all reach no higher, but not all stay below',
    supervised.cross_entropy,
    tree.demonstrations(best_of_draws(3)),
    lambda policy: (policy.pi, reached(R) ** 3 - (reached(R) - np.exp(REF)) ** 3),
)
case(
    'rest',
    EMPIRICAL + ': draws from the reference that reach the threshold, which is between rewards of each prompt',
    supervised.cross_entropy,
    tree.demonstrations(np.exp(REF) * (R > 0)),
    lambda policy: (policy.pi, share(np.exp(REF) * (R > 0))),
    atol=0.02,
)
case(
    'generative_rm',
    'the answers 0 and 1 have the odds of their frequencies, so the score is the log-odds of being good',
    supervised.cross_entropy,
    tree.demonstrations(np.pad(np.stack([SHARE[:, 0], 1 - SHARE[:, 0]], axis=1), ((0, 0), (0, 4)))),
    lambda policy: (policy.s[:, 0] - policy.s[:, 1], logit(SHARE[:, 0])),
)
case(
    'quark',
    'each token is a mixture: behind what was said before, (frequency in the data + beta ref) / (1 + beta)',
    _of(supervised.quark, beta=0.6),
    tree.demonstrations(OFTEN),
    lambda policy: (
        np.exp(policy.tokens),
        (np.exp(tree.split(np.log(share(OFTEN)))) + 0.6 * np.exp(policy.ref_tokens)) / 1.6,
    ),
)
case(
    'c_rlft',
    EMPIRICAL + ', weighted',
    _of(supervised.class_weighted, undesirable_weight=0.1),
    tree.singles(among=range(6)),
    lambda policy: (policy.pi, share(SHARE + 0.1 * (1 - SHARE))),
)
RIVALS = 'rivals are drawn, unless there are but two tokens; here, as with `rivals` = 1, it is the likeliest other'
case(
    'cringe',
    RIVALS,
    _of(supervised.cringe, alpha=0.7),
    tree.singles(among=range(6)),
    lambda policy: rivalry(policy, SHARE, 0.7 * (1 - SHARE)),
)
case(
    'pairwise_cringe',
    RIVALS + '; as cringe, of gated pairs',
    _of(shaped.pairwise_cringe, alpha=0.7, gate_margin=1.0, temperature=2.0),
    ALL,
    _of(gated, alpha=0.7, gate_margin=1.0, temperature=2.0),
)
case(
    'dft',
    'the gradient is that of -p: all to the commonest token',
    supervised.dft,
    tree.demonstrations(OFTEN),
    only(mode()),
    atol=0.02,
)
case(
    'unlikelihood',
    'q log p + alpha (1 - q) log (1 - p) of a token: p = q / (q + alpha (1 - q))',
    _of(supervised.unlikelihood, alpha=2.0),
    tree.singles(among=(0, 1)),
    lambda policy: (policy.pi[:, :2], (SHARE / (SHARE + 2 * (1 - SHARE)))[:, :2]),
)

# Reward models.
KINDS = tree.RNG.dirichlet([4, 4, 4], R.shape)  # how often a response is of each class
BOTH = np.transpose([*itertools.permutations(range(3), 2)])  # six texts of two responses
HEADS = {pointwise.process: 2, pointwise.attributes: 2, pointwise.classification: 3}
case(
    'rm',
    'sigmoid(r_i - r_j) = p, and centring makes the sum 0',
    _of(reward.bradley_terry, centring=0.01),
    MATCHED.labelled(margin=0.0),
    lambda found: ([found[:, [0, 1], 0], found[:, [2, 4], 0]], [logit(P) / 2, -logit(P) / 2]),
)
LEVEL = [[7, 7], [8, 8], [3, 3]]
case(
    'rm_length_debiased',
    'the longer response is the better one as often as not, so the correlation is 0: Bradley-Terry',
    _of(reward.length_debiased, penalty=5.0),
    tree.matched(((0, 2), (4, 1)), LEVEL),
    lambda found: (found[:, [0, 4], 0] - found[:, [2, 1], 0], logit(np.array(LEVEL) / 10)),
)
RANKED = 'pairs of a Plackett-Luce ranking are those of Bradley and Terry: r, up to a constant'
case(
    'rm_all_pairs',
    RANKED,
    reward.all_pairs,
    tree.rankings(),
    lambda found: (centred(found[:, :4, 0]), centred(shown(R))),
)
case(
    'rm_plackett_luce',
    RANKED,
    reward.plackett_luce,
    tree.rankings(),
    lambda found: (centred(found[:, :4, 0]), centred(shown(R))),
)
case(
    'rm_regression',
    'the mean rating',
    pointwise.regression,
    tree.ratings({0.8: 0.25, -0.4: 0.75}),
    lambda found: (found[..., 0], R - 0.1),
)
case(
    'rm_attributes',
    'a mean of ratings, of which one of two on a response weighs half, and one alone whole',
    _of(pointwise.attributes, attributes=('kind', 'terse')),
    tree.demonstrations(np.ones((2, *R.shape))).labelled(
        kind=np.reshape([R + 0.3, R - 0.6], (-1, 1)), terse=np.reshape([-R, np.full(R.shape, np.nan)], (-1, 1))
    ),
    lambda found: (found, np.stack([R + (0.5 * 0.3 - 0.6) / 1.5, -R], axis=2)),
)
case(
    'rm_classes',
    'the frequencies of classes',
    pointwise.classification,
    tree.demonstrations(np.moveaxis(KINDS, 2, 0)).labelled(**{'class': np.repeat(np.arange(3), R.size)[:, None]}),
    lambda found: (np.exp(found) / np.exp(found).sum(axis=2, keepdims=True), KINDS),
)
case(
    'preference_model',
    'the log-odds of the first: r_i - r_j for each text of two, which changes its sign with their order',
    pointwise.correctness,
    tree.singles(WINS[:, *BOTH], among=range(6)),
    lambda found: (found[..., 0], R[:, BOTH[0]] - R[:, BOTH[1]]),
)
case(
    'orm',
    'the log-odds of being right',
    pointwise.correctness,
    tree.singles(),
    lambda found: (found[:, :4, 0], logit(shown(SHARE))),
)
case(
    'fudge',
    'the mean reward behind a prefix',
    pointwise.prefixes,
    tree.demonstrations(np.stack([np.full(R.shape, 0.25), np.full(R.shape, 0.75)])).labelled(
        reward=np.reshape([R + 0.8, R - 0.4], (-1, 1))
    ),
    lambda found: (found[..., 0], R - 0.1),
)
case(
    'prm',
    'the log-odds of being right',
    pointwise.process,
    tree.singles(),
    lambda found: (found[:, :4, 1] - found[:, :4, 0], logit(shown(SHARE))),
)


# What trains on its own samples has no data that could be enumerated.
OFFLINE = [name for name in catalog.algorithms() if not catalog.is_online(name)]


@functools.cache
def fitted(loss, data, steps=3000, follows=()):
  """The policy that a loss leads to, or the rewards."""
  function = getattr(loss, 'func', loss)
  if function.__module__ in (reward.__name__, pointwise.__name__):
    return tree.scored(loss, data, steps, outputs=HEADS.get(function, 1))
  return tree.trained(loss, data, steps, follows)


class TestFixedPoint:

  @pytest.mark.parametrize('name', CASES)
  def test_is_what_theory_says(self, name):
    case = CASES[name]
    found, wanted = case.check(fitted(case.loss, case.data, follows=case.follows))
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), atol=case.atol, rtol=0, err_msg=case.why)

  def test_is_given_for_every_algorithm(self):
    assert set(CASES) == set(OFFLINE)

  @pytest.mark.parametrize('name', OFFLINE)
  def test_is_that_of_the_loss_which_the_algorithm_trains(self, name):
    text = (catalog.ROOT / f'{name}.gin').read_text(encoding='utf-8')
    module, function = re.findall(r'loss_fn = @(\w+)\.(\w+)', text)[0]
    loss = getattr(CASES[name].loss, 'func', CASES[name].loss)
    assert (loss.__module__, loss.__name__) == (f'jaxalign.losses.{module}', function)

  def test_is_moved_by_the_temperature(self):
    other = fitted(_of(preference.dpo, beta=1.0), ALL)
    assert np.abs(other.s - fitted(CASES['dpo'].loss, ALL).s).max() > 0.3

  @pytest.mark.parametrize('name', ['dpo', 'robust', 'gpo_exponential'])
  def test_is_finite_for_ipo_under_certain_labels_where_others_diverge(self, name):
    reached = lambda loss, steps: np.abs(gap(fitted(loss, CERTAIN, steps).z))
    np.testing.assert_allclose(reached(CASES['ipo'].loss, 3000), 1 / (2 * 0.5), atol=3e-3)
    assert np.all(reached(CASES[name].loss, 6000) > reached(CASES[name].loss, 3000) + 1)

  @pytest.mark.parametrize('name,margin', [('cdpo', logit(0.9) / 0.5), ('exo_pair', logit(0.8) / 0.5)])
  def test_under_certain_labels_is_where_the_smoothed_label_says(self, name, margin):
    found = gap(fitted(CASES[name].loss, CERTAIN).z)
    np.testing.assert_allclose(found, np.sign(P - 0.5) * margin, atol=5e-3)
