"""How several adapters act together, as a value: an expression tree over their names.

`Stack` runs adapters one after another (MAD-X), `Fuse` mixes them by attention (AdapterFusion),
`Split` gives each a part of the sequence, `BatchSplit` a part of the batch, `Parallel` a copy of
the input, and `Average` mixes what they return with fixed weights. The tree holds names only; the
blocks and what may stand inside of each are those of the `adapters` library.
"""

import ast
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

_BARE = re.compile(r'[\w@.+/-]+')
_TOKEN = re.compile(
    r"""\s*(?:([\w@.+/-]+)|([(),=\[\]])|('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"))""", re.DOTALL
)


@dataclasses.dataclass(frozen=True, init=False)
class Composition:
    """The base of all blocks; `children` are names of adapters or other blocks, in order.

    Raises:
        ValueError: no children, a name that is none, or a block that may not stand in this one.
    """

    kind: ClassVar[str]  # as `parse` reads and `str` writes it
    allowed: ClassVar[tuple[str, ...]]  # the kinds of block that may stand inside

    children: 'tuple[str | Composition, ...]'

    def __init__(self, *children: 'str | Composition') -> None:
        object.__setattr__(self, 'children', tuple(children))
        self._require(bool(children), 'has no adapters; give at least one')
        for child in children:
            self._check_child(child)

    def _check_child(self, child: Any) -> None:
        if isinstance(child, Composition):
            supported = ', '.join(('a name', *self.allowed))
            self._require(
                child.kind in self.allowed,
                f'may not hold {child.kind}(...); supported inside of it: {supported}',
            )
        else:
            self._require(
                isinstance(child, str) and bool(child),
                f'holds {child!r}, which is neither the name of an adapter nor a block',
            )

    def _require(self, condition: bool, sentence: str) -> None:
        if not condition:
            raise ValueError(f'{self.kind} {sentence}')

    def options(self) -> dict[str, list[Any]]:
        """Return what the block says beside its children, as JSON values."""
        return {}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters of the whole tree, each once, in the order in which they are written."""
        return tuple(dict.fromkeys(_names(self)))

    def __str__(self) -> str:
        """Write the tree as `parse` reads it."""
        parts = [_quoted(child) for child in self.children]
        parts += [f'{name}=[{", ".join(map(repr, v))}]' for name, v in self.options().items()]
        return f'{self.kind}({", ".join(parts)})'


@dataclasses.dataclass(frozen=True, init=False)
class Stack(Composition):
    """One after another, each on what the one before it returned (Pfeiffer et al. 2020)."""

    kind = 'stack'
    allowed = ('fuse', 'split', 'parallel', 'batch_split', 'average')


@dataclasses.dataclass(frozen=True, init=False)
class Fuse(Composition):
    """All on the same input, mixed by an attention over their outputs (Pfeiffer et al. 2021)."""

    kind = 'fuse'
    allowed = ('stack',)

    @property
    def fusion(self) -> str:
        """The name of the attention's parameters: each child's last adapter, joined by commas."""
        return ','.join(last(child) for child in self.children)


@dataclasses.dataclass(frozen=True, init=False)
class Parallel(Composition):
    """Each on a copy of the input, with a result of its own (Rücklé et al. 2021, section 2)."""

    kind = 'parallel'
    allowed = ('stack', 'batch_split', 'average')


@dataclasses.dataclass(frozen=True, init=False)
class Split(Composition):
    """Each on a part of the sequence: `splits` are the parts' lengths in tokens, or one for all."""

    kind = 'split'
    allowed = ('split', 'stack', 'batch_split', 'average')

    splits: tuple[int, ...]

    def __init__(self, *children: str | Composition, splits: Sequence[int] | int) -> None:
        super().__init__(*children)
        object.__setattr__(self, 'splits', _counts(self, 'splits', splits, least=1))

    def options(self) -> dict[str, list[Any]]:
        """Return the lengths."""
        return {'splits': list(self.splits)}


@dataclasses.dataclass(frozen=True, init=False)
class BatchSplit(Composition):
    """Each on a part of the batch: `batch_sizes` are the parts' rows, or one number for all."""

    kind = 'batch_split'
    allowed = ('stack', 'split', 'batch_split', 'average')

    batch_sizes: tuple[int, ...]

    def __init__(self, *children: str | Composition, batch_sizes: Sequence[int] | int) -> None:
        super().__init__(*children)
        object.__setattr__(self, 'batch_sizes', _counts(self, 'batch_sizes', batch_sizes, least=0))

    def options(self) -> dict[str, list[Any]]:
        """Return the numbers of rows."""
        return {'batch_sizes': list(self.batch_sizes)}


@dataclasses.dataclass(frozen=True, init=False)
class Average(Composition):
    """The weighted mean of what they return; `weights` are normalised to a sum of 1."""

    kind = 'average'
    allowed = ('stack', 'split', 'batch_split')

    weights: tuple[float, ...]

    def __init__(
        self, *children: str | Composition, weights: Sequence[float] | None = None
    ) -> None:
        super().__init__(*children)
        given = [1.0] * len(children) if weights is None else weights
        object.__setattr__(self, 'weights', _normalised(self, given))

    def options(self) -> dict[str, list[Any]]:
        """Return the weights."""
        return {'weights': list(self.weights)}


BLOCKS: dict[str, type[Composition]] = {
    cls.kind: cls for cls in (Stack, Fuse, Split, BatchSplit, Parallel, Average)
}


def last(node: str | Composition) -> str:
    """Return the adapter that acts last: the one whose head a block is used with."""
    return node if isinstance(node, str) else last(node.children[-1])


