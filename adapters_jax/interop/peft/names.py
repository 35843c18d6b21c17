"""The names of a torch model's modules, and which of them a PEFT config chooses.

PEFT finds the projections to adapt by name, in the model with everything around the encoder: a list
of names is matched against the ends of the full ones, a text is a regular expression for a whole
one. The names are therefore those of the model that was adapted, with the prefix `bert.` where it
was a model with a head.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapters_jax.interop.peft.configs import Names
from adapters_jax.models import families
from adapters_jax.models.backbone import BackboneConfig

ALL_LINEAR = 'all-linear'
POOLER = 'pooler.dense'
# Which projections PEFT adapts where nobody chose: those of its table for BERT and RoBERTa.
_DEFAULT_TARGETS = {'IA3': ('key', 'value', 'output.dense')}
_DEFAULT_FEED_FORWARD = ('output.dense',)


def projections(config: BackboneConfig) -> dict[str, str]:
    """Return our path of each dense layer by its torch name: those of the blocks, and the pooler's.

    The path is 'layer_{i}/{sub_layer}/{name}' or 'pooler'.
    """
    return {
        name.removesuffix('.weight'): path.removesuffix('/kernel')
        for name, (path, _) in families.tensor_names(config).items()
        if path.endswith('/kernel')
    }


def place(path: str) -> tuple[int, str, str]:
    """Split 'layer_{i}/{sub_layer}/{name}'."""
    layer, sub_layer, name = path.split('/')
    return int(layer.removeprefix('layer_')), sub_layer, name


def module_of(layer: int, sub_layer: str, name: str, config: BackboneConfig) -> str:
    """Return the torch name of a projection, without prefix."""
    path = f'layer_{layer}/{sub_layer}/{name}'
    return next(module for module, ours in projections(config).items() if ours == path)


def targets(settings: Mapping[str, Any], modules: Iterable[str], prefix: str) -> list[str]:
    """Return which modules (without prefix) the settings choose.

    Raises:
        ValueError: a regular expression that is none.
    """
    chosen = settings['target_modules']
    if chosen is None:
        chosen = _DEFAULT_TARGETS.get(settings['peft_type'], ('query', 'value'))
    try:
        return [m for m in modules if _is_target(settings, chosen, prefix + m)]
    except re.error as error:
        raise ValueError(
            f'the target modules {chosen!r} hold an invalid regular expression: {error}'
        ) from error


def _is_target(settings: Mapping[str, Any], chosen: Names, name: str) -> bool:
    excluded = settings.get('exclude_modules')
    if excluded and _covers(excluded, name):
        return False
    if any(re.match(rf'(^|.*\.){m}($|\..*)', name) for m in saved_modules(settings)):
        return False
    if isinstance(chosen, str) and chosen.lower() != ALL_LINEAR:
        return re.fullmatch(chosen, name) is not None
    everything = isinstance(chosen, str)
    return (everything or _covers(chosen, name)) and _in_layers(settings, name)


def _covers(names: Names, name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == end or name.endswith(f'.{end}') for end in names)


def _in_layers(settings: Mapping[str, Any], name: str) -> bool:
    """Tell whether the module is in one of the layers to transform."""
    layers = settings.get('layers_to_transform')
    if layers is None or layers == ():
        return True
    patterns = settings.get('layers_pattern') or (r'[^.]*',)
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    found = (re.match(rf'(?:^|.*?\.){pattern}\.(\d+)\.', name) for pattern in patterns)
    number = next((int(match[1]) for match in found if match), None)
    return number is not None and number in ((layers,) if isinstance(layers, int) else layers)


def saved_modules(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules that are stored whole."""
    names = settings['modules_to_save'] or ()
    return (names,) if isinstance(names, str) else names


def is_feed_forward(settings: Mapping[str, Any], name: str) -> bool:
    """Tell whether (IA)³ scales the input of a module, not its output."""
    names = settings['feedforward_modules']
    if names is None:
        names = _DEFAULT_FEED_FORWARD if settings['target_modules'] is None else ()
    if isinstance(names, str):
        return _covers(names, name)
    return any(name.endswith(end) for end in names)


def of_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first key that matches the end of a module's name.

    Raises:
        ValueError: a key that is no regular expression.
    """
    try:
        found = (k for k in pattern or {} if re.match(rf'(.*\.)?({k})$', name))
        return next((pattern[k] for k in found), default)
    except re.error as error:
        raise ValueError(
            f'rank_pattern or alpha_pattern has an invalid regular expression: {error}'
        ) from error


def shortest(chosen: Sequence[str], config: BackboneConfig) -> list[str]:
    """Return target modules that choose exactly these, as ends of names where that suffices."""
    ends = _ends(chosen, config)
    blocks = [module for module, path in projections(config).items() if path != 'pooler']
    covered = {module for module in blocks if _covers(tuple(ends), module)}
    return ends if covered == set(chosen) else sorted(chosen)


def shortest_pair(
    chosen: Sequence[str], feed_forward: Sequence[str], config: BackboneConfig
) -> tuple[list[str], list[str]]:
    """Return target modules as `shortest` does, and among them the feed-forward ones."""
    targets_, inputs = shortest(chosen, config), _ends(feed_forward, config)
    settings = {'feedforward_modules': tuple(inputs), 'target_modules': tuple(targets_)}
    scaled = {module for module in chosen if is_feed_forward(settings, module)}
    if set(inputs) <= set(targets_) and scaled == set(feed_forward):
        return targets_, inputs
    return sorted(chosen), sorted(feed_forward)


def _ends(modules: Sequence[str], config: BackboneConfig) -> list[str]:
    paths = projections(config)
    return sorted({_END[place(paths[module])[2]] for module in modules})


_END = {
    'query': 'query',
    'key': 'key',
    'value': 'value',
    'output': 'attention.output.dense',
    'up': 'intermediate.dense',
    'down': 'output.dense',
}
