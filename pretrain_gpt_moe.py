"""Pretrains a GPT mixture-of-experts model: composes the configuration, checks it, starts or joins the ranks.

python pretrain_gpt_moe.py --help     the same as: megalina train --help
"""

import sys

from megalina.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
