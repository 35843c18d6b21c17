"""The command of the protocol: experiments/papers/command.py says what it takes and writes."""

from experiments.mao2022 import Mao2022
from experiments.papers.command import run

if __name__ == '__main__':
    run(Mao2022())