def parse(text: str) -> Composition:
    """Return the tree that `text` writes: `stack(lang_en, fuse(sst2, mnli))`; a name is a stack.

    Options follow the children: `split(a, b, splits=[64, 32])`, `average(a, b, weights=[1, 3])`.
    A name with other characters than letters, digits and `_@.+/-` stands in quotes.

    Raises:
        ValueError: text that writes no tree, or a tree that is not supported.
    """
    tokens = _Tokens(text)
    node = _parse_node(tokens)
    tokens.expect('')
    return node if isinstance(node, Composition) else Stack(node)


def _names(node: str | Composition) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    else:
        for child in node.children:
            yield from _names(child)


def _quoted(child: str | Composition) -> str:
    bare = isinstance(child, Composition) or _BARE.fullmatch(child)
    return str(child) if bare else repr(child)


def _counts(owner: Composition, name: str, values: Any, least: int) -> tuple[int, ...]:
    counts = (values,) * len(owner.children) if type(values) is int else values
    owner._require(
        isinstance(counts, list | tuple)
        and len(counts) == len(owner.children)
        and all(type(count) is int and count >= least for count in counts),
        f'has {name}={values!r}; expected {len(owner.children)} whole numbers of {least} or more, '
        'one for each child',
    )
    return tuple(counts)


def _normalised(owner: Composition, weights: Any) -> tuple[float, ...]:
    valid = (
        isinstance(weights, list | tuple)
        and len(weights) == len(owner.children)
        and all(type(weight) in (int, float) and math.isfinite(weight) for weight in weights)
    )
    total = math.fsum(weights) if valid else 0.0
    owner._require(
        valid and total != 0,
        f'has weights={weights!r}; expected {len(owner.children)} numbers, one for each child, '
        'whose sum is not 0',
    )
    # As they are where they sum to 1 but for rounding: what was written comes back to the bit.
    if math.isclose(total, 1.0, rel_tol=1e-12):
        return tuple(float(weight) for weight in weights)
    return tuple(weight / total for weight in weights)


class _Token(NamedTuple):
    text: str
    kind: str  # 'name', 'mark' or 'quoted'; '' at the end


class _Tokens:
    """The words and marks of a text, one after another."""

    def __init__(self, text: str) -> None:
        self.text, self._at = text, 0
        self.next = self._read()

    def _read(self) -> _Token:
        match = _TOKEN.match(self.text, self._at)
        if match is None:
            rest = self.text[self._at :].strip()
            if rest:
                raise ValueError(
                    f'{self.text!r} has {rest[0]!r} where a name or a block is expected'
                )
            return _Token('', '')
        self._at = match.end()
        return _Token(match[match.lastindex], ('name', 'mark', 'quoted')[match.lastindex - 1])

    def take(self) -> _Token:
        token, self.next = self.next, self._read()
        return token

    def expect(self, mark: str) -> None:
        """Take the next token, which must be this mark ('' for the end)."""
        if self.next != _Token(mark, 'mark' if mark else ''):
            raise ValueError(
                f'{self.text!r} has {self.next.text or "its end"!r} where '
                f'{mark or "its end"!r} is expected'
            )
        if mark:
            self.take()


def _parse_node(tokens: _Tokens) -> str | Composition:
    token = tokens.take()
    if token.kind == 'quoted':
        return ast.literal_eval(token.text)
    if token.kind != 'name':
        raise ValueError(
            f'{tokens.text!r} has {token.text or "its end"!r} where a name or a block is expected'
        )
    if tokens.next != _Token('(', 'mark'):
        return token.text
    if token.text not in BLOCKS:
        raise ValueError(
            f'{tokens.text!r} has the unknown block {token.text!r}; known: {", ".join(BLOCKS)}'
        )
    children, options = _parse_arguments(tokens)
    cls = BLOCKS[token.text]
    known = {f.name for f in dataclasses.fields(cls)} - {'children'}
    if not options.keys() <= known or (cls in (Split, BatchSplit) and not options):
        raise ValueError(
            f'{token.text} in {tokens.text!r} has the options {", ".join(options) or "none"}; '
            f'expected {", ".join(known) or "none"}'
        )
    return cls(*children, **options)


def _parse_arguments(tokens: _Tokens) -> tuple[list[str | Composition], dict[str, Any]]:
    """Take what stands between a block's parentheses, and these."""
    children: list[str | Composition] = []
    options: dict[str, Any] = {}
    tokens.expect('(')
    while True:
        node = _parse_node(tokens)
        if isinstance(node, str) and tokens.next == _Token('=', 'mark'):
            tokens.take()
            options[node] = _parse_numbers(tokens)
        elif options:
            raise ValueError(f'{tokens.text!r} has {node} after an option; children come first')
        else:
            children.append(node)
        if tokens.next == _Token(')', 'mark'):
            tokens.take()
            return children, options
        tokens.expect(',')


def _parse_numbers(tokens: _Tokens) -> Any:
    if tokens.next != _Token('[', 'mark'):
        return _number(tokens)
    tokens.take()
    numbers = [_number(tokens)]
    while tokens.next != _Token(']', 'mark'):
        tokens.expect(',')
        numbers.append(_number(tokens))
    tokens.take()
    return numbers


def _number(tokens: _Tokens) -> int | float:
    token = tokens.take()
    for kind in (int, float):
        try:
            return kind(token.text)
        except ValueError:
            continue
    raise ValueError(f'{tokens.text!r} has {token.text!r} where a number is expected')
