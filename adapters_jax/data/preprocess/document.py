"""A text as the steps of a chain hand it on: with its words and their tags, once it has any.

Tags belong to words, and later steps change words or take them away. So a tagged text carries the
places of its words along, and every step keeps tags and words together; a text without tags is
nothing but its letters, and what its words are is asked of it when somebody needs to know.
"""

import dataclasses
from collections.abc import Callable, Sequence

import regex

# Letters, their marks and digits; the two joiners stand inside of Persian and Indic words.
_RUN = r'[\p{L}\p{M}\p{N}_\u200c\u200d]+'
_WORDS = regex.compile(
    # "U.S." is a word, and "don't", and "3.5"; whatever else is visible stands for itself, an emoji
    # with all that is joined to it.
    rf"(?:\p{{L}}\p{{M}}*\.){{2,}}|{_RUN}(?:['’]{_RUN}|(?<=\p{{N}})[.,](?=\p{{N}}){_RUN})*|(?![\s\p{{Cc}}])\X"
)

Span = tuple[int, int]


def find_words(text: str) -> tuple[Span, ...]:
    """Begin and end of each word: letters and digits on end, an abbreviation, or a single sign.

    In a script without spaces between words a whole run is one word.
    """
    return tuple(match.span() for match in _WORDS.finditer(text))


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, and of a tagged one the words: where they are, and a tag for each.

    spans: begin and end of each word; None for a text that is not tagged.
    """

    text: str
    spans: tuple[Span, ...] | None = None
    tags: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[Span, ...]:
        """Begin and end of each word, whether the text is tagged or not."""
        return find_words(self.text) if self.spans is None else self.spans

    @property
    def words(self) -> list[str]:
        """The words in their order."""
        return [self.text[begin:end] for begin, end in self.places]

    def preceded(self, prefix: str) -> 'Document':
        """The text behind another one, whose words are none of its own."""
        moved = tuple((begin + len(prefix), end + len(prefix)) for begin, end in self.spans or ())
        return Document(prefix + self.text, None if self.spans is None else moved, self.tags)

    def tagged(self, tags: Sequence[str]) -> 'Document':
        """The same text with a tag for each of its words."""
        return Document(self.text, self.places, tuple(tags))

    def mapped(self, change: Callable[[str], str]) -> 'Document':
        """The text after a change of its letters; of a tagged one, word by word."""
        if self.spans is None:
            return Document(change(self.text))
        parts = [(change(gap), change(word)) for gap, word in self._parts()]
        return _joined(parts, change(self._tail()), self.tags)

    def filtered(self, keep: Sequence[bool]) -> 'Document':
        """The text with only those of its words for which `keep` holds, and one space for each gap
        that is left where a word was."""
        parts, gap, gone = [], '', False
        for (before, word), kept in zip(self._parts(), keep, strict=True):
            gap += before
            if not kept:
                gone = True
                continue
            if gone:
                gap = ' ' if gap and parts else ''
            parts.append((gap, word))
            gap, gone = '', False
        tags = [tag for tag, kept in zip(self.tags, keep, strict=False) if kept]
        found = _joined(parts, '' if gone else self._tail(), tags)
        return Document(found.text) if self.spans is None else found

    def _parts(self) -> list[tuple[str, str]]:
        """Return each word with what stands between it and the one before."""
        parts, last = [], 0
        for begin, end in self.places:
            parts.append((self.text[last:begin], self.text[begin:end]))
            last = end
        return parts

    def _tail(self) -> str:
        places = self.places
        return self.text[places[-1][1] :] if places else self.text


def _joined(parts: Sequence[tuple[str, str]], tail: str, tags: Sequence[str]) -> Document:
    spans, length = [], 0
    for gap, word in parts:
        begin = length + len(gap)
        length = begin + len(word)
        spans.append((begin, length))
    text = ''.join(gap + word for gap, word in parts) + tail
    return Document(text, tuple(spans), tuple(tags))
