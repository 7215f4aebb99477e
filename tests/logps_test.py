"""Tests of the chunked log-probabilities, against dense float64 formulas."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import logps
from jaxalign import sharding
from jaxalign import vocab

pytestmark = pytest.mark.usefixtures('optimised')

B, T, D, V = 8, 12, 16, 384
VOCAB = 301  # the other columns are padding
MESHES = ('fsdp:2,tensor:2,context:2', 'data:2,fsdp:2,tensor:2', 'tensor:8', 'fsdp:8')
DENSE = ('entropy', 'correct', 'mean_logit')


def _data(seed=0, counted=0.6):
  """Hidden states, head, targets and mask as numpy float32; padding columns are large, so that they show if counted."""
  rng = np.random.default_rng(seed)
  hidden_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
  head_DV = rng.normal(size=(D, V)).astype(np.float32)
  head_DV[:, VOCAB:] = 9.0
  targets_BT = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
  mask_BT = (rng.random((B, T)) < counted).astype(np.float32)
  return hidden_BTD, head_DV, targets_BT, mask_BT


def _gold(hidden_BTD, head_DV, targets_BT, mask_BT):
  """Every statistic by the textbook formula, float64, on full logits."""
  logits = np.einsum('btd,dv->btv', hidden_BTD.astype(np.float64), head_DV.astype(np.float64))[..., :VOCAB]
  top = logits.max(-1, keepdims=True)
  p = np.exp(logits - top)
  p /= p.sum(-1, keepdims=True)
  chosen = np.take_along_axis(p, targets_BT[..., None], -1)[..., 0]
  stats = {
      'logps': np.log(chosen),
      'entropy': -(p * np.log(p)).sum(-1),
      'correct': (logits.argmax(-1) == targets_BT).astype(np.float64),
      'mean_logit': logits.mean(-1),
      'sharpness': np.log((p * p).sum(-1)),
  }
  return {name: x * mask_BT for name, x in stats.items()}


def _gold_gradients(hidden_BTD, head_DV, targets_BT, mask_BT, weight_BT, entropy_weight_BT):
  """Gradients of sum(weight * logps + entropy_weight * entropy), float64: (d hidden, d head)."""
  h, w = hidden_BTD.astype(np.float64), head_DV.astype(np.float64)[:, :VOCAB]
  logits = np.einsum('btd,dv->btv', h, w)
  logp = logits - logits.max(-1, keepdims=True)
  logp -= np.log(np.exp(logp).sum(-1, keepdims=True))
  p = np.exp(logp)
  entropy = -(p * logp).sum(-1, keepdims=True)
  onehot = np.eye(VOCAB)[targets_BT]
  d_logits = weight_BT[..., None] * (onehot - p) - entropy_weight_BT[..., None] * p * (logp + entropy)
  d_logits *= mask_BT[..., None]
  d_head = np.zeros(head_DV.shape)
  d_head[:, :VOCAB] = np.einsum('btd,btv->dv', h, d_logits)
  return np.einsum('btv,dv->btd', d_logits, w), d_head


@functools.cache
def _jitted(**options):
  """`token_stats` with these options, compiled once for all tests that call it alike."""
  return jax.jit(functools.partial(logps.token_stats, **options))


@functools.cache
def _jitted_gradients(**options):
  def total(hidden_BTD, head_DV, targets_BT, mask_BT, weight_BT, entropy_weight_BT):
    stats = logps.token_stats(hidden_BTD, head_DV, targets_BT, mask_BT, **options)
    result = jnp.sum(stats['logps'] * weight_BT)
    return result + jnp.sum(stats['entropy'] * entropy_weight_BT) if 'entropy' in stats else result

  return jax.jit(jax.grad(total, argnums=(0, 1)))


def _stats(data, mesh='', chunk=16, dense=DENSE):
  """`token_stats` of numpy data, on one device or on a mesh of eight."""
  with _on(mesh):
    return jax.device_get(_jitted(vocab_size=VOCAB, chunk=chunk, dense=dense)(*data))


def _gradients(data, weight_BT, entropy_weight_BT=None, mesh='', chunk=16, **more):
  """Gradients of a weighted sum of log-probabilities (and entropies): (d hidden, d head)."""
  dense = () if entropy_weight_BT is None else ('entropy',)
  with _on(mesh):
    fn = _jitted_gradients(vocab_size=VOCAB, chunk=chunk, dense=dense, **more)
    return jax.device_get(fn(*data, weight_BT, entropy_weight_BT))


def _on(mesh):
  return jax.set_mesh(sharding.make_mesh(mesh)) if mesh else contextlib.nullcontext()


def _weights(seed=1):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(B, T)).astype(np.float32), rng.normal(size=(B, T)).astype(np.float32)


def _close(actual, gold, tolerance):
  """Within `tolerance` of the largest gold number."""
  np.testing.assert_allclose(actual, gold, rtol=0, atol=tolerance * max(1.0, np.abs(gold).max()))


def _arrays(jaxpr):
  """Every array that a jaxpr and the jaxprs inside it take, make or close over."""
  for var in (*jaxpr.invars, *jaxpr.constvars):
    yield var.aval
  for eqn in jaxpr.eqns:
    for var in eqn.outvars:
      yield var.aval
    for leaf in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'eqns') or hasattr(x, 'jaxpr')):
      inner = leaf.jaxpr if hasattr(leaf, 'jaxpr') else leaf
      if hasattr(inner, 'eqns'):
        yield from _arrays(inner)


def _largest(fn, *args):
  """Size of the largest array inside `fn`, of one device inside `shard_map`."""
  return max(aval.size for aval in _arrays(jax.make_jaxpr(fn)(*args).jaxpr) if hasattr(aval, 'size'))


def _collectives(text):
  """{(opcode, whether it is inside a loop): count} of the collectives in a compiled program's text."""
  computations, name = {}, None
  for line in text.splitlines():
    head = re.match(r'(?:ENTRY )?%?([\w.-]+) \(.*\{$', line)
    if head:
      name = head[1]
      computations[name] = []
    elif name:
      computations[name].append(line)
  calls = {
      name: {called for line in lines for called in re.findall(r'%([\w.-]+)', line) if called in computations}
      for name, lines in computations.items()
  }
  looped = set()
  pending = [
      body for lines in computations.values() for line in lines for body in re.findall(r'body=%?([\w.-]+)', line)
  ]
  assert pending, 'no loop was found, so nothing could be found inside one'
  while pending:
    name = pending.pop()
    if name not in looped:
      looped.add(name)
      pending += calls[name]
  counts = {}
  for name, lines in computations.items():
    for line in lines:
      op = re.search(r' = \S+ (all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)(?:-start)?\(', line)
      if op:
        key = op[1], name in looped
        counts[key] = counts.get(key, 0) + 1
  return counts


