"""draft"""

import jax
import jax.numpy as jnp


def pick(platform, dtype, config, length, mesh):
  return 'xla'


def attend(name, q, k, v, segments):
  T = q.shape[1]
  ok = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((T, T), bool))[None]
  return dense(q, k, v, ok)


def dense(q_BTNH, k_BSKH, v_BSKH, allowed_BTS):
  B, T, N, H = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  R = N // K
  q = q_BTNH.reshape(B, T, K, R, H).transpose(0, 2, 3, 1, 4).reshape(B, K, R * T, H)
  k, v = k_BSKH.transpose(0, 2, 3, 1), v_BSKH.transpose(0, 2, 1, 3)
  logits = jnp.matmul(q, k, preferred_element_type=jnp.float32).reshape(B, K, R, T, S) * H**-0.5
  logits = jnp.where(allowed_BTS[:, None, None], logits, -1e30)
  exp = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
  total = jnp.sum(exp, axis=-1)
  out = jnp.matmul(exp.astype(v.dtype).reshape(B, K, R * T, S), v, preferred_element_type=jnp.float32)
  out = out.reshape(B, K, R, T, H) / total[..., None]
  return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)
