"""Tokenizers: SentencePiece models and Hugging Face `tokenizer.json` files behind one interface.

A tokenizer here turns text into ids and back and knows which ids are special. It never adds BOS or EOS by itself: they
have one owner, `examples`. Whether text *is* a special token is decided here and not by the libraries: the name of a
special token becomes its id only in `encode(..., special=True)`, and not where `literal` said that it is plain text.
"""

import abc
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import hashlib
import itertools
import json
import os
import re
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
import tokenizers as hf_tokenizers

from jaxalign import storage
from jaxalign import types

# A noncharacter, for internal use as Unicode says; it stands inside the name of a special token that is plain text.
_BREAK = '\ufdd0'
_MODEL, _JSON = 'tokenizer.model', 'tokenizer.json'
_CONFIG, _SPECIAL_MAP, _TEMPLATE = 'tokenizer_config.json', 'special_tokens_map.json', 'chat_template.jinja'
_MODEL_CONFIG = 'config.json'


class Tokenizer(abc.ABC):
  """Text to ids and back.

  Attributes:
    vocab_size: one more than the largest id.
    bos_id: the id that a text starts with, None where this tokenizer's model was trained without one.
    eos_id: the id that ends a response.
    pad_id: any valid id; it may equal `eos_id`, because masks never come from ids.
    bos_token: name of the BOS token for chat templates, '' without one; it may have a name where `bos_id` is None.
    eos_token: name of the EOS token.
    special_tokens: ids of special tokens by name.
    chat_template: Jinja source, None without one.
    fingerprint: a hash of the files, chat template included.
  """

  # Whether the library starts afresh, with a space in front, after a special token inside a text.
  _prefix_after_special = True

  def __init__(
      self,
      files: Mapping[str, bytes],
      settings: Mapping[str, Any],
      where: str,
      *,
      vocabulary: Mapping[str, int],
      specials: Mapping[str, int],
      bos_id: int | None,
      eos_id: int | None,
  ):
    """Resolves the special tokens: by `settings`, where they say something, otherwise as the library has them.

    Args:
      files: what was loaded, by the name to save it under.
      settings: see `_settings`.
      where: the file.
      vocabulary: all ids by token.
      specials: the special ones of them.
      bos_id: what the library puts in front of a text, None where it does not.
      eos_id: EOS where no setting names it.
    """
    self._files = dict(files)
    self.vocab_size = max(vocabulary.values(), default=-1) + 1
    names: dict[int | None, str] = {token_id: name for name, token_id in vocabulary.items()}
    defaults = {'bos_token': names.get(bos_id), 'eos_token': names.get(settings.get('eos_token_id', eos_id))}
    roles = {**defaults, **settings}
    tokens = {role: roles[role] for role in ('bos_token', 'eos_token') if roles.get(role) is not None}
    if 'eos_token' not in tokens:
      raise types.RunError(f'{where}: it has no end-of-sequence token; name one as eos_token in {_CONFIG} beside it')
    absent = [f'{role} {name!r}' for role, name in tokens.items() if name not in vocabulary]
    if absent:
      raise types.RunError(f'{where}: {absent[0]} of {_CONFIG} is not in its vocabulary')
    self.special_tokens = {**specials, **{name: vocabulary[name] for name in tokens.values()}}
    self.bos_token, self.eos_token = tokens.get('bos_token', ''), tokens['eos_token']
    adds_bos = self.bos_token and settings.get('add_bos_token', bos_id is not None)
    self.bos_id = vocabulary[self.bos_token] if adds_bos else None
    self.eos_id = vocabulary[self.eos_token]
    self.pad_id = vocabulary.get(settings.get('pad_token', ''), self.eos_id)
    self.chat_template: str | None = settings.get('chat_template')
    self._names_of_specials = {token_id: name for name, token_id in self.special_tokens.items()}
    self._names_pattern = _any_of(self.special_tokens, re.escape)
    self._special_pattern = _any_of(self.special_tokens, self._pattern_of)
    digest = hashlib.blake2b(digest_size=12)
    for name, content in sorted(self._files.items()):
      digest.update(f'{name} {len(content)} '.encode() + content)
    self.fingerprint = digest.hexdigest()

  def encode(self, text: str, *, continuation: bool = False, special: bool = False) -> list[int]:
    """The ids of a text, without BOS and EOS.

    Args:
      text: any text without lone surrogates.
      continuation: the text goes on from an earlier one: no space is put in front of it, and none is taken away.
      special: names of special tokens become their ids, for rendered chat templates; otherwise they are plain text.
    """
    ids: list[int] = []
    for part in self._parts(text if special else self.literal(text)):
      if isinstance(part, int):
        ids.append(part)
        continuation = not self._prefix_after_special
        continue
      for plain in filter(None, part.split(_BREAK)):
        ids += self._to_ids(plain, continuation)
        continuation = True
    return ids

  def decode(self, ids: Iterable[int], *, continuation: bool = False, skip_special: bool = True) -> str:
    """The text of ids, the inverse of `encode`.

    Args:
      ids: tokens of a whole text, or of a response.
      continuation: the ids go on from earlier ones (a response), so that a space in front belongs to the text.
      skip_special: leave special tokens out, otherwise they are shown by name.
    """
    names, ids = self._names_of_specials, [int(i) for i in ids]
    if skip_special:
      return self._to_text([i for i in ids if i not in names], continuation)
    text = ''
    for name, run in itertools.groupby(ids, names.get):
      plain = list(run)
      text += name * len(plain) if name else self._to_text(plain, continuation)
      continuation = continuation if name else not self._prefix_after_special
    return text

  def literal(self, text: str) -> str:
    """The text with names of special tokens marked as plain text, which `encode(..., special=True)` respects."""
    return self._names_pattern.sub(lambda match: match[0][:1] + _BREAK + match[0][1:], text)

  def save(self, directory: str | os.PathLike) -> None:
    """Writes the files, so that `load(directory)` gives this tokenizer back.

    Raises:
      RunError: a file cannot be written.
    """
    try:
      storage.path(directory).mkdir(parents=True, exist_ok=True)
      for name, content in self._files.items():
        (storage.path(directory) / name).write_bytes(content)
    except storage.errors() as err:
      raise types.RunError(f'{directory}: cannot save the tokenizer ({storage.reason(err)})') from err

  @abc.abstractmethod
  def _to_ids(self, text: str, continuation: bool) -> list[int]:
    """Encodes a text that has no special tokens."""

  @abc.abstractmethod
  def _to_text(self, ids: list[int], continuation: bool) -> str:
    """Decodes ids that are not special."""

  def _pattern_of(self, name: str) -> str:
    return re.escape(name)

  def _parts(self, text: str) -> Iterable[str | int]:
    """Splits a text at its special tokens, which come as ids."""
    end = 0
    for match in self._special_pattern.finditer(text):
      yield text[end : match.start()]
      yield self.special_tokens[match[0] if match[0] in self.special_tokens else match[0].strip()]
      end = match.end()
    yield text[end:]


