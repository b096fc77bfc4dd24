"""Pretrains a GPT mixture-of-experts model: composes the configuration, checks it, starts or joins the ranks.

python pretrain_gpt_moe.py --help
"""

import fcntl
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megalina import launch, validate, worker
from megalina.cli.hydra_command import arguments_for_hydra, show_help
from megalina.compose import CONF, register_schema
from megalina.config import PretrainConfig, RunConfig
from megalina.console import StatusLine, command
from megalina.credentials import find_credentials, masked, refuse_credentials, text_values
from megalina.dry_run import describe
from megalina.explain import explain
from megalina.launch import later_starts
from megalina.parallel.plan_file import check_order, with_plan
from megalina.plan_settings import AUTO
from megalina.rank_files import Unsaved, tell_agent
from megalina.readiness import has_apex

if TYPE_CHECKING:
    from megalina.data.source import TokenData

BAD_INPUT = 2  # exit code
WORKER = (sys.executable, "-m", "megalina.worker")  # one a rank, with the path of config.yaml
register_schema()


@hydra.main(config_path=str(CONF), config_name="pretrain", version_base="1.3")
def job(cfg: DictConfig) -> float:
    """One run: a sweep calls it once a job.  Returns the final validation loss, which Hydra's optimising sweepers want."""
    hydra_cfg = HydraConfig.get()
    sweeping = hydra_cfg.mode == RunMode.MULTIRUN
    overrides = OmegaConf.to_container(hydra_cfg.overrides.task)  # as typed: references in them are not resolved
    assert isinstance(overrides, list)
    try:
        if not sweeping and Path(hydra_cfg.runtime.output_dir) != Path.cwd():
            raise ValueError(f"hydra.run.dir={hydra_cfg.run.dir}: the run folder is set by run.dir")
        if sweeping and OmegaConf.to_container(cfg.run)["dir"] == RunConfig().dir:  # type: ignore[index, call-overload]
            folder = Path(hydra_cfg.runtime.output_dir)
            cfg.run.dir = str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
        config = worker.load_config(cfg)
        refuse_credentials(text_values(config), find_credentials(os.environ, Path.home()))
        member = launch.joined(os.environ)
        config = with_plan(config, member.world if member else config.launch.ranks)
        if config.strategy.partition == AUTO:
            from megalina.perfmodel.forecast.partition import with_partition  # simulates

            world = member.world if member else config.launch.ranks
            validate.check_config(config, world)
            config = with_partition(config, world)
        if config.train.init_from and (Path(config.train.init_from) / "checkpoints").is_dir():
            from megalina.train.resume import with_weights  # seconds

            config = with_weights(config)
        if sweeping and member is not None:
            raise ValueError(f"-m under {member.launcher}: a sweep starts its ranks itself; run it without, with launch.ranks=N")
        if config.launch.dry_run:
            return _dry_run(config, member)
        if member is not None:
            return _join(config, member, overrides)
        return _launch(config, overrides, sweeping=sweeping)
    except launch.Stopped as error:  # of a sweep too: its other jobs are not started
        _say(str(error))
        sys.exit(128 + error.signum)
    except (ValueError, OmegaConfBaseException, OSError, launch.RankFailed, Unsaved) as error:
        line, code = _verdict(error)
        _say(f"job {hydra_cfg.job.num}: {line}" if sweeping else line)
        if sweeping:
            raise  # the jobs that follow are run all the same
        tell_agent(_masked(line), os.environ)
        sys.exit(code)


def check(config: PretrainConfig, *, world: int, local_ranks: int) -> list[str]:
    """Everything but data and checkpoints that can be known before a rank starts: ValueError, or warnings."""
    validate.check_config(config, world)
    validate.check_paths(config)
    check_replays(config)
    import torch  # seconds; --help and mistakes in the configuration don't need it

    num_gpus = torch.cuda.device_count() if config.launch.device != "cpu" else 0
    if launch.joined(os.environ) and num_gpus == 1:
        local_ranks = 1  # srun --gpus-per-task=1 shows every rank its own GPU alone
    num_cores = launch.num_cores()
    validate.check_machine(
        config,
        local_ranks=local_ranks,
        num_cores=num_cores,
        num_gpus=num_gpus,
        apex=has_apex(),
        wandb_key=validate.has_wandb_key(os.environ, Path.home()),
    )
    return validate.advice(config, local_ranks=local_ranks, num_cores=num_cores, num_gpus=num_gpus)


