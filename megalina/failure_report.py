"""The failure report: which rank a job was lost by, where it was, and what the others say."""

import signal
from collections.abc import Mapping
from pathlib import Path

from megalina.collective_log import first_difference, name_ranks, read_collectives, read_mirror
from megalina.rank_files import REFUSED, STOOD_STILL, UNSAVED, collectives_path, position_path, traceback_path
from megalina.rank_process import for_own_reasons, how_it_ended

TAIL_LINES = 40  # of a rank's log


class RankFailed(RuntimeError):
    """A rank ended by itself with an error; the message has its number, where it was, and its traceback.

    `again`: another start may go better.  It would not where a rank refused its settings before the first step."""

    def __init__(self, message: str, *, again: bool = True):
        super().__init__(message)
        self.again = again


def blame(first: Mapping[int, int], failed: Mapping[int, int], logs: Path, ranks: int) -> RankFailed:
    """About the rank that failed for a reason of its own, if that can be told; else about the first one.

    `first`, `failed`: exit codes of the ranks that were seen to have failed at first, and in the end."""
    texts = {rank: _last_words(logs, rank) for rank in failed}
    if STOOD_STILL in first.values():  # all end together then; one has said why, rank 0 on our stderr
        words = [texts[r] for r, code in failed.items() if code == STOOD_STILL and traceback_path(logs, r).is_file()]
        return RankFailed("\n".join([f"the job of {ranks} rank(s) stood still and was ended", *words[:1]]))
    if UNSAVED in first.values():  # all alike; where the disk had no room for a word, it is on stderr
        files = [traceback_path(logs, r) for r, code in failed.items() if code == UNSAVED]
        told = [path.read_text() for path in files if path.is_file() and path.stat().st_size]
        return RankFailed(told[0] if told else "the last state could not be saved")
    # A rank that loses another one in the middle of a message may abort.
    rank = min(for_own_reasons(failed, texts) or failed, key=lambda r: (failed[r] == -signal.SIGABRT, r not in first, r))
    code, places = failed[rank], {r: read_mirror(position_path(logs, r)) for r in range(ranks)}
    where = f" in {places[rank]}" if places[rank] else ""
    lines = [f"rank {rank} of {ranks} {how_it_ended(code)}{where}; the job was ended"]
    for place in dict.fromkeys(place for r, place in places.items() if r != rank and place):
        there = [r for r, other in places.items() if r != rank and other == place]
        lines.append(f"{name_ranks(there)} {'was' if len(there) == 1 else 'were'} in {place}")
    found = first_difference({r: read_collectives(collectives_path(logs, r)) for r in range(ranks)})
    if found and found.splitlines()[0] not in texts[rank]:
        lines += ["the ranks did not submit the same collectives:", found]
    refused = code == REFUSED and not any(places.values())
    return RankFailed("\n".join([*lines, texts[rank]]).rstrip(), again=not refused)


def _last_words(logs: Path, rank: int) -> str:
    """What it left for us, else the end of its log."""
    log = logs / f"rank_{rank}.log"
    if traceback_path(logs, rank).is_file():
        lines = traceback_path(logs, rank).read_text(errors="replace").splitlines()
    elif rank > 0 and log.is_file():
        lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    else:
        return ""  # rank 0 has written to our stderr
    return "\n".join(f"[rank {rank}] {line}" for line in lines)
