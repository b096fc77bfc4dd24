"""Write a run's report.html again, from its run folder (also of a run that was killed, or is still going).

python tools/write_report.py --help     the same as: megalina report --help
"""

from megalina.cli.report import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
