"""Let a checkpoint of any layout write on from a prompt, on one process.

python tools/generate.py --help     the same as: megalina generate --help
"""

from megalina.cli.generate import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
