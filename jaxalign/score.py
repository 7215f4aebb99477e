"""Scores of responses, their tokens or their steps: by a reward model, by an aligned policy, or by functions."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import functools
import types as python_types
from typing import Any
from typing import NamedTuple

from absl import logging
import jax
import numpy as np
import tqdm

from jaxalign import reading
from jaxalign import recipe as recipe_lib
from jaxalign import scorers
from jaxalign import sharding
from jaxalign import types
from jaxalign.data import dataset as dataset_lib
from jaxalign.data import examples
from jaxalign.data import loader as loader_lib
from jaxalign.data import response_texts
from jaxalign.data import scored
from jaxalign.data import sources
from jaxalign.models import transformer
from jaxalign.rewards import functions
from jaxalign.rewards import modelled
from jaxalign.rewards import panels

_CALL = 64  # responses at least that a reward function is called with


def score(
    job: recipe_lib.Job, *, per: str, row_length: int | None, recipe: recipe_lib.Recipe | None = None
) -> Iterator[dict[str, Any]]:
  """Scores the responses in `--data` by the head of `--model`.

  The checkpoint of a policy that was trained against a reference has no head; its implicit rewards are then the
  log-ratios log policy - log reference, in nats, of a response or of each token. (Times beta they are rewards: Rafailov
  et al., 2023, https://arxiv.org/abs/2305.18290, Sec. 4, and 2024, https://arxiv.org/abs/2404.12358, of tokens.)

  A model that reads two responses in one text (`data.judged.both_orders`) gives each the logarithm of the probability
  that it is better than the other, the mean over both orders; a judge in words (`data.judged.answered`) log p of the
  good answer less log p of the other. So sigmoid(r_a - r_b) is the probability that a is better with all of them.
  What such a model reads, and how its outputs become scores, its recipe says (`scored_fn`, `combine_fn`).

  Args:
    job: names model, data and mesh.
    per: 'response', 'token' or 'step', see `data.scored.responses`.
    row_length: tokens of the longest sequence, longer ones are cut; None for 1024 or the context of the model.
    recipe: of the model's run, with a `scored_fn`; None takes the columns that `data.scored.responses` reads.

  Returns:
    One object a record that was kept: `record` says which it is, `scores` has a score per response or, of tokens and
    steps, a list of scores; `truncated` says whether a part of the record did not fit the row; the columns that the
    record itself has follow. A score is a number, or a list of them where the head has several outputs (of a
    classifier, before the softmax).

  Raises:
    UsageError: the model has neither a head that scores nor a reference, or does not score what `per` says, or its
      context is shorter than `row_length`, or sources have weights, or the recipe has no `scored_fn`.
    RunError: a file or a record cannot be read.
  """
  if per not in scored.PER:
    raise types.UsageError(f'--per={per}: it is one of {", ".join(scored.PER)}')
  if recipe is not None and recipe.scored_fn is None:
    raise types.UsageError('--gin_file: nothing binds recipe.Recipe.scored_fn, which is all that is read of it here')
  parts, specs = sharding.parts(job.mesh, 'length'), sources.parse_all(job.data)
  if row_length is not None and row_length % parts:
    raise types.UsageError(f'--row_length={row_length}: --mesh splits it {parts} ways; make it a multiple')
  with jax.set_mesh(job.mesh):
    loaded = recipe_lib.load(job.model, job.mesh)
    context = loaded.model.config.max_length
    length = row_length or min(scorers.LENGTH, context) // parts * parts
    scoring = None if recipe is None else modelled.Scoring(recipe.scored_fn, recipe.combine_fn)
    if length > context:
      raise types.UsageError(f'--row_length={row_length}: the context of the model is {context} tokens')
    loaded = loaded._replace(model=transformer.for_rows(loaded.model, job.mesh, length))
    found_by = reading.of(job.model, loaded, job.mesh, per=per, own=scoring)
    loader = _open(job, specs, loaded.tokenizer, found_by.example_fn, length)
    run = found_by.run(job.mesh)
    found: dict[int, dict[int, np.ndarray]] = {}
    steps = loader.ordered(range(len(loader.dataset)))
    for plan, batch in tqdm.tqdm(steps, 'scoring', unit='step', disable=None, leave=False):
      values = np.asarray(run(found_by.params, batch))
      for place in loader.places(plan):
        found.setdefault(place.record, {})[place.slot] = values[place.micro, place.row][place.targets]
  own = [sources.open_source(spec, job.data_dir) for spec in specs]
  return (
      _scored(loader.dataset, own, record, slots, per, found_by.combine_fn) for record, slots in sorted(found.items())
  )


def _scored(
    dataset: dataset_lib.Joined,
    own: Sequence[sources.Source],
    record: int,
    slots: dict[int, np.ndarray],
    per: str,
    combine_fn: Callable | None,
) -> dict[str, Any]:
  """A record with its scores, of the outputs of each of its sequences, `[n, O]` by number."""
  made = {
      'record': dataset.where(record),
      'scores': _scores_of([slots[slot] for slot in sorted(slots)], per, combine_fn),
      'truncated': dataset[record].truncated,
  }
  source, place = dataset.place(record)
  return made | own[source].at(place) | made  # What was made comes first, and wins.


def _scores_of(values: list[np.ndarray], per: str, combine_fn: Callable | None) -> list[Any]:
  """Scores of a record's responses, of what each of its sequences was marked for, `[n, O]`."""
  number = lambda outputs: float(outputs[0]) if outputs.size == 1 else outputs.tolist()
  if per != 'response':
    return [[number(outputs) for outputs in one] for one in values]
  # A head is read once a response, where its last token has been read; log-ratios add up.
  sums = [one.sum(axis=0) for one in values]
  return list(map(number, sums if combine_fn is None else combine_fn(sums)))


def of_both_orders(outputs: list[np.ndarray]) -> list[np.ndarray]:
  """Log-probabilities that each of two responses is better, of the log-odds that the one which comes first is."""
  log_sigmoid = lambda x: -np.logaddexp(0.0, -x.astype(np.float64))
  ahead, behind = outputs
  mean = lambda a, b: np.logaddexp(log_sigmoid(a), log_sigmoid(b)) - np.log(2.0)
  return [mean(ahead, -behind), mean(-ahead, behind)]


def of_answers(outputs: list[np.ndarray]) -> list[np.ndarray]:
  """Log-odds of the good answer, of which each is followed by the other."""
  return [yes - no for yes, no in zip(outputs[::2], outputs[1::2])]


def _open(job: recipe_lib.Job, specs: list[str], tokenizer, example_fn: Callable, row_length: int) -> loader_lib.Loader:
  datasets = [recipe_lib.open_source(job, example_fn, tokenizer, spec, row_length) for spec in specs]
  # The responses of a record lie in one micro-batch. Placed one by one where there is room, the longest first, they
  # leave at most one row half empty.
  half_rows = max(int(dataset.lengths_NK.sum(axis=1).max()) for dataset in datasets) * 2 // row_length
  parts = sharding.parts(job.mesh, 'batch')
  rows = parts * -(-max(scorers.ROWS, min(half_rows + 1, max(dataset.group_size for dataset in datasets))) // parts)
  packing = loader_lib.Packing(rows=rows, row_length=row_length)
  return loader_lib.Loader(datasets, [1.0] * len(datasets), packing=packing, mesh=job.mesh, seed=0)


class _Read(NamedTuple):
  """A record that is scored, where it is, and the texts of its responses."""

  record: Mapping[str, Any]
  source: sources.Source
  row: int
  texts: response_texts.Texts


def by_rewards(
    specs: Sequence[str],
    data: str,
    *,
    how: str,
    data_dir: str | None = None,
    tokenizer: str | None = None,
    skip_bad_records: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    own: Mapping[str, modelled.Scoring] = python_types.MappingProxyType({}),
    row_length: int | None = None,
) -> Iterator[dict[str, Any]]:
  """Scores responses by functions and models; see `functions.parse` and `functions.combine`.

  Args:
    specs: as for `--reward`.
    data: as for `--data`; which columns are read `data.response_texts.read` says.
    how: one of `functions.HOW`; 'normalised' is over all responses of the data.
    data_dir: where TFDS sets lie.
    tokenizer: as for `--tokenizer`, for rewards of token ids; None gives them none.
    skip_bad_records: count records that cannot be read, rather than stop at the first.
    mesh: where models lie; None where all rewards are functions, for which no device is asked.
    own: see `scorers.checked`.
    row_length: see `scorers.checked`.

  Returns:
    One object a record that was kept: `record` says which it is, `scores` has a score per response, None where all
    rewards abstain; the columns that the record itself has follow. Mean and deviation of each reward are logged.

  Raises:
    UsageError: a reward or a file is not there, or there is no such way to combine, or a model does not score.
    RunError: a record cannot be read, or a reward fails on one.
  """
  functions.check_how(how)
  rewards = [functions.parse(spec) for spec in specs]
  encode = None
  if tokenizer:
    loaded = recipe_lib.load_tokenizer(tokenizer, recipe_lib.A_TOKENIZER)
    encode = functools.partial(examples.to_ids, loaded, continuation=True, special=False)
  found, kept = [], []
  with contextlib.ExitStack() as stack:
    models: Mapping[str, functions.Scorer] = {}
    if mesh is not None:
      stack.enter_context(jax.set_mesh(mesh))
      models = scorers.checked(rewards, mesh, own=own, row_length=row_length)()
    panel = stack.enter_context(panels.Panel(rewards, models, together=mesh is not None))
    for batch in _batches(_texts(data, data_dir, skip_bad_records)):
      found.append(panel(_responses(batch, encode)))
      kept += [(one.source, one.row, len(one.texts.responses)) for one in batch]
  if not kept:
    raise types.RunError(f'--data={data}: it holds no responses to score')
  values = {reward.name: np.concatenate([part[reward.name].values for part in found]) for reward in rewards}
  _log(values)
  total_N = functions.combine(list(values.values()), [reward.weight for reward in rewards], how)
  scores = iter([None if np.isnan(total) else float(total) for total in total_N])
  for source, row, count in kept:
    made = {'record': source.where(row), 'scores': [next(scores) for _ in range(count)]}
    yield made | source[row] | made  # What was made comes first, and wins.


def _log(values: Mapping[str, np.ndarray]) -> None:
  """Logs mean and deviation of each reward, `[N]` by name."""
  for name, values_N in values.items():
    known = values_N[~np.isnan(values_N)]
    mean, std = (known.mean(), known.std()) if known.size else (np.nan, np.nan)
    logging.info(
        '%s: mean %.4g, std %.4g, abstained %d of %d', name, mean, std, len(values_N) - known.size, len(values_N)
    )


def _texts(data: str, data_dir: str | None, skip_bad_records: bool) -> Iterator[_Read]:
  """The records of `--data` that have responses; tells of those that are left out."""
  left: dict[str, list[str]] = {}
  for source in [sources.open_source(spec, data_dir) for spec in sources.parse_all(data)]:
    for index in tqdm.trange(len(source), desc='scoring', unit='record', disable=None, leave=False):
      try:
        record = source[index]
        yield _Read(record, source, index, response_texts.read(record))
      except examples.Dropped as err:
        left.setdefault(err.reason, []).append(source.where(index))
      except types.RunError as err:
        known = err if isinstance(err, sources.BadRecord) else types.RunError(f'{source.where(index)}: {err}')
        if not skip_bad_records:
          raise known from err
        left.setdefault('unreadable', []).append(source.where(index))
  for reason, where in left.items():
    logging.warning('%s: %d records left out: %s (first %s)', data, len(where), reason, where[0])


def _batches(found: Iterable[_Read]) -> Iterator[list[_Read]]:
  """Records with at least `_CALL` responses together, but for the last."""
  batch: list[_Read] = []
  for one in found:
    batch.append(one)
    if sum(len(read.texts.responses) for read in batch) >= _CALL:
      yield batch
      batch = []
  if batch:
    yield batch


def _responses(batch: Sequence[_Read], encode: Callable[[str], list[int]] | None) -> functions.Responses:
  each = [one for one in batch for _ in one.texts.responses]
  texts = [text for one in batch for text in one.texts.responses]
  columns = dict.fromkeys(name for one in batch for name in one.record)
  return functions.Responses(
      prompts=[one.texts.prompt for one in each],
      responses=texts,
      fields={name: [one.record.get(name) for one in each] for name in columns},
      where=[one.source.where(one.row) for one in each],
      ids=None if encode is None else list(map(encode, texts)),
  )
