"""The names of a torch model's modules, and which of them a PEFT config chooses.

PEFT finds the projections to adapt by name, in the model with everything around the encoder: a list
of names is matched against the ends of the full ones, a text is a regular expression for a whole
one. The names are therefore those of the model that was adapted, with the prefix `bert.` where it
was a model with a head.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapters_jax.interop import modules
from adapters_jax.interop.peft.configs import Names
from adapters_jax.models.backbone import BackboneConfig

ALL_LINEAR = 'all-linear'
POOLER = 'pooler.dense'
# What PEFT adapts in each family where nobody chose, and of which (IA)³ scales the inputs: its
# tables by model type, of those that one family of ours stands for.
_QUERY_VALUE = {
    **dict.fromkeys(('bert', 'roberta', 'electra'), ('query', 'value')),
    't5': ('q', 'v'),
    'bart': ('q_proj', 'v_proj'),
}
_DEFAULT_TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    'LORA': _QUERY_VALUE,
    'VERA': _QUERY_VALUE,
    'ADALORA': {
        'bert': ('query', 'value'),
        'roberta': ('query', 'key', 'value', 'dense'),
        't5': ('q', 'k', 'v', 'o', 'wi', 'wo'),
        'bart': ('q_proj', 'k_proj', 'v_proj', 'out_proj', 'fc1', 'fc2'),
    },
    'IA3': {
        **dict.fromkeys(('bert', 'roberta'), ('key', 'value', 'output.dense')),
        't5': ('k', 'v', 'wo'),
        'bart': ('q_proj', 'v_proj', 'fc2'),
    },
    'LN_TUNING': {
        't5': ('layer_norm', 'final_layer_norm'),
        'bart': ('self_attn_layer_norm', 'encoder_attn_layer_norm', 'final_layer_norm'),
    },
}
_DEFAULT_FEED_FORWARD = {
    **dict.fromkeys(('bert', 'roberta'), ('output.dense',)),
    't5': ('wo',),
    'bart': ('fc2',),
}


def place(path: str) -> tuple[int, str, str]:
    """Split 'layer_{i}/{sub_layer}/{name}'."""
    layer, sub_layer, name = path.split('/')
    return int(layer.removeprefix('layer_')), sub_layer, name


def module_of(layer: int, sub_layer: str, name: str, config: BackboneConfig) -> str:
    """Return the torch name of a projection, without prefix."""
    return modules.by_path(config)[f'layer_{layer}/{sub_layer}/{name}']


def resolved(settings: Mapping[str, Any], config: BackboneConfig) -> dict[str, Any]:
    """Return the settings with PEFT's choice of modules where they leave it to PEFT.

    Raises:
        ValueError: PEFT has no choice for the family.
    """
    found, kind = dict(settings), settings['peft_type']
    if kind not in _DEFAULT_TARGETS or settings['target_modules'] is not None:
        return found
    # A gated network has other names, and which of PEFT's lists counts hangs on the model type.
    unclear = config.block.gated and kind in ('ADALORA', 'IA3')
    chosen = _DEFAULT_TARGETS[kind].get(config.family)
    if chosen is None or unclear:
        raise ValueError(
            f'it has no target_modules, and PEFT has no choice of its own for {kind} on '
            f'{config.family}; name the modules that are adapted'
        )
    found['target_modules'] = chosen
    if kind == 'IA3' and settings['feedforward_modules'] is None:
        found['feedforward_modules'] = _DEFAULT_FEED_FORWARD[config.family]
    return found


def targets(settings: Mapping[str, Any], among: Iterable[str], prefix: str) -> list[str]:
    """Return which modules (without prefix) the settings choose, which are `resolved`.

    Raises:
        ValueError: a regular expression that is none.
    """
    chosen = settings['target_modules'] or ()
    try:
        return [m for m in among if _is_target(settings, chosen, prefix + m)]
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
    if isinstance(chosen, str):
        return chooses_all(settings) or re.fullmatch(chosen, name) is not None
    # PEFT asks for the layer of those alone that the end of a name chooses.
    return name in chosen or (_covers(chosen, name) and _in_layers(settings, name))


def chooses_all(settings: Mapping[str, Any]) -> bool:
    """Tell whether the settings choose every dense layer, whatever it is called."""
    chosen = settings['target_modules']
    return isinstance(chosen, str) and chosen.lower() == ALL_LINEAR


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
    names = settings['feedforward_modules'] or ()
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
    blocks = [module for module, path in modules.projections(config).items() if path != 'pooler']
    for ends in (_ends(chosen, config, parts) for parts in (1, 2)):
        if {module for module in blocks if _covers(tuple(ends), module)} == set(chosen):
            return ends
    return sorted(chosen)


def shortest_pair(
    chosen: Sequence[str], feed_forward: Sequence[str], config: BackboneConfig
) -> tuple[list[str], list[str]]:
    """Return target modules as `shortest` does, and among them the feed-forward ones."""
    targets_, inputs = shortest(chosen, config), _ends(feed_forward, config, 1)
    settings = {'feedforward_modules': tuple(inputs), 'target_modules': tuple(targets_)}
    scaled = {module for module in chosen if is_feed_forward(settings, module)}
    if set(inputs) <= set(targets_) and scaled == set(feed_forward):
        return targets_, inputs
    return sorted(chosen), sorted(feed_forward)


def _ends(chosen: Sequence[str], config: BackboneConfig, parts: int) -> list[str]:
    """Return the ends of names by which these are told from others.

    Others are those whose last `parts` of our path, the name or sub-layer and name, are not theirs.
    """
    paths = modules.projections(config)
    kinds = {module: path.split('/')[-parts:] for module, path in paths.items()}
    return sorted({_end(module, kinds) for module in chosen})


def _end(module: str, kinds: Mapping[str, list[str]]) -> str:
    """Return the shortest end of a name that no module of another kind has, or the longest.

    No end has the number of a layer in it.
    """
    own = re.search(r'[^\d.][^.]*(\.[^\d.][^.]*)*$', module)[0].split('.')
    ends = ['.'.join(own[-count:]) for count in range(1, len(own) + 1)]
    for end in ends:
        alike = (other for other in kinds if _covers((end,), other))
        if all(kinds[other] == kinds[module] for other in alike):
            return end
    return ends[-1]
