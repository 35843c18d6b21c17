"""The command of the protocol: experiments/papers/command.py says what it takes and writes."""

from experiments.mahabadi2021 import Mahabadi2021
from experiments.papers.command import run

if __name__ == '__main__':
    run(Mahabadi2021())
