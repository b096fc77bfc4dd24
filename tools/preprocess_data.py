"""Turn text into token ids that training reads: PREFIX.bin and PREFIX.idx in Megatron's format.

python tools/preprocess_data.py --help     the same as: megalina data --help
"""

import sys

from megalina.cli.data import main

if __name__ == "__main__":
    sys.exit(main())
