"""Recipes to run: the experiments in conf/experiment, each with its command.

python tools/examples.py --help     the same as: megalina examples --help
"""

from megalina.cli.examples import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
