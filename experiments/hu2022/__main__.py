"""The command of the protocol: experiments/papers/command.py says what it takes and writes."""

from experiments.hu2022 import Hu2022
from experiments.papers.command import run

if __name__ == '__main__':
    run(Hu2022())
