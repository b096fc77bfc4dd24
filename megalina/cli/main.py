"""megalina: train mixture-of-experts models, and plan, simulate, compare, check and read what they do."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from megalina.console import command

COMMANDS = {  # the module of megalina.cli whose main it is, and what it does
    "train": ("train", "pretrain a model: every setting is an override, as in: megalina train experiment=laptop"),
    "eval": ("evaluate", "how well a checkpoint writes, and how fast it is served under each placement of its experts"),
    "plan": ("plan", "does a run fit, which layout, which strategy, how fast: without a GPU, without weights"),
    "simulate": ("simulate", "steps in virtual time, one configuration or a sweep of them"),
    "compare": ("compare", "how fast a training step is under each strategy, on links of a given rate"),
    "verify": ("verify", "does every layout of a configuration's model give the numbers of one process?"),
    "checkpoint": ("checkpoint", "inspect, verify, convert and average checkpoints; import and export Hugging Face models"),
    "data": ("data", "turn text into token ids that training reads"),
    "generate": ("generate", "let a checkpoint write on from a prompt"),
    "doctor": ("doctor", "is this machine ready, and what to do if it isn't"),
    "examples": ("examples", "recipes to run, each with its command"),
    "completion": ("completion", "a script for bash and zsh that completes commands, settings and their values"),
    "report": ("report", "write a run's report.html again, from its run folder"),
}
BAD_INPUT = 2  # exit code


def main(argv: Sequence[str] | None = None) -> int:
    chosen, *arguments = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if chosen in ("--help", "-h", "help"):
        print(_help())
        return 0
    if chosen not in COMMANDS:
        near = difflib.get_close_matches(chosen, COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        print(f"megalina {chosen}: there is no such command{hint}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return BAD_INPUT
    name = sys.argv[0]
    sys.argv[0] = f"megalina {chosen}"  # what argparse calls the program in its help
    try:
        code: int = import_module(f"megalina.cli.{COMMANDS[chosen][0]}").main(arguments)
    finally:
        sys.argv[0] = name
    return code


def _help() -> str:
    lines = [f"  {command:<12}{what}" for command, (_, what) in COMMANDS.items()]
    return "\n".join([str(__doc__), "", "  megalina COMMAND [ARGUMENTS]     its own help: megalina COMMAND --help", "", *lines])


def run() -> NoReturn:
    """The process `megalina`."""
    command(main)


if __name__ == "__main__":
    run()
