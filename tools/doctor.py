"""Is this machine ready to train, and what to do if it isn't.

python tools/doctor.py --help     the same as: megalina doctor --help
"""

from megalina.cli.doctor import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
