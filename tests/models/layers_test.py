"""Parts of a layer; whole layers are compared with transformers in families_test."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import architecture
from jaxalign.models import layers

CONFIG = architecture.Config(50, 2, 8, 2, 2, 8, 24, 64, norm_eps=1e-5)


class TestRmsNorm:

  @pytest.mark.parametrize('offset', [0.0, 1.0])
  def test_divides_by_the_root_of_the_mean_square(self, offset):
    x, scale = np.random.default_rng(0).normal(size=(1, 3, 8)), np.arange(1.0, 9)
    wanted = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * (offset + scale)
    config = dataclasses.replace(CONFIG, norm_offset=offset)
    found = layers.rms_norm(jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32), config)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
