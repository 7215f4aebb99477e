"""Losses are computed under strict dtype promotion: a float64 or an integer that slips in is an error."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
  with jax.numpy_dtype_promotion('strict'):
    yield
