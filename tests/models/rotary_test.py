"""Rotary positions, against complex numbers."""

import jax.numpy as jnp
import numpy as np

from jaxalign.models import rotary


class TestRotate:

  def test_turns_pairs_by_the_position_times_their_frequency(self):
    x = np.random.default_rng(0).normal(size=(1, 3, 1, 8))
    positions = np.array([[0, 1, 7]])
    z = (x[..., :4] + 1j * x[..., 4:]) * np.exp(
        1j * positions[..., None, None] * 100.0 ** (-np.arange(4) / 4)[None, None, None]
    )
    found = rotary.rotate(jnp.asarray(x, jnp.float32), rotary.rotations(positions, 8, 100.0))
    np.testing.assert_allclose(found, np.concatenate([z.real, z.imag], axis=-1), atol=1e-6)
