"""Orbax checkpoints that hold a whole run: evaluation and sampling need nothing else, on any mesh.

checkpoints/run.json          what was run: model config, compute dtype, algorithm, data
checkpoints/config.gin        the operative configuration
checkpoints/tokenizer/        the tokenizer's files
checkpoints/base/             the parameters the run began with, where its loss has a reference or they are frozen
checkpoints/start/            the adapters it began with, where those were not new
checkpoints/STEP/params       trained parameters: adapters alone, where the base is frozen
checkpoints/STEP/critic       those of a critic that shares none with the policy
checkpoints/STEP/train        optimizer state, step, key, counters
checkpoints/STEP/data         epoch and step of the consumed batches
checkpoints/STEP/loss         state of a loss that has one
checkpoints/STEP/reference    what a reference that follows the policy has in place of STEP/params
"""

from collections.abc import Mapping
import dataclasses
import json
import os
from typing import Any
from typing import NamedTuple

from absl import logging
from etils import epath
import jax
import orbax.checkpoint as ocp

from jaxalign import forward
from jaxalign import reference
from jaxalign import sharding
from jaxalign import step as step_lib
from jaxalign import storage
from jaxalign import types
from jaxalign.data import tokenizers
from jaxalign.models import architecture
from jaxalign.models import lora as lora_lib
from jaxalign.models import quant
from jaxalign.models import transformer


@dataclasses.dataclass(frozen=True)
class Options:
  """How many checkpoints stay: the newest `keep`, and the best one by an evaluation metric."""

  keep: int = 2
  best_metric: str = 'eval/loss'
  best_mode: str = 'min'

  def __post_init__(self):
    if self.keep < 1 or self.best_mode not in ('min', 'max'):
      raise types.UsageError(f"checkpoint.{self}: keep must be at least 1, and best_mode 'min' or 'max'")


class Loaded(NamedTuple):
  """A restored checkpoint: `model.apply({'params': params}, ...)` runs it; `run` is the content of run.json.

  With LoRA, `params` holds adapters and base; `lora.merge(params, model.lora)` makes plain parameters of them.
  """

  model: transformer.Transformer
  params: types.PyTree
  tokenizer: tokenizers.Tokenizer
  run: Mapping[str, Any]
  step: int


class Store:
  """The checkpoints of one run: saved in the background, each whole or absent."""

  def __init__(self, directory: storage.Path, options: Options):
    metric = options.best_metric
    sign = {'min': -1.0, 'max': 1.0}[options.best_mode]
    policies = [
        ocp.checkpoint_managers.LatestN(options.keep),
        ocp.checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: sign * metrics[metric], n=1, keep_checkpoints_without_metrics=False
        ),
    ]
    self._directory = directory
    self._metric = metric
    self._manager = ocp.CheckpointManager(
        epath.Path(directory),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        ),
    )

  def latest(self) -> int | None:
    """The step of the newest whole checkpoint."""
    return self._manager.latest_step()

  def save(self, state: step_lib.TrainState, step: int, place: Mapping[str, int], metrics: Mapping[str, float]) -> None:
    """Starts to save `state` and its `place` in the data; `metrics` of the last evaluation decide which is the best.

    Raises:
      RunError: this or the save before it failed (a full disk); older checkpoints are whole.
    """
    arrays = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
    args = ocp.args.Composite(data=ocp.args.JsonSave(dict(place)), **arrays)
    known = {self._metric: float(metrics[self._metric])} if self._metric in metrics else None
    try:
      self._manager.save(step, args=args, metrics=known)
    except (OSError, ValueError) as err:
      raise self._failed(err) from err

  def wait(self) -> None:
    """Waits until what was saved is on disk; raises RunError where it could not be written."""
    try:
      self._manager.wait_until_finished()
    except (OSError, ValueError) as err:
      raise self._failed(err) from err

  def _failed(self, err: Exception) -> types.RunError:
    steps = ', '.join(str(s) for s in self._manager.all_steps()) or 'none'
    reason = ' '.join(str(err).split())[:300]
    return types.RunError(
        f'{self._directory}: a checkpoint could not be written ({reason}); whole checkpoints: {steps}'
    )

  def restore(self, step: int, abstract: step_lib.TrainState) -> tuple[step_lib.TrainState, dict[str, int]]:
    """Restores the state of `step` onto the shardings of `abstract`, and the place in the data.

    Raises:
      RunError: the checkpoint is of another model.
    """
    arrays = {name: ocp.args.StandardRestore(tree) for name, tree in _items(abstract).items()}
    check_shapes(self._directory / str(step) / 'params', forward.divided(abstract.params)[0])
    found = self._manager.restore(step, args=ocp.args.Composite(data=ocp.args.JsonRestore(), **arrays))
    loss_state = found['loss']['state'] if 'loss' in arrays else abstract.loss_state
    followed = found['reference'] if 'reference' in arrays else ()
    params = found['params'] | ({forward.CRITIC: found['critic']} if 'critic' in arrays else {})
    state = step_lib.TrainState(params=params, loss_state=loss_state, reference=followed, **found['train'])
    return state, found['data']

  def close(self) -> None:
    """Waits for the last save and frees what the manager holds."""
    self.wait()
    self._manager.close()


