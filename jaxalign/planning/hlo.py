"""What a compiled program does, read off its text: products, bytes, cycles and collectives, loops counted as they run.

`compiled.cost_analysis()` counts the body of a loop once. Here every instruction counts as often as it runs.
"""

import collections
from collections.abc import Iterator
import dataclasses
import functools
import itertools
import math
import re

_BITS = {'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 'bf16': 16, 'f16': 16, 's32': 32}
_BITS |= {'u32': 32, 'f32': 32, 's64': 64, 'u64': 64, 'f64': 64, 'f8e4m3fn': 8, 'f8e5m2': 8}
_ARRAY = re.compile(r'([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?')
_NAMES = re.compile(r'%([\w.\-]+)')
_MOST = re.compile(r'at_most_(\d+)_turns\)*/while"')  # a scope right around a loop; see `vocab.loop`
COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute', 'all-to-all')
# What only names what is there already.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while', 'conditional', 'call', 'after-all'}
_FREE |= {'partition-id', 'iota', 'copy-done', 'async-start', 'async-update', 'async-done', 'call-start', 'call-done'}
_CALLS = {'fusion', 'call', 'call-start', 'async-start'}  # with `-start`, beside other work, on SparseCores too
_UNKNOWN = 2**63 - 1  # cycles, as of what runs on SparseCores


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation.

  Attributes:
    name: what others call it by.
    shape: its type, as it is written.
    op: what it does.
    operands: names of what it reads.
    rest: what is written behind those.
    is_root: whether it is what its computation gives.
  """

  name: str
  shape: str
  op: str
  operands: tuple[str, ...]
  rest: str
  is_root: bool

  def called(self, key: str) -> str | None:
    """The computation that it calls under this name."""
    found = re.search(rf'\b{key}=%([\w.\-]+)', self.rest)
    return found[1] if found else None

  def number(self, key: str) -> int | None:
    """A number that is written behind it."""
    found = re.search(rf'\b{key}[="]+:?"?(\d+)', self.rest)
    return int(found[1]) if found else None


@dataclasses.dataclass
class Costs:
  """What one device does in a run of a program.

  Attributes:
    flops: of matrix products, two for each product and sum; those of Pallas kernels are in `kernel_flops`.
    kernel_flops: of Pallas kernels, by formula: see `kernel_flops`.
    cycles: the compiler's own estimate of all that is not a collective or a Pallas kernel.
    bytes: read from and written to HBM.
    collectives: by kind, how often one runs and how many bytes the whole arrays have.
  """

  flops: float = 0.0
  kernel_flops: float = 0.0
  cycles: float = 0.0
  bytes: float = 0.0
  collectives: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)


class Module:
  """The text of a compiled program."""

  def __init__(self, text: str):
    self.computations: dict[str, list[Instruction]] = {}
    self.entry = ''
    for name, is_entry, lines in _computations(text):
      self.computations[name] = [one for one in map(_instruction, lines) if one is not None]
      self.entry = name if is_entry else self.entry
    self.of_name = {one.name: one for lines in self.computations.values() for one in lines}

  def shapes(self, instruction: Instruction) -> list[str]:
    """The types of what it reads."""
    return [self.of_name[name].shape for name in instruction.operands if name in self.of_name]

  def trips(self, loop: Instruction) -> int | None:
    """How often the body of a `while` runs, at most where the run tells; None where nothing says so."""
    told = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest) or _MOST.search(loop.rest)
    if told:
      return int(told[1])
    body, condition = loop.called('body'), loop.called('condition')
    assert body and condition, loop
    root = next((one for one in self.computations[condition] if one.is_root), None)
    if root is None or root.op != 'compare' or 'direction=LT' not in root.rest:
      return None
    counter, bound = (self.of_name.get(name) for name in root.operands)
    if counter is None or counter.op != 'get-tuple-element' or bound is None:
      return None
    index, most = counter.number('index'), self._constant(bound, loop)
    given = self.of_name.get(loop.operands[0])
    if most is None or index is None or given is None or given.op != 'tuple':
      return None
    start = self._constant(self.of_name[given.operands[index]], loop)
    step = self._step(self.computations[body], index)
    return None if start is None or not step else max(0, -(-(most - start) // step))

  def _constant(self, one: Instruction | None, loop: Instruction) -> int | None:
    if one is None:
      return None
    if one.op == 'constant':
      found = re.match(r'\(?(-?\d+)', one.rest)
      return int(found[1]) if found else None
    if one.op in ('copy', 'bitcast', 'copy-done', 'copy-start') and one.operands:
      return self._constant(self.of_name.get(one.operands[0]), loop)
    return None

  def _step(self, body: list[Instruction], index: int) -> int:
    """What a turn of the loop adds to its counter, 1 where that cannot be read off."""
    root = next(one for one in body if one.is_root)
    if root.op != 'tuple' or index >= len(root.operands):
      return 1

    def added(name: str) -> int | None:
      one = self.of_name.get(name)
      if one is None:
        return None
      if one.op == 'get-tuple-element':
        return 0 if one.number('index') == index else None
      if one.op in ('copy', 'bitcast', 'copy-done', 'copy-start'):
        return added(one.operands[0])
      if one.op == 'add':
        a, b = one.operands
        for x, y in ((a, b), (b, a)):
          before, constant = added(x), self._constant(self.of_name.get(y), root)
          if before is not None and constant is not None:
            return before + constant
      return None

    return added(root.operands[index]) or 1

  def runs(self) -> Iterator[tuple[Instruction, float, bool]]:
    """Every instruction, how often it runs (in a loop of unknown length once), and whether it stands in a fusion."""
    yield from self._runs(self.entry, 1.0, False)

  def _runs(self, name: str, times: float, fused: bool) -> Iterator[tuple[Instruction, float, bool]]:
    for one in self.computations.get(name, ()):
      yield one, times, fused
      if one.op == 'while':
        turns = self.trips(one)
        body = one.called('body')
        assert body is not None
        yield from self._runs(body, times * (1 if turns is None else turns), fused)
      elif one.op == 'conditional':
        branches = re.search(r'branch_computations=\{([^}]*)\}', one.rest)
        names = _NAMES.findall(branches[1]) if branches else [one.called('true_computation')]
        for branch in filter(None, names[:1]):
          yield from self._runs(branch, times, fused)
      elif one.op in _CALLS and (inner := one.called('calls') or one.called('to_apply')):
        yield from self._runs(inner, times, fused or one.op == 'fusion')


def costs(text: str) -> Costs:
  """What one device does in a run of a compiled program, whose text is `compiled.as_text()`.

  A loop whose length is known at run time alone counts with the most turns that its name gives (`vocab.loop`), or once.
  """
  module, found = Module(text), Costs()
  channels: dict[tuple[str, str], tuple[float, float]] = {}
  scattered = _scattering(module)
  for number, (one, times, fused) in enumerate(module.runs()):
    found.flops += times * _flops(module, one)
    kind = one.op.removesuffix('-start')
    # Groups of one device exchange nothing.
    if kind in COLLECTIVES and not re.search(r'replica_groups=\{\{\d+\}', one.rest):
      size, kind = _whole_bytes(module, one, kind), 'reduce-scatter' if one.name in scattered else kind
      # The parts of one that runs beside other work have its channel; those of `shard_map` that do not all have 1.
      channel = one.number('channel_id')
      place = kind, f'at {number}' if channel in (None, 1) else str(channel)
      channels[place] = max(channels.get(place, (0.0, 0.0)), (times, size))
    if fused:
      continue
    if one.op == 'custom-call' and 'tpu_custom_call' in one.rest:
      found.kernel_flops += times * kernel_flops(one.name, module.shapes(one), one.rest)
    if kind not in COLLECTIVES and (cycles := one.number('estimated_cycles')) != _UNKNOWN:
      found.cycles += times * (cycles or 0)
    if one.op not in _FREE:
      moved = sum(_bytes(shape, in_hbm=True) for shape in (one.shape, *module.shapes(one)))
      found.bytes += times * moved
  totals: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
  for (kind, _), (times, size) in channels.items():
    totals[kind].update({'count': times, 'bytes': times * size})
  found.collectives = {kind: dict(total) for kind, total in sorted(totals.items())}
  return found


def kernel_flops(name: str, operands: list[str], rest: str = '') -> float:
  """FLOPs of a Pallas kernel on these operands: of splash attention and of grouped products, 0 of another.

  Attention: queries `[..., N, T, H]`, keys `[..., K, S, H]` and values `[..., K, S, H']` are the first three arrays of
  16 bits. Of T S places half are seen. A pass forward multiplies by H and by H', that for the gradient of queries by H
  once more, and that for those of keys and values by both once more.

  Grouped products: rows `[R, D]` and matrices `[E, D, F]`, or for the gradient of those `[R, F]`. The rows that usually
  are of a group (`models.grouped`) meet one matrix each; tiles that are computed for two groups are left out.
  """
  parsed = [_parsed(operand) for operand in operands]
  if 'gmm' in name or 'ragged-dot' in name:
    arrays = [dims for _, dims, _ in parsed if len(dims) > 1]
    if len(arrays) < 2:
      return 0.0
    rows, others = arrays[:2]
    usual = re.search(r'usual_(\d+)_rows', rest)
    out = others[1] if len(others) == 2 else others[1] * others[2] // rows[1]
    return 2.0 * (int(usual[1]) if usual else rows[0]) * rows[1] * out
  passes = next((n for part, n in (('_fwd', (1, 1)), ('dkv', (2, 2)), ('dq', (2, 1))) if part in name), None)
  arrays = [dims for dtype, dims, _ in parsed if dtype in ('bf16', 'f16') and len(dims) > 2]
  if 'splash' not in name or passes is None or len(arrays) < 3:
    return 0.0
  queries, keys, values = arrays[:3]
  width = passes[0] * queries[-1] + passes[1] * values[-1]
  return 2 * width * math.prod(queries[:-1]) * keys[-2] / 2


def _scattering(module: Module) -> set[str]:
  """Names of the all-reduces of which a fusion keeps a part."""
  inner = (
      name
      for lines in module.computations.values()
      for one in lines
      if one.op == 'fusion' and (name := one.called('calls')) and 'all-reduce-scatter' in f'{one.name} {name}'
  )
  return {one.name for name in inner for one in module.computations.get(name, ()) if one.op == 'all-reduce'}


def _whole_bytes(module: Module, one: Instruction, kind: str) -> float:
  """Bytes of the larger of what a collective reads and gives; the start of one gives both."""
  reads = sum(map(_bytes, module.shapes(one)))
  gives = _bytes(one.shape) - (reads if one.op.endswith('-start') and kind != 'all-reduce' else 0)
  return max(reads, gives)


def _computations(text: str) -> Iterator[tuple[str, bool, list[str]]]:
  name, is_entry, lines = '', False, list[str]()
  for line in text.splitlines():
    header = re.match(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
    if header:
      name, is_entry, lines = header[2], bool(header[1]), []
    elif name and re.match(r'\}(, execution_thread=".*")?\s*$', line):
      yield name, is_entry, lines
      name = ''
    elif name:
      lines.append(line)


def _instruction(line: str) -> Instruction | None:
  found = re.match(r'^\s*(ROOT )?%([\w.\-]+) = ', line)
  if not found:
    return None
  start = found.end()
  end = _closing(line, start) + 1 if line[start] == '(' else line.index(' ', start)
  op = re.match(r' ?([\w\-]+)', line[end:])
  if not op:
    return None
  opening = end + op.end()
  closing = _closing(line, opening)
  operands = tuple(_NAMES.findall(line[opening:closing]))
  rest = line[opening:] if op[1] == 'constant' else line[closing + 1 :]
  return Instruction(found[2], line[start:end], op[1], operands, rest, bool(found[1]))


def _closing(line: str, opening: int) -> int:
  """The place of the parenthesis that closes the one at `opening`."""
  depth = 0
  for place in range(opening, len(line)):
    depth += {'(': 1, ')': -1}.get(line[place], 0)
    if not depth:
      return place
  return len(line)


@functools.lru_cache(maxsize=100_000)
def _parsed(shape: str) -> tuple[str, tuple[int, ...], str]:
  """Type, sizes and layout of the first array of a shape."""
  found = _ARRAY.search(shape)
  if not found:
    return '', (), ''
  return found[1], tuple(map(int, filter(None, found[2].split(',')))), found[3] or ''


@functools.lru_cache(maxsize=100_000)
def _bytes(shape: str, in_hbm: bool = False) -> float:
  """Of all arrays of a shape, of those that are in HBM alone where `in_hbm`: others are on the chip, S(1) and on."""
  total = 0.0
  for dtype, dims, layout in _ARRAY.findall(shape):
    if dtype in _BITS and not (in_hbm and re.search(r'S\([1-9]', layout)):
      total += _BITS[dtype] / 8 * math.prod(map(int, filter(None, dims.split(','))))
  return total


def _flops(module: Module, one: Instruction) -> float:
  if one.op == 'dot':
    contracted = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', one.rest)
    _, lhs, _ = _parsed(module.shapes(one)[0])
    over = math.prod(lhs[int(i)] for i in contracted[1].split(',') if i) if contracted else 1
    return 2.0 * math.prod(_parsed(one.shape)[1]) * over
  return _convolution(module, one) if one.op == 'convolution' else 0.0


def _convolution(module: Module, one: Instruction) -> float:
  """Two for each product of a convolution, as which TPUs write products of matrices."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', one.rest)
  assert labels, one.rest
  (_, lhs, _), (_, kernel, _) = map(_parsed, module.shapes(one)[:2])
  out = _parsed(one.shape)[1]
  size = lambda dims, names, letter: dims[names.index(letter)]
  places = sorted(letter for letter in labels[1] if letter.isdigit())
  window = re.search(r'window=\{([^}]*)\}', one.rest)
  said = dict(part.split('=') for part in window[1].split()) if window else {}
  values = lambda key, default: said[key].split('x') if key in said else [default] * len(places)
  options = zip(values('stride', '1'), values('pad', '0_0'), values('lhs_dilate', '1'), values('rhs_dilate', '1'))
  products = 1.0
  for place, (stride, pad, lhs_dilate, rhs_dilate) in zip(places, options):
    sizes = size(lhs, labels[1], place), size(kernel, labels[2], place), size(out, labels[3], place)
    products *= _meetings(*sizes, int(stride), int(pad.split('_')[0]), int(lhs_dilate), int(rhs_dilate))
  return 2 * products * size(out, labels[3], 'b') * size(out, labels[3], 'f') * size(kernel, labels[2], 'i')


@functools.lru_cache(maxsize=10_000)
def _meetings(lhs: int, kernel: int, out: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int) -> int:
  """How many pairs of places of output and kernel meet an element of the input, along one axis."""
  count = 0
  for o, k in itertools.product(range(out), range(kernel)):
    place = o * stride + k * rhs_dilate - low
    count += place % lhs_dilate == 0 and 0 <= place // lhs_dilate < lhs
  return count
