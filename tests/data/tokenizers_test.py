"""Tokenizers: ids against hand-made vocabularies, special tokens, continuation, files."""

import json
import shutil

import pytest
import sentencepiece

from jaxalign import types
from jaxalign.data import tokenizers

_LLAMA_PARTS = {
    # The layout of Llama-2's tokenizer.json: a space is put in front by the normalizer and taken away by the decoder.
    'normalizer': {
        'type': 'Sequence',
        'normalizers': [
            {'type': 'Prepend', 'prepend': '▁'},
            {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'},
        ],
    },
    'pre_tokenizer': None,
    'decoder': {
        'type': 'Sequence',
        'decoders': [
            {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '},
            {'type': 'Fuse'},
            {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0},
        ],
    },
    'model': {'type': 'BPE', 'vocab': {'<s>': 0, '</s>': 1, '▁': 2, 'a': 3, 'b': 4, '▁a': 5}, 'merges': ['▁ a']},
}


def _metaspace(scheme):
  part = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': scheme, 'split': False}
  return _LLAMA_PARTS | {'normalizer': None, 'pre_tokenizer': part, 'decoder': part}


def _post_processor(name, token_id):
  return {
      'type': 'TemplateProcessing',
      'single': [{'SpecialToken': {'id': name, 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}],
      'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}}],
      'special_tokens': {name: {'id': name, 'ids': [token_id], 'tokens': [name]}},
  }


class TestEncode:

  def test_sentencepiece_ids_are_the_librarys(self, sentencepiece_model):
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = tokenizers.load(sentencepiece_model)
    for text in ('the cat', ' the  cat\n', 'héllo 你好 😀', ''):
      assert tokenizer.encode(text) == library.encode(text)

  def test_never_adds_bos_or_eos(self, write_json_tokenizer, sentencepiece_model):
    directory = write_json_tokenizer(post_processor=_post_processor('<s>', 0))
    for tokenizer in (tokenizers.load(directory), tokenizers.load(sentencepiece_model)):
      ids = tokenizer.encode('ab')
      assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids

  @pytest.mark.parametrize('parts', [_LLAMA_PARTS, _metaspace('always'), _metaspace('first')])
  def test_continuation_has_no_space_in_front(self, write_json_tokenizer, parts):
    tokenizer = tokenizers.load(write_json_tokenizer(**parts))
    assert tokenizer.encode('ab') == [5, 4]
    assert tokenizer.encode('ab', continuation=True) == [3, 4]
    assert tokenizer.encode(' ab', continuation=True) == [5, 4]

  def test_continuation_has_no_space_in_front_with_sentencepiece(self, sentencepiece_model):
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = tokenizers.load(sentencepiece_model)
    pieces = [library.id_to_piece(i) for i in tokenizer.encode('the cat', continuation=True)]
    assert ''.join(pieces) == 'the▁cat'

  def test_continuation_keeps_its_space_where_the_model_strips_text(self, train_sentencepiece):
    path = train_sentencepiece(normalization_rule_name='nmt_nfkc', remove_extra_whitespaces=True)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = tokenizers.load(path)
    assert library.id_to_piece(tokenizer.encode(' the', continuation=True)[0]).startswith('▁')

  def test_continuation_of_nothing_is_nothing(self, sentencepiece_model, write_json_tokenizer):
    for path in (sentencepiece_model, write_json_tokenizer()):
      assert tokenizers.load(path).encode('', continuation=True) == []

  def test_the_name_of_a_special_token_is_plain_text(self, write_json_tokenizer, sentencepiece_model):
    for path in (write_json_tokenizer(), sentencepiece_model):
      tokenizer = tokenizers.load(path)
      ids = tokenizer.encode('a</s>b<s>')
      assert not set(ids) & set(tokenizer.special_tokens.values())
      assert tokenizer.decode(ids) == 'a</s>b<s>'

  def test_special_makes_ids_of_names(self, write_json_tokenizer):
    tokenizer = tokenizers.load(write_json_tokenizer(special=('<s>', '</s>', '</s>x')))
    a, b = tokenizer.encode('a') + tokenizer.encode('b')
    assert tokenizer.encode('<s>a</s>b</s>x</s', special=True)[:5] == [0, a, 1, b, 2]

  def test_special_makes_ids_of_control_pieces(self, sentencepiece_model):
    tokenizer = tokenizers.load(sentencepiece_model)
    inst, end = tokenizer.special_tokens['[INST]'], tokenizer.special_tokens['[/INST]']
    hello = tokenizer.encode('hello')
    assert tokenizer.encode('<s>[INST]hello[/INST]', special=True) == [1, inst, *hello, end]

  @pytest.mark.parametrize('parts, second', [(_LLAMA_PARTS, 5), (_metaspace('always'), 5), (_metaspace('first'), 3)])
  def test_text_after_a_special_token_starts_as_the_library_has_it(self, write_json_tokenizer, parts, second):
    tokenizer = tokenizers.load(write_json_tokenizer(**parts))
    assert tokenizer.encode('a</s>a', special=True) == [5, 1, second]

  def test_literal_names_stay_plain_in_a_rendered_text(self, write_json_tokenizer, sentencepiece_model):
    for path in (write_json_tokenizer(), sentencepiece_model):
      tokenizer = tokenizers.load(path)
      ids = tokenizer.encode('<s>' + tokenizer.literal('a</s>') + '</s>', special=True)
      assert [i for i in ids if i in tokenizer.special_tokens.values()] == [tokenizer.bos_id, tokenizer.eos_id]
      assert tokenizer.decode(ids) == 'a</s>'

  def test_an_eos_that_is_an_ordinary_added_token_is_plain_text_too(self, write_json_tokenizer):
    directory = write_json_tokenizer()
    spec = json.loads((directory / 'tokenizer.json').read_text())
    spec['added_tokens'][1]['special'] = False
    (directory / 'tokenizer.json').write_text(json.dumps(spec))
    tokenizer = tokenizers.load(directory)
    assert tokenizer.eos_id not in tokenizer.encode('a</s>')
    assert tokenizer.encode('a</s>', special=True)[-1] == tokenizer.eos_id

  def test_special_tokens_that_strip_take_the_whitespace_beside_them(self, write_json_tokenizer):
    directory = write_json_tokenizer()
    spec = json.loads((directory / 'tokenizer.json').read_text())
    spec['added_tokens'][1]['rstrip'] = True
    (directory / 'tokenizer.json').write_text(json.dumps(spec))
    tokenizer = tokenizers.load(directory)
    assert tokenizer.encode('a </s>\n a', special=True) == tokenizer.encode('a ') + [1] + tokenizer.encode('a')


class TestDecode:

  @pytest.mark.parametrize('text', ['the cat', ' the', '  a\n\n b ', 'héllo 你好 😀'])
  def test_inverts_encode(self, sentencepiece_model, write_json_tokenizer, text):
    for path in (sentencepiece_model, write_json_tokenizer()):
      tokenizer = tokenizers.load(path)
      assert tokenizer.decode(tokenizer.encode(text)) == text
      assert tokenizer.decode(tokenizer.encode(text, continuation=True), continuation=True) == text

  @pytest.mark.parametrize('parts', [_LLAMA_PARTS, _metaspace('always'), _metaspace('first')])
  def test_a_continuation_keeps_its_space(self, write_json_tokenizer, parts):
    tokenizer = tokenizers.load(write_json_tokenizer(**parts))
    assert tokenizer.decode([5, 4]) == 'ab'
    assert tokenizer.decode([5, 4], continuation=True) == ' ab'

  def test_shows_special_tokens_only_on_request(self, sentencepiece_model):
    tokenizer = tokenizers.load(sentencepiece_model)
    ids = [1, *tokenizer.encode('the cat'), 2, 2]
    assert tokenizer.decode(ids) == 'the cat'
    assert tokenizer.decode(ids, skip_special=False) == '<s>the cat</s></s>'


class TestLoad:

  def test_sentencepiece_knows_its_own_special_tokens(self, sentencepiece_model):
    tokenizer = tokenizers.load(sentencepiece_model)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == ('<s>', '</s>', None)
    assert (
        tokenizer.vocab_size == sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model)).vocab_size()
    )

  def test_a_directory_prefers_tokenizer_json(self, write_json_tokenizer, sentencepiece_model):
    directory = write_json_tokenizer()
    shutil.copy(sentencepiece_model, directory / 'tokenizer.model')
    assert tokenizers.load(directory).vocab_size == tokenizers.load(directory / 'tokenizer.json').vocab_size

  def test_a_directory_may_have_one_model_of_any_name(self, tmp_path, sentencepiece_model):
    shutil.copy(sentencepiece_model, tmp_path / 'one.model')
    assert tokenizers.load(tmp_path).eos_id == 2
    shutil.copy(sentencepiece_model, tmp_path / 'two.model')
    with pytest.raises(types.RunError, match='one.model, two.model'):
      tokenizers.load(tmp_path)

  def test_the_config_names_tokens_and_template(self, write_json_tokenizer):
    config = {
        'bos_token': {'content': '</s>'},
        'eos_token': '<e>',
        'pad_token': '<p>',
        'add_bos_token': True,
        'chat_template': [{'name': 'tool', 'template': 'no'}, {'name': 'default', 'template': 'yes'}],
    }
    tokenizer = tokenizers.load(write_json_tokenizer(special=('<s>', '</s>', '<e>', '<p>'), config=config))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.chat_template) == (1, 2, 3, 'yes')

  def test_the_special_tokens_map_fills_in(self, write_json_tokenizer):
    directory = write_json_tokenizer(config={})
    (directory / 'special_tokens_map.json').write_text(json.dumps({'eos_token': {'content': '</s>'}}))
    assert tokenizers.load(directory).eos_id == 1

  @pytest.mark.parametrize('eos', [1, [1, 0]])
  def test_the_models_config_gives_eos_as_a_last_resort(self, write_json_tokenizer, tmp_path, eos):
    directory = write_json_tokenizer(config={})
    (directory / 'config.json').write_text(json.dumps({'eos_token_id': eos}))
    assert tokenizers.load(directory).eos_id == 1
    tokenizers.load(directory).save(tmp_path / 'saved')
    assert tokenizers.load(tmp_path / 'saved').eos_id == 1

  def test_the_template_file_wins(self, write_json_tokenizer):
    directory = write_json_tokenizer(config={'eos_token': '</s>', 'chat_template': 'old'})
    (directory / 'chat_template.jinja').write_text('new é', encoding='utf-8')
    assert tokenizers.load(directory).chat_template == 'new é'

  def test_bos_is_put_first_only_where_the_model_was_trained_so(self, write_json_tokenizer):
    config = {'bos_token': '<s>', 'eos_token': '</s>'}
    unused = tokenizers.load(write_json_tokenizer(config=config))
    assert (unused.bos_token, unused.bos_id) == ('<s>', None)
    assert tokenizers.load(write_json_tokenizer(config=config | {'add_bos_token': True})).bos_id == 0
    post_processor = _post_processor('<s>', 0)
    assert tokenizers.load(write_json_tokenizer(config=config, post_processor=post_processor)).bos_id == 0
    off = config | {'add_bos_token': False}
    assert tokenizers.load(write_json_tokenizer(config=off, post_processor=post_processor)).bos_id is None

  def test_truncation_in_the_file_is_ignored(self, write_json_tokenizer):
    truncation = {'direction': 'Right', 'max_length': 2, 'strategy': 'LongestFirst', 'stride': 0}
    assert len(tokenizers.load(write_json_tokenizer(truncation=truncation)).encode('abababab')) == 4

  def test_missing_files_are_named(self, tmp_path):
    with pytest.raises(types.RunError, match=f'{tmp_path}: .*there is none'):
      tokenizers.load(tmp_path)
    with pytest.raises(types.RunError, match='nowhere.model: .*No such file'):
      tokenizers.load(tmp_path / 'nowhere.model')

  @pytest.mark.parametrize(
      'name, content',
      [
          *(
              (name, content)
              for name in ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'tokenizer.model')
              for content in (b'', b'{"model": ', b'\xff\xfe', b'[]')
          ),
          ('tokenizer.json', b'{"model": {"type": "BPE"}}'),
          ('tokenizer_config.json', b'{"eos_token": {"text": "</s>"}}'),
          ('tokenizer_config.json', b'{"chat_template": [{}]}'),
          ('chat_template.jinja', b'\xff\xfe'),
      ],
  )
  def test_corrupt_files_are_named(self, write_json_tokenizer, name, content):
    directory = write_json_tokenizer()
    if name == 'tokenizer.model':
      (directory / 'tokenizer.json').unlink()
    (directory / name).write_bytes(content)
    with pytest.raises(types.RunError, match=str(directory / name)) as caught:
      tokenizers.load(directory)
    assert '\n' not in str(caught.value)

  def test_tokens_that_are_not_in_the_vocabulary_are_named(self, write_json_tokenizer):
    with pytest.raises(types.RunError, match="eos_token '<end>'"):
      tokenizers.load(write_json_tokenizer(config={'eos_token': '<end>'}))
    with pytest.raises(types.RunError, match='no end-of-sequence token'):
      tokenizers.load(write_json_tokenizer(config={}))

  def test_a_model_without_the_tokens_of_its_template_is_refused(self, tmp_path, sentencepiece_model):
    shutil.copy(sentencepiece_model, tmp_path / 'tokenizer.model')
    config = {'added_tokens_decoder': {'900': {'content': '<|im_start|>'}}, 'chat_template': 'x'}
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config))
    assert tokenizers.load(tmp_path).eos_id == 2
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(config | {'chat_template': '<|im_start|>'}))
    with pytest.raises(types.RunError, match=r'lacks .<\|im_start\|>.'):
      tokenizers.load(tmp_path)


