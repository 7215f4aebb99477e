"""Weighs undesirable responses by their prompts: adds the column density_ratio to single responses with labels.

  python tools/density_ratio.py --input=jsonl:feedback.jsonl --model=builtin:stories260K --output=weighted.jsonl
  python -m jaxalign.main --algo=bco_udm --data=jsonl:weighted.jsonl

A logistic regression tells the prompts of desirable responses from those of undesirable ones, both counting alike, by
the mean of the model's hidden states; the ratio of its probabilities is the density ratio, held within bounds. This is
the underlying distribution matching of Jung et al., 2024, https://arxiv.org/abs/2404.04656 (`losses.unpaired.bco_udm`
weighs by it); the bounds are TRL's.
"""

import argparse
from collections.abc import Sequence
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign import recipe
from jaxalign import sharding
from jaxalign import storage
from jaxalign import types
from jaxalign.data import examples
from jaxalign.data import feedback
from jaxalign.data import records
from jaxalign.data import sources

_ROWS = 16
_STEP = 64  # lengths are rounded up to these


def embed(spec: str, prompts: Sequence[Any]) -> np.ndarray:
  """The mean of a model's last hidden states over each prompt's tokens, `[N, D]` float32.

  Args:
    spec: see `--model`.
    prompts: texts, or lists of messages; of longer ones the last tokens that the model's context holds are read.
  """
  mesh = sharding.make_mesh('', devices=jax.local_devices()[:1])
  with jax.set_mesh(mesh):
    loaded = recipe.load(spec, mesh)
    context = loaded.model.config.max_length
    ids = [examples.prompt_ids(loaded.tokenizer, prompt)[-context:] or [loaded.tokenizer.eos_id] for prompt in prompts]

    @jax.jit
    def means(inputs_BT, segments_BT):
      positions_BT = jnp.broadcast_to(jnp.arange(inputs_BT.shape[1])[None, :], inputs_BT.shape)
      hidden_BTD = loaded.model.apply({'params': loaded.params}, inputs_BT, positions_BT, segments_BT)
      weight_BT1 = segments_BT[..., None].astype(jnp.float32)
      return jnp.sum(hidden_BTD * weight_BT1, axis=1) / jnp.sum(weight_BT1, axis=1)

    found = np.zeros((len(ids), loaded.model.config.embed_dim), np.float32)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), _ROWS):
      places = order[start : start + _ROWS]
      length = -(-max(len(ids[i]) for i in places) // _STEP) * _STEP
      inputs, segments = np.zeros((2, _ROWS, length), np.int32)
      for row, i in enumerate(places):
        inputs[row, : len(ids[i])], segments[row, : len(ids[i])] = ids[i], 1
      segments[len(places) :, 0] = 1
      found[places] = np.asarray(means(inputs, segments))[: len(places)]
  return found


def density_ratios(features_ND: np.ndarray, desirable_N: np.ndarray, low: float, high: float) -> np.ndarray:
  """Computes p(desirable | x) / p(undesirable | x) of a balanced logistic regression, within [low, high]: `[N]`.

  The regression has scikit-learn's penalty, |w|^2 / 2 beside the sum of losses, on features of mean 0 and variance 1.

  Raises:
    RunError: all responses are desirable, or none is.
  """
  count = np.array([np.sum(desirable_N == 0), np.sum(desirable_N == 1)])
  if not count.all():
    raise types.RunError('all responses have the same label; a density ratio needs both')
  x_ND = (features_ND - features_ND.mean(axis=0)) / np.maximum(features_ND.std(axis=0), 1e-6)
  x_ND = jnp.asarray(np.concatenate([x_ND, np.ones((len(x_ND), 1))], axis=1), jnp.float32)
  weight_N = jnp.asarray(len(x_ND) / (2 * count[desirable_N.astype(int)]), jnp.float32)
  sign_N = jnp.asarray(2 * desirable_N - 1, jnp.float32)

  def loss(w_D):
    return jnp.sum(weight_N * jax.nn.softplus(-sign_N * (x_ND @ w_D))) + 0.5 * jnp.sum(jnp.square(w_D[:-1]))

  solver, slope = optax.lbfgs(), optax.value_and_grad_from_state(loss)

  def one(_, carry):
    w_D, state = carry
    value, gradient = slope(w_D, state=state)
    update, state = solver.update(gradient, state, w_D, value=value, grad=gradient, value_fn=loss)
    return optax.apply_updates(w_D, update), state

  first = jnp.zeros(x_ND.shape[1])
  w_D, _ = jax.jit(lambda w: jax.lax.fori_loop(0, 200, one, (w, solver.init(w))))(first)
  return np.clip(np.exp(np.asarray(x_ND @ w_D, np.float64)), low, high)


def weigh(spec: str, model: str, low: float, high: float) -> list[dict[str, Any]]:
  """The records of `spec` with the column density_ratio.

  Raises:
    UsageError: there is no such model.
    RunError: a record cannot be read, is a pair, or has no label.
  """
  source = sources.open_source(spec)
  found, prompts, labels = [], [], []
  for index in range(len(source)):
    record = source[index]
    try:
      if 'label' not in record:
        raise records.missing(record, None, ('prompt', 'completion', 'label'))
      ((prompt, _, desirable),) = feedback.responses(records.known(record, None))
    except types.RunError as err:
      raise types.RunError(f'{source.where(index)}: {err}') from err
    found.append(dict(record))
    prompts.append(prompt)
    labels.append(desirable)
  ratios = density_ratios(embed(model, prompts), np.array(labels), low, high)
  return [record | {'density_ratio': float(ratio)} for record, ratio in zip(found, ratios)]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--input', required=True, help='records with prompt, completion and label: jsonl:PATH, ...')
  parser.add_argument('--model', default=recipe.DEFAULT_MODEL, help='what reads the prompts, as for jaxalign.main')
  parser.add_argument('--output', type=storage.on_disk, required=True, help='the jsonl file to write')
  parser.add_argument('--low', type=float, default=0.5, help='the least ratio')
  parser.add_argument('--high', type=float, default=10.0, help='the largest ratio')
  args = parser.parse_args(argv)
  try:
    if not 0 < args.low <= args.high:
      raise types.UsageError(f'--low={args.low:g} --high={args.high:g}: 0 < low <= high is wanted')
    weighed = weigh(args.input, args.model, args.low, args.high)
    storage.write_text(args.output, ''.join(json.dumps(record, ensure_ascii=False) + '\n' for record in weighed))
  except (types.UsageError, types.RunError) as err:
    print(f'density_ratio: {err}', file=sys.stderr)
    return 2 if isinstance(err, types.UsageError) else 1
  except OSError as err:
    print(f'density_ratio: {args.output}: {err.strerror or err}', file=sys.stderr)
    return 1
  values = sorted(record['density_ratio'] for record in weighed)
  print(f'{args.output}: {len(weighed)} records, ratios {values[0]:.3g} to {values[-1]:.3g}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
