"""Instructions whose following can be checked by a program, by their names in IFEval.

Each check is a function of the response and of the instruction's own keywords. What the paper leaves open follows its
public data and program: keywords are regular expressions, words are runs of letters and digits.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import re
from typing import Any

from jaxalign.rewards import rules

# Not checked: it wants a library that tells languages apart.
LEFT_OUT = ('language:response_language',)

_ANSWERS = ('My answer is yes.', 'My answer is no.', 'My answer is maybe.')
_ABBREVIATIONS = re.compile(r'\b(Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|e\.g|i\.e|[A-Z])\.(?=\s)')


def followed(
    responses: Sequence[str],
    instruction_id_list: Sequence[Sequence[str]],
    kwargs: Sequence[Sequence[Mapping[str, Any]]],
) -> list[float | None]:
  """The share of its instructions that each response follows to the letter (IFEval's strict accuracy), in [0, 1].

  A response of nothing but space follows none. None where there is no instruction to check: those of `LEFT_OUT` do not
  count.

  Args:
    responses: texts.
    instruction_id_list: names of the instructions to each, as 'length_constraints:number_words'.
    kwargs: their keywords; None in place of a value is as if it was not there.

  Raises:
    ValueError: there is no such instruction, or it wants other keywords.

  References:
    Zhou et al., 2023, https://arxiv.org/abs/2311.07911, Table 1.
  """
  return [_share(*one) for one in zip(responses, instruction_id_list, kwargs, strict=True)]


def _share(response: str, names: Sequence[str] | None, keywords: Sequence[Mapping[str, Any]] | None) -> float | None:
  if names is None or keywords is None or len(names) != len(keywords):
    raise ValueError('columns instruction_id_list and kwargs: two lists of the same length are wanted')
  checks = [(name, one) for name, one in zip(names, keywords) if name not in LEFT_OUT]
  if not checks:
    return None
  return sum(_follows(response, name, one) for name, one in checks) / len(checks)


def _follows(response: str, name: str, keywords: Mapping[str, Any]) -> bool:
  if name not in CHECKS:
    raise ValueError(f'there is no instruction {name}; there are {", ".join(CHECKS)}')
  given = {key: value for key, value in (keywords or {}).items() if value is not None}
  try:
    return bool(response.strip()) and CHECKS[name](response, **given)
  except TypeError as err:
    raise ValueError(f'instruction {name} with {given}: {err}') from err


def _compared(count: int, relation: str, limit: int) -> bool:
  if relation not in ('at least', 'less than'):
    raise ValueError(f"relation {relation!r} is neither 'at least' nor 'less than'")
  return count >= limit if relation == 'at least' else count < limit


def _occurrences(word: str, text: str, edge: str = '') -> int:
  try:
    pattern = re.compile(f'{edge}{word}{edge}', re.IGNORECASE)
  except re.error:  # It was meant as it is.
    pattern = re.compile(f'{edge}{re.escape(word)}{edge}', re.IGNORECASE)
  return len(pattern.findall(text))


def _has_keywords(text: str, *, keywords: Sequence[str]) -> bool:
  return all(_occurrences(word, text) for word in keywords)


def _keyword_frequency(text: str, *, keyword: str, frequency: int, relation: str) -> bool:
  return _compared(_occurrences(keyword.strip(), text), relation, frequency)


def _forbids(text: str, *, forbidden_words: Sequence[str]) -> bool:
  return not any(_occurrences(word, text, edge=r'\b') for word in forbidden_words)


def _letter_frequency(text: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
  return _compared(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
  return _compared(len(sentences(text)), relation, num_sentences)


def sentences(text: str) -> list[str]:
  """The sentences of a text; each ends in . ! ? or an ellipsis before space, or in an empty line.

  The points of common abbreviations end none. (IFEval's program splits by a trained model, and may differ.)
  """
  guarded = _ABBREVIATIONS.sub(lambda match: match[0][:-1] + '\0', text)
  pieces = re.split(r'(?<=[.!?…])["\'”’)\]]*\s+|\n\s*\n', guarded)
  return [piece.replace('\0', '.').strip() for piece in pieces if re.search(r'\w', piece)]


def _number_words(text: str, *, num_words: int, relation: str) -> bool:
  return _compared(len(re.findall(r'\w+', text)), relation, num_words)


def _parts(text: str, divider: str) -> list[str] | None:
  """What stands between dividers, empty parts at both ends left out; None where another part is empty."""
  parts = [part.strip() for part in text.split(divider)]
  parts = parts[not parts[0] : len(parts) - (not parts[-1])]
  return parts if all(parts) else None


def _number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
  parts = _parts(text, '***')
  return parts is not None and len(parts) == num_paragraphs


def _first_word_of_paragraph(text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
  paragraphs = [part.strip() for part in text.split('\n\n')]
  full = [part for part in paragraphs if part]
  if len(full) != num_paragraphs or not 1 <= nth_paragraph <= len(full) or not paragraphs[nth_paragraph - 1]:
    return False
  word = re.split(r'[.,?!\'"]', paragraphs[nth_paragraph - 1].split()[0].lstrip('\'"'))[0]
  return word.lower() == first_word.lower()


def _placeholders(text: str, *, num_placeholders: int) -> bool:
  return len(re.findall(r'\[.*?\]', text)) >= num_placeholders


def _postscript(text: str, *, postscript_marker: str) -> bool:
  marker = postscript_marker.strip().lower()
  letters = {'p.s.': r'p\.\s?s\.', 'p.p.s': r'p\.\s?p\.\s?s'}.get(marker, re.escape(marker))
  return re.search(letters, text.lower()) is not None


def _bullets(text: str, *, num_bullets: int) -> bool:
  return len(re.findall(r'^\s*(?:\*[^*\n]|-).*$', text, re.MULTILINE)) == num_bullets


def _constrained(text: str) -> bool:
  return any(answer in text for answer in _ANSWERS)


def _highlights(text: str, *, num_highlights: int) -> bool:
  found = re.findall(r'\*\*([^\n*]*)\*\*|\*([^\n*]*)\*', text)
  return sum(bool((double or single).strip()) for double, single in found) >= num_highlights


def _sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
  return len(re.findall(re.escape(section_spliter.strip()) + r'\s?\d+', text)) >= num_sections


def _is_json(text: str) -> bool:
  try:
    rules.parse_json(text)
  except (ValueError, RecursionError):
    return False
  return True


def _has_title(text: str) -> bool:
  return any(found.strip('<> ') for found in re.findall(r'<<([^\n]+)>>', text))


def _two_responses(text: str) -> bool:
  parts = _parts(text, '******')
  return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _repeats_prompt(text: str, *, prompt_to_repeat: str) -> bool:
  return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(text: str, *, end_phrase: str) -> bool:
  return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _is_quoted(text: str) -> bool:
  text = text.strip()
  return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(text: str, *, capital_frequency: int, capital_relation: str) -> bool:
  words = re.findall(r"\w+(?:['’-]\w+)*", text)
  return _compared(sum(word.isupper() for word in words), capital_relation, capital_frequency)


# Those of case do not look at the language, which IFEval's program also wants to be English.
CHECKS: dict[str, Callable[..., bool]] = {
    'keywords:existence': _has_keywords,
    'keywords:frequency': _keyword_frequency,
    'keywords:forbidden_words': _forbids,
    'keywords:letter_frequency': _letter_frequency,
    'length_constraints:number_sentences': _number_sentences,
    'length_constraints:number_words': _number_words,
    'length_constraints:number_paragraphs': _number_paragraphs,
    'length_constraints:nth_paragraph_first_word': _first_word_of_paragraph,
    'detectable_content:number_placeholders': _placeholders,
    'detectable_content:postscript': _postscript,
    'detectable_format:number_bullet_lists': _bullets,
    'detectable_format:constrained_response': _constrained,
    'detectable_format:number_highlighted_sections': _highlights,
    'detectable_format:multiple_sections': _sections,
    'detectable_format:json_format': _is_json,
    'detectable_format:title': _has_title,
    'combination:two_responses': _two_responses,
    'combination:repeat_prompt': _repeats_prompt,
    'startend:end_checker': _ends,
    'startend:quotation': _is_quoted,
    'change_case:english_capital': str.isupper,
    'change_case:english_lowercase': str.islower,
    'change_case:capital_word_frequency': _capital_words,
    'punctuation:no_comma': lambda text: ',' not in text,
}
