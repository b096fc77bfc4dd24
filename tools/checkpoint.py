"""Look into checkpoints, verify, convert and average them, and take models from Hugging Face's format and back, on one process
and with one tensor in memory at a time.

python tools/checkpoint.py --help     the same as: megalina checkpoint --help
"""

from megalina.cli.checkpoint import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
