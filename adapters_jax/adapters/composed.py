"""Named adapters that act together as an expression says: a composition as a method.

The expression (`composition`) holds names; this gives each name its method, keeps their parameters
under their names, and those of AdapterFusion under `fusion`. Being a method, it is trained, stored,
routed and counted like any other.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import optax
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters import composition, fields, fusion
from adapters_jax.adapters.composition import Composition, Fuse, Parallel, Stack
from adapters_jax.adapters.fusion import PRESETS, FusionConfig
from adapters_jax.adapters.method import Inserted, Method, acts
from adapters_jax.adapters.union import Union, places
from adapters_jax.params import Rule, Tree, flatten
from adapters_jax.sites import SUB_LAYERS, Dimensions, Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Composed(Method):
    """Adapters by name, and the expression over them.

    Parameters: `{name: tree}` and, for each `fuse(a, b)`, `fusion/{a,b}/layer_{i}/{sub_layer}`.
    The `frozen_members` are not trained.
    """

    architecture: ClassVar[str] = 'composed'

    expression: str
    members: Mapping[str, Method]
    frozen_members: tuple[str, ...] = ()
    fusion: FusionConfig = PRESETS['dynamic']

    def __post_init__(self) -> None:
        """Check the expression, its names, and that each method supports the blocks around it."""
        tree = composition.parse(self.expression)
        object.__setattr__(self, 'expression', str(tree))
        object.__setattr__(self, 'members', fields.FrozenDict(self.members))
        taken = [name for name in self.members if _RESERVED.fullmatch(name)]
        self.require(not taken, f'a member is named {taken and taken[0]!r}; rename it')
        parted = [name for name in self.members if '/' in name]
        self.require(
            not parted,
            f"the member {parted and parted[0]!r} has a '/' in its name, which would be two names "
            "in a file; write it with a '-', say",
        )
        for name in tree.names:
            self.require(
                name in self.members,
                f'{self.expression} names {name!r}, which is not among {", ".join(self.members)}',
            )
        unused = sorted(set(self.members) - set(tree.names))
        self.require(not unused, f'{self.expression} does not use the adapters {unused}')
        strange = sorted(set(self.frozen_members) - set(self.members))
        self.require(not strange, f'frozen_members names {strange}, which are no members')
        # In one order, so that methods are equal which differ in that alone.
        frozen = tuple(name for name in tree.names if name in self.frozen_members)
        object.__setattr__(self, 'frozen_members', frozen)
        self._check_supported(tree, ())
        self._check_alone(tree)
        _check_parallel(tree, '')
        counts = sorted(
            {len(block.children) for block in blocks_of(tree) if block.kind == 'parallel'}
        )
        self.require(
            len(counts) <= 1,
            f'{tree} has parallel blocks of {" and of ".join(map(str, counts))} adapters; all '
            'copies of the batch are made at once, so give them the same number',
        )

    def _check_alone(self, tree: Composition) -> None:
        """Refuse what only one adapter of an expression can do."""
        inserting = [name for name in _leaves(tree) if self.members[name].inserted.count]
        self.require(
            len(inserting) <= 1,
            f'{", ".join(inserting)} each insert vectors into the text; keep one',
        )
        scheduled = [
            name
            for name in self._trained
            if any(acts(type(m), 'optimizer') for m in _parts(self.members[name]))
        ]
        self.require(
            len(scheduled) <= 1,
            f'{", ".join(scheduled)} each have a schedule of ranks; train one and name the others '
            'in frozen_members',
        )

    @property
    def _trained(self) -> tuple[str, ...]:
        return tuple(name for name in self.members if name not in self.frozen_members)

    def _check_supported(self, node: str | Composition, around: tuple[str, ...]) -> None:
        if isinstance(node, Composition):
            for child in node.children:
                self._check_supported(child, (*around, node.kind))
            return
        method = self.members[node]
        self.require(
            not isinstance(method, Composed),
            f'{node} is a composition itself ({getattr(method, "expression", "")}), which cannot '
            'stand in another one; give the adapters that it holds, and write its expression out',
        )
        self.require(
            bool(supported(method)),
            f'{node} ({method.architecture}) trains leaves of the backbone itself, of which there '
            'is one set for all adapters, so it cannot be composed; '
            'a bottleneck can with train_norms=False',
        )
        lacking = [kind for kind in around if kind not in supported(method)]
        self.require(
            not lacking,
            f'{node} ({method.architecture}) stands inside of {lacking and lacking[0]}(...), which '
            f'it does not support; supported: {", ".join(sorted(supported(method))) or "none"}',
        )

    @functools.cached_property
    def tree(self) -> Composition:
        """The expression as a tree of blocks."""
        return composition.parse(self.expression)

    @property
    def replicas(self) -> int:
        """How many copies of the batch `parallel` makes; 1 without one."""
        blocks = blocks_of(self.tree)
        return max((len(b.children) for b in blocks if isinstance(b, Parallel)), default=1)

    @property
    def divides(self) -> bool:
        """Whether the sequence or the batch is divided, or the batch copied, by numbers."""
        kinds = {block.kind for block in blocks_of(self.tree)}
        return bool(kinds & {'split', 'batch_split', 'parallel'})

    @property
    def stepwise(self) -> bool:
        """Whether every member is, and nothing is divided."""
        return not self.divides and all(member.stepwise for member in self.members.values())

    @property
    def packable(self) -> bool:
        """Whether every member is, and nothing is divided."""
        return not self.divides and all(member.packable for member in self.members.values())

    @property
    def inserted(self) -> Inserted:
        """What the one member inserts that does."""
        found = (m.inserted for m in self.members.values() if m.inserted.count)
        return next(found, Inserted())

    @property
    def reserved_positions(self) -> int:
        """What the members take together."""
        return sum(member.reserved_positions for member in self.members.values())

    @property
    def stores_constants(self) -> bool:
        """Whether a member does."""
        return any(member.stores_constants for member in self.members.values())

    @property
    def reads_trunk(self) -> bool:
        """Whether a member does."""
        return any(member.reads_trunk for member in self.members.values())

    @property
    def known_tags(self) -> int:
        """The most that a member knows."""
        return max(member.known_tags for member in self.members.values())

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen members, and what the others keep frozen of their own."""
        whole = [f'{re.escape(name)}/.*' for name in self.frozen_members]
        own = [f'{re.escape(n)}/{x}' for n, m in self.members.items() for x in m.frozen]
        return (*whole, *own)

    def prepare(self, encode: Callable[[str], list[int]]) -> Self:
        """Prepare every member."""
        members = {name: member.prepare(encode) for name, member in self.members.items()}
        return dataclasses.replace(self, members=members)

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return the members' fresh parameters by name, and those of every fusion.

        Raises:
            ValueError: adapters that are fused but do not act at the same places, or one that is
                stacked where it would undo another.
        """
        trees = {
            name: member.init(functional.fold(key, i), dimensions, backbone)
            for i, (name, member) in enumerate(sorted(self.members.items()))
        }
        self._refuse_overwriting(trees)
        fuses = [block for block in blocks_of(self.tree) if isinstance(block, Fuse)]
        fused = {
            block.fusion: self._init_fusion(
                functional.fold(key, 1000 + i), block, trees, dimensions
            )
            for i, block in enumerate(fuses)
        }
        return trees | ({'fusion': fused} if fused else {})

    def _refuse_overwriting(self, trees: Mapping[str, Tree]) -> None:
        """Refuse to scale what a projection reads behind one that has changed what it returns.

        The projection is computed anew of what it reads then, and the change would be lost.
        """
        for block in blocks_of(self.tree):
            before: dict[str, str] = {}
            for child in block.children if isinstance(block, Stack) else ():
                here: dict[str, str] = {}
                for name in _leaves(child):
                    found, anew = _projections(self.members[name], trees[name])
                    here |= dict.fromkeys(found, name)
                    lost = sorted(anew & before.keys())
                    self.require(
                        not lost,
                        f'in {block}, {name} scales what {lost and lost[0]} reads, and what '
                        f'{lost and before[lost[0]]} adds there would be lost; put {name} first, '
                        'or give it scale_inputs=() and its projections in scale_outputs',
                    )
                before |= here

    def _init_fusion(
        self, key: PRNGKeyArray, block: Fuse, trees: Mapping[str, Tree], dimensions: Dimensions
    ) -> Tree:
        """Return a fusion's parameters at each place where the adapters act that it mixes."""
        common = ends(trees[last(block.children[0])])
        for name in _leaves(block):
            self.require(
                ends(trees[name]) == common,
                f'{block} mixes adapters that act at different places: {name} and '
                f'{last(block.children[0])}; give them the same sub-layers and layers',
            )
        fresh: Tree = {}
        for layer, name in sorted(common):
            place = fusion.place_key(key, layer, name)
            one = fusion.init(place, dimensions.hidden, self.fusion)
            fresh.setdefault(f'layer_{layer}', {})[name] = one
        return fresh

    def constants(self, dimensions: Dimensions) -> Tree:
        """Return the members' constants by name."""
        found = {name: member.constants(dimensions) for name, member in self.members.items()}
        return {name: tree for name, tree in found.items() if tree}

    def rules(self, dimensions: Dimensions) -> tuple[Rule, ...]:
        """Return nothing: members that train the backbone's own leaves are refused."""
        return ()

    def penalty(self, params: Tree) -> Float[Array, ''] | None:
        """Return the sum of the trained members' penalties and of the fusions'."""
        found = [self.members[name].penalty(params.get(name, {})) for name in self._trained]
        found.append(fusion.penalty(params.get('fusion', {}), self.fusion))
        given = [value for value in found if value is not None]
        return sum(given[1:], given[0]) if given else None

    def optimizer(
        self, inner: optax.GradientTransformation, total_steps: int
    ) -> optax.GradientTransformation:
        """Return the optimiser inside of every trained member's."""
        for name in self._trained:
            inner = self.members[name].optimizer(inner, total_steps)
        return fusion.cool(inner) if self.fusion.temperature else inner

    def first_layer(self, params: Tree, dimensions: Dimensions) -> int:
        """Return the lowest of the members' first layers."""
        return self.first_place(params, dimensions).layer

    def first_place(self, params: Tree, dimensions: Dimensions) -> Place:
        """Return the first of the members' first places."""
        return min(
            member.first_place(params.get(name, {}), dimensions)
            for name, member in self.members.items()
        )

    def to_json(self) -> dict[str, Any]:
        """Return expression, members and options as JSON values."""
        return {
            'architecture': self.architecture,
            'expression': self.expression,
            'members': {name: member.to_json() for name, member in self.members.items()},
            'frozen_members': list(self.frozen_members),
            'fusion': dataclasses.asdict(self.fusion),
        }


