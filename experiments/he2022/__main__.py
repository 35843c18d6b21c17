"""The command of the protocol: experiments/papers/command.py says what it takes and writes."""

from experiments.he2022 import He2022
from experiments.papers.command import run

if __name__ == '__main__':
    run(He2022())
