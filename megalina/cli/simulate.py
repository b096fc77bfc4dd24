"""Simulates steps of training runs in virtual time, one configuration or a sweep of them: no ranks, no GPU, no weights.

python tools/simulate.py --help
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalina.cli.hydra_command import arguments_for_hydra, show_help
from megalina.compose import CONF, register_schema
from megalina.explain import explain

BAD_INPUT = 2  # exit code


@dataclass(slots=True, kw_only=True)
class SimulateConfig:
    """What a simulation needs besides the configuration of a run; explained in conf/simulate.yaml."""

    sequences_per_rank: int = 0  # 0: train.global_batch_size as it is
    vocab_size: int = 32768
    slow_rank: int = -1  # none
    slow_factor: float = 1.0
    busiest_load: float = 1.0
    trace: str = ""
    picture: str = ""
    json: str = ""
    redraw: str = ""


register_schema()
ConfigStore.instance().store(name="simulate_schema", node=SimulateConfig, package="simulate")


class SweepReport(Callback):
    """What a sweep leaves behind once its last job is done."""

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        draw(Path(config.hydra.sweep.dir))


@hydra.main(config_path=str(CONF), config_name="simulate", version_base="1.3")
def job(cfg: DictConfig) -> float:
    """One job.  Returns the step's seconds, which Hydra's optimising sweepers want; nan where there is no step."""
    hydra_cfg = HydraConfig.get()
    words = OmegaConf.to_container(hydra_cfg.overrides.task)
    assert isinstance(words, list)
    try:
        if hydra_cfg.mode == RunMode.MULTIRUN:
            return _one_of_many(cfg, words, int(hydra_cfg.job.num), Path(hydra_cfg.sweep.dir))
        if cfg.simulate.redraw:
            draw(Path(cfg.simulate.redraw))
            return float("nan")
        return _alone(cfg, words)
    except (ValueError, OmegaConfBaseException, OSError) as error:
        print(explain(error, sys.argv[1:]), file=sys.stderr)
        sys.exit(BAD_INPUT)


def _alone(cfg: DictConfig, words: list[str]) -> float:
    from megalina.perfmodel.forecast.sweep import row_of, simulated

    job = _job(cfg, words)
    _check_paths(cfg.simulate)
    found = simulated(job)
    row = row_of(0, {}, job, found)
    _show(job, found)
    _write(cfg.simulate, found, job, Path())
    if cfg.simulate.json:
        Path(cfg.simulate.json).write_text(json.dumps(row, indent=1, allow_nan=False) + "\n")
    return row["step_s"] or float("nan")


def _one_of_many(cfg: DictConfig, words: list[str], number: int, folder: Path) -> float:
    """What can't be simulated is a row, too, and the sweep goes on."""
    from megalina.perfmodel.forecast.sweep import RESULTS, append, row_of, simulated

    if number == 0 and (folder / RESULTS).exists():
        raise ValueError(f"{folder / RESULTS} holds another sweep: give another hydra.sweep.dir, or remove it")
    job = _job(cfg, words)
    try:
        outcome: Any = simulated(job)
    except ValueError as error:
        outcome = error
    swept = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    row = row_of(number, swept, job, outcome)
    folder.mkdir(parents=True, exist_ok=True)
    append(folder / RESULTS, row)
    if not isinstance(outcome, ValueError):
        _write(cfg.simulate, outcome, job, folder / str(number))
    says = row["reason"] or f"{row['step_s'] * 1e3:.1f} ms, {row['plan']}"
    print(f"job {number}: {says}", file=sys.stderr, flush=True)
    return row["step_s"] or float("nan")


