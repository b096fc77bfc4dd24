"""Plan a run: does it fit, which layout, which strategy, how fast?  Without a GPU, without weights, without starting anything.

python tools/plan.py --help     the same as: megalina plan --help
"""

from megalina.cli.plan import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