def check_data(config: PretrainConfig) -> int:
    """Prepares the data if that has to be done, and returns the size of its vocabulary; ValueError if the model's is smaller, or
    the tasks of `eval` can't be made of them."""
    from megalina.data.source import open_data

    data = open_data(config.data, seq_len=config.train.seq_len, seed=config.train.seed)
    check_sequences(config, data)
    vocab_size = data.vocab_size
    if config.eval.interval:
        from megalina.train.task_scores import tasks_of

        tasks_of(config, data)
    if config.model.vocab_size and vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size ({config.model.vocab_size}) is below the {vocab_size} pieces of the data: "
            "set model.vocab_size=0 to follow the data, or take the tokenizer that belongs to the model"
        )
    return config.model.vocab_size or vocab_size


def check_replays(config: PretrainConfig) -> None:
    """ValueError if a file of routing that is to be replayed can't be read, or is of another model."""
    if config.router.replay or config.router.replay_validation:
        from megalina.data.replayed import read_replays  # torch

        read_replays(config)


def check_sequences(config: PretrainConfig, data: "TokenData") -> None:
    """ValueError if the run would meet a sequence whose routing is to be replayed and isn't in the file.  Where a run goes on
    from a checkpoint, its ranks look for those of training once they know from where on."""
    if not (config.router.replay or config.router.replay_validation):
        return
    from megalina.data.replayed import replayed
    from megalina.train.known_sequences import check_known
    from megalina.train.sample_windows import pairs

    train, data = config.train, replayed(data, config)
    if config.router.replay and not _starts_from_checkpoint(config):
        steps = min(train.exit_step or train.steps, train.steps)
        windows = pairs(config.data.skip_samples)
        check_known(data.train, first=0, count=train.global_batch_size, steps=steps, windows=windows)
    if config.router.replay_validation and data.valid is not None:
        data.valid.batch(0, min(train.eval_sequences, data.valid.num_sequences))


def check_changed(config: PretrainConfig) -> None:
    """ValueError if settings differ from those of the checkpoint that the run would go on from, and must not."""
    if _starts_from_checkpoint(config):
        from megalina.train.resume import check_settings  # a second that a new run need not wait for

        check_settings(config)


def check_checkpoint(config: PretrainConfig, *, vocab_size: int) -> None:
    """ValueError if the run would start from a checkpoint that isn't of this model, or must not start because of one."""
    if _starts_from_checkpoint(config):
        from megalina.train.resume import check_start

        check_start(config, vocab_size=vocab_size)


def _starts_from_checkpoint(config: PretrainConfig) -> bool:
    """Whether there may be one, as far as is known without reading any."""
    named = config.train.init_from or config.train.resume not in ("auto", "verify", "none")
    return bool(named) or (Path(config.run.dir) / "checkpoints").is_dir()


def _dry_run(config: PretrainConfig, member: launch.Member | None) -> float:
    world = member.world if member else config.launch.ranks
    validate.check_config(config, world)
    validate.check_paths(config)
    check_replays(config)
    # Only data that needs no preparation is opened: nothing is written.
    vocab_size = check_data(config) if config.data.prefix else config.model.vocab_size or config.data.vocab_size
    check_order(config, world, vocab_size=vocab_size)
    if member is None or member.rank == 0:
        print(describe(config, world, vocab_size=vocab_size), flush=True)
    return float("nan")


def _launch(config: PretrainConfig, overrides: list[str], *, sweeping: bool) -> float:
    ranks, run_dir = config.launch.ranks, Path(config.run.dir)
    line = StatusLine()
    line.show("checking the configuration and this machine ...")
    try:
        warnings = check(config, world=ranks, local_ranks=ranks)
    finally:
        line.end()
    with _run_folder(config, ranks, overrides, sweeping=sweeping):
        _warn(warnings)
        summary_path = run_dir / "summary.json"
        summary_path.unlink(missing_ok=True)
        try:
            command, restarts = [*WORKER, str(run_dir / "config.yaml")], config.launch.restarts
            next_start = later_starts(run_dir / "checkpoints", config.train.resume)

            def again() -> tuple[list[str], str]:
                resume, origin = next_start()
                return [*command, resume], origin

            try:
                launch.run_with_restarts(command, ranks=ranks, logs=run_dir / "logs", restarts=restarts, again=again)
            except launch.RankFailed as error:
                if sweeping or not error.again:
                    raise
                resume, origin = next_start()
                raise launch.RankFailed(f"{error}\nnext, {origin}: {next_command(config, overrides, resume)}") from error
        finally:
            if summary_path.exists():  # also when a signal has ended the run early
                print(summary_path.read_text().strip(), flush=True)
        return _val_loss(json.loads(summary_path.read_text()))


def next_command(config: PretrainConfig, overrides: Sequence[str], resume: str) -> str:
    """What to type to go on where a job was lost, in the same folder.  `overrides`: as typed; `resume`: train.resume to go on
    with."""
    kept = [text for text in overrides if text.partition("=")[0] not in ("run.dir", "train.resume")]
    words = [*kept, f"run.dir={config.run.dir}", *([] if resume == "auto" else [f"train.resume={resume}"])]
    return shlex.join(["python", "pretrain_gpt_moe.py", *words])


