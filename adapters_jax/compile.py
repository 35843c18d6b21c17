"""Check a run before it has devices: `python -m adapters_jax.compile --config=FILE --devices=8`.

The step and the forward pass are compiled for a mesh (`--config.mesh.fsdp=4`) of simulated CPU
devices, or of a TPU topology that is not at hand (`--topology=v5e:4x4`), and not run. Of the
backbone only config.json is read, of the data nothing. Of the FLOPs that are told, those of
attention's kernels on a GPU are left out: its compiler does not know them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from adapters_jax import entry, files
from adapters_jax.config import Config
from adapters_jax.training import ahead

REPORT, SHARDINGS = 'compiled.json', 'shardings.txt'


def check(
    config: Config,
    devices: int = 0,
    topology: str = '',
    length: int = 0,
    texts: int = 1,
    labels: int = 0,
) -> tuple[dict[str, Any], str]:
    """Compile what `config` describes; return what it costs a device, and where every leaf lies.

    `devices` simulates as many CPU devices, which has to come before JAX is asked for any;
    `topology` is that of TPUs; with neither, the devices at hand are meant. The other arguments are
    those of `ahead.plan`.

    Raises:
        ValueError, FileNotFoundError: a mistake in the config, or devices that cannot be had.
    """
    if devices and topology:
        raise ValueError(
            f'--devices={devices} and --topology={topology} name two sets of devices; give one'
        )
    plan = ahead.plan(config, _devices(devices, topology), length, texts, labels)
    return ahead.report(plan), ahead.shardings(plan)


def _devices(devices: int, topology: str) -> Sequence[Any] | None:
    """Return the devices to compile for; None: those at hand."""
    if not devices and not topology:
        return None
    simulate(devices or 1)
    return ahead.topology(topology) if topology else jax.devices()[:devices]


def simulate(devices: int) -> None:
    """Let JAX see this many CPU devices and nothing else.

    Raises:
        ValueError: not a number of devices, or JAX has found others already.
    """
    if devices < 1:
        raise ValueError(f'--devices is {devices}; expected 1 or more')
    try:
        jax.config.update('jax_platforms', 'cpu')
        jax.config.update('jax_num_cpu_devices', devices)
    except RuntimeError as error:  # the devices have been counted before
        if len(jax.devices()) < devices:
            raise ValueError(
                f'--devices is {devices}, but JAX has found {len(jax.devices())} devices in this '
                'process already; call it first, or in a process of its own'
            ) from error


def render(report: Mapping[str, Any]) -> str:
    """Return the report as text."""
    mesh = ' x '.join(f'{name} {size}' for name, size in report['mesh'].items())
    lines = [
        f'{report["method"]} on {report["backbone"]}, mesh {mesh} of {report["device"]}, '
        f'{report["rows"]} rows of {report["length"]} tokens a step',
        'bytes that each device holds:',
        entry.table({name: f'{size:>15,}' for name, size in report['held'].items()}),
    ]
    for name in ('step', 'forward'):
        lines += ['', *_program(name, report[name])]
    return '\n'.join(lines)


def _program(name: str, found: Mapping[str, Any]) -> list[str]:
    lines = [
        f'{name}: {found["memory"]["temp"]:,} bytes of temporaries, {found["flops"]:.4g} FLOPs a '
        f'device, compiled in {found["seconds"]} s',
        f'  each device sends {found["sent"]:,.0f} bytes:',
    ]
    for row in found['collectives']:
        loop = '' if row['sure'] else ' (for each pass of a loop)'
        what = f'{row["count"]:>4} {row["kind"]}'
        lines.append(f'  {what:<24} {row["axes"]:<18} {row["bytes"]:>15,.0f}  {row["for"]}{loop}')
    if not found['collectives']:
        lines[-1] = '  nothing is sent'
    return lines


def main(
    config: Config, devices: int, topology: str, length: int, texts: int, labels: int, output: str
) -> None:
    """Compile, print the report, and write it with the shardings where a directory is given."""
    for name, value in (('length', length), ('labels', labels)):
        if value < 0:
            raise ValueError(f'--{name} is {value}; expected 0 or more')
    if output:
        directory = files.make_directory(Path(output))
    report, shardings = check(config, devices, topology, length, texts, labels)
    print(render(report))
    if output:
        files.write_json(directory / REPORT, report)
        files.write_text(directory / SHARDINGS, shardings)
        print(f'wrote {directory}: {REPORT}, {SHARDINGS}')


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'config': config_flags.DEFINE_config_file('config', None, 'FILE.py[:key=value,...]'),
        'devices': flags.DEFINE_integer('devices', 0, 'Simulate this many CPU devices.'),
        'topology': flags.DEFINE_string('topology', '', 'A TPU topology, such as v5e:4x4.'),
        'length': flags.DEFINE_integer('length', 0, 'Tokens of a row; 0: data.max_length.'),
        'texts': flags.DEFINE_integer('texts', 1, 'Texts that a row has room for.'),
        'labels': flags.DEFINE_integer('labels', 0, 'Classes, where task.labels is empty; 0: 2.'),
        'output': flags.DEFINE_string('output', '', 'Directory of the report; empty: none.'),
    }


if __name__ == '__main__':
    entry.run(_define, main)