class TestSave:

  def test_load_gives_it_back(self, write_json_tokenizer, sentencepiece_model, tmp_path):
    directory = write_json_tokenizer(config={'bos_token': '<s>', 'eos_token': '</s>', 'chat_template': 'x'})
    (directory / 'chat_template.jinja').write_text('y')
    for path in (directory, sentencepiece_model):
      tokenizer = tokenizers.load(path)
      tokenizer.save(tmp_path / 'saved' / path.name)
      again = tokenizers.load(tmp_path / 'saved' / path.name)
      for name in ('vocab_size', 'bos_id', 'eos_id', 'special_tokens', 'chat_template', 'fingerprint'):
        assert vars(again)[name] == vars(tokenizer)[name]
      assert again.encode('ab \n') == tokenizer.encode('ab \n')

  def test_needs_nothing_of_the_source(self, write_json_tokenizer, tmp_path):
    directory = write_json_tokenizer()
    tokenizer = tokenizers.load(directory)
    shutil.rmtree(directory)
    tokenizer.save(tmp_path / 'saved')
    assert tokenizers.load(tmp_path / 'saved').fingerprint == tokenizer.fingerprint

  def test_a_place_that_cannot_be_written_is_named(self, sentencepiece_model, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(types.RunError, match=str(tmp_path / 'file')):
      tokenizers.load(sentencepiece_model).save(tmp_path / 'file')


class TestFingerprint:

  def test_changes_with_the_vocabulary_and_the_template(self, write_json_tokenizer):
    config = {'eos_token': '</s>'}
    paths = [
        write_json_tokenizer(config=config),
        write_json_tokenizer(config=config, merges=('a b',)),
        write_json_tokenizer(config=config | {'chat_template': 'x'}),
    ]
    assert len({tokenizers.load(path).fingerprint for path in paths}) == 3
    assert tokenizers.load(paths[0]).fingerprint == tokenizers.load(write_json_tokenizer(config=config)).fingerprint