def _job(cfg: DictConfig, words: list[str]) -> Any:
    from megalina.perfmodel.forecast.sweep import Job, weak_scaling
    from megalina.perfmodel.forecast.uneven import Unevenness
    from megalina.worker import load_config

    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    own = plain.pop("simulate")
    config = load_config(OmegaConf.to_yaml(OmegaConf.create(plain)))
    world = config.cluster.nodes * config.cluster.ranks_per_node
    for name, low, high in (("sequences_per_rank", 0, 2**24), ("vocab_size", 1, 2**24), ("busiest_load", 1, 1_000_000)):
        if not low <= own[name] <= high:
            raise ValueError(f"simulate.{name}={own[name]} must be from {low} to {high}")
    scaled = weak_scaling(config, world, own["sequences_per_rank"])
    kept = [word for word in words if not word.lstrip("+").startswith("simulate.")]
    if scaled is not config:
        kept = [word for word in kept if not word.startswith("train.global_batch_size=")]
        kept.append(f"train.global_batch_size={scaled.train.global_batch_size}")
    unevenness = Unevenness(slow_rank=own["slow_rank"], slow_factor=own["slow_factor"], busiest_load=own["busiest_load"])
    return Job(scaled, world, config.model.vocab_size or own["vocab_size"], unevenness, kept)


def _check_paths(own: DictConfig) -> None:
    for name in ("trace", "picture", "json"):
        if own[name] and not Path(own[name]).absolute().parent.is_dir():
            raise ValueError(f"simulate.{name}={own[name]}: there is no folder {Path(own[name]).absolute().parent}")


def _show(job: Any, found: Any) -> None:
    from megalina.perfmodel.forecast.forecast import memory_limit_bytes
    from megalina.perfmodel.forecast.pipeline_report import layers_of, rank_table
    from megalina.perfmodel.forecast.report import memory_table, strategy_table

    cluster = job.config.cluster
    print(f"{cluster.name}, {cluster.nodes} nodes of {cluster.ranks_per_node}, simulated\n")
    print(strategy_table([found], layouts=False))
    if found.found is not None:
        if found.found.of_ranks:
            print(f"\n{rank_table(found.config, found.found, layers_of(_piped(job, found)))}")
        of = "the rank that holds the most" if found.found.of_ranks else "a rank"
        print(f"\nmemory of {of}\n{memory_table(found.found.memory, memory_limit_bytes(cluster))}")


def _piped(job: Any, found: Any) -> Any:
    from megalina.perfmodel.forecast.priced_pipeline import PricedPipeline

    return PricedPipeline(found.config, job.world, found.plan, vocab_size=job.vocab_size)


def _write(own: DictConfig, found: Any, job: Any, folder: Path) -> None:
    """Trace and picture of a job that was simulated; of a pipeline all ranks' cells."""
    from megalina.perfmodel.forecast.pipeline_report import draw_cells
    from megalina.perfmodel.forecast.sweep import trace
    from megalina.timeline.picture import draw as draw_step

    if found.found is None:
        return
    if own.trace:
        trace(folder / own.trace, found, job.world)
    if own.picture:
        (folder / own.picture).parent.mkdir(parents=True, exist_ok=True)
        if found.found.of_ranks:
            draw_cells(folder / own.picture, _piped(job, found), found.found, note="simulated")
            return
        draw_step(folder / own.picture, {str(found.plan): found.found.timeline.events(0)}, note="simulated")


def draw(folder: Path) -> None:
    """sweep.png and sweep.html of a sweep's rows, and the table on stdout."""
    from megalina.perfmodel.forecast.sweep import RESULTS, read
    from megalina.perfmodel.forecast.sweep_report import figure_of, page, table

    if not (folder / RESULTS).is_file():
        raise ValueError(f"{folder / RESULTS}: there is no such file; give the folder of a sweep")
    rows = read(folder / RESULTS)
    print(table(rows))
    if (figure := figure_of(rows)) is not None:
        figure.savefig(folder / "sweep.png")
    (folder / "sweep.html").write_text(page(rows, figure))
    print(f"\n{folder / RESULTS}, sweep.png, sweep.html")


def main(argv: Sequence[str] | None = None) -> int:
    """The command: mistakes become one line and exit code 2."""
    with arguments_for_hydra(argv):
        try:
            if not show_help("simulate", sys.argv[1:]):
                job()
        except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
            print(explain(error, sys.argv[1:]), file=sys.stderr)
            return BAD_INPUT
        except SystemExit as end:  # of a job that has said why
            return int(end.code or 0)
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    from megalina.console import command

    command(main)
