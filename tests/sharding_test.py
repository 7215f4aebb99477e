"""The mesh that flags name, the table of axes, where parameters and batches lie, and joining a job's processes."""

from flax import linen as nn
import jax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign import sharding
from jaxalign import step
from jaxalign import types
from jaxalign.models import architecture
from jaxalign.models import transformer

P = jax.sharding.PartitionSpec

CONFIG = architecture.Config(
    vocab_size=100,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    mlp_dim=24,
    max_length=32,
    tie_embeddings=False,
    score_outputs=1,
)


def model_on(mesh, **changes):
  return transformer.build(architecture.Config(**(CONFIG.to_json() | changes)), mesh, length=32)


class TestParseMesh:

  def test_reads_sizes_in_any_order(self):
    assert sharding.parse_mesh('tensor:2, fsdp:-1') == {'tensor': 2, 'fsdp': -1}
    assert sharding.parse_mesh('') == {}

  @pytest.mark.parametrize(
      ('text', 'words'),
      [
          ('fsdp', "'fsdp' is not AXIS:SIZE"),
          ('fsdp=4', "'fsdp=4' is not AXIS:SIZE"),
          ('fsdp:4,model:2', "unknown axis 'model'; the axes are data, fsdp, tensor, context, expert"),
          ('fsdp:2,tensor:2,fsdp:2', "axis 'fsdp' is given twice"),
          ('tensor:0', "the size of 'tensor' must be positive, or -1"),
          ('tensor:-2', "the size of 'tensor' must be positive, or -1"),
          ('data:-1,fsdp:-1', 'only one axis can be -1'),
      ],
  )
  def test_names_the_flag_and_the_axis_in_errors(self, text, words):
    with pytest.raises(types.UsageError) as err:
      sharding.parse_mesh(text)
    assert str(err.value).startswith(f'--mesh={text}: {words}')


class TestMakeMesh:

  @pytest.mark.parametrize(
      ('text', 'shape'),
      [
          ('', (1, 8, 1, 1, 1)),
          ('fsdp:-1', (1, 8, 1, 1, 1)),
          ('tensor:2,data:-1', (4, 1, 2, 1, 1)),
          ('data:2,fsdp:2,tensor:2', (2, 2, 2, 1, 1)),
          ('context:2,expert:2,fsdp:2,data:-1', (1, 2, 1, 2, 2)),
      ],
  )
  def test_gives_an_axis_of_minus_one_the_devices_that_are_left(self, text, shape):
    mesh = sharding.make_mesh(text)
    assert mesh.axis_names == ('data', 'fsdp', 'tensor', 'context', 'expert')
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())

  def test_has_axes_that_constraints_may_name(self):
    assert set(sharding.make_mesh().axis_types) == {jax.sharding.AxisType.Auto}

  @pytest.mark.parametrize(
      ('text', 'words'),
      [
          ('tensor:3', 'tensor:3 = 3 does not divide the 8 devices; choose sizes whose product does'),
          ('fsdp:16', 'fsdp:16 = 16 does not divide the 8 devices; choose sizes whose product does'),
          ('data:3,fsdp:-1', 'data:3 = 3 does not divide the 8 devices; choose sizes whose product does'),
          ('fsdp:2,tensor:2', 'fsdp:2 x tensor:2 = 4, but there are 8 devices; make one axis -1 to take the rest'),
      ],
  )
  def test_names_the_axes_that_do_not_fit_the_devices(self, text, words):
    with pytest.raises(types.UsageError) as err:
      sharding.make_mesh(text)
    assert str(err.value) == f'--mesh={text}: {words}'

  def test_of_one_slice_takes_no_sizes_between_slices(self):
    with pytest.raises(types.UsageError, match=r'--dcn_mesh=data:2: all devices are in one slice'):
      sharding.make_mesh('', 'data:2')
    assert sharding.make_mesh('', 'data:-1').devices.shape == (1, 8, 1, 1, 1)


@pytest.fixture(scope='module')
def slices():
  """Twelve devices that are not there: three slices of a TPU v5e."""
  pytest.importorskip('libtpu', reason='libtpu, which describes TPUs, is not installed')
  return topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2', num_slices=3).devices


