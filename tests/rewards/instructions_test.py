"""Instructions that can be checked: of each, responses that follow it and responses that do not."""

import pytest

from jaxalign.rewards import instructions

AT_LEAST, LESS = {'relation': 'at least'}, {'relation': 'less than'}

# (instruction, its keywords, responses that follow it, responses that do not)
CASES = [
    ('keywords:existence', {'keywords': ['sun', 'Moon']}, ['The SUN and moons.'], ['the sun', 'none']),
    ('keywords:existence', {'keywords': ['c(']}, ['in c( code'], ['in c code']),
    ('keywords:frequency', {'keyword': ' a', 'frequency': 2} | AT_LEAST, ['A cat, a dog'], ['x']),
    ('keywords:frequency', {'keyword': 'cat', 'frequency': 2} | LESS, ['a cat', 'none'], ['cat cats']),
    ('keywords:forbidden_words', {'forbidden_words': ['art', 'b(']}, ['party'], ['Art is', 'modern art']),
    (
        'keywords:letter_frequency',
        {'letter': 'E', 'let_frequency': 2, 'let_relation': 'at least'},
        ['Every', 'eel'],
        ['eight', 'x'],
    ),
    (
        'keywords:letter_frequency',
        {'letter': '#', 'let_frequency': 1, 'let_relation': 'less than'},
        ['none'],
        ['# title'],
    ),
    (
        'length_constraints:number_sentences',
        {'num_sentences': 3} | AT_LEAST,
        ['One. Two! Three?', 'He said "Go." Then. Now', 'Title\n\nOne. Two'],
        ['Dr. A. Smith came. He left.', 'It is 3.5 m. Yes', 'e.g. this. That.', 'One... two'],
    ),
    ('length_constraints:number_sentences', {'num_sentences': 2} | LESS, ['One line'], ['One. Two.']),
    ('length_constraints:number_words', {'num_words': 4} | AT_LEAST, ["it's so - good"], ['just three words']),
    ('length_constraints:number_words', {'num_words': 3} | LESS, ['two words', '...'], ['well, three words']),
    (
        'length_constraints:number_paragraphs',
        {'num_paragraphs': 2},
        ['a\n***\nb', '***\na\n***\nb\n***'],
        ['a', 'a\n\nb', 'a\n***\n***\nb', 'a***b***c'],
    ),
    (
        'length_constraints:nth_paragraph_first_word',
        {'num_paragraphs': 2, 'nth_paragraph': 2, 'first_word': 'However'},
        ['One.\n\nHowever, two.', 'One.\n\n"however" two'],
        ['However, one.\n\nTwo.', 'One.\n\nTwo.', 'One.\n\nHowever.\n\nThree.', 'However.'],
    ),
    ('detectable_content:number_placeholders', {'num_placeholders': 2}, ['[name] of [city]', '[a][]'], ['[name]']),
    ('detectable_content:postscript', {'postscript_marker': 'P.S.'}, ['Bye. P.S. Hi', 'bye\np. s. Hi'], ['PS Hi']),
    ('detectable_content:postscript', {'postscript_marker': 'P.P.S'}, ['Bye.\nP.P.S Hi'], ['Bye. P.S. Hi']),
    (
        'detectable_format:number_bullet_lists',
        {'num_bullets': 2},
        ['* a\n* b', 'Two:\n- a\n  - b', '* a\n- b'],
        ['* a', '* a\n* b\n* c', '**a**\n* b', 'a * b\nc - d'],
    ),
    ('detectable_format:constrained_response', {}, ['My answer is no.', 'Well. My answer is maybe.'], ['My answer is']),
    (
        'detectable_format:number_highlighted_sections',
        {'num_highlights': 2},
        ['*a* and *b*', '**a** and *b*', '*a* **b** *c*'],
        ['*a*', '**a**', '* a\n* b', '** ** *a*'],
    ),
    (
        'detectable_format:multiple_sections',
        {'section_spliter': 'Section', 'num_sections': 2},
        ['Section 1\na\nSection 2\nb', 'Section1 Section2 Section 3'],
        ['Section 1', 'section 1 section 2', 'Section A Section B'],
    ),
    ('detectable_format:json_format', {}, ['{"a": 1}', '```JSON\n[1]\n```'], ['{a: 1}', 'It is {"a": 1}']),
    ('detectable_format:title', {}, ['<<Poem of joy>>\ntext'], ['<Poem>', '<<>>', '<< >>', '<<a\nb>>']),
    (
        'combination:two_responses',
        {},
        ['one\n******\ntwo', '******one******two******'],
        ['one', 'one******one', 'one******two******three', 'one************two'],
    ),
    ('combination:repeat_prompt', {'prompt_to_repeat': 'Say hi. '}, ['say hi. Hi!'], ['Hi! Say hi.']),
    ('startend:end_checker', {'end_phrase': 'Any questions?'}, ['So. any questions? ', '"Any questions?"'], ['Any?']),
    ('startend:quotation', {}, ['"a"', ' "a b" \n'], ['a', '"', '"a', '"a" b']),
    ('change_case:english_capital', {}, ['ALL OF IT, 3!'], ['Not', 'NOt']),
    ('change_case:english_lowercase', {}, ['all of it, 3!'], ['Not', 'no T']),
    (
        'change_case:capital_word_frequency',
        {'capital_frequency': 2, 'capital_relation': 'at least'},
        ['SO I say', 'A WELL-KNOWN cat'],
        ['So Is It', 'ONE'],
    ),
    ('punctuation:no_comma', {}, ['a b'], ['a, b']),
]