# Names of branches that a tree may have beside its members.
_RESERVED = re.compile(r'fusion|words|embeddings|shared|constants|output|backbone|layer_\d+')

# The blocks that a method may stand in, by the site at which it acts.
_EVERYWHERE = frozenset({'stack', 'batch_split', 'parallel'})
_TOKENWISE = _EVERYWHERE | {'average', 'split'}


def supported(method: Method) -> frozenset[str]:
    """Return the kinds of block that a method may stand in.

    A backbone has one set of LayerNorms and biases, so what trains these is alone; prefixes have no
    mean, and those that move the keys' positions do so in all rows alike, as vectors inserted into
    the text lengthen them; only bottlenecks can be fused.
    """
    if isinstance(method, Union):
        return frozenset.intersection(*(supported(member) for member in method.members))
    kind = type(method)
    if acts(kind, 'rules') and (not acts(kind, 'adapt') or getattr(method, 'train_norms', False)):
        return frozenset()
    if method.inserted.count:
        return frozenset({'stack'})
    if acts(kind, 'key_value'):
        return frozenset({'stack'}) if getattr(method, 'count_keys', False) else _EVERYWHERE
    if acts(kind, 'embeddings') or acts(kind, 'block'):
        return _EVERYWHERE | {'average'}
    if acts(kind, 'adapt') and hasattr(kind, 'read'):
        return _TOKENWISE | {'fuse'}
    return _TOKENWISE


