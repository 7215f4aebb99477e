import jax
import jax.numpy as jnp


def pick(platform, dtype, config, length, mesh):
  return 'xla'


def attend(name, q, k, v, segments):
  T = q.shape[1]
  ok = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((T, T), bool))[None]
  return dense(q, k, v, ok)


def dense(q, k, v, ok_BTS):
  B, T, N, H = q.shape
  K = k.shape[2]
  q = q.reshape(B, T, K, N // K, H)
  s = jnp.einsum('BTKRH,BSKH->BKRTS', q, k, preferred_element_type=jnp.float32) * H**-0.5
  s = jnp.where(ok_BTS[:, None, None], s, -1e30)
  p = jax.nn.softmax(s, -1).astype(v.dtype)
  return jnp.einsum('BKRTS,BSKH->BTKRH', p, v).reshape(B, T, N, H)