def _items(state: step_lib.TrainState) -> dict[str, types.PyTree]:
  """The trees that a checkpoint holds apart: parameters, what few runs have, and the rest."""
  rest = {name: value for name, value in vars(state).items() if name not in ('params', 'loss_state', 'reference')}
  loss = {'loss': {'state': state.loss_state}} if jax.tree.leaves(state.loss_state) else {}
  followed = {'reference': state.reference} if jax.tree.leaves(state.reference) else {}
  params, critic = forward.divided(state.params)
  return {'params': params, 'train': rest} | ({} if critic is None else {'critic': critic}) | loss | followed


def check_shapes(path: storage.Path, abstract: types.PyTree) -> None:
  """Raises RunError where the parameters at `path` are not those of `abstract`, naming the first that differs."""
  flat = lambda tree: {
      jax.tree_util.keystr(p, simple=True, separator='/'): tuple(x.shape)
      for p, x in jax.tree_util.tree_leaves_with_path(tree)
  }
  with ocp.StandardCheckpointer() as checkpointer:
    saved = flat(checkpointer.metadata(epath.Path(path)).item_metadata.tree)
  wanted = flat(abstract)
  for name in sorted(saved.keys() | wanted.keys()):
    if saved.get(name) != wanted.get(name):
      raise types.RunError(
          f'{path} is the checkpoint of another model: {name} is {saved.get(name, "absent")} there,'
          f' {wanted.get(name, "absent")} in this run; choose another --workdir or the same --model'
      )


def save_run(directory: storage.Path, run: Mapping[str, Any], config: str, tokenizer: tokenizers.Tokenizer) -> None:
  """Writes run.json, config.gin and the tokenizer, by process 0."""
  if jax.process_index():
    return
  directory.mkdir(parents=True, exist_ok=True)
  (directory / 'config.gin').write_text(config, encoding='utf-8')
  tokenizer.save(directory / 'tokenizer')
  (directory / 'run.json').write_text(json.dumps(run, indent=1), encoding='utf-8')


def save_imported(
    directory: storage.Path,
    params: types.PyTree,
    model: transformer.Transformer,
    origin: Mapping[str, Any] | None,
    tokenizer: tokenizers.Tokenizer,
) -> None:
  """Writes weights that no run has trained as a checkpoint of step 0; `origin` is the config.json they came with."""
  step = storage.absolute(directory) / '0'
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(epath.Path(step / 'params'), params)
  if jax.process_index() == 0:
    storage.write_text(step / 'commit_success.txt', '')  # By which Orbax knows what is whole in a bucket.
  run: dict[str, Any] = {'model': model.config.to_json(), 'lora': None, 'hf_config': origin, 'bindings': None}
  run |= {'dtype': str(model.dtype), 'row_length': model.config.max_length, 'model_spec': ''}
  save_run(directory, run, '', tokenizer)


def read_json(path: storage.Path) -> dict[str, Any]:
  """The content of a JSON file in a workdir; RunError where it is broken."""
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except json.JSONDecodeError as err:
    raise types.RunError(f'{path}: not valid JSON ({err}); restore it, or train in another --workdir') from err


def save_base(directory: storage.Path, ref: reference.Reference) -> None:
  """Saves what a run begins with in place of what a run left that never got to a step."""
  parts = {'base': ref.fixed or ref.moving} | ({'start': ref.moving} if ref.fixed and ref.moving else {})
  with ocp.StandardCheckpointer() as checkpointer:
    for name, params in parts.items():
      checkpointer.save(epath.Path(directory / name), quant.to_disk(params), force=True)


def is_checkpoint(path: storage.Path) -> bool:
  """Whether a path is a workdir, its folder of checkpoints or one checkpoint."""
  return any((folder / 'run.json').exists() for folder in (path, path / 'checkpoints', path.parent))


def find(directory: str | os.PathLike, flag: str = '') -> tuple[storage.Path, int]:
  """Finds the `checkpoints` folder and the step that a user means by a workdir, that folder or one step's folder.

  Args:
    directory: any of them.
    flag: as `--checkpoint=`, where that named it.

  Raises:
    UsageError: there is no checkpoint.
  """
  given = storage.absolute(directory)
  with storage.naming(f'{flag}{directory}'):
    for folder in (given, given / 'checkpoints'):
      if (folder / 'run.json').exists():
        # In a bucket nothing is renamed when it is whole.
        steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit() and ocp.utils.is_checkpoint_finalized(p)]
        if not steps:
          raise types.UsageError(f'{flag}{directory}: {folder} holds no finished checkpoint')
        return folder, max(steps)
    if given.name.isdigit() and (given.parent / 'run.json').exists() and given.exists():
      return given.parent, int(given.name)
  raise types.UsageError(f'{flag}{directory}: no checkpoint there (looked for run.json and checkpoints/run.json)')


