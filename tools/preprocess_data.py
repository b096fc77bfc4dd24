"""Turn text into token ids that training reads: PREFIX.bin and PREFIX.idx in Megatron's format.

python tools/preprocess_data.py --help     the same as: megalina data --help
"""

from megalina.cli.data import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
