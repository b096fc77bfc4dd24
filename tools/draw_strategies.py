"""Draw strategies: one training step of each as a timeline in virtual time, where ranks, links and devices are mere numbers.

python tools/draw_strategies.py --out FOLDER [OVERRIDES] [--strategies A,B] [--ranks N --link-mbit X --latency-ms X]
"""

import argparse
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megalina.config import PretrainConfig
    from megalina.perfmodel.forecast.priced_step import PricedStep
    from megalina.perfmodel.sim.list_search import Found
    from megalina.perfmodel.sim.network import Network
    from megalina.perfmodel.sim.virtual import Timeline
    from megalina.step.plan import Plan
    from megalina.step.program import Instruction, Program
    from megalina.step.strategy import Setting

BAD_INPUT = 2  # exit code
RANKS, LINK_MBIT, LATENCY_MS = 4, 500.0, 1.0
# what a YAML leaves to measured steps, or needs from elsewhere
EXTRA = {"lina": ("strategy.packing=2",), "lina_zero": ("parallel.zero=1",)}
WIDTH, SMALL = 1.09, 0.01  # of the axis, in longest steps: room for words at the end; of a step: waits that go without saying
DPI, DPI_OF_ALL = 95, 58
ALL = "all"


@dataclass(frozen=True, slots=True)
class Cluster:
    """`ranks` nodes of one rank, each with a link of its own."""

    ranks: int = RANKS
    link_mbit: float = LINK_MBIT
    latency_ms: float = LATENCY_MS  # of each exchange, whatever its size


@dataclass(frozen=True)
class VirtualJob:
    """A configuration on a cluster in virtual time: all ranks are alike, and all experts get equally many rows."""

    config: "PretrainConfig"
    cluster: Cluster

    @property
    def plan(self) -> "Plan":
        return self.priced.plan

    @cached_property
    def priced(self) -> "PricedStep":
        from megalina.perfmodel.forecast.partition import best_partition
        from megalina.perfmodel.forecast.priced_step import PricedStep
        from megalina.plan_settings import AUTO, plan_of
        from megalina.train.packing import allowed_packings

        config, ranks = self.config, self.cluster.ranks
        vocab_size = config.model.vocab_size or config.data.vocab_size
        plan = plan_of(config.strategy, packing=allowed_packings(config, ranks)[0])
        step = PricedStep(config, ranks, plan, vocab_size=vocab_size, network=self.network, seconds=self.seconds)
        if config.strategy.partition != AUTO:
            return step
        return step.under(best_partition(config, ranks, plan, vocab_size=vocab_size, step=step))

    @property
    def seconds(self) -> "Callable[[Instruction], float]":
        """Of an emulated device; hosts take no time."""
        from megalina.perfmodel.cost.instruction_bytes import bucket_specs
        from megalina.perfmodel.cost.instruction_seconds import emulated_seconds
        from megalina.step.program import Kind
        from megalina.train.packing import allowed_packings

        config, ranks = self.config, self.cluster.ranks
        packing = allowed_packings(config, ranks)[0]
        buckets = bucket_specs(config, ranks, vocab_size=config.model.vocab_size or config.data.vocab_size, packing=packing)
        computed = emulated_seconds(self.config, buckets)
        assert computed is not None
        return lambda instruction: computed(instruction) if instruction.kind is Kind.COMPUTE else 0.0

    @property
    def network(self) -> "Network":
        from megalina.perfmodel.sim.network import one_level

        return one_level(self.cluster.link_mbit * 1e6 / 8, self.cluster.latency_ms / 1e3)

    @property
    def setting(self) -> "Setting":
        """What a strategy builds a step from."""
        return self.priced.setting

    def step(self, program: "Program") -> "Timeline":
        return self.priced.walk(program=program)

    def found(self, *, deferred: bool = True) -> "Found":
        """What strategy=search finds.  Without `deferred` only lists in which no weights' gradients are deferred."""
        from megalina.perfmodel.forecast.searched_list import Job, searched_list

        config, strategy = self.config, self.config.strategy
        vocab_size = config.model.vocab_size or config.data.vocab_size
        job = Job(config, self.cluster.ranks, vocab_size, self.network, self.seconds, self.plan.packing)
        return searched_list(
            job, evaluations=strategy.search_evaluations, most_mb=strategy.search_mb, seed=config.train.seed, deferred=deferred
        )

    def drawn(self) -> "Drawn":
        """The step of the configuration's strategy."""
        from megalina.plan_settings import SEARCH
        from megalina.step.strategy import training_step

        strategy = self.config.strategy
        if strategy.name == SEARCH and not strategy.order:
            found = self.found()
            return Drawn(found.plan, self.step(found.program))
        return Drawn(self.plan, self.step(training_step(strategy.name, self.setting)))


