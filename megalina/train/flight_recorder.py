"""NCCL's flight recorder: torch keeps the last collectives of each CUDA rank, for `torchfrtrace` to read after a hang.

torch writes them when a collective times out; the doctor, which is faster, asks for them itself.
"""

from collections.abc import MutableMapping
from pathlib import Path

import torch


def prepare(environ: MutableMapping[str, str], logs: Path) -> None:
    """Set what the user has left open: the recorder's size, and that it is written to LOGS/nccl_trace_RANK.

    Before the process group is made."""
    defaults = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(logs / "nccl_trace_"),
    }
    older = {
        "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
        "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    }
    for name, value in defaults.items():
        if name not in environ and older.get(name) not in environ:
            environ[name] = value


def dump(path: Path) -> bool:
    """Write what the recorder holds to `path`; False where there is no NCCL."""
    take = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if take is None or not torch.cuda.is_available():
        return False
    path.write_bytes(take())
    return True
