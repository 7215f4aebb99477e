"""Turns a checkpoint of jaxalign into a Hugging Face directory, or shows how one would be read.

  python tools/convert_hf.py --checkpoint=runs/dpo --output=DIR [--dtype=bfloat16]
  python tools/convert_hf.py --checkpoint=runs/dpo --output=DIR --adapter
  python tools/convert_hf.py --model=DIR [--output=DIR]

The first writes config.json, *.safetensors and the tokenizer's files, chat template included, as transformers reads
them with `AutoModelForCausalLM.from_pretrained`; a reward model becomes a `*ForSequenceClassification`, and adapters
are merged into the weights. The second writes the adapters alone, as PEFT reads them. The third prints which of our
parameters is made of which tensors and, with --output, writes them as a checkpoint, which `--model` takes everywhere.
"""

import argparse
from collections.abc import Sequence
import pathlib
import sys

import jax

from jaxalign import checkpoint
from jaxalign import recipe
from jaxalign import sharding
from jaxalign import storage
from jaxalign import types
from jaxalign.cli import catalog
from jaxalign.models import hf
from jaxalign.models import hf_export
from jaxalign.models import peft
from jaxalign.models import transformer


def export(directory: str, output: pathlib.Path, dtype: str | None) -> None:
  """Writes the newest checkpoint in `directory` to `output`."""
  loaded = checkpoint.writer(checkpoint.load(directory, sharding.make_mesh('', devices=jax.local_devices()[:1])))
  origin = loaded.run['hf_config']
  dtype = dtype or (origin or {}).get('dtype') or (origin or {}).get('torch_dtype') or 'float32'
  count = hf_export.write(
      output, checkpoint.merged(loaded), loaded.model.config, origin, dtype, loaded.tokenizer.pad_id
  )
  loaded.tokenizer.save(output)
  print(f'{output}: {count} tensors in {dtype}, of step {loaded.step}')


def export_adapter(directory: str, output: pathlib.Path) -> None:
  """Writes the adapters of the newest checkpoint in `directory` to `output`."""
  loaded = checkpoint.writer(checkpoint.load(directory, sharding.make_mesh('', devices=jax.local_devices()[:1])))
  if loaded.model.lora is None:
    raise types.UsageError(f'--checkpoint={directory}: it holds no adapters; leave --adapter out')
  spec, of_base = loaded.run['model_spec'], loaded.run['hf_config']
  if of_base is None and catalog.exists(f'models/{spec}.gin'):
    problem = f'its base, {spec}, was drawn at random and is in no directory'
    raise types.UsageError(f'--checkpoint={directory}: {problem}; leave --adapter out')
  base = storage.absolute(recipe.model_directory(spec))
  family = (of_base or {}).get('model_type', 'llama')
  count = peft.write(output, loaded.params, loaded.model, family, str(base))
  loaded.tokenizer.save(output)
  print(f'{output}: {count} tensors of an adapter, of step {loaded.step}')
  if checkpoint.is_checkpoint(base):
    print(f'its base, {base}, is a checkpoint: PEFT wants that exported too')


def read(directory: storage.Path, output: pathlib.Path) -> None:
  """Writes a Hugging Face directory as a checkpoint of step 0, in float32."""
  loaded = recipe.load(str(directory), sharding.make_mesh(), dtype='float32')
  checkpoint.save_imported(
      output, loaded.params, loaded.model, hf.read_json(directory / 'config.json'), loaded.tokenizer
  )
  print(f'{output}: a checkpoint of {directory}')


def show(directory: storage.Path) -> None:
  """Prints where each parameter comes from."""
  config = hf.read_config(directory)
  family = hf.read_json(directory / 'config.json')['model_type']
  abstract = transformer.abstract_params(transformer.Transformer(config), sharding.make_mesh())
  for path, x in jax.tree_util.tree_leaves_with_path(abstract):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    names = hf.tensor_map(family, config, name).tensors.reshape(-1)
    last = f' ... {names[-1]}' if len(names) > 1 else ''
    print(f'{name} {x.shape} <- {names[0]}{last}')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  given = parser.add_mutually_exclusive_group(required=True)
  given.add_argument('--checkpoint', help='a workdir, or one checkpoint in it')
  given.add_argument('--model', help='a Hugging Face directory')
  parser.add_argument('--output', type=storage.on_disk, help='the directory to write')
  parser.add_argument('--dtype', choices=sorted(hf_export.DTYPES), help='default: that of the weights trained from')
  parser.add_argument('--adapter', action='store_true', help='write the adapters alone, in the format of PEFT')
  args = parser.parse_args(argv)
  if args.checkpoint and not args.output:
    parser.error('--checkpoint needs --output')
  if args.dtype and (args.adapter or args.model):
    parser.error('--dtype is of exported weights; adapters and checkpoints are float32')
  if args.adapter and args.model:
    parser.error('--adapter goes with --checkpoint')
  try:
    if args.model:
      if args.output and args.output.exists() and (args.output.is_file() or any(args.output.iterdir())):
        raise types.UsageError(f'--output={args.output}: it is not an empty directory; choose another')
      directory = recipe.model_directory(args.model)
      show(directory)
      if args.output:
        read(directory, args.output)
    elif args.adapter:
      export_adapter(args.checkpoint, args.output)
    else:
      export(args.checkpoint, args.output, args.dtype)
  except (types.UsageError, types.RunError) as err:
    print(f'convert_hf: {err}', file=sys.stderr)
    return 2 if isinstance(err, types.UsageError) else 1
  except OSError as err:
    print(f'convert_hf: {err.filename or args.output}: {err.strerror or err}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
