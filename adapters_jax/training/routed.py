"""The model of several tasks over one backbone: each row goes through the adapter and head of its
own task.

Each member keeps the names that it would have in a run by itself (`adapters/NAME`, `heads/NAME`),
so a member's own model reads its part of the common parameters as they are: to be evaluated, to be
saved, and to be served alone. Leaves of the backbone that the method trains are common to all.
"""

import dataclasses

from jaxtyping import Array, Float, PRNGKeyArray

from adapters_jax.adapters.bank import Bank
from adapters_jax.adapters.dropping import Dropped, drop_layers
from adapters_jax.adapters.method import Method
from adapters_jax.model import Batch, Model
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.heads import HeadBank
from adapters_jax.params import Rule, Tree, freeze
from adapters_jax.sites import Place

_NAME = 'members'  # under which the bank finds all of them


@dataclasses.dataclass(frozen=True)
class Routed:
    """Models that differ in their names and heads only; it stands where a step takes a `Model`.

    From the layers `dropped` all of them leave their adapters out.

    Raises:
        ValueError: heads of tokens together with heads of texts.
    """

    members: tuple[Model, ...]
    dropped: Dropped = 0

    def __post_init__(self) -> None:
        """Let every member drop as many layers; refuse heads that cannot share a batch."""
        members = (dataclasses.replace(model, dropped=self.dropped) for model in self.members)
        object.__setattr__(self, 'members', tuple(members))
        self._heads()

    @property
    def method(self) -> Method:
        """The method of all members."""
        return self.members[0].method

    @property
    def config(self) -> BackboneConfig:
        """The backbone's."""
        return self.members[0].config

    @property
    def remat(self) -> str:
        """What of a layer is kept for the backward pass."""
        return self.members[0].remat

    @property
    def rules(self) -> tuple[Rule, ...]:
        """What is trained: all that is trained of a member."""
        *own, last = (rule for model in self.members for rule in model.rules)
        return (*(rule for rule in own if rule != last), freeze('.*'))

    def trunk(self, params: Tree) -> Place:
        """Return where the trunk of all members ends."""
        return min(model.trunk(params) for model in self.members)

    def penalty(self, params: Tree) -> Float[Array, ''] | None:
        """Return the sum of what the members add to the mean loss."""
        found = [model.penalty(params) for model in self.members]
        given = [value for value in found if value is not None]
        return sum(given[1:], given[0]) if given else None

    def trunk_outputs(self, params: Tree, batch: Batch) -> Float[Array, 'B T N D']:
        """Return what `apply` may begin with; the trunk has nothing of any member."""
        return self.members[0].trunk_outputs(params, batch)

    def apply(
        self, params: Tree, batch: Batch, key: PRNGKeyArray | None = None
    ) -> Float[Array, 'B S C']:
        """Return the outputs of each row's own member, with zeros beyond its own width.

        `batch` has the column `adapter`, int32 [B]: the number of each row's member, or -1.
        """
        given = params.get('adapters', {}).items()
        adapters = {name: drop_layers(tree, self.dropped) for name, tree in given}
        own = {'adapters': {_NAME: adapters}, 'heads': {_NAME: params['heads']}}
        return self._bank.apply({'backbone': params['backbone']} | own, batch, key)

    def _heads(self) -> HeadBank:
        return HeadBank(tuple((m.name, m.head_config, m.outputs) for m in self.members))

    @property
    def _bank(self) -> Model:
        bank = Bank(members={model.name: model.method for model in self.members})
        return dataclasses.replace(
            self.members[0], method=bank, heads=self._heads(), name=_NAME, dropped=0
        )
