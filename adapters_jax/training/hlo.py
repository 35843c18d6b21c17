"""The text of a compiled program as instructions: who calls whom, how often, and on whose data.

XLA offers no stable way to ask a compiled program what it does, but prints it in one form for every
platform. Only what that form says of data flow is read here; `collectives` says what it means.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

_CALLED = re.compile(
    r'\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([^,\s]+)'
)
_BRANCHES = re.compile(r'\b(?:branch|called)_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_ARRAY = re.compile(r'\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]')
# What hands its operand on, in another place, form or number format.
_MOVES = {
    *('bitcast', 'convert', 'copy', 'copy-start', 'copy-done', 'optimization-barrier', 'reshape'),
    *('transpose', 'slice', 'dynamic-slice', 'all-gather', 'all-gather-start', 'all-gather-done'),
}
_ASYNC_ENDS = ('async-update', 'async-done')  # name the computation that async-start has begun


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of an array as one device holds it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What it takes, packed; nothing for what is no array of numbers (token, opaque)."""
        found = re.match(r'(?:pred$|[a-z]+(\d+))', self.dtype)
        bits = int(found[1] or 8) if found else 0
        return -(-functools.reduce(int.__mul__, self.shape, 1) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program: `name = type opcode(operands), attributes`."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    argument: str  # what stands between the parentheses of the opcode
    attributes: str

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its result, those of a tuple in order."""
        return arrays(self.type)

    @property
    def op_name(self) -> str:
        """The operation of the traced program that it stems from, or the argument's name."""
        found = _OP_NAME.search(self.attributes)
        return found[1].replace("\\'", "'").replace('\\"', '"') if found else ''

    @property
    def called(self) -> list[tuple[str, str]]:
        """What it calls: (as what, the computation's name)."""
        named = [(role, name.lstrip('%')) for role, name in _CALLED.findall(self.attributes)]
        for branches in _BRANCHES.findall(self.attributes):
            named += [('branch', name.strip().lstrip('%')) for name in branches.split(',')]
        return [] if self.opcode in _ASYNC_ENDS else named

    @property
    def trips(self) -> int | None:
        """How often a loop runs, where the compiler knows it."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None


def arrays(type_: str) -> tuple[Array, ...]:
    """Return the arrays that a type names, in order."""
    return tuple(
        Array(dtype, tuple(int(size.lstrip('<=')) for size in shape.split(',') if size))
        for dtype, shape in _ARRAY.findall(type_)
    )


def elements(type_: str) -> list[str]:
    """Return the types in a tuple's type; a type that is no tuple is its own single element."""
    if not type_.startswith('('):
        return [type_]
    found, depth, start = [], 0, 1
    for place, letter in enumerate(type_):
        depth += (letter in '([{') - (letter in ')]}')
        if (letter == ',' and depth == 1) or (letter == ')' and depth == 0):
            found.append(re.sub(r'/\*.*?\*/', '', type_[start:place]).strip())
            start = place + 1
    return found


class Program:
    """A compiled program: computations of instructions, of which one is the entry."""

    def __init__(self, text: str) -> None:
        """Read what `compiled.as_text()` returns.

        Raises:
            ValueError: a text without an entry computation.
        """
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ''
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            header = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
            if header:
                current = self.computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif instruction := _read(line):
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError('the text has no ENTRY computation; expected a compiled HLO module')
        sizes = [
            re.search(rf'\b{name}=(\d+)', text) for name in ('replica_count', 'num_partitions')
        ]
        self.devices = functools.reduce(int.__mul__, (int(s[1]) for s in sizes if s), 1)
        self._callers = {
            called: (name, instruction)
            for name, computation in self.computations.items()
            for instruction in computation.values()
            for _, called in instruction.called
        }

    def executed(self) -> Iterator[tuple[str, Instruction, int, bool]]:
        """Yield each instruction with its computation, how often it runs, and whether that is sure.

        Not sure is the number inside a loop of unknown length, of which one pass is counted. Of a
        conditional every branch is.
        """
        yield from self._executed(self.entry, 1, True)

    def _executed(self, name: str, times: int, sure: bool) -> Iterator[Any]:
        for instruction in self.computations[name].values():
            yield name, instruction, times, sure
            loop = instruction.opcode == 'while'
            trips = instruction.trips if loop else 1
            for _, called in instruction.called:
                yield from self._executed(called, times * (trips or 1), sure and trips is not None)

    def sources(self, computation: str, name: str, path: tuple[int, ...] = ()) -> set[str]:
        """Return the arguments of the program that a value is, where it is nothing else.

        Followed are operations that move numbers and do not change them; what a loop carries is
        taken for what it began with. `path` are the indices of the value within a tuple.
        """
        found = self.computations[computation].get(name)
        if found is None:
            return set()
        if found.opcode == 'parameter':
            return self._argument(computation, found, path)
        if found.opcode == 'get-tuple-element':
            index = int(re.search(r'\bindex=(\d+)', found.attributes)[1])
            return self.sources(computation, found.operands[0], (index, *path))
        if found.opcode == 'tuple' and path:
            return self.sources(computation, found.operands[path[0]], path[1:])
        if found.opcode in _MOVES:
            path = () if found.opcode.endswith('-done') else path
            return self.sources(computation, found.operands[0], path)
        if found.opcode in ('fusion', 'call'):
            return self._within(dict(found.called).popitem()[1], path)
        return set()

    def _within(self, called: str, path: tuple[int, ...]) -> set[str]:
        root = list(self.computations[called].values())[-1]
        return self.sources(called, root.name, path)

    def _argument(
        self, computation: str, parameter: Instruction, path: tuple[int, ...]
    ) -> set[str]:
        if computation == self.entry:
            return {parameter.op_name or parameter.name}
        caller, call = self._callers[computation]
        operand = call.operands[int(parameter.argument)]
        return self.sources(caller, operand, path)


def _read(line: str) -> Instruction | None:
    found = re.match(r'\s+(?:ROOT )?%?([\w.\-]+) = (.*)', line)
    if not found:
        return None
    type_, rest = _split_type(found[2])
    opcode = re.match(r'([\w\-]+)\(', rest)
    if not opcode:
        return None
    end = _closing(rest, opcode.end() - 1)
    inside, attributes = rest[opcode.end() : end], rest[end + 1 :]
    operands = tuple(re.findall(r'%([\w.\-]+)', inside))
    return Instruction(found[1], type_, opcode[1], operands, inside, attributes)


def _split_type(text: str) -> tuple[str, str]:
    if text.startswith('('):
        end = _closing(text, 0) + 1
        return text[:end], text[end:].lstrip()
    type_, _, rest = text.partition(' ')
    return type_, rest


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == '(') - (text[place] == ')')
        if depth == 0:
            return place
    raise ValueError(f'the parentheses of {text[:80]!r} do not match')
