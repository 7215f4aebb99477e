"""What a transformer looks like: sizes, and what its family does otherwise than Llama."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from jaxalign import types

_VOCAB_MULTIPLE = 128  # the vocabulary is padded to it, so that a tensor axis divides it

# global: all earlier tokens, rotary positions; local: the last `window` of them; nope: all of them, without positions.
LAYER_KINDS = ('global', 'local', 'nope')
_CHOICES: dict[str, tuple[str, ...]] = {
    'qk_norm': ('', 'head', 'all'),
    'norms': ('pre', 'post', 'both'),
    'activation': ('silu', 'gelu_tanh', 'gelu'),
}
_FROM_ZERO = (
    'window local_rope_theta query_scale attn_softcap final_softcap num_experts norm_offset score_outputs'.split()
)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """How rotary frequencies are changed for a longer context than that of pre-training.

  Attributes:
    kind: 'linear' (Chen et al., 2023, https://arxiv.org/abs/2306.15595), 'llama3' (Llama 3.1) or 'yarn' (Peng et al.,
      2023, https://arxiv.org/abs/2309.00071).
    factor: by how much the context grows.
    original_length: context of pre-training, for 'llama3' and 'yarn'.
    low_freq_factor: of 'llama3': wavelengths beyond original_length / low_freq_factor are scaled.
    high_freq_factor: of 'llama3': wavelengths below original_length / high_freq_factor are not.
    beta_fast: of 'yarn': frequencies that turn more often than this in the original context are not scaled.
    beta_slow: of 'yarn': frequencies that turn less often are.
    attention_factor: of 'yarn': multiplies cosines and sines; 0 takes 0.1 log(factor) + 1.
    truncate: of 'yarn': whether the bounds between scaled and unscaled pairs are rounded to whole pairs.
  """

  kind: str
  factor: float
  original_length: int = 0
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float = 0.0
  truncate: bool = True

  def __post_init__(self):
    if self.kind not in ('linear', 'llama3', 'yarn'):
      raise types.UsageError(f"architecture.RopeScaling.kind = {self.kind!r}: it is 'linear', 'llama3' or 'yarn'")
    if self.kind != 'linear' and self.original_length < 1:
      raise types.UsageError(f'architecture.RopeScaling.original_length: {self.kind!r} needs it')


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of a transformer, and its family's ways; the defaults are those of Llama 2.

  Attributes:
    vocab_size: V without padding.
    num_layers: L.
    embed_dim: D.
    num_heads: N, query heads.
    num_kv_heads: K, key and value heads; divides N.
    head_size: H, even.
    mlp_dim: F, of each expert where there are experts.
    max_length: positions that the model was trained for.
    pattern: kinds of layers, see LAYER_KINDS; it repeats, and may end anywhere.
    window: tokens that a 'local' layer sees, the query's own among them.
    rope_theta: base of the rotary frequencies.
    local_rope_theta: base in 'local' layers, which are never scaled; 0 where they rotate as the others.
    rope_fraction: share of each head that is rotated, its first part.
    rope_scaling: None for none.
    norm_eps: added to the mean square in RMSNorm.
    norm_offset: added to the scale of each RMSNorm (1 for Gemma, whose weights are what the scale has above 1).
    norms: where each half of a layer has its norm: 'pre' what it reads, 'post' what it adds, 'both'.
    qk_norm: RMSNorm of queries and keys: '' none, 'head' over each head, 'all' over all heads together.
    qkv_bias: whether queries, keys and values have a bias.
    out_bias: whether the product after attention has one.
    mlp_bias: whether the feed-forward products have one.
    activation: of the gate.
    query_scale: multiplies the logits of attention; 0 stands for 1 / sqrt(H).
    attn_softcap: c of c tanh(logit / c) in attention; 0 for none.
    final_softcap: the same of the logits over the vocabulary.
    scale_embeddings: whether embeddings are multiplied by sqrt(D).
    num_experts: feed-forward halves per layer of which each token takes some; 0 for one that all take.
    experts_per_token: how many it takes.
    normalise_experts: whether the weights of those that it takes are made to sum to 1.
    tie_embeddings: whether the output matrix is the transposed embedding.
    score_outputs: numbers that a head makes of each hidden state: 1 for rewards or values, one per label for a
      classifier; 0 where there is no such head.
    score_bias: whether that head has a bias, as Hugging Face's heads of tokens have and those of responses have not.
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  num_kv_heads: int
  head_size: int
  mlp_dim: int
  max_length: int
  pattern: tuple[str, ...] = ('global',)
  window: int = 0
  rope_theta: float = 10000.0
  local_rope_theta: float = 0.0
  rope_fraction: float = 1.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  norm_offset: float = 0.0
  norms: str = 'pre'
  qk_norm: str = ''
  qkv_bias: bool = False
  out_bias: bool = False
  mlp_bias: bool = False
  activation: str = 'silu'
  query_scale: float = 0.0
  attn_softcap: float = 0.0
  final_softcap: float = 0.0
  scale_embeddings: bool = False
  num_experts: int = 0
  experts_per_token: int = 2
  normalise_experts: bool = True
  tie_embeddings: bool = True
  score_outputs: int = 0
  score_bias: bool = False

  def __post_init__(self):
    # A list, of gin or JSON, could not be hashed, and a configuration is part of what jit caches by.
    object.__setattr__(self, 'pattern', tuple(self.pattern))
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type in (int, float) and (value < 0 or not value and field.name not in _FROM_ZERO):
        _refuse(f'{field.name} = {value}', 'it must be positive')
    for name, choices in _CHOICES.items():
      if getattr(self, name) not in choices:
        _refuse(f'{name} = {getattr(self, name)!r}', f'it is one of {", ".join(map(repr, choices))}')
    if not self.pattern or not set(self.pattern) <= set(LAYER_KINDS):
      _refuse(f'pattern = {self.pattern}', f'it holds any of {", ".join(LAYER_KINDS)}, at least one')
    if self.num_heads % self.num_kv_heads:
      _refuse(f'num_heads = {self.num_heads}', f'it must be a multiple of num_kv_heads = {self.num_kv_heads}')
    if self.rotated_size % 2:
      _refuse(f'head_size = {self.head_size}', 'rotary positions want an even number')
    if 'local' in self.pattern and not self.window:
      _refuse('window = 0', "'local' layers of the pattern need it")
    if self.num_experts and self.experts_per_token > self.num_experts:
      _refuse(f'experts_per_token = {self.experts_per_token}', f'there are {self.num_experts} experts')

  @property
  def padded_vocab(self) -> int:
    """V with padding; ids from `vocab_size` on are never read and have probability 0."""
    return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

  @property
  def rotated_size(self) -> int:
    """How much of a head is rotated."""
    return int(self.head_size * self.rope_fraction)

  @property
  def kinds(self) -> tuple[str, ...]:
    """The kind of each of the L layers."""
    return tuple(self.pattern[i % len(self.pattern)] for i in range(self.num_layers))

  @property
  def repeats(self) -> int:
    """How often the whole pattern comes; the layers that are left begin it once more."""
    return self.num_layers // len(self.pattern)

  def to_json(self) -> dict[str, Any]:
    """What `from_json` takes."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, values: Mapping[str, Any]) -> 'Config':
    """Undoes `to_json`; raises RunError where another version wrote it."""
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
      raise types.RunError(f'a model with the setting {unknown[0]!r} was saved by another version of jaxalign')
    scaling = values.get('rope_scaling')
    return cls(**{**values, 'rope_scaling': RopeScaling(**scaling) if scaling else None})

  @property
  def attention_scale(self) -> float:
    """What the products of queries and keys are multiplied by."""
    return self.query_scale or 1.0 / math.sqrt(self.head_size)


def _refuse(what: str, why: str) -> None:
  raise types.UsageError(f'architecture.Config.{what}: {why}')


def flops_per_token(
    config: Config, length: int, *, frozen: bool = False, live: bool = False, head: bool = True
) -> float:
  """FLOPs of training on a token, forward and backward, in rows of `length`: what utilisation is measured by.

    6 * (parameters of the matrices that a token meets) + 12 * L * N * H * length / 2

  With `frozen` weights the 6 is a 4: they have no gradient; adapters do not count. A `live` reference is one more pass
  forward, which adds 2 to that and 4 to the 12. Without `head` there are no logits, as of a model that scores. In
  'local' layers a query meets at most `window` keys. Recomputation does not count, nor what the causal mask discards.
  Chowdhery et al., 2022, https://arxiv.org/abs/2204.02311, App. B.
  """
  c = config
  attention = c.embed_dim * c.head_size * (2 * c.num_heads + 2 * c.num_kv_heads)
  mlp = 3 * c.embed_dim * c.mlp_dim * (c.experts_per_token if c.num_experts else 1) + c.embed_dim * c.num_experts
  keys = sum(_mean_keys(length, c.window if kind == 'local' else length) for kind in c.kinds)
  matrices = c.num_layers * (attention + mlp) + head * c.embed_dim * c.vocab_size
  forward = 2 * matrices, 4 * c.num_heads * c.head_size * keys
  return ((2 if frozen else 3) + live) * forward[0] + (3 + live) * forward[1]


def _mean_keys(length: int, window: int) -> float:
  """Keys that a query of a row meets on average, half of them where it sees all before it."""
  window = min(window, length)
  return window - window * window / (2 * length)
