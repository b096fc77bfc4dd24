"""Compare strategies: how fast is a training step under each, on links of a given rate?

python tools/compare_strategies.py --help     the same as: megalina compare --help
"""

from megalina.cli.compare import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
