"""Talking to a model: lines in, answers out."""

import io

from jaxalign import main
from jaxalign import recipe as recipe_lib
from jaxalign import respond
from jaxalign.data import tokenizers
from tools import chat

STORIES = 'builtin:stories260K'


class TestChat:

  def talk(self, monkeypatch, capsys, lines, *flags):
    monkeypatch.setattr(chat.sys, 'stdin', io.StringIO(''.join(f'{line}\n' for line in lines)))
    assert chat.main([f'--model={STORIES}', '--max_new_tokens=8', '--temperature=0', *flags]) == 0
    return capsys.readouterr()

  def test_goes_on_from_what_was_said(self, monkeypatch, capsys):
    lines = ['Once upon a time', ' and', '/reset', 'Once upon a time', '/what', '/exit', 'Tom']
    out, err = self.talk(monkeypatch, capsys, lines)
    assert 'no chat template' in err
    first, second, again, unknown = out.splitlines()
    assert first == again
    assert unknown == '/what: there are /reset and /exit'
    args = 'jaxalign', '--mode=sample', f'--model={STORIES}', '--temperature=0', '--max_new_tokens=8'
    assert main.main([*args, f'--prompt=Once upon a time{first} and']) == 0
    assert capsys.readouterr().out == f'Once upon a time{first} and{second}\n'

  def test_writes_turns_by_a_template(self, monkeypatch, capsys):
    seen, sample = [], respond.sampling.sample
    monkeypatch.setattr(
        respond.sampling, 'sample', lambda *args, **options: (seen.append(args[2][0]), sample(*args, **options))[1]
    )
    out, err = self.talk(monkeypatch, capsys, ['Hi', 'Who?'], '--template=hh')
    assert 'template' not in err
    tokenizer = tokenizers.load(recipe_lib.asset('stories260K'))
    answer = out.splitlines()[0].strip()
    assert tokenizer.decode(seen[1]).split() == f'Human: Hi Assistant: {answer} Human: Who? Assistant:'.split()

  def test_says_when_there_is_no_room(self, monkeypatch, capsys):
    out, _ = self.talk(monkeypatch, capsys, ['Tom ' * 600, 'Tom'])
    assert 'leave no room in the context of 512: /reset begins anew' in out.splitlines()[0]
    assert len(out.splitlines()) == 2
