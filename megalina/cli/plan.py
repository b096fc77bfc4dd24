"""Plan a run: does it fit, which layout, which strategy, how fast?  Without a GPU, without weights, without starting anything.

    python tools/plan.py model=mixtral_8x7b cluster=h100_400g nodes=8 --search
    python tools/plan.py experiment=laptop cluster=h100_400g nodes=1 parallel.ep=8 train.global_batch_size=64
    python tools/plan.py model=qwen3_30b_a3b cluster=h100_400g nodes=128 parallel.ep=128 parallel.zero=1 train.dtype=bfloat16 \
        train.seq_len=4096 train.micro_batch_size=2 train.global_batch_size=2048 --tokens 1e12 --loads 1,1.5,3

Overrides are those of pretrain_gpt_moe.py; `nodes=N` is short for cluster.nodes=N, and all ranks of these nodes take part.  The
step's own list is walked in virtual time (megalina/perfmodel/sim) with the cluster's figures (conf/cluster), of which each says
if it is published or assumed: results are as good as those.  A search tries pipelines, too: stages, chunks and schedules.
Routing is taken to be even, but for the columns of --loads, which layouts without pipelines have.  """

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megalina.config import ParallelConfig, PretrainConfig
    from megalina.perfmodel.forecast.priced_step import Shared
    from megalina.perfmodel.forecast.search import Candidate

BAD_INPUT = 2  # exit code
MOST_LOAD = 1_000_000  # as many as there are ranks at most
SHOWN = 10
SKEW = 1.5  # rows of the busiest rank over the mean, for which a plan should have room
MOST_WORDS = 2**24
DEFAULT_VOCAB = 32768  # where neither the model nor --vocab-size says it
SEARCH_SEQUENCES = 1024  # a step, where the search may choose
OF_PIPELINES = ("parallel.pp", "parallel.pp_chunks", "parallel.pp_layout", "strategy.pipeline")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_intermixed_args(argv)
    from megalina.explain import explain

    overrides = [f"cluster.{word}" if word.startswith("nodes=") else word for word in args.overrides]
    try:
        return plan(args, overrides)
    except Exception as error:  # what Hydra raises is no ValueError
        if not isinstance(error, ValueError | OSError) and not type(error).__module__.startswith(("hydra", "omegaconf")):
            raise
        print(explain(error, overrides), file=sys.stderr)
        return BAD_INPUT


def plan(args: argparse.Namespace, overrides: list[str]) -> int:
    from megalina.cli.progress import Bar
    from megalina.compose import compose
    from megalina.dry_run import describe
    from megalina.perfmodel.forecast.forecast import check_work
    from megalina.perfmodel.forecast.priced_step import Shared, few_collections
    from megalina.perfmodel.forecast.report import as_json, command, heads, joined, origin, planned_for, strategy_table
    from megalina.perfmodel.forecast.search import search
    from megalina.validate import check_hardware

    for path in filter(None, (args.json, args.picture)):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}")
    config = compose(overrides)
    check_hardware(config.cluster)

    world = config.cluster.nodes * config.cluster.ranks_per_node
    added = chosen(config, overrides, world, searching=args.search)
    config = compose([*overrides, *added])
    vocab_size = args.vocab_size or config.model.vocab_size or DEFAULT_VOCAB
    check_work(config, world)
    kept = [word for word in overrides if not (args.search and word.split("=", 1)[0] in OF_PIPELINES)]  # the search says them
    common = planned_for([*kept, *added], config, world=world, vocab_size=vocab_size)
    if start := origin(overrides, config):
        print(f"{start}\n")
    if added:
        print(f"chosen, since nothing else was asked for: {' '.join(added)}\n")
    shared = Shared()
    with few_collections(), Bar() as bar:
        if args.search:
            candidates = search(config, world, vocab_size=vocab_size, progress=bar, shared=shared)
        else:
            candidates = of_one_layout(config, world, vocab_size, progress=bar, shared=shared)
    best = candidates[0]
    print(describe(best.config, world, vocab_size=vocab_size).rpartition("\n")[0])  # without the run's folder
    print(f"attention  {heads(best.config)}")
    print_figures(best, world, vocab_size, args.loads, shared)
    print(f"\n{config.cluster.name}, {config.cluster.nodes} nodes of {config.cluster.ranks_per_node}: {summary(candidates)}")
    print(strategy_table(candidates[:SHOWN] if args.search else candidates, layouts=args.search))
    if best.found is None:
        print(f"\n{would_fit(best, world, vocab_size)}")
    if best.found is not None:
        print_skewed(candidates, world, vocab_size, shared)
        days = args.tokens / best.found.tokens_a_day if args.tokens else 0.0
        until = f"; {days:,.1f} days for {args.tokens:,.0f} tokens" if days else ""
        file = f"conf/cluster/{config.cluster.name}.yaml"
        print(f"\n{best.found.tokens_a_day:,.0f} tokens a day{until}; simulated, on figures of {file}")
        words = joined(common, best.overrides())
        print("\n" + command(words, nodes=config.cluster.nodes, ranks_per_node=config.cluster.ranks_per_node))
        if args.picture:
            draw_timelines(args.picture, candidates, world, vocab_size)
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


