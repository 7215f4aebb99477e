"""What a loss needs of batch, model and reference, found by tracing it."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign import types

# (policy, ref, labels, *, state) -> LossOut
LossFn = Callable[..., types.LossOut]


class Needs(NamedTuple):
  """What a loss was found to need, by tracing it.

  Attributes:
    fields: that it reads: 'policy.logps_GK', 'ref.logratios_GK', 'labels.margin', ...
    state: its first state, zeros; `()` for most losses.
    of_tokens: whether it gives a value per token, or else per group; None where that was not traced.
    metrics: names of those that it gives.
  """

  fields: frozenset[str] = frozenset()
  state: types.PyTree = ()
  of_tokens: bool | None = None
  metrics: frozenset[str] = frozenset()

  @property
  def reference(self) -> bool:
    """Whether it compares with a reference."""
    return any(field.startswith('ref.') for field in self.fields)

  @property
  def writes(self) -> bool:
    """Whether it reads log-probabilities of the policy, which is then trained to write, not only to score."""
    return any(field.startswith(('policy.logps', 'ref.')) for field in self.fields)

  @property
  def live(self) -> bool:
    """Whether it reads of the reference what cannot be kept on disk."""
    return bool(self.fields & {'ref.kl_BT', 'ref.entropy_GK'})

  @property
  def whole_step(self) -> bool:
    """Whether what it makes of a group depends on the others of the step."""
    return 'policy.valid_G' in self.fields or bool(jax.tree.leaves(self.state))


# Fields of `types.Stats` that a reference alone has, and those that it has like the policy.
_OF_REF = frozenset({'logratios_GK', 'kl_BT', 'entropy_GK'})
# What a head gives of responses and tokens; other fields of the policy are of the language model.
_OF_HEADS = frozenset({'policy.rewards_GK', 'policy.outputs_GKO', 'policy.scores_BTO'})
OF_RESPONSES = frozenset(
    {'policy.rewards_GK', 'policy.outputs_GKO', 'policy.tokens_GK', 'policy.valid_GK', 'policy.valid_G'}
)
OF_STEPS = frozenset({'policy.scores_BTO', 'policy.mask_BT'})
_OF_BOTH = frozenset({'logps_BT', 'mask_BT', 'logps_GK', 'tokens_GK'})


class _Recorder:
  """Stands for an argument of a loss and writes down which of its fields are read, and which are missing."""

  def __init__(self, name: str, fields: Mapping[str, types.Array], needs: set[str], missing: list[str]):
    self._name, self._fields, self._needs, self._missing = name, fields, needs, missing

  def __getattr__(self, field: str):
    if field not in self._fields:
      self._missing.append(f'{self._name}.{field}, but {self._name} has {", ".join(self._fields)}')
      raise AttributeError(field)
    return self[field]

  def __getitem__(self, field: str):
    if field not in self._fields:
      self._missing.append(f'the label {field!r}, but the data has only {", ".join(self._fields) or "none"}')
      raise KeyError(field)
    self._needs.add(f'{self._name}.{field}')
    return self._fields[field]


def trace(
    loss_fn: LossFn,
    *,
    group_size: int,
    labels: tuple[str, ...],
    token_labels: tuple[str, ...] = (),
    outputs: int = 1,
) -> Needs:
  """What a loss needs, found by tracing it on shapes.

  Args:
    loss_fn: the loss; given no state it begins with zeros of the shapes that it then returns.
    group_size: K, responses per group in the data.
    labels: names of the labels that the data has of responses.
    token_labels: names of those that it has of tokens.
    outputs: of the head that scores, 0 where there is none.

  Raises:
    UsageError: the loss reads a label or a response that the data lacks, or of a model what there is not.
  """
  found: set[str] = set()
  missing: list[str] = []
  number = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  index = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  table, tokens = number(2, group_size), number(2, 4)
  of = {'GK': table, 'BT': tokens, 'BTO': number(2, 4, outputs), 'G': number(2)}
  of['GKO'] = number(2, group_size, outputs)
  shapes: dict[str, Any] = {field: of.get(field.rpartition('_')[2]) for field in types.Stats.__dataclass_fields__}
  shapes['rows'] = types.Rows(tokens, index(2, 4), index(2, 2), index(2, 2), 2, group_size)
  given = dict.fromkeys(labels, table) | dict.fromkeys(token_labels, tokens)

  of_policy = {name: x for name, x in shapes.items() if name not in _OF_REF}
  of_ref = {name: x for name, x in shapes.items() if name in _OF_REF | _OF_BOTH}

  def run(policy, ref, given):
    recorders = (_Recorder(*one, found, missing) for one in (('policy', policy), ('ref', ref), ('labels', given)))
    return loss_fn(*recorders, state=())

  try:
    with checked_indices():
      out = jax.eval_shape(run, of_policy, of_ref, given)
  except (KeyError, AttributeError) as err:
    if not missing:  # It is of the loss itself. What gin makes of an error does not tell the name.
      raise
    raise types.UsageError(f'the loss reads {missing[-1]}') from err
  except IndexError as err:
    raise types.UsageError(f'the loss reads more responses to a prompt than the {group_size} of the data') from err
  headless = sorted(found & {'policy.values_GK', 'policy.scores_BTO'}) if not outputs else []
  if headless:
    problem = 'bind recipe.Recipe.score_outputs = 1, or a recipe.Recipe.critic for a loss of sampled tokens'
    raise types.UsageError(f'the loss reads {headless[0]} of a head: {problem}')
  if outputs > 1 and 'policy.values_GK' in found:
    raise types.UsageError(f'the loss reads policy.values_GK of a head with one output, and this one has {outputs}')
  state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out.state)
  return Needs(frozenset(found), state, len(out.per_item.shape) == 2, frozenset(out.metrics))


def check_read(needs: Needs, labels: tuple[str, ...], group_size: int) -> None:
  """Raises UsageError where the data say which responses are better, and a loss on groups does not read it.

  Args:
    needs: of the loss.
    labels: names of the labels that the data has of responses.
    group_size: K, responses per group in the data.
  """
  # Pairs have scores too, but their first response is the better one anyway.
  telling = ('desirable', *(['score'] if group_size > 1 and 'margin' not in labels else []))
  for name in telling:
    if not needs.of_tokens and name in labels and f'labels.{name}' not in needs.fields:
      raise types.UsageError(
          f'the data have labels.{name}, by which responses are better, and the loss does not read it: choose one that'
          ' does, or other data (recipe.Recipe.example_fn = @feedback.pairs_of_list makes pairs of lists)'
      )


@contextlib.contextmanager
def checked_indices() -> Iterator[None]:
  """An index beyond an axis is an error, and not the last place there."""
  before = jax.config.jax_check_static_indices  # type: ignore[attr-defined]
  jax.config.update('jax_check_static_indices', True)
  try:
    yield
  finally:
    jax.config.update('jax_check_static_indices', before)


def check(
    name: str,
    needs: Needs,
    *,
    of_tokens: bool,
    given: frozenset[str] | None = None,
    heads: frozenset[str] = frozenset(),
) -> None:
  """Raises UsageError where a loss is of another kind than the objective.

  Args:
    name: of the objective.
    needs: of the loss.
    of_tokens: whether the objective sums values of tokens, or of groups.
    given: what it gives of the policy; None for all but what heads make.
    heads: what it gives of those too.
  """
  kinds = {
      'supervised': 'tokens of demonstrations',
      'policy_gradient': 'tokens of sampled responses',
      'preference': 'groups of responses',
      'reward': 'scores of responses',
      'process': 'scores of steps',
  }
  read = {field for field in needs.fields if field.startswith('policy.')}
  wrong = sorted(read & _OF_HEADS - heads if given is None else read - given)
  if not wrong and needs.of_tokens in (None, of_tokens):
    return
  problem = f'it reads {wrong[0]}' if wrong else f'it gives a value per {"token" if needs.of_tokens else "group"}'
  raise types.UsageError(
      f'the loss is of another kind than recipe.Recipe.objective = @objectives.{name}, which is of {kinds[name]}:'
      f' {problem}; bind the objective of its kind, or start from an --algo whose loss is'
  )
