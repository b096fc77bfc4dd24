"""Plan a run: does it fit, which layout, which strategy, how fast?  Without a GPU, without weights, without starting anything.

python tools/plan.py --help     the same as: megalina plan --help
"""

import sys

from megalina.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