class _SentencePiece(Tokenizer):
  """A SentencePiece model; its control pieces are special."""

  def __init__(self, files: Mapping[str, bytes], settings: Mapping[str, Any], where: str):
    try:
      self._first = sentencepiece.SentencePieceProcessor(model_proto=files[_MODEL])
      proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
      proto.ParseFromString(self._first.serialized_model_proto())
      proto.normalizer_spec.add_dummy_prefix = False
      # Otherwise the space in front of a continuation would be lost, and its first word glued to the one before.
      proto.normalizer_spec.remove_extra_whitespaces = False
      self._next = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    except RuntimeError as err:
      raise types.RunError(f'{where}: not a SentencePiece model') from err
    # What transformers calls legacy, and its default: text after a special token starts afresh.
    self._prefix_after_special = settings.get('legacy', True)
    first = self._first
    pieces = {first.id_to_piece(i): i for i in range(first.vocab_size())}
    specials = {piece: i for piece, i in pieces.items() if first.is_control(i)}
    bos_id, eos_id = (i if i >= 0 else None for i in (first.bos_id(), first.eos_id()))
    # Written by the template, such a token would be taken apart as plain text.
    lost = [name for name in settings['added'] if name not in pieces and name in settings.get('chat_template', '')]
    if lost:
      raise types.RunError(f'{where}: it lacks {lost[0]!r}, which the chat template writes; use its {_JSON}')
    super().__init__(files, settings, where, vocabulary=pieces, specials=specials, bos_id=bos_id, eos_id=eos_id)

  def _to_ids(self, text: str, continuation: bool) -> list[int]:
    return (self._next if continuation else self._first).encode(text)

  def _to_text(self, ids: list[int], continuation: bool) -> str:
    return (self._next if continuation else self._first).decode(ids)


