"""Log-probabilities under the reference, computed once per response and kept on disk.

The cache is keyed per response by a hash of its token ids and mask; the file is named by a checksum of every parameter
and by what else the numbers depend on. Other parameters, tokens or precision are a miss, never a wrong hit.
"""

from collections.abc import Callable
from collections.abc import Iterable
import contextlib
import dataclasses
import hashlib
import os
import pathlib
from typing import Any
from typing import NamedTuple
import zipfile

from absl import logging
import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import numpy as np
import tqdm

from jaxalign import types
from jaxalign.data import loader as loader_lib
from jaxalign.models import lora
from jaxalign.models import transformer

# (params, batch) -> [A, B, T], the same on every process
RefFn = Callable[[types.PyTree, types.Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Sync:
  """A reference that follows the policy: reference <- alpha policy + (1 - alpha) reference, every so many steps.

  With adapters it is they that are mixed, not what they add to the base. TRL's `ref_model_sync_steps` and
  `ref_model_mixup_alpha`. Gorbatovski et al., 2024 (TR-DPO), https://arxiv.org/abs/2404.09656, Eq. 4 and 5.

  Attributes:
    every: steps between two changes.
    alpha: 1 copies the policy.
  """

  every: int
  alpha: float

  def __post_init__(self):
    if self.every < 1 or not 0 < self.alpha <= 1:
      raise types.UsageError(f'reference.{self}: every must be at least 1, alpha above 0 and at most 1')

  def moved(self, ref: types.PyTree, params: types.PyTree, step: types.Array) -> types.PyTree:
    """The reference of the next step after `step` steps, of which the last led to `params`.

    It moves as a step begins, so that what is evaluated and saved after a step is what that was trained against.
    """
    mixed = lambda: jax.tree.map(lambda r, p: (1 - self.alpha) * r + self.alpha * p, ref, params)
    return jax.lax.cond((step > 0) & (step % self.every == 0), mixed, lambda: ref)


class Own(NamedTuple):
  """How the reference is computed and kept, where that is not as the policy is.

  Attributes:
    model: of the reference.
    where: shardings of what it does not share with the policy, None for those that this has.
    dtype: of the same, None likewise.
  """

  model: transformer.Transformer
  where: types.PyTree | None = None
  dtype: str | None = None

  def of(self, params: types.PyTree) -> types.PyTree:
    """Parameters of the policy, as the reference keeps them."""
    params = params if self.dtype is None else jax.tree.map(lambda x: x.astype(self.dtype), params)
    return params if self.where is None else jax.device_put(params, self.where)


class Reference(NamedTuple):
  """The model that a run began with.

  Attributes:
    model: without dropout; without adapters where they changed nothing at first.
    moving: parameters that training takes over and changes: who needs them later makes a copy.
    fixed: parameters that are frozen in training too, so that there is no second copy of them.
  """

  model: transformer.Transformer
  moving: types.PyTree
  fixed: types.PyTree

  def kept(self, follows: bool, own: Own) -> 'Reference':
    """The same, with a copy of what training takes over, as the step takes the buffers that it starts from.

    Of a reference that follows the policy there is none: it is in the state of the step.
    """
    return self._replace(moving=None if follows else jax.tree.map(jnp.copy, own.of(self.moving)), model=own.model)

  def alone(self, own: Own) -> 'Reference':
    """The same, sharing nothing with what is trained."""
    return self._replace(moving=own.of(self.params), fixed={}, model=own.model)

  @property
  def params(self) -> types.PyTree:
    """One tree, as the model reads it."""
    return lora.join(self.moving, self.fixed)

  @classmethod
  def of(
      cls, model: transformer.Transformer, trained: types.PyTree, frozen: types.PyTree, *, follows: bool = False
  ) -> 'Reference':
    """What `model` is before its first step; where it `follows` the policy, with adapters that change nothing yet."""
    moves = _has_own(model, follows)
    return cls(model_of(model, follows=follows), trained if moves else {}, frozen)


def model_of(model: transformer.Transformer, *, follows: bool = False) -> transformer.Transformer:
  """The model of the reference that `Reference.of` makes."""
  if _has_own(model, follows):
    return transformer.without_dropout(model)
  # A head is trained, and no reference's is read.
  config = dataclasses.replace(model.config, score_outputs=0, score_bias=False)
  return transformer.without_adapters(model).clone(config=config)


def _has_own(model: transformer.Transformer, follows: bool) -> bool:
  """Whether a reference reads more than what is frozen in training too."""
  return model.lora is None or bool(model.lora.adapter) or follows


def checksum(params: types.PyTree) -> str:
  """A hash of every parameter's bits, computed on the mesh; equal on any mesh, since integer sums do not round."""

  def sums(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      x = jax.lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint32)
    bits = x.astype(jnp.uint32)
    # A weight per place, so that a permutation changes the sum.
    places = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
      places = places * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.stack([jnp.sum(bits), jnp.sum(bits * (places * np.uint32(2654435761) + np.uint32(1)))])

  digest = hashlib.blake2b(digest_size=16)
  for path, pair in jax.tree_util.tree_leaves_with_path(
      jax.device_get(jax.jit(lambda p: jax.tree.map(sums, p))(params))
  ):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.asarray(pair).tobytes())
  return digest.hexdigest()


def digest(*parts: str) -> str:
  """A short hash of strings, for file names."""
  return hashlib.blake2b('\0'.join(parts).encode(), digest_size=12).hexdigest()


class Cache:
  """Reference log-probabilities of responses by key, in memory and in one file."""

  def __init__(self, folder: pathlib.Path, name: str):
    self._path = folder / f'ref-{name}.npz'
    self._rows: dict[int, np.ndarray] = _read(self._path) if jax.process_index() == 0 else {}
    if jax.process_count() > 1:
      # Hosts may not share a disk; what process 0 knows is what all know.
      self._rows = _broadcast(self._rows)

  def __contains__(self, key: int) -> bool:
    return key in self._rows

  def __getitem__(self, key: int) -> np.ndarray:
    return self._rows[key]

  def __setitem__(self, key: int, logps: np.ndarray) -> None:
    self._rows[key] = logps

  def save(self) -> None:
    """Writes the file whole, by process 0."""
    if jax.process_index() or not self._rows:
      return
    part = self._path.with_name(f'{self._path.name}.{os.getpid()}.part')
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with part.open('wb') as file:
        arrays: Any = _to_arrays(self._rows)
        np.savez(file, **arrays)
      os.replace(part, self._path)
    except OSError as err:
      with contextlib.suppress(OSError):
        part.unlink()
      raise types.RunError(f'{self._path}: cannot write the reference cache ({err.strerror}); free some space') from err


def _to_arrays(rows: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
  return {
      'keys': np.fromiter(rows, np.uint64, len(rows)),
      'sizes': np.array([row.size for row in rows.values()], np.int64),
      'logps': np.concatenate([*rows.values(), np.zeros(0, np.float32)]).astype(np.float32),
  }


def _from_arrays(keys, sizes, logps) -> dict[int, np.ndarray]:
  return dict(zip(keys.tolist(), np.split(logps, np.cumsum(sizes)[:-1]))) if keys.size else {}


def _read(path: pathlib.Path) -> dict[int, np.ndarray]:
  if not path.exists():
    return {}
  try:
    with np.load(path) as file:
      return _from_arrays(file['keys'], file['sizes'], file['logps'])
  except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as err:
    logging.warning('%s is corrupt (%s); its log-probabilities are computed again', path, err)
    return {}


def _broadcast(rows: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
  arrays = _to_arrays(rows)
  counts = multihost_utils.broadcast_one_to_all(np.array([arrays['keys'].size, arrays['logps'].size]))
  halves = arrays['keys'].view(np.uint32)  # 64-bit integers do not pass through JAX by default
  if jax.process_index():
    halves = np.zeros(2 * int(counts[0]), np.uint32)
    arrays = {'sizes': np.zeros(int(counts[0]), np.int32), 'logps': np.zeros(int(counts[1]), np.float32)}
  sent = multihost_utils.broadcast_one_to_all((halves, arrays['sizes'].astype(np.int32), arrays['logps']))
  halves, sizes, logps = (np.asarray(x) for x in sent)
  return _from_arrays(np.ascontiguousarray(halves).view(np.uint64), sizes, logps)


def fill(
    cache: Cache, params: types.PyTree, loader: loader_lib.Loader, ref_fn: RefFn, records: Iterable[int], label: str
) -> int:
  """Computes what the cache lacks of `records`, saves it, and returns how many responses were computed."""
  keys, records = loader.row_keys, list(records)
  there = loader.dataset.lengths_NK > 0  # A list may be shorter than K.
  missing = [r for r in records if any(int(key) not in cache for key in keys[r][there[r]])]
  steps = loader.ordered(missing)
  done = 0
  for plan, batch in tqdm.tqdm(steps, f'reference of {label}', unit='step', disable=None, leave=False):
    values = np.asarray(ref_fn(params, batch))
    for place in loader.places(plan):
      cache[int(keys[place.record][place.slot])] = values[place.micro, place.row][place.targets]
      done += 1
  if done:
    cache.save()
  logging.info(
      'reference log-probabilities of %s: %d computed, %d responses from the cache',
      label,
      done,
      int(there[records].sum()) - done,
  )
  return done
