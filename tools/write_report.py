"""Write a run's report.html again, from its run folder (also of a run that was killed, or is still going).

python tools/write_report.py --help     the same as: megalina report --help
"""

import sys

from megalina.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