class TestTokenStats:

  # 13 and 5 divide nothing here; 1000 exceeds the 96 targets.
  @pytest.mark.parametrize('chunk', [1, 5, 13, 96, 1000])
  def test_equals_the_dense_log_softmax_for_any_chunk(self, chunk):
    data = _data()
    stats, gold = _stats(data, chunk=chunk), _gold(*data)
    assert set(stats) == {'logps', *DENSE}
    for name in stats:
      _close(stats[name], gold[name], 1e-6)

  @pytest.mark.parametrize('chunk', [1, 13, 1000])
  def test_gradients_are_those_of_the_dense_log_softmax(self, chunk):
    data, (weight_BT, _) = _data(), _weights()
    gold = _gold_gradients(*data, weight_BT, np.zeros((B, T)))
    for got, want in zip(_gradients(data, weight_BT, chunk=chunk), gold):
      _close(got, want, 1e-5)

  def test_entropy_carries_its_gradient(self):
    data, (_, weight_BT) = _data(), _weights()
    gold = _gold_gradients(*data, np.zeros((B, T)), weight_BT)
    for got, want in zip(_gradients(data, np.zeros((B, T), np.float32), weight_BT), gold):
      _close(got, want, 1e-5)

  def test_gradients_of_entropy_and_logps_add_up(self):
    data, weights = _data(), _weights()
    for got, want in zip(_gradients(data, *weights), _gold_gradients(*data, *weights)):
      _close(got, want, 1e-5)

  def test_correct_and_mean_logit_carry_no_gradient(self):
    data = _data()

    def total(hidden_BTD, head_DV):
      stats = logps.token_stats(hidden_BTD, head_DV, *data[2:], vocab_size=VOCAB, dense=('correct', 'mean_logit'))
      return jnp.sum(stats['correct'] + stats['mean_logit'])

    for gradient in jax.jit(jax.grad(total, argnums=(0, 1)))(*data[:2]):
      assert not np.any(gradient)

  def test_padding_columns_have_probability_zero(self):
    hidden_BTD, head_DV, targets_BT, mask_BT = _data()
    same_BTD = np.broadcast_to(hidden_BTD[:1, :1], (1, VOCAB, D))
    every_id = same_BTD, head_DV, np.arange(VOCAB, dtype=np.int32)[None], np.ones((1, VOCAB), np.float32)
    total = np.exp(_stats(every_id, dense=())['logps'].astype(np.float64)).sum()
    np.testing.assert_allclose(total, 1.0, rtol=1e-6)
    loud = head_DV.copy()
    loud[:, VOCAB:] *= -1e4
    np.testing.assert_array_equal(
        _stats((hidden_BTD, head_DV, targets_BT, mask_BT))['logps'],
        _stats((hidden_BTD, loud, targets_BT, mask_BT))['logps'],
    )

  def test_padding_columns_get_no_gradient(self):
    data, weights = _data(), _weights()
    _, d_head = _gradients(data, *weights)
    assert not np.any(d_head[:, VOCAB:]) and np.all(np.any(d_head[:, :VOCAB], axis=0))

  def test_masked_targets_are_exactly_zero_and_get_exactly_zero_gradient(self):
    hidden_BTD, head_DV, targets_BT, mask_BT = _data()
    poisoned = np.where(mask_BT[..., None] > 0, hidden_BTD, np.nan).astype(np.float32)
    data = poisoned, head_DV, targets_BT, mask_BT
    for name, x in _stats(data).items():
      assert not np.any(x[mask_BT == 0]), name
      assert np.all(np.isfinite(x)), name
    d_hidden, d_head = _gradients(data, *_weights())
    assert not np.any(d_hidden[mask_BT == 0]) and np.all(np.isfinite(d_hidden)) and np.all(np.isfinite(d_head))
    assert np.all(np.any(d_hidden[mask_BT > 0], axis=-1))

  @pytest.mark.parametrize('mesh', ['', 'fsdp:2,tensor:2,context:2'])
  def test_a_batch_without_targets_is_zero_everywhere(self, mesh):
    data = (*_data()[:3], np.zeros((B, T), np.float32))
    assert not any(np.any(x) for x in _stats(data, mesh).values())
    assert not any(np.any(x) for x in _gradients(data, *_weights(), mesh=mesh))

  def test_is_finite_where_logits_are_extreme(self):
    hidden_BTD, head_DV, targets_BT, mask_BT = _data()
    data = hidden_BTD * np.float32(1e4), head_DV, targets_BT, mask_BT
    assert all(np.all(np.isfinite(x)) for x in _stats(data).values())
    assert all(np.all(np.isfinite(x)) for x in _gradients(data, *_weights()))

  def test_bfloat16_operands_cost_less_than_a_hundredth(self):
    data, weights = _data(), _weights()
    rounded = tuple(np.asarray(x.astype(jnp.bfloat16), np.float32) for x in data[:2])
    narrow = tuple(x.astype(jnp.bfloat16) for x in data[:2])
    stats, gold = _stats((*narrow, *data[2:])), _gold(*rounded, *data[2:])
    # Products are exact in float32, so that only the order of sums differs.
    assert stats['logps'].dtype == np.float32
    _close(stats['logps'], gold['logps'], 1e-5)
    _close(stats['entropy'], gold['entropy'], 1e-5)
    got, want = _gradients((*narrow, *data[2:]), *weights), _gold_gradients(*rounded, *data[2:], *weights)
    again = _gradients((*narrow, *data[2:]), *weights, kept_bytes=4 * 2 * 16 * V)
    for g, w, same in zip(got, want, again, strict=True):
      assert g.dtype == same.dtype == jnp.bfloat16
      _close(g.astype(np.float64), w, 1e-2)
      _close(same.astype(np.float64), w, 1e-2)

  @pytest.mark.parametrize('mesh', MESHES)
  def test_values_and_gradients_on_a_mesh_are_those_of_one_device(self, mesh):
    data, weights = _data(), _weights()
    here, there = _stats(data), _stats(data, mesh, chunk=5)
    for name in here:
      _close(there[name], here[name], 1e-6)
    for got, want in zip(_gradients(data, *weights, mesh=mesh, chunk=5), _gradients(data, *weights)):
      _close(got, want, 1e-5)

  @pytest.mark.parametrize('mesh', ['fsdp:2,tensor:2,context:2', 'fsdp:8'])
  def test_gradients_of_a_large_head_are_those_of_all_columns_at_once(self, mesh, monkeypatch):
    # Parts of 48 columns and of 56, the last of which is narrower.
    monkeypatch.setattr(vocab, '_MOST', 1000)
    monkeypatch.setattr(vocab, '_ALIGNED', 8)
    data, weights = _data(), _weights()
    found = _gradients(data, *weights, mesh=mesh, chunk=7)
    for got, want in zip(found, _gold_gradients(*data, *weights), strict=True):
      _close(got, want, 1e-5)

  # 384 columns are 5 blocks of 77, or 3 of 64 of a device's half, the last of which begins within that before it.
  @pytest.mark.parametrize('mesh', ['', 'fsdp:2,tensor:2,context:2'])
  def test_blocks_of_columns_are_all_columns_at_once(self, mesh, monkeypatch):
    monkeypatch.setattr(vocab, '_CPU_BLOCK', 90)
    data, weights, chunk = _data(), _weights(), 11
    stats, gold = _stats(data, mesh, chunk, (*DENSE, 'sharpness')), _gold(*data)
    for name in gold:
      _close(stats[name], gold[name], 1e-6)
    for got, want in zip(_gradients(data, *weights, mesh, chunk), _gold_gradients(*data, *weights), strict=True):
      _close(got, want, 1e-5)

  # None of a device's 3 to 20 chunks, some and all. Half of 384 columns are 5 blocks of 39, the last of which begins
  # within that before it.
  @pytest.mark.parametrize('chunks', [0.5, 2, 100])
  @pytest.mark.parametrize('columns', ['whole', 'in blocks', 'in parts'])
  @pytest.mark.parametrize('mesh', ['', 'fsdp:2,tensor:2,context:2', 'fsdp:8'])
  def test_gradients_from_logits_that_were_kept_are_those_of_the_formula(self, mesh, columns, chunks, monkeypatch):
    if columns == 'in blocks':
      monkeypatch.setattr(vocab, '_CPU_BLOCK', 40)
    elif columns == 'in parts':
      monkeypatch.setattr(vocab, '_MOST', 1000)
      monkeypatch.setattr(vocab, '_ALIGNED', 8)
    _jitted_gradients.cache_clear()
    data, weights, chunk = _data(), _weights(), 5
    found = _gradients(data, *weights, mesh, chunk, kept_bytes=int(4 * chunks * chunk * V))
    _jitted_gradients.cache_clear()
    for got, want in zip(found, _gold_gradients(*data, *weights), strict=True):
      _close(got, want, 1e-5)

  # Forward 1; backward the product again, which logits that were kept spare, and one for each gradient.
  @pytest.mark.parametrize('chunks, products', [(0, 1 + 3), (0.5, 1 + 3), (2, 2 * 1 + 2 + 3), (6, 1 + 2)])
  def test_logits_that_were_kept_are_not_computed_again(self, chunks, products):
    hidden_BTD, head_DV, targets_BT, mask_BT = _data()
    kept = int(4 * chunks * 16 * V)

    def total(hidden_BTD, head_DV):
      options = {'vocab_size': VOCAB, 'chunk': 16, 'kept_bytes': kept}
      return jnp.sum(logps.token_stats(hidden_BTD, head_DV, targets_BT, mask_BT, **options)['logps'])

    gradient = jax.grad(total, argnums=(0, 1))
    assert str(jax.make_jaxpr(gradient)(hidden_BTD, head_DV)).count('dot_general') == products
    # Where nothing is differentiated nothing is kept.
    assert _largest(total, hidden_BTD, head_DV) == 16 * V
    assert _largest(gradient, hidden_BTD, head_DV) == 16 * V * max(1, chunks)

  def test_blocks_are_finite_where_logits_are_extreme(self, monkeypatch):
    monkeypatch.setattr(vocab, '_CPU_BLOCK', 100)
    hidden_BTD, head_DV, targets_BT, mask_BT = _data()
    data = hidden_BTD * np.float32(1e4), head_DV, targets_BT, mask_BT
    assert all(np.all(np.isfinite(x)) for x in _stats(data, chunk=12).values())
    assert all(np.all(np.isfinite(x)) for x in _gradients(data, *_weights(), chunk=12))

  def test_only_cpus_take_blocks(self):
    local = lambda block, x: x + block
    lower = (
        lambda platform: jax.jit(lambda x: vocab.in_blocks(local, 10_000, x))
        .trace(0)
        .lower(lowering_platforms=(platform,))
    )
    assert ['10000' in lower(platform).as_text() for platform in ('cpu', 'tpu', 'cuda')] == [False, True, True]

  def test_devices_with_different_numbers_of_targets_agree(self):
    hidden_BTD, head_DV, targets_BT, _ = _data()
    mask_BT = np.zeros((B, T), np.float32)
    mask_BT[0], mask_BT[5, 3] = 1, 1  # one device runs several chunks, six have none
    data, weights = (hidden_BTD, head_DV, targets_BT, mask_BT), _weights()
    _close(_stats(data, 'fsdp:4,tensor:2', chunk=4)['logps'], _gold(*data)['logps'], 1e-6)
    for got, want in zip(_gradients(data, *weights, mesh='fsdp:4,tensor:2', chunk=4), _gold_gradients(*data, *weights)):
      _close(got, want, 1e-5)

  @pytest.mark.parametrize('mesh', ['', *MESHES])
  def test_no_array_is_larger_than_the_logits_of_one_chunk(self, mesh):
    tokens, width, chunk, vocab = 96, 8, 8, 1024
    rng = np.random.default_rng(0)
    hidden_BTD = rng.normal(size=(B, tokens, width)).astype(np.float32)
    head_DV = rng.normal(size=(width, vocab)).astype(np.float32)
    ones_BT = np.ones((B, tokens), np.float32)

    def total(hidden_BTD, head_DV):
      targets_BT = ones_BT.astype(np.int32)
      stats = logps.token_stats(hidden_BTD, head_DV, targets_BT, ones_BT, vocab_size=900, chunk=chunk, dense=DENSE)
      return jnp.sum(stats['logps'] + stats['entropy'])

    # What has no vocabulary is smaller; the logits of one of eight devices are larger.
    assert B * tokens * width < chunk * vocab < B * tokens * vocab / 8
    with _on(mesh):
      assert _largest(total, hidden_BTD, head_DV) <= chunk * vocab
      assert _largest(jax.grad(total, argnums=(0, 1)), hidden_BTD, head_DV) <= chunk * vocab

  def test_the_walk_over_jaxprs_sees_full_logits_where_they_are(self):
    hidden_BTD, head_DV, *_ = _data()

    def looped(hidden_BTD, head_DV):
      logits = lambda i, x: x + jnp.sum(jax.nn.log_softmax(jnp.einsum('btd,dv->btv', hidden_BTD, head_DV))) + i
      return jax.lax.fori_loop(0, 2, jax.checkpoint(logits), 0.0)

    assert _largest(looped, hidden_BTD, head_DV) == B * T * V

  def test_fsdp_gathers_the_head_once_per_pass_and_never_in_the_loop(self, monkeypatch):
    data = _data(counted=1.0)
    mesh = sharding.make_mesh('fsdp:8')
    tokens, head = sharding.named(mesh, 'batch', 'length'), sharding.named(mesh, 'embed', 'vocab')
    hidden = sharding.named(mesh, 'batch', 'length', None)

    def total(hidden_BTD, head_DV, targets_BT, mask_BT):
      stats = logps.token_stats(hidden_BTD, head_DV, targets_BT, mask_BT, vocab_size=VOCAB, chunk=4)
      return jnp.sum(stats['logps'])

    def compiled(fn, out):
      jitted = jax.jit(fn, in_shardings=(hidden, head, tokens, tokens), out_shardings=out)
      return _collectives(jitted.lower(*data).compile().as_text())

    with jax.set_mesh(mesh):
      forward = compiled(total, None)
      both = compiled(jax.grad(total, argnums=(0, 1)), (hidden, head))
      monkeypatch.setattr(vocab, '_MOST', D * V // 3)
      monkeypatch.setattr(vocab, '_ALIGNED', 128)
      parts = compiled(jax.grad(lambda *args: total(*args), argnums=(0, 1)), (hidden, head))
    assert not [found for found in forward | both | parts if found[1]]
    assert (parts['all-gather', False], parts['reduce-scatter', False]) == (4, 3)  # 3 parts of the columns
    # The compiler may let the backward pass use what the forward pass gathered.
    assert forward['all-gather', False] == 1
    assert 1 <= both['all-gather', False] <= 2
    assert both['reduce-scatter', False] == 1

  def test_memory_per_token_does_not_hold_a_vocabulary(self):
    wide, vocab = 32, 8192

    def temporary(tokens):
      def total(hidden_BTD, head_DV, targets_BT, mask_BT):
        stats = logps.token_stats(hidden_BTD, head_DV, targets_BT, mask_BT, vocab_size=vocab, chunk=128)
        return jnp.sum(stats['logps'])

      shapes = (
          jax.ShapeDtypeStruct((1, tokens, wide), jnp.float32),
          jax.ShapeDtypeStruct((wide, vocab), jnp.float32),
          jax.ShapeDtypeStruct((1, tokens), jnp.int32),
          jax.ShapeDtypeStruct((1, tokens), jnp.float32),
      )
      compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
      return compiled.memory_analysis().temp_size_in_bytes

    slope = (temporary(8192) - temporary(2048)) / (8192 - 2048)
    # A few float32 vectors of the model's width; logits would be 4 * 8192 = 32768 bytes.
    assert slope <= 4 * 4 * wide

  def test_refuses_a_statistic_that_it_does_not_have(self):
    with pytest.raises(ValueError, match='perplexity'):
      logps.token_stats(*_data(), vocab_size=VOCAB, dense=('perplexity',))


class TestTemperature:

  def test_divides_float32_logits_of_16_bit_operands(self):
    hidden_BTD, head_DV, targets_BT, mask_BT = _data()
    operands = [jnp.asarray(x, jnp.bfloat16) for x in (4 * hidden_BTD, head_DV)]
    found = _jitted(vocab_size=VOCAB, temperature=0.7)(*operands, targets_BT, mask_BT)['logps']
    exact = [np.asarray(x, np.float64) for x in operands]
    wanted = _gold(exact[0] / 0.7, exact[1], targets_BT, mask_BT)['logps']
    np.testing.assert_allclose(found, wanted, atol=1e-4)  # rounding hidden states that are divided errs by 0.1


class TestSoften:

  @pytest.mark.parametrize('kept', [0, 2, 100])
  @pytest.mark.parametrize('temperature', [1.0, 0.6])
  @pytest.mark.parametrize('mesh', ['', 'fsdp:2,tensor:2,context:2'])
  def test_caps_logits_and_their_gradient_and_divides_them(self, mesh, temperature, kept):
    *data, mask_BT = _data()
    weight_BT, entropy_weight_BT = _weights()
    options = {'vocab_size': VOCAB, 'chunk': 16, 'dense': ('entropy',), 'softcap': 3.0, 'temperature': temperature}

    def dense(hidden_BTD, head_DV):
      logits = 3.0 * jnp.tanh((hidden_BTD @ head_DV)[..., :VOCAB] / 3.0) / temperature
      logp = jax.nn.log_softmax(logits)
      chosen = jnp.take_along_axis(logp, data[2][..., None], -1)[..., 0]
      entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
      return jnp.sum(mask_BT * (weight_BT * chosen + entropy_weight_BT * entropy))

    with _on(mesh):
      gradients = _jitted_gradients(**options, kept_bytes=4 * kept * 16 * V)
      found = jax.device_get(gradients(*data, mask_BT, weight_BT, entropy_weight_BT))
      stats = jax.device_get(_jitted(**options)(*data, mask_BT))
    np.testing.assert_allclose(
        np.sum(stats['logps'] * weight_BT + stats['entropy'] * entropy_weight_BT), dense(*data[:2]), rtol=1e-5
    )
    for x, y in zip(found, jax.grad(dense, (0, 1))(*data[:2])):
      _close(x, np.asarray(y), 1e-5)
