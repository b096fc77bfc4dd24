"""Plan a run: does it fit, which layout, which strategy, how fast?  Without a GPU, without weights, without starting anything.

    python tools/plan.py model=mixtral_8x7b cluster=h100_400g nodes=8 --search
    python tools/plan.py experiment=laptop cluster=h100_400g nodes=1 parallel.ep=8 train.global_batch_size=64

Overrides are those of pretrain_gpt_moe.py; `nodes=N` is short for cluster.nodes=N, and all ranks of these nodes take part.  The
step's own list is walked in virtual time (megalina/sim) with the cluster's figures (conf/cluster), of which each says if it is
published or assumed: results are as good as those.  Routing is taken to be even.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent

if TYPE_CHECKING:
    from megalina.config import PretrainConfig
    from megalina.forecast.search import Candidate

BAD_INPUT = 2  # exit code
SHOWN = 10
DEFAULT_VOCAB = 32768  # where neither the model nor --vocab-size says it
SEARCH_SEQUENCES = 1024  # a step, where the search may choose


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    from pretrain_gpt_moe import explain

    overrides = [f"cluster.{word}" if word.startswith("nodes=") else word for word in args.overrides]
    try:
        return plan(args, overrides)
    except Exception as error:  # what Hydra raises is no ValueError
        if not isinstance(error, ValueError | OSError) and not type(error).__module__.startswith(("hydra", "omegaconf")):
            raise
        print(explain(error, overrides), file=sys.stderr)
        return BAD_INPUT


def plan(args: argparse.Namespace, overrides: list[str]) -> int:
    from megalina.dry_run import describe
    from megalina.forecast.forecast import memory_limit_bytes
    from megalina.forecast.report import as_json, memory_table, strategy_table
    from megalina.forecast.search import search
    from megalina.validate import check_hardware
    from tools.compare_strategies import composed

    if args.json and not args.json.absolute().parent.is_dir():
        raise ValueError(f"{args.json}: there is no folder {args.json.absolute().parent}")
    config = composed(overrides)
    check_hardware(config.cluster)
    world = config.cluster.nodes * config.cluster.ranks_per_node
    added = chosen(config, overrides, world, searching=args.search)
    config = composed([*overrides, *added])
    vocab_size = args.vocab_size or config.model.vocab_size or DEFAULT_VOCAB
    given = [word for word in overrides if not word.startswith("cluster.nodes=")]
    common = [*given, *added, f"launch.ranks={world}"]
    if added:
        print(f"chosen, since nothing else was asked for: {' '.join(added)}\n")
    if args.search:
        candidates = search(config, world, vocab_size=vocab_size, progress=show)
        print(file=sys.stderr)
    else:
        candidates = of_one_layout(config, world, vocab_size)
    best = candidates[0]
    print(describe(best.config, world, vocab_size=vocab_size).rpartition("\n")[0])  # without the run's folder
    if best.found is not None:
        print(f"\nmemory of a rank, {best.plan}")
        print(memory_table(best.found.memory, memory_limit_bytes(config.cluster)))
    print(f"\n{config.cluster.name}, {config.cluster.nodes} nodes of {config.cluster.ranks_per_node}: {summary(candidates)}")
    print(strategy_table(candidates[:SHOWN] if args.search else candidates, layouts=args.search))
    if best.found is not None:
        days = args.tokens / best.found.tokens_a_day if args.tokens else 0.0
        until = f"; {days:,.1f} days for {args.tokens:,.0f} tokens" if days else ""
        file = f"conf/cluster/{config.cluster.name}.yaml"
        print(f"\n{best.found.tokens_a_day:,.0f} tokens a day{until}; simulated, on figures of {file}")
        print("\npython pretrain_gpt_moe.py " + " ".join([*common, *best.overrides()]))
        if args.picture:
            draw_timelines(args.picture, candidates)
    if args.json:
        args.json.write_text(json.dumps(as_json(candidates, world=world, common=common), indent=1, allow_nan=False) + "\n")
    return 0


def chosen(config: "PretrainConfig", overrides: Sequence[str], world: int, *, searching: bool) -> list[str]:
    """What a search may choose where the user did not: a batch that this many ranks can share, and bfloat16 on devices that
    have it."""
    given = {word.split("=", 1)[0].lstrip("+") for word in overrides}
    added = []
    if searching and "train.global_batch_size" not in given:
        added.append(f"train.global_batch_size={-(-SEARCH_SEQUENCES // world) * world}")
    if searching and "train.dtype" not in given and config.cluster.hardware.bfloat16_tflops:
        added.append("train.dtype=bfloat16")
    return added


def of_one_layout(config: "PretrainConfig", world: int, vocab_size: int) -> "list[Candidate]":
    """The layout as it is, under every strategy that it can run."""
    from dataclasses import replace

    from megalina.forecast.search import EAGER, candidate, ordered, plans_of
    from megalina.parallel.plans import strategy_of
    from megalina.validate import check_config

    check_config(replace(config, strategy=strategy_of(EAGER, config.strategy)), world)
    plans = plans_of(config, world, vocab_size=vocab_size)
    return ordered([candidate(config, p, world, vocab_size=vocab_size) for p in plans])


def summary(candidates: "Sequence[Candidate]") -> str:
    fitting = sum(c.fits for c in candidates)
    if not fitting:
        least = min(c.memory_bytes for c in candidates)
        return f"none of {len(candidates)} fits, the smallest needs {least / 2**30:.1f} GiB a rank: take more or larger devices"
    return f"{fitting} of {len(candidates)} candidates fit"


def draw_timelines(path: Path, candidates: "Sequence[Candidate]") -> None:
    """The fastest one, above eager in the same layout."""
    from megalina.timeline.picture import draw

    best = candidates[0]
    eager = next(
        (c for c in candidates if c.plan.strategy == "eager" and c.config.parallel == best.config.parallel and c.found), None
    )
    pair = [eager, best] if eager is not best else [best]
    shown = {str(c.plan): c.found.timeline.events(0) for c in pair if c is not None and c.found}
    draw(path, shown, note=f"simulated, {best.config.cluster.name}")


def show(done: int, total: int, what: str) -> None:
    print(f"\r{what}: {done}/{total} ", end="", file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="A=B", help="as for pretrain_gpt_moe.py, and nodes=N")
    parser.add_argument(
        "--search", action="store_true", help="layouts x recompute x micro-batch x strategies, not this one alone"
    )
    parser.add_argument("--tokens", type=float, default=0.0, metavar="N", help="say how many days so many tokens take")
    parser.add_argument("--vocab-size", type=int, default=0, metavar="N", help=f"default: the model's, or {DEFAULT_VOCAB}")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="the fastest one's step as a timeline")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all candidates")
    return parser


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # pretrain_gpt_moe.py, tools
    sys.exit(main())
