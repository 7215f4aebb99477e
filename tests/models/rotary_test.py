"""Rotary positions, against complex numbers; transformers checks the scaled frequencies in families_test."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import architecture
from jaxalign.models import rotary

CONFIG = architecture.Config(50, 2, 16, 2, 2, 8, 24, 64, rope_theta=100.0)


class TestRotate:

  def test_turns_pairs_by_the_position_times_their_frequency(self):
    x = np.random.default_rng(0).normal(size=(1, 3, 1, 8))
    positions = np.array([[0, 1, 7]])
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(
        1j * positions[..., None, None] * 100.0 ** (-np.arange(4) / 4)[None, None, None]
    )
    found = rotary.rotate(jnp.asarray(x, jnp.float32), rotary.rotations(CONFIG, 'global', positions))
    np.testing.assert_allclose(found, np.concatenate([z.real, z.imag], axis=-1), atol=1e-6)

  def test_leaves_the_rest_of_a_head(self):
    half = dataclasses.replace(CONFIG, rope_fraction=0.5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 1, 8)), jnp.float32)
    found = rotary.rotate(x, rotary.rotations(half, 'global', np.array([[0, 1, 7]])))
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])
    assert (np.abs(found - x)[0, 1:, 0, :4] > 1e-4).all()

  def test_leaves_a_layer_without_positions(self):
    x = jnp.ones((1, 3, 1, 8))
    assert rotary.rotate(x, rotary.rotations(CONFIG, 'nope', np.array([[0, 1, 7]]))) is x


class TestFrequencies:

  @pytest.mark.parametrize(
      'scaling,first,last',
      [
          (architecture.RopeScaling('linear', 4.0), 0.25, 0.25),
          # The shortest wavelength, 2 pi, is kept; the longest here, 2 pi 100^(3/4) = 199, is beyond the context.
          (architecture.RopeScaling('llama3', 4.0, original_length=100), 1.0, 0.25),
          (architecture.RopeScaling('yarn', 4.0, original_length=100, beta_fast=10.0), 1.0, 0.25),
      ],
  )
  def test_scales_long_wavelengths_by_the_factor(self, scaling, first, last):
    plain, _ = rotary.frequencies(CONFIG, 'global')
    scaled, _ = rotary.frequencies(dataclasses.replace(CONFIG, rope_scaling=scaling), 'global')
    np.testing.assert_allclose([(scaled / plain)[0], (scaled / plain)[-1]], [first, last])

  def test_of_local_layers_have_their_own_base_and_no_scale(self):
    scaling = architecture.RopeScaling('linear', 4.0)
    config = dataclasses.replace(CONFIG, local_rope_theta=9.0, rope_scaling=scaling)
    np.testing.assert_allclose(rotary.frequencies(config, 'local')[0], 9.0 ** (-np.arange(4) / 4))
