"""Analyze all-to-all: sections 2 and 4 of the Lina paper on your own model and cluster.

python tools/analyze_alltoall.py [OVERRIDES] [--experts 2,4,8] [--steps N] [--json FILE] [--plot PNG] [--timeline PNG]
    [--trace FILE]
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from math import gcd
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megalina.config import PretrainConfig
    from megalina.launch import Member
    from megalina.timeline.trace import TracedStep
    from papers.lina.alltoall import Analysis

BAD_INPUT = 2  # exit code
WARM_UP_STEPS = 5
PICTURES, TRACES = (".png", ".svg"), (".json", ".json.gz")


@dataclass(frozen=True, slots=True)
class Measured:
    """One setting, as all ranks hold it."""

    analysis: "Analysis"
    last_step: "TracedStep"
    offsets_s: list[float]  # of their clocks
    note: str  # that devices are emulated


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_intermixed_args(argv)
    from megalina import launch
    from megalina.cli.train import check_data
    from megalina.explain import explain

    member = launch.joined(os.environ)
    try:
        check_files(args)
        configs = settings_of(args.overrides, args.experts, args.steps, member)
        if member is None:
            check_data(configs[0])
            return _launch(argv, configs[0].launch.ranks)
        if not _agreed(configs[0], member):
            return BAD_INPUT  # rank 0 says why
    except Exception as error:
        if not _is_input(error):
            raise
        print(explain(error, args.overrides), file=sys.stderr)
        return BAD_INPUT
    from torch import distributed as dist

    settings = [measure(config, args.steps, first=member.rank == 0) for config in configs]
    dist.destroy_process_group()
    if member.rank == 0:
        write(settings, args)
    return 0


def check_files(args: argparse.Namespace) -> None:
    """ValueError for a file that could not be written at the end."""
    for flag, endings in (("json", ()), ("plot", PICTURES), ("timeline", PICTURES), ("trace", TRACES)):
        path: Path | None = getattr(args, flag)
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"--{flag} {path}: there is no folder {path.absolute().parent}")
        if path is not None and endings and not path.name.endswith(endings):
            raise ValueError(f"--{flag} {path}: the name must end in {' or '.join(endings)}")


def settings_of(overrides: Sequence[str], experts: str, steps: int, member: "Member | None") -> "list[PretrainConfig]":
    """The configuration of each setting, checked; ValueError, or an error of Hydra, for bad input."""
    from megalina.cli.train import check
    from megalina.compose import compose
    from megalina.parallel.plan_file import with_plan

    own = compose(overrides)
    train = replace(own.train, steps=max(own.train.steps, WARM_UP_STEPS + steps))  # the schedule is that of the real run
    own = replace(own, train=train, guard=replace(own.guard, spike="none"))
    world = member.world if member else own.launch.ranks
    own = with_plan(own, world)
    configs = [own]
    if experts:
        most = world // own.parallel.tp
        configs = [
            replace(own, model=replace(own.model, num_experts=n), parallel=replace(own.parallel, ep=gcd(n, most)))
            for n in numbers_of(experts)
        ]
    for config in configs:
        if config.parallel.ep < 2:
            what = f"--experts {config.model.num_experts} on {world} rank(s)" if experts else f"parallel.ep={config.parallel.ep}"
            raise ValueError(f"{what} gives no all-to-all: ranks must share the experts, as with launch.ranks=4 parallel.ep=4")
        check(config, world=world, local_ranks=member.local_ranks if member else world)
    return configs


def numbers_of(experts: str) -> list[int]:
    """Of --experts."""
    try:
        numbers = [int(word) for word in experts.split(",")]
    except ValueError:
        raise ValueError(f"--experts {experts}: give numbers with commas between, such as 2,4,8") from None
    if min(numbers) < 2:
        raise ValueError(f"--experts {experts}: a layer needs at least 2 experts")
    return numbers


def measure(config: "PretrainConfig", steps: int, *, first: bool) -> Measured:
    """Train some steps; all ranks call it together."""
    from megalina.comm.calibration import calibrate, fastest, sizes_of_step
    from megalina.console import StatusLine
    from megalina.data.source import open_data
    from megalina.layout import rows
    from megalina.mesh import all_gather_object
    from megalina.timeline.recorder import Event, Recorder
    from megalina.timeline.trace import TracedStep, aligned
    from megalina.train.step_runner import StepRunner
    from megalina.train.timing import emulation_note, machine
    from megalina.train.trainer import choose_device
    from papers.lina.alltoall import analysis_of

    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    runner, own = StepRunner(config, data, device=choose_device(config.launch.device)), list[list[Event]]()
    recorder = Recorder()
    for step in range(1, WARM_UP_STEPS + 1):
        runner.compute(step, record=recorder if step == WARM_UP_STEPS else None)
    sizes_bytes = sizes_of_step(runner.mesh, recorder.events())
    before = calibrate(runner.mesh, runner.log, sizes_bytes, sharded=config.parallel.zero == 1)
    device = runner.trainable.device
    if device is not None:
        device.busy_s = device.overrun_s = 0.0
    status = StatusLine()
    gc.collect()
    gc.disable()  # a collection would hit some step
    try:
        for step in range(WARM_UP_STEPS + 1, WARM_UP_STEPS + steps + 1):
            if first:
                status.show(f"{config.model.num_experts} experts: step {step - WARM_UP_STEPS}/{steps}")
            recorder = Recorder()
            runner.compute(step, record=recorder)
            own.append(recorder.events())
    finally:
        gc.enable()
        status.end()
    after = calibrate(runner.mesh, runner.log, sizes_bytes, sharded=config.parallel.zero == 1)
    alone = fastest(before, after, sizes_bytes)
    times_s = (device.busy_s, device.overrun_s) if device is not None else (0.0, 0.0)
    by_rank, machines, times = zip(*all_gather_object(runner.mesh, (own, machine(), times_s)), strict=True)
    by_step = [list(events) for events in zip(*by_rank, strict=True)]
    busy_s, overrun_s = map(sum, zip(*times, strict=True))
    groups = rows(runner.mesh.shape)
    analysis = analysis_of(
        by_step,
        alone,
        groups=groups["ep"],
        experts=config.model.num_experts,
        strategy=config.strategy.name,
        overrun_fraction=overrun_s / busy_s if busy_s else 0.0,
    )
    runner.close()
    last = TracedStep(by_step[-1], groups, alone)
    return Measured(analysis, last, aligned(last.by_rank, machines), emulation_note(runner.trainable))


def write(settings: Sequence[Measured], args: argparse.Namespace) -> None:
    """Print the tables, and write the files that are asked for."""
    from megalina.timeline import picture
    from megalina.timeline.trace import write_trace
    from papers.lina import alltoall_figure
    from papers.lina.alltoall import as_json
    from papers.lina.alltoall_tables import report

    analyses, last = [m.analysis for m in settings], settings[-1]
    print(report(analyses, steps=args.steps, note=last.note), flush=True)
    if args.json:
        args.json.write_text(json.dumps(as_json(analyses, steps=args.steps, note=last.note), indent=1) + "\n")
    if args.plot:
        alltoall_figure.draw(args.plot, analyses, last.note)
    if args.timeline:
        timelines = {f"{m.analysis.experts} experts, rank 0": m.last_step.by_rank[0] for m in settings}
        picture.draw(args.timeline, timelines, last.note, race=False)
    if args.trace:
        write_trace(args.trace, {WARM_UP_STEPS + args.steps: last.last_step}, last.offsets_s, last.note)


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, whole

    parser = Parser(
        description="Trains some steps of your configuration, with your strategy, and says what all-to-alls cost: their share of "
        "the step (by number of experts), what a MoE layer's forward pass goes to, how much all-to-alls are slowed down by "
        "gradients, and how long devices stand idle.  The paper's numbers stand beside.",
        epilog="Starts launch.ranks ranks here, or joins those of torchrun, srun or tools/emulate_cluster.py.  Nothing is "
        "written but the files that are asked for.  Example: tools/emulate_cluster.py --nodes 4 --link-mbit 500 -- python "
        "tools/analyze_alltoall.py model=laptop strategy=ddp parallel.ep=4 --experts 4,8 --plot slowdown.png",
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as of pretrain_gpt_moe.py: model=laptop parallel.ep=4")
    parser.add_argument(
        "--experts", default="", metavar="E,E", help="once for each number of experts a layer, over as many ranks as divide it "
        "(parallel.ep is set); default: the configuration's own",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=whole(1, 1_000_000), default=20, metavar="N", help="measured steps a setting (default: 20)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all numbers, and every slowdown")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plots of shares, a layer, slowdowns (CDF), idle time; .svg too")
    parser.add_argument("--timeline", type=Path, metavar="PNG", help="the last step of rank 0, a row a setting; .svg too")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="the last step of all ranks, for ui.perfetto.dev: .json.gz")
    return parser


def _launch(argv: Sequence[str], ranks: int) -> int:
    """This very command once a rank, each of which finds that it has been started."""
    from megalina import launch

    with tempfile.TemporaryDirectory(prefix="megalina_analyze_") as logs:
        try:
            launch.run_ranks([sys.executable, str(Path(__file__).resolve()), *argv], ranks=ranks, logs=Path(logs))
        except launch.Stopped as error:
            print(error, file=sys.stderr)
            return 128 + error.signum
        except launch.RankFailed as error:
            print(error, file=sys.stderr)
            return 1
    return 0


def _agreed(config: "PretrainConfig", member: "Member") -> bool:
    """Whether all ranks hold the same configuration; then they have a process group."""
    from torch import distributed as dist

    from megalina.agreement import Agreement
    from megalina.cli.train import check_data
    from megalina.train.trainer import choose_device

    os.environ.update(member.environment())
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    agent_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    agreement = Agreement(member, agent_store=agent_store, timeout_s=config.cluster.timeout_s, attempt=attempt)
    if member.rank > 0 and agreement.take(config) is None:
        return False
    if member.rank == 0:
        try:
            check_data(config)
        except (ValueError, OSError):
            agreement.refuse()
            raise
        agreement.offer(config)
    backend = "nccl" if choose_device(config.launch.device).type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=config.cluster.timeout_s))
    return True


def _is_input(error: Exception) -> bool:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return isinstance(error, (HydraException, OmegaConfBaseException, ValueError, OSError))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from megalina.console import command

    command(main)