def ladder_job(*overrides: str, cluster: Cluster = Cluster()) -> VirtualJob:
    """The ladder's model with light gradients, and one expert a rank, unless `overrides` say otherwise; with strategy=pair its
    micro-batch in two halves, unless there are more.  ValueError, or an error of Hydra, for bad ones."""

    from megalina.compare.ladder import Setting, with_partners
    from megalina.compose import compose
    from megalina.parallel.plan_file import with_plan
    from megalina.validate import check_config

    if wrong := [o for o in overrides if not isinstance(o, str)]:
        raise ValueError(f"ladder_job({wrong[0]!r}): give overrides one by one, as in ladder_job('model.num_heads=7')")
    ladder = Setting("", cluster.ranks, 1, ()).all_overrides()
    composed = compose([*ladder, f"launch.ranks={cluster.ranks}", *overrides])
    config = with_partners(with_plan(composed, cluster.ranks), cluster.ranks)
    check_config(config, cluster.ranks)
    if config.parallel.tp > 1:
        raise ValueError(f"parallel.tp is {config.parallel.tp}: steps are drawn without tensor parallelism, set it to 1")
    if not config.cluster.attention_ms and not config.cluster.device_gflops:
        raise ValueError("how fast is a device? Give cluster.attention_ms and cluster.experts_ms, or cluster.device_gflops")
    return VirtualJob(config, cluster)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One step of a strategy."""

    plan: "Plan"
    timeline: "Timeline"

    @property
    def title(self) -> str:
        from megalina.timeline.contention import summary

        step_s, traffic = self.timeline.step_s, summary(self.timeline.events(0), {}).traffic
        classes = {"tokens": "a2a", "gradients": "grads", "weights": "params"}
        waits_s = {name: traffic[key].exposed_s for name, key in classes.items()}
        shown = [f"{wait_s * 1e3:.0f} ms for {name}" for name, wait_s in waits_s.items() if wait_s > SMALL * step_s]
        return f"{self.plan}    {step_s * 1e3:.0f} ms a step, stands still {', '.join(shown) or 'hardly ever'}"


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_intermixed_args(argv)
    from megalina.explain import explain

    try:
        drawn = steps_of(args)
    except Exception as error:
        if not _is_input(error):
            raise
        print(explain(error, args.overrides), file=sys.stderr)
        return BAD_INPUT
    args.out.mkdir(exist_ok=True)
    note = f"virtual time; {args.ranks} ranks, links of {args.link_mbit:g} Mbit/s"
    for name, figure in figures_of(drawn, note=note).items():
        _save(figure, args.out / f"{name}.png", dpi=DPI_OF_ALL if name == ALL else DPI)
    for step in drawn.values():
        print(step.title)
    return 0


def steps_of(args: argparse.Namespace) -> dict[str, Drawn]:
    """By the name of the strategy; ValueError, or an error of Hydra, for bad input."""
    from megalina.namespaces import check_figures
    from megalina.step.strategy import STRATEGIES

    names = args.strategies.split(",") if args.strategies else list(STRATEGIES)
    if unknown := [name for name in names if name not in STRATEGIES]:
        raise ValueError(f"--strategies {','.join(unknown)}: choose among {', '.join(STRATEGIES)}")
    if not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.absolute().parent}")
    check_figures(ranks=args.ranks, link_mbit=args.link_mbit)
    cluster = Cluster(args.ranks, args.link_mbit, args.latency_ms)
    jobs = {name: ladder_job(f"strategy={name}", *EXTRA.get(name, ()), *args.overrides, cluster=cluster) for name in names}
    return {name: job.drawn() for name, job in jobs.items()}


def figures_of(drawn: Mapping[str, Drawn], *, note: str) -> "dict[str, Figure]":
    """One of each strategy, and with several "all", with the same milliseconds at the same place in all of them."""
    from megalina.timeline.picture import figure_of

    timelines = {step.title: step.timeline.events(0) for step in drawn.values()}
    right_ms = WIDTH * 1e3 * max(step.timeline.step_s for step in drawn.values())
    figures = {name: figure_of({title: timelines[title]}, note) for name, title in zip(drawn, timelines, strict=True)}
    if len(drawn) > 1:
        figures[ALL] = figure_of(timelines, note, race=False)
    for figure in figures.values():
        figure.axes[0].set_xlim(-0.002 * right_ms, right_ms)
    return figures


def _save(figure: "Figure", path: Path, *, dpi: int) -> None:
    """With a palette, which makes the file small."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    Image.open(buffer).convert("RGB").quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)


def _is_input(error: Exception) -> bool:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return isinstance(error, (ValueError, OSError, HydraException, OmegaConfBaseException))


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, number, whole

    parser = Parser(
        description="Draws one training step of each strategy as a timeline in virtual time: no rank is started and nothing is "
        "measured.  Devices take the time that the configuration says, links share their rate fairly, and each step is the very "
        "list that ranks would run.  All pictures have one scale; all.png has all of them.  The model is the ladder's "
        "with light gradients (6 layers, attention 10 ms, experts 14 ms), unless overrides say otherwise.",
        epilog="examples:\n  tools/draw_strategies.py --out docs/images/strategies model.num_layers=3   (docs/strategies.md)\n"
        "  tools/draw_strategies.py --out mine --strategies eager,lina --ranks 8 --link-mbit 1000 model.num_heads=7 "
        "model.num_kv_heads=7\n  tools/draw_strategies.py --out mine --strategies flow strategy.parts=4 strategy.late_layers=0",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of pretrain_gpt_moe.py")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for NAME.png of each; made if it isn't there")
    parser.add_argument("--strategies", default="", metavar="A,B", help="default: all but auto, which has no step of its own")
    parser.add_argument(
        "--ranks", type=whole(1, 1024), default=RANKS, metavar="N", help=f"each on a node of its own (default: {RANKS})"
    )
    parser.add_argument(
        "--link-mbit", type=number(above=True), default=LINK_MBIT, metavar="X", help="of each node, each way (default: 500)"
    )
    parser.add_argument(
        "--latency-ms", type=number(0, 1e9), default=LATENCY_MS, metavar="X", help="of each exchange (default: 1)"
    )
    return parser


if __name__ == "__main__":
    from megalina.console import command

    command(main)
