"""Reads files with a word a line (CoNLL columns, CoNLL-U), and keeps what stands around the tags.

Such files are laid out in as many ways as there are corpora. How the lines are divided is found out
from all of them, not from the first, and each mistake is told with its line. Of each sentence the
text between the tags is kept as it is, comments, other columns and line ends included, so that the
file with other tags in it can be written without knowing any of this.
"""

import collections
import dataclasses
import pathlib
import re
from collections.abc import Sequence

from adapters_jax.data import text_files

FIELDS = ('ID', 'FORM', 'LEMMA', 'UPOS', 'XPOS', 'FEATS', 'HEAD', 'DEPREL', 'DEPS', 'MISC')
OPTIONAL = ('FEATS', 'DEPS', 'MISC')  # where _ says that there is nothing, not that it is unknown
BLANKS = ' \t\r\ufeff'  # of a line that ends a sentence; joined files have byte order marks inside

_COMMENT = re.compile(r'#\s*(id\s|new(doc|par)\b|[\w.:-]+(\s[\w.:-]+)?\s+=)')
_FULL = re.compile(r'[^ \t]+')
_ID = re.compile(
    r'\d+([-.]\d+)?'
)  # 3, 3-4 (a token of two words), 3.1 (a word that is not written)

Cells = list[tuple[int, int]]  # where the columns of a line begin and end


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A sentence of W words.

    tags: None where there is no such column; '' where a tag is not known. frame: [W + 1], the text
        of the file between the tags. line: the number of the line that the frame begins in.
    """

    words: list[str]
    tags: list[str] | None
    frame: list[str]
    line: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a file is to be read.

    word, tag: names of `FIELDS` (CoNLL-U) or positions from 0, from the end if below 0; '' for FORM
        and UPOS, of other files for the first and the last column.
    delimiter: what stands between columns; '' for blanks or tabs, whichever fits every line.
    labelled: whether a missing column of tags is an error.
    """

    encoding: str = 'utf-8-sig'
    word: str | int = ''
    tag: str | int = ''
    delimiter: str = ''
    labelled: bool = True


def read(path: pathlib.Path, layout: Layout) -> list[Sentence]:
    """The sentences of a file. Raises ValueError naming the file and the line of a mistake."""
    lines = text_files.read_lines(path, layout.encoding)
    table = _Table(path, lines, layout)
    words = _word_lines(table)
    return [_sentence(table, words, block) for block in _blocks(table, words)]


class _Table:
    """A file's lines, once it is known how they are divided and which columns are wanted."""

    def __init__(self, path: pathlib.Path, lines: Sequence[str], layout: Layout):
        self.path, self.lines, self.layout = path, lines, layout
        # A line that begins with # may be a comment or a word, so it does not help to find out.
        sure = [n for n, line in enumerate(lines) if not _is_blank(line) and line[0] != '#']
        sure = [n for n in sure if not _is_boundary(lines[n])]
        if not sure:
            raise ValueError(f'{path} has no words; it must hold at least one sentence.')
        self.universal = '.conllu' in path.suffixes or _looks_universal(lines[sure[0]])
        self.divider, self.width = self._divided(sure)
        for number in sure:
            self.check(number)
        self.word = self._column(layout.word, 'text_a', 'FORM', 0)
        alone = layout.tag == '' and self.width == 1
        self.tag = 1 if alone else self._column(layout.tag, 'label', 'UPOS', -1)
        self._check_columns(sure[0])

    def at(self, number: int) -> str:
        """The place of a line, for messages."""
        return f'{self.path}, line {number + 1}'

    def _divided(self, sure: Sequence[int]) -> tuple['_Divider', int]:
        """How lines are divided, and into how many columns: equally many in most lines."""
        if self.universal:
            return _Divider('\t'), len(FIELDS)
        delimiters = [self.layout.delimiter] if self.layout.delimiter else ['', '\t']
        ways = [_Divider(delimiter) for delimiter in delimiters]
        counts = [collections.Counter(way.count(self.lines[n]) for n in sure) for way in ways]
        widths = [count.most_common(1)[0] for count in counts]
        # Where nothing divides, all lines have one column: that says nothing for a delimiter.
        best = max(range(len(ways)), key=lambda i: (widths[i][0] > 1, widths[i][1]))
        return ways[best], widths[best][0]

    def check(self, number: int) -> None:
        """Refuse a line with another number of columns than the others."""
        line = self.lines[number]
        if '\r' in line.rstrip('\r'):
            raise ValueError(
                f'{self.at(number)}: a carriage return inside the line; save the file with line '
                'feeds, alone or behind carriage returns.'
            )
        found = self.divider.count(line)
        if found != self.width:
            others = 'CoNLL-U, divided by tabs, has' if self.universal else 'most other lines have'
            raise ValueError(
                f'{self.at(number)}: {_columns(found)}, where {others} {self.width}; mend the line '
                f'{line[:60]!r}, or set data.delimiter if it divides otherwise.'
            )
        key = line.partition('\t')[0]
        if self.universal and not _ID.fullmatch(key):
            raise ValueError(
                f'{self.at(number)}: the ID {key!r}; expected a number, or two with a hyphen (1-2) '
                'or a point (1.1) between them.'
            )

    def _column(self, given: str | int, key: str, name: str, place: int) -> int:
        """The number of the column that the config names."""
        if given == '':
            given = name if self.universal else place
        if self.universal and str(given).upper() in FIELDS:
            return FIELDS.index(str(given).upper())
        number = int(given) if re.fullmatch(r'-?\d+', str(given)) else None
        if number is not None and number < 0:
            number += self.width
        missing = self.layout.labelled or key != 'label'
        if number is None or number < 0 or (number >= self.width and missing):
            names = f'one of {", ".join(FIELDS)}, or ' if self.universal else ''
            raise ValueError(
                f'data.columns.{key} is {given!r}, but {self.path} has {_columns(self.width)}; '
                f'expected {names}a position from 0 to {self.width - 1}, or -1 for the last.'
            )
        return number

    def _check_columns(self, first: int) -> None:
        if self.tag >= self.width and self.layout.labelled:
            raise ValueError(
                f'{self.at(first)}: {_columns(self.width)}, here and on the other lines; expected '
                'a word and its tag, divided by a tab or a blank (else set data.delimiter).'
            )
        if self.word == self.tag:
            raise ValueError(
                f'{self.path}: words and tags are both to be column {self.word} of {self.width}; '
                'set data.columns.text_a and data.columns.label to two columns.'
            )