def print_skewed(candidates: "Sequence[Candidate]", world: int, vocab_size: int, shared: "Shared") -> None:
    """Where the fastest one does not fit under skew, the fastest that does."""
    from megalina.perfmodel.forecast.search import fits_under

    best, *others = [c for c in candidates if c.found]
    if fits_under(best, SKEW, world, vocab_size=vocab_size, shared=shared):
        return
    other = next((c for c in others if fits_under(c, SKEW, world, vocab_size=vocab_size, shared=shared)), None)
    if other is None or other.found is None:
        print(f"\nat a skew of {SKEW:g} it does not fit, nor does any other that is shown here")
        return
    layout = other.config.parallel
    where = f"{layout_words(layout)} parallel.zero={layout.zero}"
    train = f"train.micro_batch_size={other.config.train.micro_batch_size} train.recompute={other.config.train.recompute}"
    print(
        f"\nat a skew of {SKEW:g} it does not fit; the fastest that does: {other.found.step_s * 1e3:.1f} ms with {where} "
        f"{train}, {other.plan}"
    )


def layout_words(parallel: "ParallelConfig") -> str:
    """As overrides."""
    words = f"parallel.tp={parallel.tp} parallel.ep={parallel.ep}"
    words = words if parallel.pp == 1 else f"parallel.pp={parallel.pp} parallel.pp_chunks={parallel.pp_chunks} {words}"
    return words if parallel.cp == 1 else f"{words} parallel.cp={parallel.cp} parallel.cp_kind={parallel.cp_kind}"


def of_one_layout(
    config: "PretrainConfig", world: int, vocab_size: int, *, progress: "Callable[[int, int, str], None]", shared: "Shared"
) -> "list[Candidate]":
    """The layout as it is, under every strategy that it can run."""
    from dataclasses import replace

    from megalina.perfmodel.forecast.search import candidate, ordered, plans_of
    from megalina.plan_settings import strategy_of
    from megalina.step.candidates import EAGER
    from megalina.validate import check_config

    check_config(replace(config, strategy=strategy_of(EAGER, config.strategy)), world)
    plans = plans_of(config, world, vocab_size=vocab_size)
    found = []
    for number, plan in enumerate(plans):
        progress(number, len(plans), "strategies")
        found.append(candidate(config, plan, world, vocab_size=vocab_size, shared=shared))
    return ordered(found)


def print_figures(best: "Candidate", world: int, vocab_size: int, loads: Sequence[float], shared: "Shared") -> None:
    """FLOPs, memory, and the step from left to right if it fits."""
    from megalina.blocks.counts import model_flops
    from megalina.perfmodel.forecast.forecast import WALKED, forecast, memory_limit_bytes
    from megalina.perfmodel.forecast.pipeline_report import layers_of, rank_table
    from megalina.perfmodel.forecast.priced_pipeline import PricedPipeline, priced
    from megalina.perfmodel.forecast.report import load_table, memory_table, timeline_text
    from megalina.perfmodel.forecast.search import under_loads

    config, plan, found = best.config, best.plan, best.found
    train, limit_bytes = config.train, memory_limit_bytes(config.cluster)
    flops = model_flops(config.model, config.router, vocab_size=vocab_size, seq_len=train.seq_len).per_token
    a_step = flops * train.global_batch_size * train.seq_len
    print(f"FLOPs      {flops:.3g} for a token, forward and backward; {a_step:.3g} a step")
    step = priced(config, world, plan, vocab_size=vocab_size, shared=shared)
    print(f"\nmemory of {'the rank that holds the most' if config.parallel.pp > 1 else 'a rank'}, {plan}")
    print(memory_table(found.memory if found else step.memory, limit_bytes))
    if isinstance(step, PricedPipeline):
        if found is not None:
            print(f"\n{rank_table(config, found, layers_of(step))}")
        return
    under = under_loads(config, plan, world, loads, vocab_size=vocab_size, shared=shared)
    steps_s = {
        u.load: forecast(config, world, vocab_size=vocab_size, plan=plan, load=u.load, shared=shared).step_s
        for u in under
        if u.peaks[train.recompute] <= limit_bytes
    }
    print(f"\nthe busiest rank under skew, {plan}; step with recompute {train.recompute}")
    print(load_table(under, limit_bytes, steps_s))
    if found is None:
        return
    longer = found.step_s > found.timeline.step_s * (1 + 1e-9)
    of = f"{WALKED} rounds of micro-batches, {found.timeline.step_s * 1e3:.1f} ms, of " if longer else ""
    print(f"\ntimeline of {of}a step of {found.step_s * 1e3:.1f} ms, {plan}; #: most of the time, +: some of it")
    print(timeline_text(found.timeline.events(0), found.timeline.step_s))


