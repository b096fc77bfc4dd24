"""The fit of a checkpoint to a run: whether its settings and tensors are the run's, seen without weights and without ranks."""

from pathlib import Path

from megalina.changed_settings import Kind, changes, some
from megalina.checkpoint.checkpoints import all_damaged, check_same
from megalina.checkpoint.checksums import damaged
from megalina.checkpoint.files import MODEL, read_description
from megalina.config import PretrainConfig
from megalina.model.gpt import GPT
from megalina.model.init import spec_of
from megalina.train.resume import resume_candidates, resume_point


def check_settings(config: PretrainConfig) -> None:
    """As far as it is known before there is data: ValueError if the run can't start from the checkpoint that it would."""
    start = _start(config)
    if resume_point(config) is None and start is not None:  # only its weights are taken
        if known := config.model.vocab_size or read_description(start)["values"].get("vocab_size", 0):
            check_fit(start, config, vocab_size=known)


def check_start(config: PretrainConfig, *, vocab_size: int) -> None:
    """ValueError if the run can't start from the checkpoint that it would: another model (names the settings that
    differ), another run, one in the way, or one that isn't complete or is damaged."""
    resume_point(config)
    if (start := _start(config)) is not None:
        check_fit(start, config, vocab_size=vocab_size)
        if found := damaged(start, tensors=False):
            raise ValueError(all_damaged({start: found}))


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
    wanted |= {MODEL + name: tuple(b.shape) for name, b in gpt.named_buffers() if name.endswith("bias_E")}
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
    return f"checkpoint {path} is of another model: {'; '.join(told)}: set back what differs, or start anew in another run.dir"
