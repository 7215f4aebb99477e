"""Merges models of one shape into a checkpoint, which `--model` takes everywhere and convert_hf.py exports.

  python tools/merge.py linear --models A B --weights 0.7 0.3 --output=DIR
  python tools/merge.py extrapolate --base=SFT --models DPO --alpha=0.3 --output=DIR
  python tools/merge.py slerp --base=SFT --models A B --share=0.5 --output=DIR
  python tools/merge.py ties --base=BASE --models SFT DPO --density=0.2 --output=DIR

Models are Hugging Face directories or checkpoints of jaxalign, whose adapters are merged first. PAFT (Pentyala et al.,
2024, https://arxiv.org/abs/2406.17923) is `ties` of models that were tuned in parallel by sft and by dpo from one base.
"""

import argparse
from collections.abc import Sequence
import sys

import jax

from jaxalign import checkpoint
from jaxalign import recipe
from jaxalign import sharding
from jaxalign import storage
from jaxalign import types
from jaxalign.data import tokenizers
from jaxalign.models import hf
from jaxalign.models import merging

_MODELS = {'linear': (1, None), 'extrapolate': (1, 1), 'slerp': (2, 2), 'ties': (1, None)}
# What each method reads, with its default; other flags are refused.
_OPTIONS = {
    'linear': {'weights': None},
    'extrapolate': {'base': None, 'alpha': 0.3},
    'slerp': {'base': None, 'share': 0.5},
    'ties': {'base': None, 'weights': None, 'density': 0.2, 'scale': 1.0},
}


def _load(spec: str) -> checkpoint.Loaded:
  """A model in float32 without adapters."""
  loaded = checkpoint.writer(recipe.load(spec, sharding.make_mesh(), dtype='float32'))
  return loaded._replace(params=checkpoint.merged(loaded))


def _origin(loaded: checkpoint.Loaded, spec: str) -> dict | None:
  path = recipe.model_directory(spec)
  return loaded.run['hf_config'] if checkpoint.is_checkpoint(path) else hf.read_json(path / 'config.json')


def _check_tokenizers(spec: str, first: tokenizers.Tokenizer, other_spec: str, other: tokenizers.Tokenizer) -> None:
  """Raises UsageError where an id means one token here and another there; chat templates may differ."""
  if first.fingerprint == other.fingerprint:
    return
  for i in range(max(first.vocab_size, other.vocab_size)):
    text = lambda one, i=i: one.decode([i], continuation=True, skip_special=False) if i < one.vocab_size else None
    if text(first) != text(other):
      raise types.UsageError(
          f'{other_spec}: its tokenizer is not that of {spec}: token {i} is {text(other)!r}, there {text(first)!r}'
      )


def merge(args: argparse.Namespace) -> None:
  """Loads, merges and writes."""
  for name in ('base', 'weights', 'alpha', 'share', 'density', 'scale'):
    if getattr(args, name) is None:
      setattr(args, name, _OPTIONS[args.method].get(name))
    elif name not in _OPTIONS[args.method]:
      raise types.UsageError(f'--{name}: {args.method} does not read it')
  low, high = _MODELS[args.method]
  if len(args.models) < low or high is not None and len(args.models) > high:
    raise types.UsageError(f'--models: {args.method} takes {low if low == high else f"at least {low}"}')
  if args.method != 'linear' and not args.base:
    raise types.UsageError(f'--base: {args.method} needs the model that the others were tuned from')
  weights = args.weights or [1 / len(args.models)] * len(args.models)
  if len(weights) != len(args.models):
    raise types.UsageError(f'--weights: {len(weights)} for {len(args.models)} models')
  if args.output.exists() and (args.output.is_file() or any(args.output.iterdir())):
    raise types.UsageError(f'--output={args.output}: it is not an empty directory; choose another')
  specs = [*([args.base] if args.base else []), *args.models]
  loaded = [_load(spec) for spec in specs]
  for spec, one in zip(specs[1:], loaded[1:]):
    if one.model.config != loaded[0].model.config:
      raise types.UsageError(f'{spec}: its configuration is not that of {specs[0]}')
    _check_tokenizers(specs[0], loaded[0].tokenizer, spec, one.tokenizer)
  base, tuned = loaded[0].params, [one.params for one in loaded[1 if args.base else 0 :]]
  if args.method == 'linear':
    params = merging.linear(tuned, weights)
  elif args.method == 'extrapolate':
    params = merging.extrapolate(base, tuned[0], args.alpha)
  elif args.method == 'slerp':
    params = merging.slerp(base, *tuned, args.share)
  else:
    params = merging.ties(base, tuned, density=args.density, scale=args.scale, weights=weights)
  first = loaded[0]
  checkpoint.save_imported(args.output, params, first.model, _origin(first, specs[0]), first.tokenizer)
  print(f'{args.output}: {args.method} of {", ".join(args.models)}, {len(jax.tree.leaves(params))} parameters')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('method', choices=sorted(_MODELS))
  parser.add_argument('--models', nargs='+', required=True, help='what is merged')
  parser.add_argument('--base', help='what they were tuned from')
  parser.add_argument('--weights', nargs='+', type=float, help='of the models (linear, ties); default: equal')
  parser.add_argument('--alpha', type=float, help='how far beyond the tuned model (extrapolate); default: 0.3')
  parser.add_argument('--share', type=float, help='of the second model (slerp); default: 0.5')
  parser.add_argument('--density', type=float, help='share of each difference that stays (ties); default: 0.2')
  parser.add_argument('--scale', type=float, help='of the merged difference (ties); default: 1')
  parser.add_argument('--output', type=storage.on_disk, required=True, help='the directory to write')
  args = parser.parse_args(argv)
  try:
    merge(args)
  except (types.UsageError, types.RunError) as err:
    print(f'merge: {err}', file=sys.stderr)
    return 2 if isinstance(err, types.UsageError) else 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
