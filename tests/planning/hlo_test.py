"""What is read off the text of compiled programs, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from jaxalign import logps
from jaxalign import sharding
from jaxalign import vocab
from jaxalign.planning import hlo

# As libtpu writes them: a loop without a known count that goes two by two, products as convolutions with padding, one
# all-gather in two parts, a scattering fusion, and a kernel.
TPU = """HloModule jit_f, is_scheduled=true

%fused_computation.1 (p0: bf16[64,32], p1: bf16[32,128]) -> bf16[64,128] {
  %p0 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %convolution.1 = bf16[64,128]{1,0:T(8,128)(2,1)} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%heads (p2: bf16[64,2,16,1], p3: bf16[2,16,8,4]) -> bf16[64,8,4,1] {
  %p2 = bf16[64,2,16,1]{3,2,1,0} parameter(0)
  %p3 = bf16[2,16,8,4]{3,2,1,0} parameter(1)
  ROOT %convolution.2 = bf16[64,8,4,1]{0,2,3,1} convolution(%p2, %p3), \
window={size=8x2 pad=7_7x0_0 rhs_reversal=1x0}, dim_labels=b1f0_1i0o->b0f1
}

%all-reduce-scatter.1 (p4: f32[128]) -> f32[16] {
  %p4 = f32[128]{0} parameter(0)
  %all-reduce.5 = f32[128]{0} all-reduce(%p4), channel_id=9, replica_groups={{0,1}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[16]{0} slice(%all-reduce.5), slice={[0:16]}
}

%body (arg: (u32[], bf16[64,32])) -> (u32[], bf16[64,32]) {
  %arg = (u32[]{:T(128)}, bf16[64,32]{1,0}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %counter = u32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%arg), index=1
  %fusion.1 = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x, %x), kind=kOutput, calls=%fused_computation.1, \
backend_config={"window_config":{"estimated_cycles":"100"}}
  %all-gather.1 = bf16[64,64]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1}}, dimensions={1}
  %all-gather.2 = bf16[64,64]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1}}, dimensions={1}
  %next = u32[]{:T(128)} add(%counter, %two)
  ROOT %out = (u32[]{:T(128)}, bf16[64,32]{1,0}) tuple(%next, %x)
}

%condition (arg.2: (u32[], bf16[64,32])) -> pred[] {
  %arg.2 = (u32[]{:T(128)}, bf16[64,32]{1,0}) parameter(0)
  %eight = u32[]{:T(128)} constant(8)
  %counter.2 = u32[]{:T(128)} get-tuple-element(%arg.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter.2, %eight), direction=LT
}

ENTRY %main (a: bf16[64,32], b: f32[128]) -> bf16[64,32] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = f32[128]{0} parameter(1)
  %zero = u32[]{:T(128)} constant(0)
  %begin = (u32[]{:T(128)}, bf16[64,32]{1,0}) tuple(%zero, %a)
  %while.1 = (u32[]{:T(128)}, bf16[64,32]{1,0}) while(%begin), condition=%condition, body=%body
  %fusion.2 = bf16[64,8,4,1]{0,2,3,1} fusion(%a, %a), kind=kOutput, calls=%heads
  %fusion.3 = f32[16]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %q = bf16[2,256,64]{2,1,0} bitcast(%a)
  %k = bf16[1,256,64]{2,1,0} bitcast(%a)
  %splash_mha_dkv.1 = (f32[1,256,64]{2,1,0}, f32[1,256,64]{2,1,0}) custom-call(%q, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"of": "many lines"
}}
  ROOT %result = bf16[64,32]{1,0} get-tuple-element(%while.1), index=1
}
"""


@pytest.fixture
def found():
  return hlo.costs(TPU)


class TestCosts:

  def test_counts_what_a_loop_runs_as_often_as_it_turns(self, found):
    (loop,) = [one for lines in hlo.Module(TPU).computations.values() for one in lines if one.op == 'while']
    assert hlo.Module(TPU).trips(loop) == 4  # from 0 to 8 by 2
    assert found.cycles == 4 * 100

  def test_counts_products_and_not_what_meets_padding(self, found):
    in_loop, heads = 2 * 64 * 32 * 128, 2 * 64 * 8 * 4 * (2 * 16)
    assert found.flops == 4 * in_loop + heads

  def test_counts_a_collective_of_several_parts_once(self, found):
    assert found.collectives['all-gather'] == {'count': 4, 'bytes': 4 * 64 * 64 * 2}

  def test_counts_what_runs_beside_other_work_on_sparse_cores(self, found):
    inner = """
%called (p5: bf16[64,32]) -> bf16[64,64] {
  %p5 = bf16[64,32]{1,0} parameter(0)
  %slow = bf16[64,32]{1,0} fusion(%p5), kind=kLoop, backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %all-gather.3 = bf16[64,64]{1,0} all-gather(%p5), channel_id=8, replica_groups={{0,1}}, dimensions={1}
}, execution_thread="sparsecore"
"""
    begun = """
  %call-start = ((bf16[64,32]{1,0}), bf16[64,64]{1,0}, u32[]{:S(8)}) call-start(%x), \
