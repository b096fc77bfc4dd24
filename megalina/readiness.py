"""Is this machine ready?  What a run needs of it, each looked at and said in a line: Python and packages, cores and memory, GPUs,
two ranks that talk to each other, disk, W&B, an emulated cluster."""

import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from megalina.launch import num_cores
from megalina.validate import has_wandb_key

NEWEST_PYTHON = (3, 13)  # that has been tried
RANKS_PORT = 29500  # torchrun's, where nobody says another
SMALL_DISK_GB, SMALL_MEMORY_GB = 5.0, 4.0
FOLDER = Path("runs")  # run.dir's, and of prepared text


class Level(StrEnum):
    GOOD = "ok"
    NOTE = "note"  # something that not every run needs
    BAD = "BAD"


@dataclass(frozen=True, slots=True)
class Finding:
    """`todo`: what to do about it; "" where there is nothing to do."""

    level: Level
    about: str
    text: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{self.level:<5}{self.about:<18}{self.text}" + (f"\n{'':<23}-> {self.todo}" if self.todo else "")


def findings(*, ranks: int = 2, folder: Path = FOLDER, environ: Mapping[str, str] | None = None) -> list[Finding]:
    """All of them.  `ranks`: how many are started to see whether they find each other; fewer than 2: none."""
    found = os.environ if environ is None else environ
    looks: list[Callable[[], Finding]] = [
        python,
        packages,
        cores,
        memory,
        gpus,
        apex,
        lambda: several_ranks(ranks),
        lambda: port(RANKS_PORT),
        lambda: disk(folder),
        lambda: wandb(found, Path.home()),
        emulated_cluster,
    ]
    return [look() for look in looks]


def python() -> Finding:
    text = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info[:2] > NEWEST_PYTHON:
        newest = ".".join(map(str, NEWEST_PYTHON))
        return Finding(Level.NOTE, "Python", text, f"newer than what has been tried: {newest} and below are")
    return Finding(Level.GOOD, "Python", text)


def packages() -> Finding:
    """What the package says it needs."""
    try:
        needed = [Requirement(text) for text in requires("megalina") or ()]
    except PackageNotFoundError:
        todo = "run `make .venv`, or `pip install -e .` in the clone"
        return Finding(Level.BAD, "packages", "megalina isn't installed in this Python", todo)
    wrong = []
    for requirement in (r for r in needed if r.marker is None):
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} isn't {requirement.specifier}")
    if wrong:
        return Finding(Level.BAD, "packages", "; ".join(wrong), "pip install -r requirements.lock")
    return Finding(Level.GOOD, "packages", f"torch {version('torch')} and {len(needed) - 1} others")


def cores() -> Finding:
    number = num_cores()
    if number == 1:
        return Finding(Level.NOTE, "cores", "1", "two ranks share it: experiment=laptop takes twice as long")
    return Finding(Level.GOOD, "cores", f"{number}, of which each rank on CPU should have one")


def memory() -> Finding:
    free_gb = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if free_gb < SMALL_MEMORY_GB:
        return Finding(Level.NOTE, "memory", f"{free_gb:.1f} GB free", "`megalina plan` says what a rank of your run needs")
    return Finding(Level.GOOD, "memory", f"{free_gb:.0f} GB free")


def gpus() -> Finding:
    import torch

    if torch.cuda.is_available():
        number = torch.cuda.device_count()
        names = sorted({torch.cuda.get_device_name(i) for i in range(number)})
        if not torch.cuda.is_bf16_supported():
            return Finding(Level.NOTE, "GPUs", f"{number}: {', '.join(names)}", "no bfloat16: use train.dtype=float32")
        return Finding(Level.GOOD, "GPUs", f"{number}: {', '.join(names)}, CUDA {torch.version.cuda}")
    if shutil.which("nvidia-smi") is None:
        return Finding(Level.NOTE, "GPUs", "none: runs are on CPU")
    if torch.version.cuda is None:
        return Finding(Level.BAD, "GPUs", "this torch is a build for CPU, and there is a GPU", "install a CUDA build of torch")
    todo = "compare the driver's version (nvidia-smi) with the CUDA that torch was built for, and CUDA_VISIBLE_DEVICES"
    return Finding(Level.BAD, "GPUs", f"torch {torch.__version__} sees none, and nvidia-smi is there", todo)


