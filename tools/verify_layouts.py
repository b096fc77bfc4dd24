"""Verify layouts: does every layout of a configuration's model give the numbers of one process?

python tools/verify_layouts.py --help     the same as: megalina verify --help
"""

import sys

from megalina.cli.verify import main

if __name__ == "__main__":
    sys.exit(main())
