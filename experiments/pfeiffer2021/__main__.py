"""The command of the protocol: experiments/papers/command.py says what it takes and writes."""

from experiments.papers.command import run
from experiments.pfeiffer2021 import Pfeiffer2021

if __name__ == '__main__':
    run(Pfeiffer2021())
