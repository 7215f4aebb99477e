"""Fused attention of cuDNN, with a dense mask; for NVIDIA GPUs."""

from typing import Literal

import jax
from jax import ad_checkpoint

from jaxalign import sharding
from jaxalign.models import seen as seen_lib

MOST = 4096  # tokens of a row: beyond it the dense mask takes more memory than the kernel saves


def takes(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, length: int) -> bool:
  """Whether it takes rows of this length on a mesh: an even number of tokens, which is not split."""
  return length % 2 == 0 and (mesh.empty or sharding.parts(mesh, 'length') == 1)


def attend(
    q_BTNH, k_BTKH, v_BTKH, seen: seen_lib.Seen, how: seen_lib.How, *, implementation: Literal['cudnn', 'xla'] = 'cudnn'
):
  """See `attention.attend`. With `implementation` 'xla' it runs on any platform."""
  same_BTS = seen_lib.sees(seen, seen, how.window)
  by_slots = how.window and seen.branches_BT is None
  out_BTNH = jax.nn.dot_product_attention(
      q_BTNH,
      k_BTKH,
      v_BTKH,
      mask=same_BTS[:, None],
      scale=how.scale,
      is_causal=True,
      local_window_size=(how.window - 1, 0) if by_slots else None,
      implementation=implementation,
  )
  return ad_checkpoint.checkpoint_name(out_BTNH, seen_lib.RESULT)
