"""The command of the protocol: experiments/papers/command.py says what it takes and writes."""

from experiments.houlsby2019 import Houlsby2019
from experiments.papers.command import run

if __name__ == '__main__':
    run(Houlsby2019())
