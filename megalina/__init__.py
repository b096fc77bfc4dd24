"""megalina: a research training framework for GPT mixture-of-experts models, in which a training step is a list."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megalina.opened_model import OpenedModel


def open_checkpoint(path: Any, **options: Any) -> "OpenedModel":
    """A checkpoint's model, to be asked for logits, routing or text: see `megalina.opened_model.open_checkpoint`.

    `path`: a checkpoint folder, or a run folder; `device` (default "cpu") and `dtype` (default torch.float32) may be given."""
    from megalina import opened_model  # seconds of torch, which `import megalina` does without

    return opened_model.open_checkpoint(path, **options)
