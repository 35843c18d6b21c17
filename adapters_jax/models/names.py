"""Tables of torch names: where each tensor of a checkpoint goes below `backbone`.

A table maps a tensor's name, without prefix, to our path and whether to transpose it: torch keeps
dense weights as [out, in].
"""

from adapters_jax.models.block import BlockConfig

Names = dict[str, tuple[str, bool]]


def dense(theirs: str, ours: str, biased: bool = True) -> Names:
    """Return the names of a dense layer."""
    own = {f'{theirs}.bias': (f'{ours}/bias', False)} if biased else {}
    return {f'{theirs}.weight': (f'{ours}/kernel', True)} | own


def norm(theirs: str, ours: str, centred: bool = True) -> Names:
    """Return the names of a LayerNorm, or of an RMSNorm."""
    own = {f'{theirs}.bias': (f'{ours}/bias', False)} if centred else {}
    return {f'{theirs}.weight': (f'{ours}/scale', False)} | own


def table(theirs: str, ours: str) -> Names:
    """Return the name of a table of vectors."""
    return {f'{theirs}.weight': (f'{ours}/embedding', False)}


def block(
    layer: int, config: BlockConfig, theirs: str, modules: dict[str, str], norms: dict[str, str]
) -> Names:
    """Return the names of a block that torch calls `theirs`.

    `modules` are the names of projections there by ours ('attention/query'), `norms` those of the
    LayerNorms by sub-layer.
    """
    found: Names = {}
    for ours, name in modules.items():
        biased = ours.rpartition('/')[2] not in config.unbiased
        found |= dense(f'{theirs}.{name}', f'layer_{layer}/{ours}', biased)
    for ours, name in norms.items():
        found |= norm(f'{theirs}.{name}', f'layer_{layer}/{ours}/norm', config.centred)
    return found
