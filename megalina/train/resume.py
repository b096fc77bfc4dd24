"""The resume point: which checkpoint a run goes on from, and whether it is of the same run.

The newest is taken whose files are all as they were written.  What one process can see at no cost (small files, sizes)
is looked at before ranks start, the rest by all ranks together; so is whether its settings and tensors are the run's, without
weights."""

from dataclasses import replace
from pathlib import Path

from megalina.changed_settings import Change, Kind, changes, check_changes, some
from megalina.checkpoint.checkpoints import Checkpoints, all_damaged, check_same
from megalina.checkpoint.checksums import damaged
from megalina.checkpoint.files import MODEL, newest_first, read_description, read_values
from megalina.checkpoint.hugging_face.carried import REPORT
from megalina.checkpoint.hugging_face.linked import settings_of
from megalina.config import PretrainConfig
from megalina.families.family import Settings
from megalina.model.gpt import GPT
from megalina.model.init import spec_of

FREE = ("model.vocab_size", "model.max_positions")  # the tensors tell whether they fit


def resume_candidates(config: PretrainConfig) -> list[Path]:
    """The checkpoints to go on from, the best first, whole or not; none: start anew.

    ValueError where one is in the way of a run that is to start anew.  Needs no process group."""
    there = newest_first(Path(config.run.dir) / "checkpoints")
    if config.train.resume == "none":
        if there:
            raise ValueError(
                f"train.resume=none, but {config.run.dir} has a checkpoint of step {int(there[0].name[5:])}: "
                "choose another run.dir, remove its checkpoints, or go on with train.resume=auto"
            )
        return []
    return there if config.train.resume in ("auto", "verify") else named_checkpoints(Path(config.train.resume))


def named_checkpoints(path: Path) -> list[Path]:
    """The checkpoint that is named; of a run folder its checkpoints, the newest first."""
    return newest_first(path / "checkpoints") if (path / "checkpoints").is_dir() else [path]


def with_weights(config: PretrainConfig) -> PretrainConfig:
    """The configuration with the newest whole checkpoint of the run folder that train.init_from names; the same one where it
    names none.  ValueError where all are damaged."""
    path = Path(config.train.init_from)
    if not config.train.init_from or not (path / "checkpoints").is_dir():
        return config
    found = {candidate: damaged(candidate, tensors=False) for candidate in named_checkpoints(path)}
    start = next((candidate for candidate, reasons in found.items() if not reasons), None)
    if start is None:
        raise ValueError(all_damaged(found) if found else f"train.init_from={path} has no checkpoint yet")
    return replace(config, train=replace(config.train, init_from=str(start)))


def resume_point(config: PretrainConfig) -> Path | None:
    """The checkpoint to go on from, as far as one process can tell; None: start anew.

    Of the tensors' files only the sizes are looked at.  ValueError where there is none to be found or all are damaged,
    where one is in the way, and where the run can't go on from it, or not without a word (`megalina/changed_settings.py`): a
    run that silently goes on with other text has no name.  Needs no process group.
    """
    found = {}
    for path in resume_candidates(config):
        found[path] = damaged(path, tensors=False)
        if not found[path]:
            check_changes(path, read_values(path)["config"], config)
            return path
    if found:
        raise ValueError(all_damaged(found))
    return None


def agreed_resume_point(config: PretrainConfig, checkpoints: Checkpoints) -> Path | None:
    """As `resume_point`, with all files checked, each rank a share; all ranks call it and are given the same.

    Damaged checkpoints are passed over with a warning; ValueError as there."""
    point = checkpoints.first_good(resume_candidates(config))
    if point is not None:
        check_changes(point, read_values(point)["config"], config)
    return point


def check_settings(config: PretrainConfig) -> None:
    """As far as it is known before there is data: ValueError if the run can't start from the checkpoint that it would."""
    start = _start(config)
    if resume_point(config) is None and start is not None:  # only its weights are taken
        if known := config.model.vocab_size or read_description(start)["values"].get("vocab_size", 0):
            check_fit(start, config, vocab_size=known)
        check_same_math(start, config)


def check_start(config: PretrainConfig, *, vocab_size: int) -> None:
    """ValueError if the run can't start from the checkpoint that it would: another model (names the settings that
    differ), another run, one in the way, or one that isn't complete or is damaged."""
    resume_point(config)
    if (start := _start(config)) is not None:
        check_fit(start, config, vocab_size=vocab_size)
        check_same_math(start, config)
        if found := damaged(start, tensors=False):
            raise ValueError(all_damaged({start: found}))


def check_same_math(path: Path, config: PretrainConfig) -> None:
    """ValueError if `train.init_from` names the checkpoint folder `path` and its weights would be another function in the model
    of `config`, though their shapes are the same: another base of RoPE, say.  Of a model that was imported or upcycled the
    router's settings count, too; others may be trained with another router from here on."""
    if config.train.init_from != str(path) or config.train.allow_changes:
        return
    values = read_description(path)["values"]
    there = settings_of(values["config"], values.get("vocab_size", 0)).math()
    here = Settings(config.model, config.router).math()
    counts = ("model.", "router.") if {"hugging_face", "upcycled"} & set(values) else ("model.",)
    differing = [
        Change(name, there.get(name), here.get(name), Kind.STATE)
        for name in there | here
        if name.startswith(counts) and name not in FREE and there.get(name) != here.get(name)
    ]
    if differing:
        raise ValueError(
            f"train.init_from={path} is of another model: {some(differing)}: set back what differs, or take its weights all the "
            "same with train.allow_changes=true"
        )


def check_fit(path: Path, config: PretrainConfig, *, vocab_size: int) -> None:
    """ValueError if the weights in the checkpoint folder `path` are not those of the model of `config`."""
    description = read_description(path)
    gpt = GPT(
        config.model,
        config.router,
        vocab_size=vocab_size,
        max_positions=config.model.max_positions or config.train.seq_len,
        seed=config.train.seed,
    )  # on the meta device: no memory
    wanted = {MODEL + name: spec_of(p).shape for name, p in gpt.named_parameters()}
    wanted |= {MODEL + name: tuple(b.shape) for name, b in gpt.router_state().items()}
    saved = {name: tuple(tensor["shape"]) for name, tensor in description["tensors"].items() if name.startswith(MODEL)}
    try:
        check_same(path, saved, wanted)
    except ValueError as error:
        raise ValueError(_with_settings(path, config, vocab_size) or str(error)) from error


def _start(config: PretrainConfig) -> Path | None:
    """The checkpoint to start from, as far as one process can tell; None: there is none, or none is any good."""
    there = [] if config.train.resume == "none" else resume_candidates(config)
    if not there and config.train.init_from:
        return Path(config.train.init_from)
    return next((path for path in there if not damaged(path, tensors=False)), None)


def _with_settings(path: Path, config: PretrainConfig, vocab_size: int) -> str:
    """What differs between a checkpoint's model and this one, by the names of settings; "" where none says it."""
    values = read_description(path)["values"]
    found = changes(values.get("config") or {}, config)
    named = [c for c in found if c.setting.startswith(("model.", "router.")) and c.kind is Kind.STATE]
    there = values.get("vocab_size", vocab_size)
    told = [some(named)] if named else []
    told += [f"a vocabulary of {there} there and of {vocab_size} here (data, model.vocab_size)"] if there != vocab_size else []
    if not told:
        return ""
    report = path / REPORT
    todo = (
        f"give the settings that {report} has" if report.is_file() else "set back what differs, or start anew in another run.dir"
    )
    return f"checkpoint {path} is of another model: {'; '.join(told)}: {todo}"