def has_apex() -> bool:
    """NVIDIA's, with its kernels; PyPI's package of that name is another project."""
    return find_spec("amp_C") is not None and find_spec("apex") is not None


def apex() -> Finding:
    if has_apex():
        return Finding(Level.GOOD, "NVIDIA Apex", "its fused optimizer is used on GPUs")
    if find_spec("apex") is not None:
        todo = "not used: it isn't NVIDIA's, or was built without CUDA extensions"
        return Finding(Level.NOTE, "NVIDIA Apex", "there is a package apex without NVIDIA's kernels", todo)
    return Finding(Level.GOOD, "NVIDIA Apex", "not there, and not needed: torch's fused optimizer is used")


def several_ranks(ranks: int) -> Finding:
    """Start some, and let them add up their numbers."""
    if ranks < 2:
        return Finding(Level.NOTE, "ranks", "not tried")
    from megalina.rank_pool import RankPool, RanksFailed

    todo = "look for a firewall or container that forbids connections to 127.0.0.1, and at `ulimit -u`, /dev/shm and /tmp"
    try:
        with RankPool(time_limit_s=60.0) as pool:
            sums = pool.run(ranks, _sum_of_ranks)
    except (RanksFailed, OSError) as error:
        return Finding(Level.BAD, "ranks", f"{ranks} processes don't work together: {str(error).splitlines()[0]}", todo)
    if sums != [ranks * (ranks - 1) / 2] * ranks:
        return Finding(Level.BAD, "ranks", f"the sums of {ranks} ranks are wrong: {sums}", todo)
    return Finding(Level.GOOD, "ranks", f"{ranks} processes start, find each other and sum (gloo)")


def _sum_of_ranks() -> float:
    import torch
    import torch.distributed as dist

    value = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(value)
    return value.item()


def port(number: int) -> Finding:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", number))
        except OSError as error:
            todo = f"under torchrun give another one: --master-port={number + 1}"
            return Finding(Level.NOTE, "port", f"{number}: {error.strerror}", todo)
    return Finding(Level.GOOD, "port", f"{number} is free for torchrun")


def disk(folder: Path) -> Finding:
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(Level.BAD, "disk", f"{there} can't be written", "choose another run.dir, data.cache_dir too")
    free_gb = shutil.disk_usage(there).free / 1e9
    if free_gb < SMALL_DISK_GB:
        todo = "checkpoints are kept by train.keep_last and keep_every; choose another run.dir"
        return Finding(Level.NOTE, "disk", f"{free_gb:.1f} GB free in {there}", todo)
    return Finding(Level.GOOD, "disk", f"{free_gb:.0f} GB free in {there}")


def wandb(environ: Mapping[str, str], home: Path) -> Finding:
    try:
        key = has_wandb_key(environ, home)
    except ValueError as error:
        return Finding(Level.NOTE, "W&B", str(error))
    if not key:
        todo = "for tracker.wandb.mode=online set WANDB_API_KEY or run `wandb login`; offline runs can be sent later"
        return Finding(Level.NOTE, "W&B", "no key: runs are recorded offline", todo)
    return Finding(Level.GOOD, "W&B", "there is a key: tracker.wandb.mode=online works if the server can be reached")


def emulated_cluster() -> Finding:
    lacking = [text for text, is_there in (("root", os.geteuid() == 0), ("iproute2", shutil.which("ip"))) if not is_there]
    if sys.platform != "linux":
        lacking = ["Linux"]
    if lacking:
        text = f"not possible here: it needs {' and '.join(lacking)}"
        return Finding(Level.NOTE, "emulated cluster", text, "only `megalina compare` and tools/emulate_cluster.py need it")
    return Finding(Level.GOOD, "emulated cluster", "possible: network namespaces and links of a given rate")