class _Json(Tokenizer):
  """A `tokenizer.json` of Hugging Face; its added tokens that are marked special are special."""

  def __init__(self, files: Mapping[str, bytes], settings: Mapping[str, Any], where: str):
    spec = _json(files[_JSON], where)
    self._added = {token['content']: token for token in spec.get('added_tokens') or ()}
    self._prefix_after_special = '"prepend_scheme": "first"' not in json.dumps(spec.get('pre_tokenizer'))
    self._first = _json_tokenizer(spec, where)
    parts = {name: _without_prefix(spec.get(name)) for name in ('normalizer', 'pre_tokenizer', 'decoder')}
    self._next = _json_tokenizer({**spec, **parts, 'post_processor': None}, where)
    plain, framed = (self._first.encode('a', add_special_tokens=add).ids for add in (False, True))
    super().__init__(
        files,
        settings,
        where,
        vocabulary=self._first.get_vocab(with_added_tokens=True),
        specials={name: token['id'] for name, token in self._added.items() if token.get('special')},
        bos_id=framed[0] if framed[:1] != plain[:1] else None,
        eos_id=None,
    )

  def _pattern_of(self, name: str) -> str:
    token = self._added.get(name, {})
    left, right = (r'\s*' if token.get(side) else '' for side in ('lstrip', 'rstrip'))
    return left + re.escape(name) + right

  def _to_ids(self, text: str, continuation: bool) -> list[int]:
    return (self._next if continuation else self._first).encode(text, add_special_tokens=False).ids

  def _to_text(self, ids: list[int], continuation: bool) -> str:
    return (self._next if continuation else self._first).decode(ids, skip_special_tokens=False)


def _any_of(names: Iterable[str], pattern_of: Callable[[str], str]) -> re.Pattern[str]:
  """Matches the longest of the names; a tokenizer may have hundreds, so their first characters are looked for first."""
  patterns = [pattern_of(name) for name in sorted(names, key=len, reverse=True)]
  firsts = {re.escape(name[0]) for name in names} | {r'\s' for pattern in patterns if pattern.startswith(r'\s')}
  return re.compile(f'(?=[{"".join(sorted(firsts))}])(?:{"|".join(patterns)})')


def load(path: str | os.PathLike) -> Tokenizer:
  """Loads a tokenizer.

  Args:
    path: a SentencePiece model, a `tokenizer.json`, or a directory with `tokenizer.json`, `tokenizer.model` or one
      `*.model`, in this order. Special tokens and chat template come from `tokenizer_config.json`,
      `special_tokens_map.json` and `chat_template.jinja` beside it, or from the model's `config.json` (EOS only).

  Raises:
    RunError: a file is missing or corrupt, or names no EOS token.
  """
  path = storage.path(path)
  file = _find(path) if path.is_dir() else path
  name = _JSON if file.suffix == '.json' else _MODEL
  files = {name: _read(file)}
  for beside in (_CONFIG, _SPECIAL_MAP, _TEMPLATE):
    if (file.parent / beside).is_file():
      files[beside] = _read(file.parent / beside)
  settings = _settings(files, file.parent)
  if name == _JSON and 'eos_token' not in settings and (file.parent / _MODEL_CONFIG).is_file():
    files[_MODEL_CONFIG] = _read(file.parent / _MODEL_CONFIG)
    eos_ids = _json(files[_MODEL_CONFIG], str(file.parent / _MODEL_CONFIG)).get('eos_token_id')
    settings['eos_token_id'] = eos_ids[0] if isinstance(eos_ids, list) and eos_ids else eos_ids
  return (_Json if name == _JSON else _SentencePiece)(files, settings, str(file))


