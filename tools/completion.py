"""Completion of commands, settings and their values for bash and zsh.

python tools/completion.py --help     the same as: megalina completion --help
"""

from megalina.cli.completion import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
