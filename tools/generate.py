"""Let a checkpoint of any layout write on from a prompt, on one process.

python tools/generate.py --help     the same as: megalina generate --help
"""

import sys

from megalina.cli.generate import main

if __name__ == "__main__":
    sys.exit(main())