@pytest.mark.libtpu
class TestMakeMeshOfSlices:

  @pytest.mark.parametrize(
      ('text', 'dcn_text', 'shape', 'between'),
      [
          ('', '', (3, 4, 1, 1, 1), 'data'),
          ('fsdp:2,tensor:2', 'data:3', (3, 2, 2, 1, 1), 'data'),
          ('tensor:4', 'fsdp:-1', (1, 3, 4, 1, 1), 'fsdp'),
          ('data:4', 'data:3', (12, 1, 1, 1, 1), 'data'),
      ],
  )
  def test_crosses_slices_along_the_axis_of_dcn_mesh_alone(self, slices, text, dcn_text, shape, between):
    mesh = sharding.make_mesh(text, dcn_text, slices)
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(slices)
    of_slice = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    along = np.moveaxis(of_slice, sharding.AXES.index(between), 0)
    blocks = along.reshape(3, along.shape[0] // 3, -1)
    for block in blocks:
      assert len(np.unique(block)) == 1
    assert len(np.unique(of_slice)) == 3

  def test_is_compiled_for_their_platform(self, slices):
    assert sharding.platform_of(sharding.make_mesh('', '', slices)) == 'tpu'
    assert sharding.platform_of(sharding.make_mesh()) == 'cpu'

  @pytest.mark.parametrize(
      ('text', 'dcn_text', 'words'),
      [
          ('fsdp:8', '', '--mesh=fsdp:8: fsdp:8 = 8 does not divide the 4 devices of a slice'),
          ('', 'data:2', '--dcn_mesh=data:2: data:2 = 2 does not divide the 3 slices'),
          ('', 'model:3', "--dcn_mesh=model:3: unknown axis 'model'"),
      ],
  )
  def test_names_the_flag_that_does_not_fit(self, slices, text, dcn_text, words):
    with pytest.raises(types.UsageError) as err:
      sharding.make_mesh(text, dcn_text, slices)
    assert str(err.value).startswith(words)


class TestSpec:

  def test_follows_the_table(self):
    assert sharding.spec('batch', 'length', 'hidden') == P(('data', 'fsdp', 'expert'), 'context', None)
    assert sharding.spec('embed', None, 'vocab') == P('fsdp', None, 'tensor')
    assert sharding.spec() == P()

  def test_refuses_a_name_that_the_table_does_not_know(self):
    with pytest.raises(ValueError, match=r"unknown logical axis 'width'; sharding.RULES knows batch, length"):
      sharding.spec('batch', 'width')

  def test_never_gives_a_mesh_axis_two_axes_of_one_array(self):
    for names in ('batch', 'length', 'vocab'), ('batch', 'length', 'heads'), ('layers', 'embed', 'kv_heads'):
      axes = [axis for name in names for axis in sharding.axes_of(name)]
      assert len(axes) == len(set(axes))
    assert {axis for axes in sharding.RULES.values() for axis in axes} == set(sharding.AXES)


class TestParts:

  def test_multiplies_the_axes_of_the_name(self):
    mesh = sharding.make_mesh('data:2,fsdp:2,tensor:2')
    assert {name: sharding.parts(mesh, name) for name in ('batch', 'vocab', 'length', 'norm')} == {
        'batch': 4,
        'vocab': 2,
        'length': 1,
        'norm': 1,
    }


class TestConstrain:

  def test_applies_on_a_mesh(self):
    mesh = sharding.make_mesh('fsdp:4,tensor:2')
    with jax.set_mesh(mesh):
      x = jax.jit(lambda x: sharding.constrain(x, 'embed', 'vocab'))(np.zeros((8, 6)))
    assert x.sharding.spec == P('fsdp', 'tensor')
    assert x.addressable_shards[0].data.shape == (2, 3)

  def test_off_a_mesh_changes_nothing(self):
    x = jnp.zeros((8, 6))
    assert sharding.constrain(x, 'embed', 'vocab') is x

  def test_wants_a_name_for_each_axis(self):
    with pytest.raises(ValueError, match='1 logical names .* for an array of rank 2'):
      sharding.constrain(jnp.zeros((2, 2)), 'embed')


class TestBatchShardings:

  @pytest.mark.parametrize('stacked', [False, True])
  def test_split_rows_of_everything_and_tokens_where_there_are_any(self, stacked):
    lead = (2,) if stacked else ()
    tokens, responses = np.zeros((*lead, 8, 32)), np.zeros((*lead, 8, 3))
    batch = types.Batch(*[tokens] * 6, responses, responses, {'margin': responses})
    mesh = sharding.make_mesh('data:2,fsdp:2,context:2')
    found = jax.tree.map(lambda s: s.spec, sharding.batch_shardings(mesh, batch, stacked))
    micro, rows = (None,) if stacked else (), ('data', 'fsdp', 'expert')
    assert found.inputs_BT == found.mask_BT == found.responses_BT == P(*micro, rows, 'context')
    assert found.group_BS == found.labels_BS['margin'] == P(*micro, rows, None)


# How each parameter lies, spelt in mesh axes. The scanned layers lead with an axis that is never split.
SPECS = {
    'embed': P('tensor', 'fsdp'),
    'head': P('fsdp', 'tensor'),
    'score': P('fsdp', None),
    'final_norm': P(None),
    'layers': {
        '0': {
            'attn_norm': P(None, None),
            'mlp_norm': P(None, None),
            'q': P(None, 'fsdp', 'tensor', None),
            'k': P(None, 'fsdp', 'tensor', None),
            'v': P(None, 'fsdp', 'tensor', None),
            'o': P(None, 'tensor', None, 'fsdp'),
            'gate': P(None, 'fsdp', 'tensor'),
            'up': P(None, 'fsdp', 'tensor'),
            'down': P(None, 'tensor', 'fsdp'),
        },
    },
}


class TestShardingsOf:

  @pytest.mark.parametrize('text', ['fsdp:8', 'fsdp:4,tensor:2', 'data:2,fsdp:2,tensor:2', 'context:2,expert:2,data:2'])
  def test_every_parameter_lies_as_the_table_says(self, text):
    mesh = sharding.make_mesh(text)
    params = transformer.abstract_params(model_on(mesh), mesh)
    assert jax.tree.map(lambda x: x.sharding.spec, params) == SPECS

    def check(x, spec):
      ways = [mesh.shape[axis] if axis else 1 for axis in spec]
      assert x.sharding.shard_shape(x.shape) == tuple(n // w for n, w in zip(x.shape, ways))

    jax.tree.map(check, params, SPECS)

  def test_moments_lie_like_their_parameters_and_the_rest_of_the_state_is_everywhere(self):
    mesh = sharding.make_mesh('fsdp:4,tensor:2')
    params = transformer.abstract_params(model_on(mesh), mesh)
    state = step.abstract_state(mesh, params, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), seed=0)
    spec_of = lambda tree: jax.tree.map(lambda x: x.sharding.spec, tree)
    (adam,) = (part for part in jax.tree.leaves(state.opt_state, is_leaf=_is_adam) if _is_adam(part))
    assert spec_of(adam.mu) == spec_of(adam.nu) == spec_of(state.params) == SPECS
    assert adam.count.sharding.spec == state.step.sharding.spec == state.key.sharding.spec == P()

  def test_rules_of_its_own_take_the_place_of_the_table(self):
    mesh = sharding.make_mesh('fsdp:4,tensor:2')
    found = transformer.abstract_params(model_on(mesh), mesh, {'embed': (), 'mlp': ('fsdp', 'tensor')})
    assert found['embed'].sharding.spec == P('tensor', None)
    assert found['layers']['0']['up'].sharding.spec == P(None, None, ('fsdp', 'tensor'))
    with pytest.raises(types.UsageError, match=r"\['embed'\] is split twice over one of \['tensor', 'tensor'\]"):
      transformer.abstract_params(model_on(mesh), mesh, {'embed': ('tensor',)})

  @pytest.mark.parametrize(
      ('rules', 'said'),
      [({'embde': ()}, "'embde' is none of"), ({'embed': 'fsdp'}, 'no tuple'), ({'embed': ('x',)}, 'x')],
  )
  def test_rules_are_of_axes_that_there_are(self, rules, said):
    with pytest.raises(types.UsageError, match=f'some.binding: .*{said}'):
      sharding.check_rules(rules, 'some.binding')

  def test_key_heads_fewer_than_the_axis_are_on_every_device(self):
    mesh = sharding.make_mesh('fsdp:2,tensor:4')
    found = transformer.abstract_params(model_on(mesh), mesh)['layers']['0']
    assert found['k'].sharding.spec == found['v'].sharding.spec == P(None, 'fsdp', None, None)
    assert found['q'].sharding.spec == P(None, 'fsdp', 'tensor', None)

  @pytest.mark.parametrize(
      ('text', 'changes', 'words'),
      [
          ('tensor:8', {}, "has 4 'heads', which tensor:8 does not divide"),
          ('tensor:8', {'num_heads': 24, 'num_kv_heads': 3}, "has 3 'kv_heads', which tensor:8 does not divide"),
          ('tensor:4,fsdp:2', {'num_heads': 12, 'num_kv_heads': 6}, "has 6 'kv_heads', which tensor:4 does not divide"),
          ('tensor:2,fsdp:4', {'mlp_dim': 25}, "has 25 'mlp', which tensor:2 does not divide"),
          ('fsdp:8', {'embed_dim': 20}, "has 20 'embed', which fsdp:8 does not divide"),
      ],
  )
  def test_names_the_axis_that_does_not_divide(self, text, changes, words):
    mesh = sharding.make_mesh(text)
    with pytest.raises(types.UsageError) as err:
      transformer.abstract_params(model_on(mesh, **changes), mesh)
    assert str(err.value).startswith('--mesh: ')
    assert words in str(err.value)

  def test_any_vocabulary_is_padded_until_the_axis_divides_it(self):
    mesh = sharding.make_mesh('tensor:4,fsdp:2')
    params = transformer.abstract_params(model_on(mesh, vocab_size=101), mesh)
    assert params['head'].shape == (16, 128)
    assert params['embed'].sharding.shard_shape(params['embed'].shape) == (32, 8)

  def test_refuses_a_name_that_the_table_does_not_know(self):
    boxed = {'w': nn.Partitioned(np.zeros((8, 8)), ('embed', 'width'))}
    with pytest.raises(ValueError, match="unknown logical axis 'width'"):
      sharding.shardings_of(sharding.make_mesh(), boxed)


def _is_adam(x):
  return isinstance(x, optax.ScaleByAdamState)


@pytest.fixture
def started(monkeypatch):
  """Sets the environment, calls start_distributed, and returns what `jax.distributed` was then given, if called."""
  for name in ('COORDINATOR_ADDRESS', 'TPU_WORKER_HOSTNAMES', 'SLURM_NTASKS', 'SLURM_STEP_NODELIST'):
    monkeypatch.delenv(name, raising=False)

  def start(**env):
    calls = []
    monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, heartbeat_timeout_seconds: calls.append(args))
    for name, value in env.items():
      monkeypatch.setenv(name, value)
    sharding.start_distributed()
    return calls

  return start


