"""Several methods at once: MAM (He et al. 2022), UniPELT (Mao et al. 2022), MAD-X, any other mix.

The members keep their own parameters, each under its name; what they do at one site is chained in
order. Where chaining has no meaning (both end the same sub-layer, both change the same projection)
the members collide, and the union is refused.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import optax
from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax import functional
from adapters_jax.adapters.method import Inserted, Method, acts
from adapters_jax.params import Rule, Tree
from adapters_jax.sites import PROJECTIONS, SUB_LAYERS, Dimensions, Place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Union(Method):
    """Methods that act together; their parameters lie under `named()`."""

    architecture: ClassVar[str] = 'union'

    members: tuple[Method, ...]

    def __post_init__(self) -> None:
        """Refuse fewer than two methods, unions of unions, and two methods that insert vectors."""
        object.__setattr__(self, 'members', tuple(self.members))
        self.require(len(self.members) >= 2, f'{len(self.members)} members; expected two or more')
        nested = any(isinstance(member, Union) for member in self.members)
        self.require(not nested, 'a member is a union itself; list its members instead')
        scheduled = sum(type(m).optimizer is not Method.optimizer for m in self.members)
        self.require(scheduled <= 1, f'{scheduled} members have a schedule of ranks; keep one')
        inserting = sum(member.inserted.count > 0 for member in self.members)
        self.require(inserting <= 1, f'{inserting} members insert vectors into the text; keep one')

    def named(self) -> dict[str, Method]:
        """Return the members by name: the architecture, numbered from the second of its kind."""
        named: dict[str, Method] = {}
        for member in self.members:
            count = sum(m.architecture == member.architecture for m in named.values())
            named[member.architecture + (f'_{count + 1}' if count else '')] = member
        return named

    @property
    def stepwise(self) -> bool:
        """Whether every member is."""
        return all(member.stepwise for member in self.members)

    @property
    def packable(self) -> bool:
        """Whether every member is."""
        return all(member.packable for member in self.members)

    @property
    def inserted(self) -> Inserted:
        """What the one member inserts that does."""
        found = (member.inserted for member in self.members if member.inserted.count)
        return next(found, Inserted())

    @property
    def reserved_positions(self) -> int:
        """What the members take together."""
        return sum(member.reserved_positions for member in self.members)

    def prepare(self, encode: Callable[[str], list[int]]) -> Self:
        """Prepare every member."""
        return dataclasses.replace(self, members=tuple(m.prepare(encode) for m in self.members))

    def init(self, key: PRNGKeyArray, dimensions: Dimensions, backbone: Tree) -> Tree:
        """Return the members' fresh parameters by name.

        Raises:
            ValueError: two members act at the same place.
        """
        trees = {
            name: member.init(functional.fold(key, i), dimensions, backbone)
            for i, (name, member) in enumerate(self.named().items())
        }
        self._refuse_collisions(trees)
        return trees

    def _refuse_collisions(self, trees: Mapping[str, Tree]) -> None:
        taken: dict[str, str] = {}
        for name, member in self.named().items():
            for place in sorted(places(member, trees[name])):
                self.require(
                    place not in taken,
                    f'{taken.get(place)} and {name} both act at {place}; give them different '
                    'sites or layers, or keep one',
                )
                taken[place] = name

    def constants(self, dimensions: Dimensions) -> Tree:
        """Return the members' constants by name."""
        found = {name: member.constants(dimensions) for name, member in self.named().items()}
        return {name: tree for name, tree in found.items() if tree}

    def rules(self, dimensions: Dimensions) -> tuple[Rule, ...]:
        """Return the members' rules one after another."""
        return tuple(rule for member in self.members for rule in member.rules(dimensions))

    def penalty(self, params: Tree) -> Float[Array, ''] | None:
        """Return the sum of the members' penalties."""
        found = [member.penalty(params.get(name, {})) for name, member in self.named().items()]
        given = [value for value in found if value is not None]
        return sum(given[1:], given[0]) if given else None

    def optimizer(
        self, inner: optax.GradientTransformation, total_steps: int
    ) -> optax.GradientTransformation:
        """Return the optimiser inside of every member's."""
        for member in self.members:
            inner = member.optimizer(inner, total_steps)
        return inner

    def first_layer(self, params: Tree, dimensions: Dimensions) -> int:
        """Return the lowest of the members' first layers."""
        return min(
            member.first_layer(params.get(name, {}), dimensions)
            for name, member in self.named().items()
        )

    def first_place(self, params: Tree, dimensions: Dimensions) -> Place:
        """Return the first of the members' first places."""
        return min(
            member.first_place(params.get(name, {}), dimensions)
            for name, member in self.named().items()
        )

    @property
    def stores_constants(self) -> bool:
        """Whether a member does."""
        return any(member.stores_constants for member in self.members)

    @property
    def reads_trunk(self) -> bool:
        """Whether a member does."""
        return any(member.reads_trunk for member in self.members)

    @property
    def known_tags(self) -> int:
        """The most that a member knows."""
        return max(member.known_tags for member in self.members)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The members' frozen leaves."""
        named = self.named().items()
        return tuple(f'{re.escape(name)}/{x}' for name, member in named for x in member.frozen)

    def to_json(self) -> dict[str, Any]:
        """Return the members as JSON values."""
        members = [member.to_json() for member in self.members]
        return {'architecture': self.architecture, 'members': members}


def places(method: Method, tree: Tree) -> set[str]:
    """Return where a method acts, of the places that allow one method only."""

    def overrides(function: str) -> bool:
        return acts(type(method), function)

    found = set(type(method).claims)
    for layer, sites in tree.items():
        if not layer.startswith('layer_'):
            continue
        if overrides('block') and 'block' in sites:
            found.add(f'{layer}/block')
        for sub_layer in set(SUB_LAYERS) & set(sites):
            if overrides('adapt'):
                found.add(f'{layer}/{sub_layer}')
            if overrides('key_value'):
                found.add(f'{layer}/{sub_layer}/key_value')
            if overrides('linear'):
                projections = set(PROJECTIONS[sub_layer]) & set(sites[sub_layer])
                found |= {f'{layer}/{sub_layer}/{name}' for name in projections}
    return found
