"""The papers whose protocols are tested."""

import importlib

NAMES = ('houlsby2019', 'pfeiffer2021', 'ruckle2021', 'hu2022', 'he2022', 'mahabadi2021', 'mao2022')


def paper(name):
    module = importlib.import_module(f'experiments.{name}')
    return next(
        kind()
        for kind in vars(module).values()
        if isinstance(kind, type) and getattr(kind, 'name', '') == name
    )
