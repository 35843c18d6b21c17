"""What devices send one another in a step: read from the compiled program, counted in bytes.

Sizes are those of ring algorithms (Thakur et al. 2005; Patarasuk and Yuan 2009), which no algorithm
undercuts: with n devices in a group, an all-reduce of an array sends 2 (n-1)/n of it from each
device, an all-gather or reduce-scatter (n-1)/n of the whole array.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from adapters_jax.training.hlo import Instruction, Program, arrays, elements

KINDS = (
    *('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all'),
    *('collective-permute', 'collective-broadcast'),
)
Groups = tuple[tuple[int, ...], ...]

# Arguments of a step by what they are called there, in words; also of the forward pass.
ARGUMENTS = {
    'frozen': 'frozen weights',
    'trainable': 'trained weights',
    'opt_state': 'optimiser state',
    'batch': 'batch',
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
        kind: one of `KINDS`.
        size: bytes of the whole array (of all arrays, where several go together): of the result of
            an all-gather, of the operand of a reduce-scatter, of either for the others.
        groups: the devices that exchange among one another, by their number in the mesh.
        times: how often it runs in one step.
        sure: whether that is known; inside a loop of unknown length `times` is for one pass.
        sources: the arguments of the program that it moves unchanged, if it does.
        op_name: the operation of the traced program that it belongs to.
    """

    kind: str
    size: int
    groups: Groups
    times: int = 1
    sure: bool = True
    sources: frozenset[str] = frozenset()
    op_name: str = ''

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, and receives."""
        n = max(map(len, self.groups), default=1)
        if n == 1:
            return 0.0
        factor = {'all-reduce': 2 * (n - 1) / n}.get(self.kind, (n - 1) / n)
        whole = self.kind in ('collective-permute', 'collective-broadcast')
        return self.times * self.size * (1.0 if whole else factor)

    def purpose(self, other: str = 'update') -> str:
        """Return what it is for, as far as the program tells; `other` is what it does not name."""
        names = {re.split(r'[\[.]', source)[0] for source in self.sources}
        known = sorted(ARGUMENTS[name] for name in names if name in ARGUMENTS)
        if known:
            return ' and '.join(known)
        if 'transpose(' in self.op_name:
            return 'backward pass'
        return 'forward pass' if 'jvp(' in self.op_name else other

    def axes(self, shape: Mapping[str, int]) -> tuple[str, ...]:
        """Return the axes of a mesh of this shape along which the devices of a group differ."""
        places = np.array(
            np.unravel_index(np.arange(math.prod(shape.values())), (*shape.values(),))
        )
        varies = [
            any(len(set(places[i, list(group)])) > 1 for group in self.groups)
            for i in range(len(shape))
        ]
        return tuple(itertools.compress(shape, varies))


def read(text: str) -> list[Collective]:
    """Return the collectives of a program, given as `compiled.as_text()`; each pair once.

    Raises:
        ValueError: a text that is no compiled program, or groups in an unknown notation.
    """
    program = Program(text)
    return [
        _collective(program, computation, instruction, times, sure)
        for computation, instruction, times, sure in program.executed()
        if instruction.opcode.removesuffix('-start') in KINDS
    ]


def _collective(
    program: Program, computation: str, found: Instruction, times: int, sure: bool
) -> Collective:
    kind = found.opcode.removesuffix('-start')
    if _is_scatter(program, computation):
        kind = 'reduce-scatter'
    groups = (
        _pairs(found.attributes)
        if kind == 'collective-permute'
        else read_groups(found.attributes, program.devices)
    )
    size = sum(array.bytes for array in arrays(_result(program, computation, found)))
    if found.opcode.startswith('reduce-scatter'):
        size *= max(map(len, groups), default=1)
    sources = [program.sources(computation, operand) for operand in found.operands]
    moved = frozenset().union(*sources) if all(sources) else frozenset()
    return Collective(kind, size, groups, times, sure, moved, found.op_name)


def _is_scatter(program: Program, computation: str) -> bool:
    """Tell whether a computation is a reduce-scatter that TPUs write as a fused all-reduce."""
    return computation.startswith('all-reduce-scatter') and computation != program.entry


def _result(program: Program, computation: str, found: Instruction) -> str:
    """Return the type of what a collective leaves; the type of a -start has its operands, too."""
    if not found.opcode.endswith('-start'):
        return found.type
    for other in program.computations[computation].values():
        if other.opcode == found.opcode.replace('-start', '-done') and found.name in other.operands:
            return other.type
    parts = elements(found.type)
    return parts[1] if len(parts) > 1 else found.type


def _pairs(attributes: str) -> Groups:
    """Return who sends to whom; what stays on a device is not sent."""
    found = re.search(r'source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}', attributes)
    pairs = re.findall(r'\{(\d+),(\d+)\}', found[1]) if found else []
    return tuple((int(a), int(b)) for a, b in pairs if a != b)


def read_groups(attributes: str, devices: int) -> Groups:
    """Return the groups of devices that an instruction's attributes name.

    There are three notations: {{0,1},{2,3}}, {} for all; [2,4]<=[4,2]T(1,0), numbers in order laid
    out and turned; and mesh['a'=2,'b'=4] {'b'}, groups along axes or parts of axes.

    Raises:
        ValueError: another one.
    """
    found = re.search(r'replica_groups=(.*)', attributes)
    text = found[1] if found else '{}'
    if listed := re.match(r'\{((?:\{[\d,]*\},?)*)\}', text):
        groups = re.findall(r'\{([\d,]+)\}', listed[1])
        return tuple(tuple(map(int, g.split(','))) for g in groups) or (tuple(range(devices)),)
    if numbered := re.match(rf'\[(\d+),(\d+)\]<=({_ORDER})', text):
        order = _order(numbered[3])
        return _as_groups(order.reshape(int(numbered[1]), int(numbered[2])))
    if along := re.match(
        rf'mesh\[([^\]]*)\](?:, device_ids=\(({_ORDER})\))? ?\{{([^}}]*)\}}', text
    ):
        return _along(along[1], along[2], along[3])
    raise ValueError(f'replica_groups={text[:60]} is in a notation that is not known here')


_ORDER = r'\[[\d,]+\](?:T\([\d,]+\))?'


def _order(text: str) -> np.ndarray:
    """Return the numbers of devices that [4,2]T(1,0) stands for, in one row."""
    sizes, _, turned = text.partition('T')
    numbers = _integers(sizes)
    order = np.arange(math.prod(numbers)).reshape(numbers)
    return order.transpose(_integers(turned)).ravel() if turned else order.ravel()


def _along(axes: str, order: str | None, chosen: str) -> Groups:
    """Return the groups along the chosen axes of a mesh; 'a':(2)4 is 4 of axis a, after 2 of it."""
    sizes = {name.strip("'"): int(size) for name, size in re.findall(r"('?[\w.]+'?)=(\d+)", axes)}
    parts: list[tuple[int, bool]] = []  # the axes, cut where only a part is meant
    wanted = {
        name.strip("'"): (int(before or 1), int(size or 0))
        for name, before, size in re.findall(r"('?[\w.]+'?)(?::\((\d+)\)(\d+))?", chosen)
    }
    for name, whole in sizes.items():
        before, size = wanted.get(name, (whole, 1))
        size = size or whole
        parts += [(before, False), (size, name in wanted), (whole // before // size, False)]
    grid = np.arange(math.prod(sizes.values())) if order is None else _order(order)
    grid = grid.reshape([size for size, _ in parts])
    inner = [i for i, (_, chosen_) in enumerate(parts) if chosen_]
    outer = [i for i in range(len(parts)) if i not in inner]
    members = math.prod(parts[i][0] for i in inner)
    return _as_groups(grid.transpose(outer + inner).reshape(-1, members))


def _integers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r'\d+', text)]


def _as_groups(rows: np.ndarray) -> Groups:
    return tuple(tuple(map(int, row)) for row in rows)


def total(found: Iterable[Collective]) -> float:
    """Return the bytes that a device sends in a step."""
    return sum(collective.sent for collective in found)


def summarise(
    found: Sequence[Collective], shape: Mapping[str, int], other: str = 'update'
) -> list[dict[str, str | int | float | bool]]:
    """Return one row for each kind, axes of the mesh and purpose: how many, and bytes sent.

    The most expensive come first. `other` as in `Collective.purpose`.
    """
    rows: dict[tuple[str, str, str], list[Collective]] = {}
    for one in found:
        key = one.kind, '+'.join(one.axes(shape)) or 'none', one.purpose(other)
        rows.setdefault(key, []).append(one)
    summary = [
        {
            'kind': kind,
            'axes': axes,
            'for': purpose,
            'count': sum(one.times for one in members),
            'bytes': total(members),
            'sure': all(one.sure for one in members),
        }
        for (kind, axes, purpose), members in rows.items()
    ]
    return sorted(summary, key=lambda row: (-row['bytes'], row['kind'], row['axes'], row['for']))
