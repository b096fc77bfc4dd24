"""A worker's module run on ranks of this machine."""

import json
import sys
from pathlib import Path
from typing import Any


class RanksFailed(RuntimeError):
    """A rank ended badly; the message has which one, and its last lines."""


def on_ranks(module: str, spec: str, folder: Path, *, ranks: int) -> dict[str, Any]:
    """What a module's main finds on so many ranks, to whose first argument `spec` is written; it says FOLDER/logs and
    FOLDER/found.json.  ValueError, RanksFailed."""
    from megalina import launch

    path = folder / "spec.json"
    path.write_text(spec)
    try:
        launch.run_ranks([sys.executable, "-m", module, str(path)], ranks=ranks, logs=folder / "logs")
    except launch.RankFailed as error:
        if not error.again:  # refused; its last line says why
            raise ValueError(str(error).splitlines()[-1].partition("] ")[2]) from error
        raise RanksFailed(str(error)) from error
    return dict(json.loads((folder / "found.json").read_text()))
