"""Why a rank ended, for torchrun: in the file that its agent reads, and whose text is the root cause that it reports last.

The agent ends with a report and a traceback of its own whatever a rank does, so a mistake's line is not the very last one; but
with this file the report says it.  https://docs.pytorch.org/docs/stable/elastic/errors.html
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress


def tell_agent(line: str, environ: Mapping[str, str]) -> None:
    """Writes `line` for the agent that has started this rank; nothing where there is none."""
    path = environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    # As torch's ErrorHandler writes it, whose import takes seconds.  The first of several ranks by this time is the root cause.
    told = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
    with suppress(OSError), open(path, "w") as file:  # the line is on stderr as well
        json.dump({"message": told}, file)
