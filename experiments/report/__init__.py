"""Finished runs as tables, figures and tests of significance: `python -m experiments.report`."""
