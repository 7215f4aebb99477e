"""What every test runs under: eight CPU devices, no implicit rank promotion, no network, no cache of the user's."""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

# What one test or process compiled the others need not compile again: those of pytest, and those that tests start.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='jaxalign-compiled-')
  atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)

# Compiling takes most of the time: for CPUs without most optimisations (but see `optimised`), and by older emitters,
# which are twice as fast at it; XLA ends at a flag that it does not know. On a busy machine eight devices take long to
# meet, and XLA gives up after 40 s.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
if importlib.metadata.version('jaxlib').startswith('0.10.'):
  os.environ['XLA_FLAGS'] = (
      '--xla_cpu_use_fusion_emitters=false --xla_cpu_collective_call_terminate_timeout_seconds=600'
  )

# Before jax is imported. The TPU lines let tests compile for a TPU that is not there.
os.environ.update(
    JAX_PLATFORMS='cpu',
    JAX_NUM_CPU_DEVICES='8',
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.2',
    JAX_TRACEBACK_FILTERING='off',  # It takes some 4 % of the time.
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES='0',
    HF_HUB_OFFLINE='1',
    TPU_SKIP_MDS_QUERY='1',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
    TPU_ACCELERATOR_TYPE='v5litepod-16',
    TPU_WORKER_HOSTNAMES='localhost',
    LIBTPU_INIT_ARGS='--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000',  # as `compiling.tune_compiler` says
)

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_numpy_rank_promotion', 'raise')

# Compilation makes first examples slow, and a run must not depend on chance.
hypothesis.settings.register_profile('jaxalign', deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile('jaxalign')


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
  """Tokenised data and reference log-probabilities of a test go to a folder of its own."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg_cache'))


@pytest.fixture(scope='module', autouse=True)
def few_programs():
  """Forgets what was compiled when it has become much: each program is mapped into memory in parts, of which Linux lets
  a process have 65,530, and XLA aborts beyond."""
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='module')
def optimised():
  """For modules that look at what the compiler makes: programs are compiled as a user's are."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)
