"""Pretrains a GPT mixture-of-experts model: composes the configuration, checks it, starts or joins the ranks.

python pretrain_gpt_moe.py --help     the same as: megalina train --help
"""

from megalina.cli.train import main
from megalina.console import command

if __name__ == "__main__":
    command(main)
