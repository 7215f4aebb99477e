"""How JAX compiles in this process: defaults of the TPU compiler, and programs that are kept on disk."""

import hashlib
import os
import pathlib

import jax


def tune_compiler() -> None:
  """Sets defaults of the TPU compiler, for programs of this process; what LIBTPU_INIT_ARGS says already stands.

  Call it before JAX looks for devices. Products with sharded weights would otherwise become loops over their parts, in
  which gathers hide behind products, but which take two to three times the cycles.
  """
  given = os.environ.get('LIBTPU_INIT_ARGS', '').split()
  defaults = {'--xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}
  names = {one.partition('=')[0] for one in given}
  added = [f'{name}={value}' for name, value in defaults.items() if name not in names]
  os.environ['LIBTPU_INIT_ARGS'] = ' '.join([*given, *added])


def keep_programs(folder: pathlib.Path) -> None:
  """Keeps what is compiled below `folder`, for the next run of the same; JAX_COMPILATION_CACHE_DIR says otherwise.

  Programs of another kind of CPU are not found, as they may have instructions that this one lacks.
  """
  if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
    return
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text(encoding='utf-8').splitlines() if info.exists() else []
  kind = next((line for line in lines if line.startswith(('flags', 'Features'))), '')
  digest = hashlib.blake2b(kind.encode(), digest_size=6).hexdigest()
  jax.config.update('jax_compilation_cache_dir', str(folder / f'compiled-{digest}'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