def share(response, names, keywords):
  return instructions.followed([response], [names], [keywords])[0]


class TestFollowed:

  @pytest.mark.parametrize(('name', 'keywords', 'good', 'bad'), CASES)
  def test_tells_who_follows(self, name, keywords, good, bad):
    others = {'num_words': None, 'language': None}  # The public data have all keywords, most of them null.
    given = {key: value for key, value in others.items() if key not in keywords} | keywords
    assert {text: share(text, [name], [given]) for text in good} == dict.fromkeys(good, 1.0)
    assert {text: share(text, [name], [given]) for text in bad} == dict.fromkeys(bad, 0.0)

  def test_knows_every_instruction_of_the_paper(self):
    assert {name for name, *_ in CASES} == set(instructions.CHECKS)
    assert len(instructions.CHECKS) + len(instructions.LEFT_OUT) == 25

  def test_is_the_share_of_instructions(self):
    names = ['punctuation:no_comma', 'startend:quotation', 'language:response_language']
    keywords = [{}, {}, {'language': 'de'}]
    found = instructions.followed(['"a"', 'a', 'a,', ' \n'], [names] * 4, [keywords] * 4)
    assert found == [1.0, 0.5, 0.0, 0.0]

  def test_abstains_where_nothing_can_be_checked(self):
    assert share('a', ['language:response_language'], [{'language': 'de'}]) is None
    assert share('a', [], []) is None

  @pytest.mark.parametrize(
      ('names', 'keywords', 'said'),
      [
          (['case:title'], [{}], 'there is no instruction case:title; there are keywords:existence, '),
          (['punctuation:no_comma'], [{'n': 1}], "instruction punctuation:no_comma with {'n': 1}: "),
          (['keywords:existence'], [{}], 'instruction keywords:existence with {}: .*keywords'),
          (['keywords:existence'], [], 'two lists of the same length'),
          (None, None, 'two lists of the same length'),
          (
              ['length_constraints:number_words'],
              [{'num_words': 3, 'relation': 'more than'}],
              "relation 'more than' is neither",
          ),
      ],
  )
  def test_says_what_is_wrong(self, names, keywords, said):
    with pytest.raises(ValueError, match=said):
      share('a', names, keywords)
