"""Evaluate a checkpoint: how well does it write, and how fast is it served under each placement of its experts?

python tools/evaluate_gpt_moe.py --help     the same as: megalina eval --help
"""

from megalina.cli.evaluate import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