def load(directory: str | os.PathLike, mesh: jax.sharding.Mesh, dtype: str | None = None) -> Loaded:
  """Restores model, parameters and tokenizer from a checkpoint alone, onto `mesh`.

      mesh = sharding.make_mesh()
      loaded = checkpoint.load('runs/dpo', mesh)
      hidden_BTD = loaded.model.apply({'params': loaded.params}, inputs_BT, positions_BT, segments_BT)

  Args:
    directory: a workdir (its newest checkpoint), its `checkpoints` folder, or one step's folder.
    mesh: any mesh that divides the model, see `sharding.make_mesh`.
    dtype: of the computation, and of parameters but for a head that scores and a frozen base that is kept in another;
      None for that of the run, and float32.

  Raises:
    UsageError: there is no checkpoint, or the mesh does not divide the model.
    RunError: a file of the checkpoint is missing or corrupt.
  """
  folder, step = find(directory)
  run = read_json(folder / 'run.json')
  config = architecture.Config.from_json(run['model'])
  lora = lora_lib.Lora(**run['lora']) if run.get('lora') else None
  built = transformer.build(config, mesh, dtype=dtype or run['dtype'], lora=lora, length=run['row_length'])
  model = transformer.without_dropout(built)
  abstract = transformer.abstract_params(model, mesh)
  trained, frozen = lora_lib.split(abstract) if lora else (abstract, {})
  if dtype is not None:
    cast = lambda tree: jax.tree.map(lambda x: x.update(dtype=dtype), tree)
    trained = {name: tree if name in lora_lib.HEAD else cast(tree) for name, tree in trained.items()}
  params = _restored(folder / str(step) / 'params', trained)
  if lora:
    params = lora_lib.join(params, _restored(folder / 'base', frozen))
  return Loaded(model, params, tokenizers.load(folder / 'tokenizer'), run, step)


def writer(loaded: Loaded) -> Loaded:
  """The same, without the head that gave a policy's values while it was trained: it writes, and scores nothing."""
  if not loaded.run.get('writes') or not loaded.model.config.score_outputs:
    return loaded
  config = dataclasses.replace(loaded.model.config, score_outputs=0, score_bias=False)
  params = {name: value for name, value in loaded.params.items() if name not in lora_lib.HEAD}
  return loaded._replace(model=loaded.model.clone(config=config), params=params)


def merged(loaded: Loaded) -> types.PyTree:
  """The parameters of a checkpoint as those of a model without adapters."""
  return lora_lib.merge(loaded.params, loaded.model.lora) if loaded.model.lora is not None else loaded.params


def load_reference(directory: str | os.PathLike, loaded: Loaded) -> reference.Reference:
  """Restores what the run of a checkpoint is compared with; where only adapters were trained, `loaded` has their base.

  It is what the run began with, or what a reference that follows the policy had become.

  Raises:
    RunError: the run kept no reference, as its loss had none, or a file of it is corrupt.
  """
  folder, step = find(directory)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), loaded.params)
  followed = folder / str(step) / 'reference'
  if followed.exists():
    halves = lora_lib.split if loaded.model.lora is not None else lambda whole: (whole, {})
    moving = _restored(followed, halves(abstract)[0])
    return reference.Reference.of(loaded.model, moving, halves(loaded.params)[1], follows=True)
  if loaded.model.lora is None:
    return reference.Reference.of(loaded.model, _restored(folder / 'base', abstract), {})
  start = lora_lib.split(abstract)[0]
  trained = _restored(folder / 'start', start) if loaded.model.lora.adapter else {}
  return reference.Reference.of(loaded.model, trained, lora_lib.split(loaded.params)[1])


def load_base(folder: storage.Path, model: transformer.Transformer, mesh: jax.sharding.Mesh) -> reference.Reference:
  """Restores what a run without adapters began with from its folder of checkpoints."""
  abstract = transformer.abstract_params(model, mesh)
  return reference.Reference.of(model, _restored(folder / 'base', abstract), {})


def load_loss_state(directory: str | os.PathLike, first: types.PyTree, mesh: jax.sharding.Mesh) -> types.PyTree:
  """Restores the state of the loss, `first` being what it began with: `()` for most losses.

  Raises:
    RunError: the checkpoint does not have it, or a file of it is corrupt.
  """
  if not jax.tree.leaves(first):
    return first
  folder, step = find(directory)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(mesh)), first)
  return _restored(folder / str(step) / 'loss', {'state': abstract})['state']


def _restored(path: storage.Path, abstract: types.PyTree) -> types.PyTree:
  if not path.exists():
    raise types.RunError(f'{path} is missing; the checkpoint is not whole')
  check_shapes(path, abstract)
  with ocp.StandardCheckpointer() as checkpointer:
    params = quant.from_disk(checkpointer.restore(epath.Path(path), quant.to_disk(abstract)), abstract)
  logging.info('restored %s', path)
  return params
