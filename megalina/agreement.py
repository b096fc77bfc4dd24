"""The agreement of all ranks on rank 0's configuration, through the job's store, before the first collective.

Ranks that something else has started each read the command line themselves: their time stamps differ, and on some node
so may a file.
"""

import json
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

from megalina.config import PretrainConfig
from megalina.launch import Member

LEAVE_S = 60.0


class Agreement:
    """Rank 0 offers its configuration or refuses; the others compare; all learn of a difference.

    Keep it until the process group is there: rank 0's server is the same one that torch.distributed uses.
    """

    def __init__(self, member: Member, *, agent_store: bool, timeout_s: float, attempt: str = "0"):
        """`agent_store`: torchrun's agent serves the store already (TORCHELASTIC_USE_AGENT_STORE)."""
        self._member = member
        try:
            store: Store = TCPStore(
                member.address,
                member.port,
                is_master=member.rank == 0 and not agent_store,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (DistNetworkError, DistStoreError) as error:
            raise ValueError(self._unreachable(timeout_s)) from error
        self._timeout_s = timeout_s
        self._store = PrefixStore(f"megalina/{attempt}", store)

    def offer(self, config: PretrainConfig) -> None:
        """Rank 0: returns when every rank holds `config`; ValueError names the first that doesn't."""
        self._store.set("offer", json.dumps(asdict(config)))
        answers = {rank: self._get(f"answer/{rank}") for rank in range(1, self._member.world)}
        differences = [f"rank {rank} differs from rank 0: {text}" for rank, text in answers.items() if text]
        self._store.set("verdict", "no" if differences else "")
        if differences:
            self._leave()
            raise ValueError(f"{differences[0]}; start all ranks with the same command and the same files")

    def refuse(self) -> None:
        """Rank 0: its configuration is no good, it has said why."""
        self._store.set("offer", "")
        self._leave()

    def take(self, config: PretrainConfig) -> PretrainConfig | None:
        """Another rank: `config` with rank 0's run folder; None: no agreement, and rank 0 says why."""
        offer = self._get("offer")
        if not offer:
            self._store.set(f"seen/{self._member.rank}", "")
            return None
        theirs = json.loads(offer)
        mine = replace(config, run=replace(config.run, dir=theirs["run"]["dir"]))
        difference = first_difference(json.loads(json.dumps(asdict(mine))), theirs)
        self._store.set(f"answer/{self._member.rank}", difference)
        if self._get("verdict"):
            self._store.set(f"seen/{self._member.rank}", "")
            return None
        return mine

    def _leave(self) -> None:
        """Rank 0 ends, and its server with it: not before the others have read why, unless they don't come."""
        with suppress(DistNetworkError, DistStoreError):
            seen = [f"seen/{rank}" for rank in range(1, self._member.world)]
            self._store.wait(seen, timedelta(seconds=min(LEAVE_S, self._timeout_s)))

    def _get(self, key: str) -> str:
        try:
            return self._store.get(key).decode()
        except (DistNetworkError, DistStoreError) as error:
            raise ValueError(self._unreachable(self._timeout_s)) from error

    def _unreachable(self, timeout_s: float) -> str:
        member = self._member
        hint = "under Slurm srun must start every rank" if member.launcher == "slurm" else "are all of them started?"
        return (
            f"rank {member.rank} of {member.world} found no agreement with the others through {member.address}:{member.port} "
            f"within {timeout_s:g} s (cluster.timeout_s): {hint}"
        )


def first_difference(here: dict, there: dict, prefix: str = "") -> str:
    """ "train.steps is 20, not 10" for the first key that differs, or nothing."""
    for name, value in here.items():
        other = there.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            inner = first_difference(value, other, f"{prefix}{name}.")
            if inner:
                return inner
        elif value != other:
            return f"{prefix}{name} is {value}, not {other}"
    return ""