def last(node: str | Composition) -> str:
    """Return the adapter that acts last in a block."""
    return composition.last(node)


def ends(tree: Tree) -> set[tuple[int, str]]:
    """Return the layers and sub-layers at which an adapter has parameters."""
    return {
        (int(layer[1]), name)
        for branch, sites in tree.items()
        if (layer := re.fullmatch(r'layer_(\d+)', branch))
        for name in sites
        if name in SUB_LAYERS
    }


def blocks_of(node: str | Composition) -> list[Composition]:
    """Return the blocks of a tree, inner ones first."""
    if isinstance(node, str):
        return []
    return [*(block for child in node.children for block in blocks_of(child)), node]


def _leaves(node: str | Composition) -> list[str]:
    """Return the adapters of a tree in order, each as often as it acts."""
    if isinstance(node, str):
        return [node]
    return [name for child in node.children for name in _leaves(child)]


def _projections(method: Method, tree: Tree) -> tuple[set[str], set[str]]:
    """Return the places where a method acts, and those that it computes of a scaled input."""
    if isinstance(method, Union):
        own = [_projections(member, tree[name]) for name, member in method.named().items()]
        return set().union(*(x for x, _ in own)), set().union(*(x for _, x in own))
    paths = (path.rpartition('/') for path in flatten(tree))
    return places(method, tree), {place for place, _, leaf in paths if leaf == 'input_scale'}


def _parts(method: Method) -> tuple[Method, ...]:
    return method.members if isinstance(method, Union) else (method,)


def _check_parallel(node: str | Composition, around: str) -> None:
    """Refuse a `parallel` whose rows another block divides as well."""
    if isinstance(node, str):
        return
    if node.kind == 'parallel' and around:
        raise ValueError(
            f'composed: {node} stands inside of {around}(...), which divides the rows too; '
            'put it above, or give its adapters to the outer block'
        )
    if node.kind in ('parallel', 'batch_split'):
        around = node.kind
    for child in node.children:
        _check_parallel(child, around)