def _join(config: PretrainConfig, member: launch.Member, overrides: list[str]) -> float:
    from megalina.agreement import Agreement

    os.environ.update(member.environment())
    agreement = Agreement(
        member,
        agent_store=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        timeout_s=config.cluster.timeout_s,
        attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )
    if member.rank > 0:
        agreed = agreement.take(config)
        if agreed is None:
            sys.exit(BAD_INPUT)  # rank 0 says why
        return _val_loss(_train(agreed))
    with ExitStack() as stack:
        try:
            warnings = check(config, world=member.world, local_ranks=member.local_ranks)
            withdraw = stack.enter_context(_run_folder(config, member.world, overrides, sweeping=False))
            _warn(warnings)
        except (ValueError, OSError) as error:
            tell_agent(_masked(_verdict(error)[0]), os.environ)  # before the others end, for which torchrun ends this rank too
            agreement.refuse()
            raise
        try:
            agreement.offer(config)
        except ValueError:
            withdraw()
            raise
        summary = _train(config)
    print((Path(config.run.dir) / "summary.json").read_text().strip(), flush=True)
    return _val_loss(summary)


def _train(config: PretrainConfig) -> dict[str, Any]:
    from torch.distributed.elastic.multiprocessing.errors import record

    from megalina.train.trainer import train

    return record(worker.work)(config, train)  # type: ignore[return-value]  # torchrun's report has a traceback, if there is one


@contextmanager
def _run_folder(config: PretrainConfig, world: int, overrides: list[str], *, sweeping: bool) -> Iterator[Callable[[], None]]:
    """The run folder, locked, with config.yaml and Hydra's overrides in it, once the data is known to be good.

    Yields what takes these files away again, where there was no run before, for a job that can't begin."""
    run_dir = Path(config.run.dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with open(run_dir / ".lock", "w") as lock:
            _lock(lock, run_dir)
            saved = run_dir / ".hydra" / "overrides.yaml"
            if sweeping and saved.exists() and OmegaConf.to_container(OmegaConf.load(saved)) != overrides:
                raise ValueError(
                    f"run.dir={run_dir} holds a job with other overrides: leave run.dir out of a sweep, "
                    "or give hydra.sweep.dir=FOLDER"
                )
            check_changed(config)  # before text is prepared, which takes its time
            vocab_size = check_data(config)
            check_order(config, world, vocab_size=vocab_size)
            check_checkpoint(config, vocab_size=vocab_size)
            composed = run_dir / "config.yaml"
            is_new = not composed.exists()
            composed.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
            saved.parent.mkdir(exist_ok=True)
            saved.write_text(OmegaConf.to_yaml(OmegaConf.create(overrides)))

            def withdraw() -> None:
                if is_new:
                    composed.unlink()
                    shutil.rmtree(saved.parent)

            yield withdraw
    finally:
        if {path.name for path in run_dir.iterdir()} <= {".lock"}:  # nothing came of it: leave no trace
            (run_dir / ".lock").unlink(missing_ok=True)
            run_dir.rmdir()


def _lock(lock: IO[str], run_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"run.dir={run_dir}: another job is running there; choose another run.dir or wait for it") from error


def _val_loss(summary: dict[str, Any]) -> float:
    return float("nan") if summary.get("val_loss") is None else float(summary["val_loss"])


def _masked(line: str) -> str:
    return masked(line, find_credentials(os.environ, Path.home()))


def _say(line: str) -> None:
    print(_masked(line), file=sys.stderr, flush=True)


def _warn(lines: list[str]) -> None:
    """Once nothing is wrong: a mistake is to be the only line."""
    for line in lines:
        _say(f"warning: {line}")


def _verdict(error: BaseException) -> tuple[str, int]:
    """What to say about an error, and the exit code."""
    if isinstance(error, launch.RankFailed | Unsaved):
        return str(error), 1
    return explain(error, sys.argv[1:]), BAD_INPUT


def main(argv: Sequence[str] | None = None) -> int:
    """The command: mistakes of the configuration become one line and exit code 2."""
    with arguments_for_hydra(argv):
        try:
            typed = {argument.split("=")[0]: argument for argument in sys.argv[1:]}
            refuse_credentials(typed, find_credentials(os.environ, Path.home()))  # before Hydra writes down a sweep's overrides
            if not show_help("pretrain", sys.argv[1:]):
                job()
        except (HydraException, OmegaConfBaseException, ValueError, OverflowError, OSError, launch.RankFailed, Unsaved) as error:
            line, code = _verdict(error)
            _say(line)
            tell_agent(_masked(line), os.environ)
            return code
        except SystemExit as end:  # of a job that has said why
            return int(end.code or 0)
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    command(main)
