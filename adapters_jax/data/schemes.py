"""How spans of words are written as a tag for each word: BIO, IOB1, IOBES and BILOU.

Data sets differ in this without saying so. Read leniently, as conlleval does, all of them tell
where spans are; written again in the scheme that they are in, they come out as they were. So a
scheme is recognised by writing, and each is converted into any other through the spans.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NONE = 'none'  # tags that are no spans, such as parts of speech
OUTSIDE = 'O'
UNKNOWN = ''  # of a word whose tag is not known

_TAG = re.compile(r'([BIESLU])(?:-(.+))?', re.DOTALL)
_BEGINS, _ENDS = 'BSU', 'ESLU'


class Letters(NamedTuple):
    """What stands before the types of a span's words; `single` is the only word of a span."""

    begin: str
    inside: str
    end: str
    single: str


SCHEMES = {
    'bio': Letters('B', 'I', 'I', 'B'),
    # Only a span that follows one of its own type begins with B (Ramshaw and Marcus 1995).
    'iob1': Letters('I', 'I', 'I', 'I'),
    'iobes': Letters('B', 'I', 'E', 'S'),
    'bilou': Letters('B', 'I', 'L', 'U'),
}
# What a head learns of each: of the same spans the form that does not depend on the neighbours.
LEARNED = {'bio': 'bio', 'iob1': 'bio', 'iobes': 'iobes', 'bilou': 'iobes', NONE: NONE}


class Span(NamedTuple):
    """The words from `first` to `last` and what they are; the type may be empty."""

    type: str
    first: int
    last: int


def spans(tags: Sequence[str]) -> list[Span]:
    """Return the spans of a sentence's tags, in order.

    A tag that continues nothing begins a span, as for conlleval (Tjong Kim Sang 2000).

    Raises:
        ValueError: a tag that is of no scheme.
    """
    found: list[Span] = []
    still_open = False
    for place, tag in enumerate(tags):
        if tag in (OUTSIDE, UNKNOWN):
            still_open = False
            continue
        letter, kind = _parsed(tag)
        if still_open and letter not in _BEGINS and found[-1].type == kind:
            found[-1] = found[-1]._replace(last=place)
        else:
            found.append(Span(kind, place, place))
        still_open = letter not in _ENDS
    return found


@functools.cache
def _parsed(tag: str) -> tuple[str, str]:
    match = _TAG.fullmatch(tag)
    if match is None:
        raise ValueError(
            f'the tag {tag!r} is of no scheme; expected {OUTSIDE}, B-TYPE, I-TYPE, ...'
        )
    return match[1], match[2] or ''


def tags_of(found: Iterable[Span], length: int, scheme: str) -> list[str]:
    """Return the tags of a sentence of `length` words with these spans, which do not overlap."""
    tags, letters = [OUTSIDE] * length, SCHEMES[scheme]
    before = Span('', -2, -2)
    for span in sorted(found, key=lambda span: span.first):
        adjacent = before.type == span.type and before.last == span.first - 1
        own = [letters.inside] * (span.last - span.first + 1)
        own[0], own[-1] = letters.begin, letters.end
        if len(own) == 1:
            own[0] = letters.single
        if scheme == 'iob1' and adjacent:
            own[0] = 'B'
        for place, letter in enumerate(own, span.first):
            tags[place] = _written(letter, span.type)
        before = span
    return tags


def _written(letter: str, kind: str) -> str:
    return f'{letter}-{kind}' if kind else letter


def convert(tags: Sequence[str], source: str, target: str) -> list[str]:
    """Return a sentence's tags in another scheme; what is not known stays so.

    Tags that are no spans come back as they are. Within one scheme what is not well-formed is
    mended: a span that begins with I- in BIO begins with B-.
    """
    if NONE in (source, target):
        return list(tags)
    new = tags_of(spans(tags), len(tags), target)
    return [UNKNOWN if tag == UNKNOWN else own for tag, own in zip(tags, new, strict=True)]


def respelt(tags: Sequence[str], source: str, target: str) -> list[str]:
    """Return predicted tags in another scheme, to score there as they did where that can be.

    Between IOBES and BILOU, which differ in letters alone, what is not well-formed stays so; else
    it is mended, as in `convert`.
    """
    letters = [SCHEMES[scheme] for scheme in (source, target) if scheme in SCHEMES]
    if [len(set(own)) for own in letters] != [4, 4]:
        return convert(tags, source, target)
    new = dict(zip(*letters, strict=True))
    return [new.get(tag[:1], tag[:1]) + tag[1:] for tag in tags]


def detect(sentences: Iterable[Sequence[str]]) -> str:
    """Return the scheme that the tags of all sentences are in; `NONE` where they are no spans.

    Of BIO and IOB1, which have the same letters, it is the one in which fewer tags are wrong.
    """
    sentences = [list(tags) for tags in sentences]
    different = set().union(*sentences) - {OUTSIDE, UNKNOWN}
    matches = [_TAG.fullmatch(tag) for tag in different]
    if None in matches:
        return NONE
    letters = {match[1] for match in matches}
    if letters <= set('BI'):
        return min(('bio', 'iob1'), key=lambda scheme: len(flaws(sentences, scheme)))
    if letters <= set('BIES'):
        return 'iobes'
    return 'bilou' if letters <= set('BILU') else NONE


def strays(sentences: Iterable[Sequence[str]]) -> list[tuple[int, int]]:
    """Return (sentence, word) of each tag that is of no scheme, where others name types of spans.

    A letter alone may be any tag; a letter, a hyphen and a type are a span's.
    """
    sentences = [list(tags) for tags in sentences]
    different = set().union(*sentences) - {OUTSIDE, UNKNOWN}
    known = {tag for tag in different if _TAG.fullmatch(tag)}
    if not any('-' in tag for tag in known):
        return []
    wrong = different - known
    return [
        (number, place)
        for number, tags in enumerate(sentences)
        for place, tag in enumerate(tags)
        if tag in wrong
    ]


def flaws(sentences: Iterable[Sequence[str]], scheme: str) -> list[tuple[int, int]]:
    """Return (sentence, word) of each tag that the scheme would write otherwise."""
    return [
        (number, place)
        for number, tags in enumerate(sentences)
        for place, new in enumerate(convert(tags, scheme, scheme))
        if tags[place] != new
    ]


def of_labels(tags: Iterable[str]) -> str:
    """Return which of the learned schemes has all these labels; `NONE` where none has."""
    tags = set(tags)
    if not all(tag == OUTSIDE or _TAG.fullmatch(tag) for tag in tags):
        return NONE
    types = {span.type for tag in tags for span in spans([tag])}
    known = dict.fromkeys(LEARNED.values())
    return next((s for s in known if s == NONE or tags <= set(labels(types, s))), NONE)


def labels(types: Iterable[str], scheme: str) -> list[str]:
    """Return every tag that spans of these types may have in a scheme."""
    letters = dict.fromkeys(SCHEMES[scheme])
    return [OUTSIDE] + [_written(letter, kind) for kind in sorted(types) for letter in letters]
