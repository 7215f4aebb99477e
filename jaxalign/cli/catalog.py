"""What gin_configs holds: an algorithm in each file at its top, ways to decode, and files of models and data sets."""

from collections.abc import Collection
from collections.abc import Sequence
import difflib
import pathlib
import re

from jaxalign import types

ROOT = pathlib.Path(__file__).parents[1] / 'gin_configs'
# By which online runs are judged by their own rewards on the prompts of --eval_data.
HELD_OUT_PROMPTS = 'options/held_out_prompts.gin'
# Where in tests/losses the losses of a module are tested, if not in methods_test.py.
_TESTED_IN = {name: name for name in ('supervised', 'reward', 'policy', 'rewarded', 'actor_critic')}
_TESTED_IN['pointwise'] = 'reward'


def algorithms(root: pathlib.Path = ROOT) -> dict[str, str]:
  """Name and description of each algorithm, or of what another folder holds.

  They are the gin files with a header '# NAME: DESCRIPTION', but for base.gin.
  """
  found = {}
  for path in sorted(root.glob('*.gin')):
    if path.stem != 'base':
      first = path.read_text(encoding='utf-8').splitlines()[0]
      found[path.stem] = first.removeprefix(f'# {path.stem}:').strip()
  return found


def is_online(name: str) -> bool:
  """Whether an algorithm trains on what it samples."""
  return "'families/online.gin'" in _text(name)


def _text(name: str) -> str:
  """What the file of an algorithm holds, and behind it that of the algorithm that it starts from, if any."""
  own = (ROOT / f'{name}.gin').read_text(encoding='utf-8')
  base = re.search(r"^include '(\w+)\.gin'", own, re.MULTILINE)
  return own if base is None or base[1] == 'base' else own + _text(base[1])


def check_algorithm(name: str) -> None:
  """Raises UsageError for an unknown algorithm, naming the choices and the nearest."""
  _check(name, algorithms(), f'--algo={name}: unknown algorithm')


def check_decoding(name: str) -> None:
  """The same of a way to decode."""
  _check(name, algorithms(ROOT / 'decode'), f'--decode={name}: unknown method')


def _check(name: str, known: Collection[str], problem: str) -> None:
  if name in known:
    return
  name = name.lower()
  close = lambda count, cutoff: difflib.get_close_matches(name, known, count, cutoff)
  swapped = [one for i in range(len(name)) if (one := name[:i] + name[i : i + 2][::-1] + name[i + 2 :]) in known]
  nearest = list(dict.fromkeys((*swapped, *close(2, 0.6)))) or close(1, 0.3)
  hint = f'; did you mean {" or ".join(nearest)}?' if nearest else ''
  raise types.UsageError(f'{problem}{hint} (there are {", ".join(known)})')


def listing() -> str:
  """The algorithms, one line each."""
  known = algorithms()
  width = max(map(len, known))
  return ''.join(f'{name:<{width}}  {text}\n' for name, text in known.items())


def table() -> str:
  """The algorithms as a Markdown table with paper, place in the surveys, loss and test."""
  rows = ['| algorithm | what it is | paper | surveys | loss | test |', '|---|---|---|---|---|---|']
  for name, text in algorithms().items():
    link = re.search(r'https?://[^\s,]+', text)
    what = re.sub(r'[\s,]*https?://[^\s,]+', '', text)
    content = _text(name)
    module, function = re.findall(r'loss_fn = @(\w+)\.(\w+)', content)[0]
    surveys = re.search(r'^#   Surveys: (.*)$', content, re.MULTILINE)
    test = f'{_TESTED_IN.get(module, "methods")}_test.py'
    paper = f'[{link[0].rpartition("/")[2]}]({link[0]})' if link else ''
    rows.append(f'| `{name}` | {what} | {paper} | {surveys[1] if surveys else ""} | `{module}.{function}` | `{test}` |')
  return '\n'.join(rows) + '\n'


def exists(name: str) -> bool:
  """Whether the package has this gin file, named from its gin folder."""
  return (ROOT / name).is_file()


def own_files(folder: str, specs: Sequence[str], ends: Sequence[str] = ('',)) -> list[str]:
  """The package's gin files for a named model or data set; none for what is the user's, or for several at once."""
  names = {re.split(r'[:\[]', spec.removeprefix('builtin:'))[0] for spec in specs if not pathlib.Path(spec).exists()}
  return [file for name in names for end in ends if len(names) == 1 and exists(file := f'{folder}/{name}{end}.gin')]