class TestStartDistributed:

  @pytest.mark.parametrize(
      'env',
      [
          {},
          {'TPU_WORKER_HOSTNAMES': 'localhost'},
          {'SLURM_NTASKS': '1', 'SLURM_STEP_NODELIST': 'n1'},
          {'SLURM_NTASKS': '4'},
          {'OMPI_COMM_WORLD_SIZE': '1'},
      ],
  )
  def test_leaves_a_process_alone_that_is_alone(self, started, env):
    assert not started(**env)

  @pytest.mark.parametrize(
      'env',
      [
          {'COORDINATOR_ADDRESS': 'auto'},
          {'TPU_WORKER_HOSTNAMES': 'w0,w1'},
          {'MEGASCALE_COORDINATOR_ADDRESS': 'w0'},
          {'SLURM_NTASKS': '4', 'SLURM_STEP_NODELIST': 'n[1-4]'},
          {'OMPI_COMM_WORLD_SIZE': '2'},
      ],
  )
  def test_lets_jax_find_the_others(self, started, env):
    assert started(**env) == [()]

  def test_takes_address_number_and_place_from_the_environment(self, started):
    assert started(COORDINATOR_ADDRESS='h0:1234', NUM_PROCESSES='4', PROCESS_ID='3') == [('h0:1234', 4, 3)]

  @pytest.mark.parametrize(
      ('env', 'words'),
      [
          ({'COORDINATOR_ADDRESS': 'h0:1'}, 'is set, but not NUM_PROCESSES and PROCESS_ID'),
          ({'COORDINATOR_ADDRESS': 'h0:1', 'NUM_PROCESSES': '2'}, 'is set, but not PROCESS_ID'),
          ({'COORDINATOR_ADDRESS': 'h0', 'NUM_PROCESSES': '2', 'PROCESS_ID': '0'}, 'write HOST:PORT, or auto'),
          (
              {'COORDINATOR_ADDRESS': 'h0:1', 'NUM_PROCESSES': '2', 'PROCESS_ID': '2'},
              'PROCESS_ID=2: write N and one of',
          ),
          ({'COORDINATOR_ADDRESS': 'h0:1', 'NUM_PROCESSES': 'x', 'PROCESS_ID': '0'}, 'NUM_PROCESSES=x'),
          ({'COORDINATOR_ADDRESS': 'h0:1', 'NUM_PROCESSES': '2', 'PROCESS_ID': '-1'}, 'PROCESS_ID=-1'),
      ],
  )
  def test_names_the_variable_that_is_missing_or_impossible(self, started, env, words):
    with pytest.raises(types.UsageError, match=words):
      started(**env)
