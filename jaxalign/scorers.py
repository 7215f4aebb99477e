"""Models that judge responses: which of them can, what each reads of a response, and its scores as rewards."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from absl import logging
import jax
import numpy as np

from jaxalign import checkpoint
from jaxalign import reading
from jaxalign import recipe as recipe_lib
from jaxalign import sharding
from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import loader as loader_lib
from jaxalign.data import scored
from jaxalign.data import tokenizers
from jaxalign.models import architecture
from jaxalign.models import hf
from jaxalign.models import transformer
from jaxalign.rewards import ensembles
from jaxalign.rewards import functions
from jaxalign.rewards import modelled
from jaxalign.rl import experience

LENGTH = 1024  # of a row, at most, where nothing says more
ROWS = 8  # at least; more where the mesh splits them
_MAX_RESPONSES = 64  # of a row; static, as lengths differ from call to call
_BLOCK = 128  # tokens, in whole numbers of which kernels take rows
_SPARE = 2  # tokens behind a response: one that ends its last step


class _Known(NamedTuple):
  """What is known of a model before a weight of it is read.

  Attributes:
    model: as `--reward` has it.
    directory: where it is.
    per: what has a score: 'response' or 'step', of a head, or 'token' of a policy.
    own: of its recipe.
    tokenizer: its own.
    is_same: whether that is the policy's, so that it reads the ids that were sampled.
    row_length: tokens of the longest text.
  """

  model: modelled.Model
  directory: str
  per: str
  own: modelled.Scoring | None
  tokenizer: tokenizers.Tokenizer
  is_same: bool
  row_length: int


class Sampled(NamedTuple):
  """What a policy samples: its tokenizer, the most tokens of a prompt and of a response to it, and of its rows."""

  tokenizer: tokenizers.Tokenizer
  prompt: int
  response: int
  row_length: int


def checked(
    rewards: Sequence[functions.Reward | modelled.Model],
    mesh: jax.sharding.Mesh,
    *,
    own: Mapping[str, modelled.Scoring],
    sampled: Sampled | None = None,
    row_length: int | None = None,
) -> Callable[[], dict[str, functions.Scorer]]:
  """What then loads the models among some rewards; what cannot be is refused before a weight is read.

  Args:
    rewards: functions are left alone.
    mesh: where models will lie.
    own: of the recipes of models, by directory.
    sampled: who writes the responses; None where they come from elsewhere, as texts.
    row_length: tokens of the longest text; longer ones are cut. None for 1024 or the context of the model.

  Raises:
    UsageError: a directory holds no model, or none that scores, or it has not what an option names, or its context is
      too short.
    RunError: a file cannot be read.
  """
  models = [reward for reward in rewards if isinstance(reward, modelled.Model)]
  meshes = [_mesh_of(m, mesh) for m in models]
  known = [
      [_known(m, one, own.get(one), sampled, row_length, its) for one in m.directories]
      for m, its in zip(models, meshes)
  ]

  def opened() -> dict[str, functions.Scorer]:
    opened_by = [[Scorer(one, its) for one in members] for members, its in zip(known, meshes)]
    return {m.name: members[0] if m.how is None else _ensemble(m, members) for m, members in zip(models, opened_by)}

  return opened


def _mesh_of(model: modelled.Model, mesh: jax.sharding.Mesh) -> jax.sharding.Mesh:
  """Its own, of the devices of another, or that one."""
  if model.mesh is None:
    return mesh
  try:
    return sharding.make_mesh(model.mesh, devices=mesh.devices.flatten().tolist())
  except types.UsageError as err:
    raise types.UsageError(f'--reward={model.name}: {err}') from err


def _known(model, directory: str, own: modelled.Scoring | None, sampled: Sampled | None, row_length, mesh) -> _Known:
  fail = lambda problem: types.UsageError(f'--reward={model.name}: {directory}: {problem}')
  path = recipe_lib.model_directory(directory)
  if checkpoint.is_checkpoint(path):
    run = checkpoint.read_json(checkpoint.find(path)[0] / 'run.json')
    config = architecture.Config.from_json(run['model'])
  elif (path / 'config.json').is_file():
    run, config = {}, hf.read_config(path)
  else:
    raise fail('no model is there (looked for run.json, checkpoints/run.json and config.json)')
  per, outputs = _per(model, config, run, own, fail), 0 if run.get('writes') else config.score_outputs
  if model.output is not None and (per != 'response' or model.output >= max(outputs, 1)):
    raise fail(f'output={model.output}: it has no such output')
  if per == 'response' and outputs > 1 and model.output is None and (own is None or own.combine_fn is None):
    raise fail(f'its head has {outputs} outputs; say which one counts, output=0 to output={outputs - 1}')
  if per == 'step' and outputs > 2:
    raise fail(f'reduce={model.reduce!r}: a step is right or wrong, 1 or 2 outputs, and its head has {outputs}')
  tokenizer = recipe_lib.load_tokenizer(directory)
  is_same = sampled is not None and own is None and _are_same(tokenizer, sampled.tokenizer)
  wanted = row_length or LENGTH
  if sampled is not None:
    longest = sampled.prompt + sampled.response + _SPARE
    # Another tokenizer may make more of a text.
    wanted = max(sampled.row_length, longest) if is_same else 2 * max(sampled.row_length, longest)
    if is_same and longest > config.max_length:
      raise fail(
          f'a prompt of {sampled.prompt} tokens and a response of {sampled.response} exceed its context,'
          f' {config.max_length}'
      )
  if row_length is not None and row_length > config.max_length:
    raise types.UsageError(f'--row_length={row_length}: the context of {directory} is {config.max_length} tokens')
  if own is not None and own.scored_fn is not None:
    _check_reads(own.scored_fn, tokenizer, fail)
  logging.info('reward %s reads %s', model.name, 'the sampled ids' if is_same else 'texts')
  return _Known(model, directory, per, own, tokenizer, is_same, _fitting(wanted, config.max_length, mesh))


def _fitting(wanted: int, context: int, mesh: jax.sharding.Mesh) -> int:
  """Tokens of a row that has room for so many, if the context has: of whole blocks, and split by the mesh."""
  parts = sharding.parts(mesh, 'length')
  blocks = -(-wanted // (_BLOCK * parts)) * _BLOCK * parts
  return blocks if blocks <= context else context // parts * parts


def _check_reads(scored_fn: Callable, tokenizer: tokenizers.Tokenizer, fail: Callable) -> None:
  """Raises UsageError where examples cannot be made of a prompt and one response, which is what there is."""
  try:
    scored_fn({'prompt': 'a', 'completion': 'b', 'append_eos': True}, tokenizer, row_length=LENGTH)
  except Exception as err:  # Whatever a function of the user's raises.
    problem = str(err).partition('\n')[0]
    raise fail(f'its recipe.Recipe.scored_fn reads no single response ({type(err).__name__}: {problem})') from err


def have_same_ids(a: tokenizers.Tokenizer, b: tokenizers.Tokenizer) -> bool:
  """Whether ids stand for the same text in both, whatever ends a response and however messages are written."""
  text = lambda one, i: one.decode([i], continuation=True, skip_special=False)
  return a.fingerprint == b.fingerprint or (
      a.vocab_size == b.vocab_size and all(text(a, i) == text(b, i) for i in range(a.vocab_size))
  )


def _are_same(a: tokenizers.Tokenizer, b: tokenizers.Tokenizer) -> bool:
  """Whether ids mean the same to both, and messages are written alike; their padding may differ."""
  roles = lambda one: (one.vocab_size, one.bos_id, one.eos_id, one.special_tokens, one.chat_template)
  return a.fingerprint == b.fingerprint or (roles(a) == roles(b) and have_same_ids(a, b))


def _per(
    model, config: architecture.Config, run: Mapping[str, Any], own: modelled.Scoring | None, fail: Callable
) -> str:
  """What of a response has a score, see `_Known`."""
  has_head = bool(config.score_outputs) and not run.get('writes')
  steps = has_head and own is None and (model.reduce is not None or config.score_bias and config.score_outputs <= 2)
  is_policy = not has_head and (own is None or own.combine_fn is None)
  if is_policy and not run.get('base'):
    raise fail(reading.NEITHER)
  if model.reduce is not None and not steps:
    raise fail(f'reduce={model.reduce!r}: it judges no steps')
  if model.beta is not None and not is_policy:
    raise fail(f'beta={model.beta}: it is of implicit rewards, and this model has a head or a recipe that scores')
  return 'step' if steps else 'token' if is_policy else 'response'


class _Text(NamedTuple):
  """What a model reads of a response, and at which of its sampled ids the marks are, None where those are not read."""

  group: examples.Group
  places: np.ndarray | None


class Scorer:
  """A model that judges responses; what it reads has always the same shape, so that it is compiled once."""

  def __init__(self, known: _Known, mesh: jax.sharding.Mesh):
    """Loads the model onto the mesh.

    Raises:
      UsageError: the mesh does not divide the model.
      RunError: a file of it is missing or corrupt.
    """
    self._known, self._mesh = known, mesh
    with jax.set_mesh(mesh):
      try:
        loaded = recipe_lib.load(known.directory, mesh, known.model.dtype)
      except types.UsageError as err:
        raise types.UsageError(f'--reward={known.model.name}: {err}') from err
    size = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(loaded.params)) / 1e6
    logging.info('memory of a device: reward %s %.1f MB', known.model.name, size)
    loaded = loaded._replace(model=transformer.for_rows(loaded.model, mesh, known.row_length))
    per = 'response' if known.per == 'token' else known.per
    self._reading = reading.of(known.directory, loaded, mesh, per=per, own=known.own)
    self.run = self._reading.run(mesh)
    parts = sharding.parts(mesh, 'batch')
    rows = parts * -(-ROWS // parts)
    self._packing = loader_lib.Packing(rows=rows, row_length=known.row_length, max_responses=_MAX_RESPONSES)

  def __call__(self, responses: functions.Responses) -> functions.Scores:
    """Scores of responses; what says nothing in a language of steps has none.

    Raises:
      RunError: a response cannot be read, or a score is not finite; it names the record. All processes meet it.
    """
    count = len(responses.responses)
    texts = {n: text for n in range(count) if (text := self._text(responses, n)) is not None}
    values_N = np.full(count, np.nan)
    ids = responses.ids if self._known.is_same else None
    tokens = None if ids is None else [np.full(len(one), np.nan) for one in ids]
    for n, found in zip(texts, self._outputs([text.group for text in texts.values()])):
      flat = np.concatenate([one.reshape(-1) for one in found])
      if not np.all(np.isfinite(flat)):
        value = flat[~np.isfinite(flat)][0]
        place = f'reward {self._known.model.name}, {responses.where[n]}'
        raise types.RunError(f'{place}: the model gives {value}', everywhere=True)
      values_N[n], marks = self._value(found)
      if tokens is not None and texts[n].places is not None:
        tokens[n][texts[n].places] = marks
    cut = [responses.where[n] for n, text in texts.items() if text.group.truncated]
    if cut:
      logging.warning(
          'reward %s: %d of %d texts cut to %d tokens (first %s)',
          *(self._known.model.name, len(cut), count, self._known.row_length, cut[0]),
      )
    return functions.Scores(values_N, tokens if self._known.per != 'response' else None)

  def _outputs(self, groups: Sequence[examples.Group]) -> list[list[np.ndarray]]:
    """What the model makes of the marks of each sequence of each group, `[n, O]` float64."""
    found: list[list[np.ndarray]] = [[np.zeros(0)] * len(group.sequences) for group in groups]
    if groups:
      data = experience.Groups(groups)
      run = lambda params, batch: {'outputs': self.run(params, batch)}
      with jax.set_mesh(self._mesh):
        for group, slot, marks in experience.annotated(self._reading.params, data, run, self._packing, self._mesh):
          found[group][slot] = marks['outputs'].astype(np.float64)
    return found

  def _value(self, found: list[np.ndarray]) -> tuple[float, np.ndarray]:
    """The score of a response, and what its marks say."""
    model = self._known.model
    if self._known.per == 'step':
      odds = found[0][:, -1] - (found[0][:, 0] if found[0].shape[1] == 2 else 0.0)
      right = np.exp(-np.logaddexp(0.0, -odds))
      return modelled.REDUCE[model.reduce or 'min'](right), right
    if self._known.per == 'token':
      ratios = found[0][:, 0] * (1.0 if model.beta is None else model.beta)
      return float(ratios.sum()), ratios
    sums = [one.sum(axis=0) for one in found]
    made = sums if self._reading.combine_fn is None else self._reading.combine_fn(sums)
    return float(np.reshape(made[0], -1)[model.output or 0]), np.zeros(0)

  def _text(self, responses: functions.Responses, n: int) -> _Text | None:
    """What is read of a response; None where there is nothing to judge."""
    try:
      if self._known.is_same and responses.ids is not None and responses.prompt_ids is not None:
        return self._of_ids(responses.prompt_ids[n], responses.ids[n])
      return self._of_words(responses, n)
    except (examples.Dropped, types.RunError) as err:
      problem = err.reason if isinstance(err, examples.Dropped) else err
      place = f'reward {self._known.model.name}, {responses.where[n]}'
      raise types.RunError(f'{place}: {problem}', everywhere=True) from err

  def _of_ids(self, prompt: Sequence[int], ids: Sequence[int]) -> _Text | None:
    whole = np.array([*prompt, *ids], np.int32)
    if self._known.per == 'token':
      marked = examples.Sequence(whole, np.arange(len(whole)) >= len(prompt))
      return _Text(examples.Group((marked,), {}), np.arange(len(ids)))
    if self._known.per == 'response':
      marked = scored.at_end(examples.Sequence(whole, np.zeros(len(whole), bool)))
      return _Text(examples.Group((marked,), {}), None)
    marked, places = scored.sampled_steps(prompt, ids, self._known.tokenizer)
    return _Text(examples.Group((marked,), {}), places) if places.size else None

  def _of_words(self, responses: functions.Responses, n: int) -> _Text | None:
    text, record = responses.responses[n], _record(responses, n)
    if not text and not record['append_eos']:
      return None
    if self._known.per == 'step':
      lines = [line for line in text.split('\n') if line.strip()]
      record |= {'completions': lines}
      del record['completion']
      if not lines:
        return None
    group = self._reading.example_fn(record, self._known.tokenizer, row_length=self._known.row_length)
    return _Text(group, None)


def _record(responses: functions.Responses, n: int) -> dict[str, Any]:
  """A prompt and one response as a record of data; other columns may say something of other responses."""
  prompt, given = responses.prompts[n], responses.fields.get('append_eos')
  if isinstance(prompt, list | tuple) and prompt and prompt[-1].get('role') == 'assistant':
    prompt = prompt[:-1]  # It was answered in the data.
  ends = given[n] if given is not None and given[n] is not None else True
  ends = ends if responses.finished is None else responses.finished[n]
  return {'prompt': prompt, 'completion': responses.responses[n], 'append_eos': ends}


def _ensemble(model: modelled.Model, members: Sequence[Scorer]) -> functions.Scorer:
  def scorer(responses: functions.Responses) -> functions.Scores:
    scores_EN = np.stack([member(responses).values for member in members])
    known_N = ~np.isnan(scores_EN).any(axis=0)
    known_EN = ensembles.centred(scores_EN[:, known_N]) if model.centre else scores_EN[:, known_N]
    values_N = np.full(known_N.shape, np.nan)
    values_N[known_N] = ensembles.combine(known_EN, how=model.how or 'mean', penalty=model.penalty)
    return functions.Scores(values_N)

  return scorer