def would_fit(smallest: "Candidate", world: int, vocab_size: int) -> str:
    from megalina.perfmodel.forecast.forecast import memory_limit_bytes
    from megalina.perfmodel.forecast.priced_pipeline import priced
    from megalina.perfmodel.forecast.search import MOST_NODES, what_fits

    config, plan = smallest.config, smallest.plan
    words = what_fits(config, plan, world, vocab_size=vocab_size)
    layout = f"{layout_words(config.parallel)}, {plan}"
    if not words:
        state_bytes = priced(config, world, plan, vocab_size=vocab_size).state_bytes
        state = f"{state_bytes / 2**30:.1f} of {memory_limit_bytes(config.cluster) / 2**30:.1f} GiB are"
        return (
            f"{layout}: nothing up to {MOST_NODES} times as many nodes fits; {state} weights, gradients and optimizer of a rank, "
            "which has all layers of its stages: raise parallel.pp, take devices with more memory, or a smaller model"
        )
    return f"fits with {' '.join(words)} (else as {layout})"


def summary(candidates: "Sequence[Candidate]") -> str:
    fitting = sum(c.fits for c in candidates)
    if not fitting:
        least = min(c.memory_bytes for c in candidates)
        return f"none of {len(candidates)} fits, the smallest needs {least / 2**30:.1f} GiB a rank"
    return f"{fitting} of {len(candidates)} candidates fit"


def draw_timelines(path: Path, candidates: "Sequence[Candidate]", world: int, vocab_size: int) -> None:
    """The fastest one, above eager in the same layout; of a pipeline its cells."""
    from megalina.perfmodel.forecast.pipeline_report import draw_cells
    from megalina.perfmodel.forecast.priced_pipeline import PricedPipeline
    from megalina.timeline.picture import draw

    best = candidates[0]
    note = f"simulated, {best.config.cluster.name}"
    if best.found is not None and best.found.of_ranks:
        draw_cells(path, PricedPipeline(best.config, world, best.plan, vocab_size=vocab_size), best.found, note=note)
        return
    eager = next(
        (c for c in candidates if c.plan.strategy == "eager" and c.config.parallel == best.config.parallel and c.found), None
    )
    pair = [eager, best] if eager is not best else [best]
    shown = {str(c.plan): c.found.timeline.events(0) for c in pair if c is not None and c.found}
    draw(path, shown, note=note)


def loads_of(text: str) -> tuple[float, ...]:
    words = text.split(",")
    try:
        loads = tuple(map(float, words))
    except ValueError:
        loads = ()
    if not loads or not all(1 <= load <= MOST_LOAD for load in loads):
        raise argparse.ArgumentTypeError(f"{text} must be numbers from 1, for even routing, to {MOST_LOAD:,} with commas")
    return loads


def parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, number, whole

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="A=B", help="as for pretrain_gpt_moe.py, and nodes=N")
    parser.add_argument(
        "--search", action="store_true", help="layouts x recompute x micro-batch x strategies, not this one alone"
    )
    parser.add_argument("--tokens", type=number(), default=0.0, metavar="N", help="say how many days so many tokens take")
    parser.add_argument(
        "--vocab-size", type=whole(0, MOST_WORDS), default=0, metavar="N", help=f"default: the model's, or {DEFAULT_VOCAB}"
    )
    parser.add_argument(
        "--loads", type=loads_of, default=(1.0, 1.5, 2.0), metavar="A,B,...", help="rows of the busiest rank, default 1,1.5,2"
    )
    parser.add_argument("--picture", type=Path, metavar="PNG", help="the fastest one's step as a timeline")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all candidates")
    return parser


if __name__ == "__main__":
    from megalina.console import command

    command(main)
