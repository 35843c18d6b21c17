"""The command of the protocol: experiments/papers/command.py says what it takes and writes."""

from experiments.papers.command import run
from experiments.ruckle2021 import Ruckle2021

if __name__ == '__main__':
    run(Ruckle2021())