def _word_lines(table: _Table) -> list[bool]:
    """Whether each line is one of a word."""
    found: list[bool] = []
    inside = False  # a sentence, where CoNLL has no comments and # is a word
    for line in table.lines:
        found.append(not _is_blank(line) and _is_word(table, line, inside))
        inside = found[-1] or (inside and not _is_blank(line))
    return found


def _is_word(table: _Table, line: str, inside: bool) -> bool:
    if table.universal:
        return line.partition('\t')[0].isdecimal()
    if line[0] != '#' or inside:
        return not _is_boundary(line)
    return not _COMMENT.match(line) and table.divider.count(line) == table.width


def _blocks(table: _Table, words: Sequence[bool]) -> list[range]:
    """The lines of each sentence: what precedes it, its own, and the blank one after it."""
    ends, inside = [], False
    for number, line in enumerate(table.lines):
        inside = inside or words[number]
        if inside and _is_blank(line):
            ends.append(number + 1)
            inside = False
    if inside or not ends:
        ends.append(len(table.lines))
    ends[-1] = len(table.lines)  # with what comes after the last sentence
    return [range(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _sentence(table: _Table, is_word: Sequence[bool], block: range) -> Sentence:
    words, tags, frame, text = [], [], [], ''
    for number in block:
        line = table.lines[number]
        if is_word[number]:
            word, tag, before, line = _word(table, number)
            words.append(word)
            tags.append(tag)
            frame.append(text + before)
            text = ''
        text += line + ('\n' if number < len(table.lines) - 1 else '')
    known = tags if table.tag < table.width else None
    return Sentence(words, known, [*frame, text], block[0] + 1)


def _word(table: _Table, number: int) -> tuple[str, str, str, str]:
    """A line's word and tag, and what stands before and after the tag."""
    table.check(number)
    line = table.lines[number]
    cells = table.divider.cells(line)
    word = line[slice(*cells[table.word])]
    word = word.strip(' \t') or word
    if not word:
        raise ValueError(f'{table.at(number)}: the word is empty; give one or remove the line.')
    if table.tag >= table.width:
        body = line.rstrip('\r')
        blank = ' ' if table.width > 1 and '\t' not in body else '\t'
        return word, '', body + (table.layout.delimiter or blank), line[len(body) :]
    cell = line[slice(*cells[table.tag])]
    tag = cell.strip(' \t')
    begin = cells[table.tag][0] + cell.find(tag)
    if not tag:
        raise ValueError(f'{table.at(number)}: {word!r} has no tag; give it one.')
    known = tag != '_' or not table.universal or FIELDS[table.tag] in OPTIONAL
    return word, tag if known else '', line[:begin], line[begin + len(tag) :]


@dataclasses.dataclass(frozen=True)
class _Divider:
    """Divides lines at each delimiter; without one at runs of tabs and blanks."""

    delimiter: str

    def count(self, line: str) -> int:
        """How many columns a line has."""
        return line.count(self.delimiter) + 1 if self.delimiter else len(self.cells(line))

    def cells(self, line: str) -> Cells:
        """Where the columns of a line are."""
        line = line.rstrip('\r')
        if not self.delimiter:
            return [match.span() for match in _FULL.finditer(line)]
        found, begin = [], 0
        for part in line.split(self.delimiter):
            found.append((begin, begin + len(part)))
            begin += len(part) + len(self.delimiter)
        return found


def _is_blank(line: str) -> bool:
    return not line.strip(BLANKS)


def _is_boundary(line: str) -> bool:
    """Whether a line stands between two documents, as in CoNLL-2003."""
    return line.startswith('-DOCSTART-')


def _looks_universal(line: str) -> bool:
    cells = line.rstrip('\r').split('\t')
    return len(cells) == len(FIELDS) and _ID.fullmatch(cells[0]) is not None


def _columns(count: int) -> str:
    return f'{count} column' if count == 1 else f'{count} columns'
