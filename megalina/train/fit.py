"""The fit of a checkpoint to a model: whether its tensors are the model's, seen without weights and without ranks."""

from pathlib import Path

from megalina.checkpoint.checkpoints import all_damaged, check_same
from megalina.checkpoint.checksums import damaged
from megalina.checkpoint.files import MODEL, read_description
from megalina.config import PretrainConfig
from megalina.model.gpt import GPT
from megalina.model.init import spec_of
from megalina.train.resume import resume_candidates, resume_point


def check_start(config: PretrainConfig, *, vocab_size: int) -> None:
    """ValueError if the run can't start from the checkpoint that it would: another model (names the first tensors that
    differ), another run, one in the way, or one that isn't complete or is
    damaged."""
    there = [] if config.train.resume == "none" else resume_candidates(config)
    start = next((path for path in there if not damaged(path, tensors=False)), None)
    if not there and config.train.init_from:
        start = Path(config.train.init_from)
    if start is not None:
        check_fit(start, config, vocab_size=vocab_size)
        if found := damaged(start, tensors=False):
            raise ValueError(all_damaged({start: found}))
    resume_point(config)


def check_fit(path: Path, config: PretrainConfig, *, vocab_size: int) -> None:
    """ValueError if the weights in the checkpoint folder `path` are not those of the model of `config`."""
    listing = read_description(path)["tensors"]
    gpt = GPT(
        config.model,
        config.router,
        vocab_size=vocab_size,
        max_positions=config.model.max_positions or config.train.seq_len,
        seed=config.train.seed,
    )  # on the meta device: no memory
    wanted = {MODEL + name: spec_of(p).shape for name, p in gpt.named_parameters()}
    wanted |= {MODEL + name: tuple(b.shape) for name, b in gpt.named_buffers() if name.endswith("bias_E")}
    saved = {name: tuple(tensor["shape"]) for name, tensor in listing.items() if name.startswith(MODEL)}
    check_same(path, saved, wanted)