def _find(directory: storage.Path) -> storage.Path:
  models = sorted(directory.glob('*.model'))
  for file in (directory / _JSON, directory / _MODEL, *(models if len(models) == 1 else ())):
    if file.is_file():
      return file
  found = f'several .model files ({", ".join(file.name for file in models)}); name one' if models else 'none of them'
  raise types.RunError(f'{directory}: a tokenizer is {_JSON}, {_MODEL} or one *.model file; there is {found}')


def _settings(files: Mapping[str, bytes], directory: storage.Path) -> dict[str, Any]:
  """Special tokens by role, chat template and options that the files state."""
  config, special_map = (
      _json(files[name], str(directory / name)) if name in files else {} for name in (_CONFIG, _SPECIAL_MAP)
  )
  settings = {name: config[name] for name in ('add_bos_token', 'legacy') if config.get(name) is not None}
  try:
    for role in ('bos_token', 'eos_token', 'pad_token'):
      token = config.get(role) or special_map.get(role)
      if token:
        settings[role] = token['content'] if isinstance(token, dict) else token
    settings['added'] = [token['content'] for token in config.get('added_tokens_decoder', {}).values()]
    template = config.get('chat_template')
    if isinstance(template, list):
      template = {one['name']: one['template'] for one in template}.get('default')
  except (AttributeError, KeyError, TypeError) as err:
    raise types.RunError(f'{directory / _CONFIG}: not as transformers writes it ({err!r})') from err
  template = _text(files[_TEMPLATE], str(directory / _TEMPLATE)) if _TEMPLATE in files else template
  return settings | ({'chat_template': template} if template else {})


def _read(file: storage.Path) -> bytes:
  try:
    return file.read_bytes()
  except storage.errors() as err:
    raise types.RunError(f'{file}: cannot read the tokenizer ({storage.reason(err)})') from err


def _text(content: bytes, where: str) -> str:
  try:
    return content.decode('utf-8')
  except UnicodeDecodeError as err:
    raise types.RunError(f'{where}: not UTF-8 text (byte {err.start})') from err


def _json(content: bytes, where: str) -> dict[str, Any]:
  try:
    value = json.loads(_text(content, where))
  except json.JSONDecodeError as err:
    raise types.RunError(f'{where}: not JSON (line {err.lineno}: {err.msg})') from err
  if not isinstance(value, dict):
    raise types.RunError(f'{where}: not a JSON object')
  return value


def _json_tokenizer(spec: dict[str, Any], where: str) -> hf_tokenizers.Tokenizer:
  try:
    tokenizer = hf_tokenizers.Tokenizer.from_str(json.dumps(spec))
  except Exception as err:  # tokenizers (Rust) raises Exception itself for bad content; what is narrower passes.
    if type(err) is not Exception:
      raise
    raise types.RunError(f'{where}: not a tokenizer.json ({err})') from err
  tokenizer.no_truncation()
  tokenizer.no_padding()
  return tokenizer


def _without_prefix(node: dict[str, Any] | None) -> dict[str, Any] | None:
  """A normalizer, pre-tokenizer or decoder that neither puts a space in front of the text nor takes one away."""
  if node is None or node['type'] == 'Prepend':
    return None
  if node['type'] == 'Sequence':
    key = next(name for name in node if name != 'type')
    children = [_without_prefix(child) for child in node[key]]
    return {**node, key: [child for child in children if child is not None]}
  if node['type'] == 'Metaspace':
    return {name: value for name, value in node.items() if name != 'add_prefix_space'} | {'prepend_scheme': 'never'}
  neutral = {'add_prefix_space': False, 'start': 0}  # of ByteLevel, and of the decoder Strip
  return {**node, **{name: value for name, value in neutral.items() if name in node}}
