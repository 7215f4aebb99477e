"""Scores of responses, their tokens or their steps: by the head of a reward model, or implied by an aligned policy."""

from collections.abc import Callable
import functools
from typing import Any

import jax
import numpy as np
import tqdm

from jaxalign import checkpoint
from jaxalign import forward
from jaxalign import recipe as recipe_lib
from jaxalign import sharding
from jaxalign import types
from jaxalign.data import loader as loader_lib
from jaxalign.data import scored
from jaxalign.data import sources

_LENGTH = 1024
_ROWS = 8  # at least; more where the mesh splits them


def score(job: recipe_lib.Job, *, per: str, row_length: int | None) -> list[dict[str, Any]]:
  """Scores the responses in `--data` by the head of `--model`.

  The checkpoint of a policy that was trained against a reference has no head; its implicit rewards are then the
  log-ratios log policy - log reference, in nats, of a response or of each token. (Times beta they are rewards: Rafailov
  et al., 2023, https://arxiv.org/abs/2305.18290, Sec. 4, and 2024, https://arxiv.org/abs/2404.12358, of tokens.)

  Args:
    job: names model, data and mesh.
    per: 'response', 'token' or 'step', see `data.scored.responses`.
    row_length: tokens of the longest sequence, longer ones are cut; None for 1024 or the context of the model.

  Returns:
    One object a record that was kept: `record` says which it is, `scores` has a score per response or, of tokens and
    steps, a list of scores; `truncated` says whether a part of the record did not fit the row. A score is a number, or
    a list of them where the head has several outputs (of a classifier, before the softmax).

  Raises:
    UsageError: the model has neither a head that scores nor a reference, or steps are to be scored without a head, or
      the context of the model is shorter than `row_length`.
    RunError: a file or a record cannot be read.
  """
  with jax.set_mesh(job.mesh):
    loaded = recipe_lib.load(job.model, job.mesh)
    of_micro, example_fn = _by_head(loaded, per) if loaded.model.config.score_outputs else _implied(job, loaded, per)
    context = loaded.model.config.max_length
    if row_length is not None and row_length > context:
      raise types.UsageError(f'--row_length={row_length}: the context of the model is {context} tokens')
    loader = _open(job, loaded.tokenizer, example_fn, row_length or min(_LENGTH, context))
    scores = lambda params, batch: jax.lax.map(functools.partial(of_micro, params), batch)
    fn = jax.jit(scores, out_shardings=sharding.named(job.mesh))
    found: dict[int, dict[int, np.ndarray]] = {}
    steps = loader.ordered(range(len(loader.dataset)))
    for plan, batch in tqdm.tqdm(steps, 'scoring', unit='step', disable=None, leave=False):
      values = np.asarray(fn(loaded.params, batch))
      for place in loader.places(plan):
        found.setdefault(place.record, {})[place.slot] = values[place.micro, place.row][place.targets]
  number = lambda outputs: float(outputs[0]) if outputs.size == 1 else outputs.tolist()
  # A head is read once a response, where its last token has been read; log-ratios add up.
  plain = lambda values: number(values.sum(axis=0)) if per == 'response' else [number(outputs) for outputs in values]
  return [
      {
          'record': loader.dataset.where(record),
          'scores': [plain(slots[slot]) for slot in sorted(slots)],
          'truncated': loader.dataset[record].truncated,
      }
      for record, slots in sorted(found.items())
  ]


def _by_head(loaded: checkpoint.Loaded, per: str) -> tuple[Callable, Callable]:
  """What gives the head's outputs of a micro-batch, and the examples that it is read at."""
  return functools.partial(forward.scores, model=loaded.model), functools.partial(scored.responses, per=per)


def _implied(job: recipe_lib.Job, loaded: checkpoint.Loaded, per: str) -> tuple[Callable, Callable]:
  """The same of the log-ratio to the reference of the model's run."""
  path = recipe_lib.model_directory(job.model)
  if not recipe_lib.is_checkpoint(path) or not loaded.run.get('base'):
    raise types.UsageError(f'{job.model}: it has no head that scores (train one with --algo=rm) and no reference')
  if per == 'step':
    raise types.UsageError(f'--per=step: {job.model} has no head that scores; its implicit rewards are of tokens')
  ref = checkpoint.load_reference(path, loaded, job.mesh)
  logps = lambda model, params, batch: forward.target_stats(params, batch, model=model)['logps']

  def ratios(params, batch):
    return (logps(loaded.model, params, batch) - logps(ref.model, ref.params, batch))[..., None]

  return ratios, scored.plain


def _open(job: recipe_lib.Job, tokenizer, example_fn: Callable, row_length: int) -> loader_lib.Loader:
  rows = sharding.parts(job.mesh, 'batch') * -(-_ROWS // sharding.parts(job.mesh, 'batch'))
  packing = loader_lib.Packing(rows=rows, row_length=row_length)
  specs = sources.parse_mixture(job.data)
  datasets = [recipe_lib.open_source(job, example_fn, tokenizer, spec, row_length) for spec, _ in specs]
  return loader_lib.Loader(datasets, [weight for _, weight in specs], packing=packing, mesh=job.mesh, seed=0)
