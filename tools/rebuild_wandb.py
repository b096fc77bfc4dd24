"""Rebuild a run's W&B folder from metrics.jsonl: W&B writes in blocks, so a run ended by kill -9 has lost what it logged.

python tools/rebuild_wandb.py RUN_DIR
"""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a whole offline W&B run of RUN_DIR from metrics.jsonl and config.yaml.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    args = parser.parse_args(argv)
    from megalina.config import WandbConfig
    from megalina.track.metrics import read_yaml

    try:
        if not (args.run_dir / "config.yaml").is_file():
            raise ValueError(f"{args.run_dir} is no run folder: it has no config.yaml")
        from megalina.track.wandb_run import rebuild

        config = read_yaml(args.run_dir / "config.yaml")
        wandb_config = WandbConfig(**{**config["tracker"]["wandb"], "mode": "offline"})
        folder = rebuild(wandb_config, run_dir=args.run_dir, run_config=config)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{folder} holds the whole run; upload it with: wandb sync {folder}")
    return 0


if __name__ == "__main__":
    from megalina.console import command

    command(main)