async_execution_thread="sparsecore", to_apply=%called
  %call-done = bf16[64,64]{1,0} call-done(%call-start)
  %next ="""
    beside = hlo.costs(TPU.replace('\n%body (arg', f'{inner}\n%body (arg').replace('\n  %next =', begun))
    assert beside.collectives['all-gather'] == {'count': 2 * 4, 'bytes': 2 * 4 * 64 * 64 * 2}
    assert (beside.cycles, beside.flops) == (found.cycles, found.flops)
    assert beside.bytes - found.bytes == 4 * (2 * 64 * 32 + 64 * 32 + 64 * 64) * 2  # once of what is called

  def test_knows_a_fusion_that_scatters(self, found):
    assert found.collectives['reduce-scatter'] == {'count': 1, 'bytes': 4 * 128}
    assert 'all-reduce' not in found.collectives

  def test_counts_half_the_places_of_a_causal_kernel(self, found):
    assert found.kernel_flops == 4 * 2 * 2 * 256 * 64 * 256 / 2

  @pytest.mark.parametrize('kernel,width', [('fwd', 148 + 128), ('dq', 2 * 148 + 128), ('dkv', 2 * (148 + 128))])
  def test_counts_keys_that_are_wider_than_values(self, kernel, width):
    operands = ['s32[4]', 'bf16[4,256,148]', 'bf16[2,256,148]', 'bf16[2,256,128]', 'f32[4,256]']
    assert hlo.kernel_flops(f'splash_mha_{kernel}', operands) == width * 4 * 256 * 256

  @pytest.mark.parametrize('name,scope,rows', [('gmm', 'usual_300_rows/', 300), ('ragged-dot-none', '', 512)])
  def test_counts_a_matrix_for_each_row_of_a_group(self, name, scope, rows):
    rest = f', custom_call_target="tpu_custom_call", metadata={{op_name="jit(step)/{scope}jit(gmm)/pallas_call"}}'
    numbers, wide, narrow = ['s32[9]{0}', 's32[12]{0}', 's32[1]{0}'], 'bf16[512,64]{1,0}', 'bf16[512,96]{1,0}'
    weights = 'bf16[8,64,96]{2,1,0}'
    wanted = 2 * rows * 64 * 96
    assert hlo.kernel_flops(f'jvp_jit_{name}__.2', [*numbers, wide, weights], rest) == wanted
    assert hlo.kernel_flops(f'transpose_jvp_jit_{name}__', [*numbers, narrow, weights], rest) == wanted  # transposed
    assert hlo.kernel_flops(f'transpose_jvp_jit_t{name}__', [*numbers, wide, narrow], rest) == wanted

  def test_leaves_out_collectives_of_one_device_and_tells_apart_those_that_share_channel_1(self):
    shared = TPU.replace('channel_id=7', 'channel_id=1')
    assert hlo.costs(shared).collectives['all-gather'] == {'count': 2 * 4, 'bytes': 2 * 4 * 64 * 64 * 2}
    alone = TPU.replace('channel_id=7, replica_groups={{0,1}}', 'channel_id=7, replica_groups={{0},{1}}')
    assert 'all-gather' not in hlo.costs(alone).collectives

  @pytest.mark.parametrize(
      'name,turns', [('', 1), ('jit(f)/at_most_5_turns/while', 5), ('jit(f)/at_most_5_turns/while/body/while', 1)]
  )
  def test_takes_the_turns_that_a_program_does_not_tell_from_the_name_of_the_loop(self, name, turns):
    text = TPU.replace(
        '%eight = u32[]{:T(128)} constant(8)', '%eight = u32[]{:T(128)} get-tuple-element(%arg.2), index=0'
    )
    of_loop = 'condition=%condition, body=%body'
    assert text.count(of_loop) == 1
    text = text.replace(of_loop, f'{of_loop}, metadata={{op_name="{name}"}}')
    assert hlo.costs(text).cycles == turns * 100

  def test_leaves_out_what_stays_on_the_chip(self):
    on_chip = hlo.costs(TPU.replace('bf16[64,32]{1,0}', 'bf16[64,32]{1,0:S(1)}'))
    assert on_chip.bytes < hlo.costs(TPU).bytes

  @pytest.mark.usefixtures('optimised')
  @pytest.mark.parametrize('turns', [1, 3])
  def test_agrees_with_hand_counts_of_what_this_machine_compiles(self, turns):
    layers, mesh = 5, sharding.make_mesh('fsdp:8')

    def run(x, weights, last):
      deep = lambda x: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, weights)[0]
      return vocab.loop(0, last, turns, lambda _, x: deep(x), x)

    args = jnp.ones((64, 24)), jnp.ones((layers, 24, 24)), jnp.int32(turns)
    where = sharding.named(mesh, 'batch', None), sharding.named(mesh), sharding.named(mesh)
    compiled = jax.jit(run, in_shardings=where).lower(*args).compile()
    assert hlo.costs(compiled.as_text()).flops == turns * layers * 2 * (64 // 8) * 24 * 24

  # Of each chunk a product forward, two for gradients, and that forward again where its logits are not kept.
  @pytest.mark.usefixtures('optimised')
  @pytest.mark.parametrize('kept,products', [(0, 4 * 4), (1, 4 * 4 - 1), (3, 4 * 4 - 3), (9, 4 * 4 - 4)])
  def test_counts_logits_again_where_they_are_not_kept(self, kept, products):
    chunk, width, tokens, ids = 16, 24, 64, 160

    def total(hidden, head, targets, mask):
      options = {'vocab_size': ids, 'chunk': chunk, 'kept_bytes': 4 * kept * chunk * ids}
      return jnp.sum(logps.token_stats(hidden, head, targets, mask, **options)['logps'])

    args = jnp.ones((1, tokens, width)), jnp.ones((width, ids)), jnp.ones((1, tokens), jnp.int32), jnp.ones((1, tokens))
    compiled = jax.jit(jax.grad(total, (0, 1))).lower(*args).compile()
    assert hlo.costs(compiled.as_text()).flops == products * 2 * chunk * width * ids
