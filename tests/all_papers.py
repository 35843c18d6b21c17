"""The papers whose protocols are tested."""

from experiments.papers.__main__ import find as paper

__all__ = ['NAMES', 'paper']
NAMES = ('houlsby2019', 'pfeiffer2021', 'ruckle2021', 'hu2022', 'he2022', 'mahabadi2021', 'mao2022')
