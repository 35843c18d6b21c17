"""The configurations of `adapters` 1.3.0 as values: every field, its type and its default.

They are what the library writes and reads (`configuration/adapter_config.py`), no methods of ours:
`configs` translates between the two. A file may leave out what has a default, and an older one has
fields that mean nothing any more.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from adapters_jax.adapters import fields

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """The base: fields are JSON values, checked against their annotations."""

    architecture: ClassVar[str | None]  # None: the field is not written
    # What the library's classes know though it is no field of theirs: it gets lost with a file, and
    # is read here in case that a file has it.
    unwritten: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        """Freeze every field and check its type."""
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, fields.freeze(getattr(self, field.name)))
        fields.check(f'config of {self.architecture or "bottleneck"}', self)

    def to_json(self) -> dict[str, Any]:
        """Return every field that the library writes."""
        values = {f.name: fields.thaw(getattr(self, f.name)) for f in dataclasses.fields(self)}
        values = {name: value for name, value in values.items() if name not in self.unwritten}
        return values | ({} if self.architecture is None else {'architecture': self.architecture})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> 'Schema':
        """Return the configuration that a file describes; null stands for a default.

        Raises:
            ValueError: a field of another type, or one that is missing.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        given = {
            name: value
            for name, value in values.items()
            if name in known and not (value is None and _has_default(known[name]))
        }
        missing = [n for n, f in known.items() if n not in given and not _has_default(f)]
        if missing:
            raise ValueError(
                f'the config of a {cls.architecture or "bottleneck"} adapter lacks '
                f'{", ".join(missing)}'
            )
        others = sorted(n for n, value in values.items() if n not in {*known, *_SILENT} and value)
        if others:
            _LOG.warning('without effect here, as in `adapters`: config %s', ', '.join(others))
        return cls(**given)


_SILENT = ('architecture', 'invertible_adapter')


def _has_default(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


@dataclasses.dataclass(frozen=True, kw_only=True)
class BnConfig(Schema):
    """A bottleneck adapter, with what may stand at the embeddings and how its kernels are made."""

    architecture: ClassVar[str | None] = None

    mh_adapter: bool
    output_adapter: bool
    reduction_factor: float | Mapping[str, float]
    non_linearity: str
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = 'bert'
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | Literal['learned', 'channel'] = 1.0
    use_gating: bool = False
    residual_before_ln: bool | Literal['post_add'] = True
    adapter_residual_before_ln: bool = False
    inv_adapter: Literal['nice', 'glow'] | None = None
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: tuple[int, ...] = ()
    dropout: float = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    factorized_phm_W: bool = True  # noqa: N815
    shared_W_phm: bool = False  # noqa: N815
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    phm_c_init: str = 'normal'
    phm_init_range: float = 0.0001
    learn_phm: bool = True
    hypercomplex_nonlinearity: str = 'glorot-uniform'
    phm_rank: int = 1
    phm_bias: bool = True
    stochastic_depth: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(Schema):
    """Prefix tuning."""

    architecture: ClassVar[str | None] = 'prefix_tuning'

    encoder_prefix: bool = True
    cross_prefix: bool = True
    leave_out: tuple[int, ...] = ()
    flat: bool = False
    prefix_length: int = 30
    bottleneck_size: int = 512
    non_linearity: str = 'tanh'
    dropout: float = 0.0
    use_gating: bool = False
    shared_gating: bool = True
    init_weights_seed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(Schema):
    """Prompt tuning."""

    architecture: ClassVar[str | None] = 'prompt_tuning'

    prompt_length: int = 10
    prompt_init: str = 'random_uniform'
    prompt_init_text: str | None = None
    combine: Literal['prefix', 'prefix_after_bos'] = 'prefix'
    init_weights_seed: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(Schema):
    """LoRA, and what the library makes of it: (IA)³, DoRA, VeRA."""

    architecture: ClassVar[str | None] = 'lora'

    selfattn_lora: bool = True
    intermediate_lora: bool = False
    output_lora: bool = False
    leave_out: tuple[int, ...] = ()
    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    attn_matrices: tuple[Literal['q', 'k', 'v'], ...] = ('q', 'v')
    composition_mode: Literal['add', 'scale'] = 'add'
    init_weights: str = 'lora'
    init_weights_seed: int | None = None
    use_gating: bool = False
    use_dora: bool = False
    vera_d: float | None = None
    vera_b: float | None = None
    dtype: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MTLLoRAConfig(LoRAConfig):
    """MTL-LoRA."""

    architecture: ClassVar[str | None] = 'mtl_lora'

    n_up_projection: int = 1
    task_specific_matrix_type: Literal['singular_values', 'linear'] = 'singular_values'
    weights_sharpness: float = 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReftConfig(Schema):
    """The family of ReFT."""

    architecture: ClassVar[str | None] = 'reft'
    unwritten: ClassVar[tuple[str, ...]] = ('subtract_projection',)

    layers: Literal['all'] | tuple[int, ...]
    prefix_positions: int
    suffix_positions: int
    r: int
    orthogonality: bool
    tied_weights: bool = False
    subtract_projection: bool = True
    dropout: float = 0.05
    non_linearity: str | None = None
    dtype: str | None = None
    output_reft: bool = True
    init_weights_seed: int | None = None


SCHEMAS: dict[str | None, type[Schema]] = {
    cls.architecture: cls
    for cls in (
        BnConfig,
        PrefixTuningConfig,
        PromptTuningConfig,
        LoRAConfig,
        MTLLoRAConfig,
        ReftConfig,
    )
}
