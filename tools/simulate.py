"""Simulates steps of training runs in virtual time, one configuration or a sweep of them: no ranks, no GPU, no weights.

python tools/simulate.py --help     the same as: megalina simulate --help
"""

from megalina.cli.simulate import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
