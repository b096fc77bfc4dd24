"""Compare strategies: how fast is a training step under each, on links of a given rate?

python tools/compare_strategies.py --help     the same as: megalina compare --help
"""

import sys

from megalina.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
