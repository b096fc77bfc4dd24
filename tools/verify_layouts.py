"""Verify layouts: does every layout of a configuration's model give the numbers of one process?

python tools/verify_layouts.py --help     the same as: megalina verify --help
"""

from megalina.cli.verify import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
