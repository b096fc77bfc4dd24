"""Namespaces: a cluster on one machine, a network namespace a node, joined by links of limited rate.

    node0: eth0 10.0.0.1 --- port0 \\
    node1: eth0 10.0.0.2 --- port1 -- bridge, in a namespace of its own: no packet leaves the cluster

Both ends of a link are shaped by a token bucket, so a node sends and receives at most at the link's rate.  Ranks of one node
reach each other at its address too, which the kernel takes through the node's loopback, and that isn't shaped.  Linux, root.
"""

import fcntl
import math
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn

from megalina.launch import Stopped
from megalina.node_ranks import Outcome, address, call, check_command, kill_in, run_on_nodes

# A file a cluster, on which its owner holds a lock.  The kernel gives the lock back when the owner ends, however it ends, so
# nothing must be guessed from process numbers, which are used again and differ between containers.
LOCKS = Path("/run/megalina")
MOST_NODES = 254  # addresses of 10.0.0.0/24
BURST = "128kb"  # the longest piece that a bucket lets pass at once; a packet of the kernel's has up to 64 kB
QUEUE_BYTES = 512 << 20  # longer than all windows of a link together: nothing is dropped
WINDOW_BYTES = 1 << 20
# The host's own settings may be others: BBR would measure and share the link in its own way, and a window that shrinks in a
# pause would make the first exchange of an instruction slower than the next.
TCP = {
    "tcp_congestion_control": "reno",
    "tcp_slow_start_after_idle": "0",
    "tcp_no_metrics_save": "1",
    "tcp_rmem": f"4096 131072 {WINDOW_BYTES}",
    "tcp_wmem": f"4096 131072 {WINDOW_BYTES}",
}


class CannotEmulate(RuntimeError):
    """What this machine lacks for a cluster, in one line."""


class NoLatency(CannotEmulate):
    """It can do everything but add latency."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes that are there until the end of `emulated_cluster`; it runs one command after another."""

    nodes: tuple[str, ...]  # names of the namespaces
    warnings: tuple[str, ...] = ()
    _free: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def run(
        self,
        command: Sequence[str],
        *,
        ranks_per_node: int,
        logs: Path,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 1e9,
        stream: IO[str] | None = None,
    ) -> Outcome:
        """Runs `command` once a rank and returns when no process of it is left: after all have ended, `timeout_s`, or soon
        after the first failure.

        Rank 0 writes to `stream` (a file; None: our stdout and stderr), the others to logs/rank_N.log.  `env` comes on top
        of our environment.  When a signal raises Stopped here, the ranks get SIGTERM and STOP_S seconds to save.
        ValueError for figures or a command that can't be, RuntimeError while another thread runs a command here."""
        check_figures(ranks_per_node=ranks_per_node, timeout_s=timeout_s)
        check_command(command)
        if not self._free.acquire(blocking=False):
            raise RuntimeError("a cluster runs one command at a time: wait for the other one, or make another cluster")
        try:
            return run_on_nodes(
                self.nodes, command, ranks_per_node=ranks_per_node, logs=logs, env=env or {}, timeout_s=timeout_s, stream=stream
            )
        finally:
            self._free.release()


@contextmanager
def emulated_cluster(*, nodes: int, link_mbit: float, latency_us: float = 0) -> Iterator[Cluster]:
    """A cluster of `nodes`, each with a link of `link_mbit` (Mbit/s) each way, on which a packet takes `latency_us` longer.

    SIGINT, SIGTERM and SIGHUP raise Stopped in the body.  At the end, however it comes, all namespaces and every process in
    them are removed; those of a launcher that was killed by SIGKILL, by the next one.

    ValueError for figures that make no cluster, CannotEmulate (NoLatency: only latency is the problem) for what is missing."""
    check_figures(nodes=nodes, link_mbit=link_mbit, latency_us=latency_us or 1)
    if nodes > MOST_NODES:
        raise ValueError(f"nodes={nodes}: a cluster has at most {MOST_NODES}")
    check_host()
    _sweep()
    with _handled(_stop), _owned() as prefix:
        for command in plan(prefix, nodes=nodes, link_mbit=link_mbit, latency_us=latency_us):
            _must(command)
        names = tuple(f"{prefix}-node{node}" for node in range(nodes))
        yield Cluster(names, tuple(dict.fromkeys(filter(None, map(_set_tcp, names)))))


def check_figures(**figures: float) -> None:
    """ValueError for the first that isn't a positive number."""
    for name, value in figures.items():
        if not 0 < value < math.inf:
            hint = "; ranks that shall share no link are of one node: nodes=1" if name == "link_mbit" else ""
            raise ValueError(f"{name}={value:g} must be positive and finite{hint}")


def check_host() -> None:
    """CannotEmulate for what can be known before anything is made."""
    if os.geteuid() != 0:
        raise CannotEmulate("a cluster of network namespaces needs root: run it with sudo")
    if absent := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        raise CannotEmulate(f"there is no {' and no '.join(absent)} here: apt-get install iproute2")


def plan(prefix: str, *, nodes: int, link_mbit: float, latency_us: float) -> list[str]:
    """The commands that make a cluster."""
    switch = f"{prefix}-switch"
    bucket = f"root handle 1: tbf rate {round(link_mbit * 1e6)}bit burst {BURST} limit {QUEUE_BYTES}"
    commands = [f"ip netns add {switch}", f"ip -n {switch} link add bridge0 up type bridge"]
    for i in range(nodes):
        node = f"{prefix}-node{i}"
        commands += [
            f"ip netns add {node}",
            f"ip -n {node} link add eth0 type veth peer name port{i} netns {switch}",
            f"ip -n {switch} link set port{i} master bridge0 up",
            f"ip -n {node} address add {address(i)}/24 dev eth0",
            f"ip -n {node} link set lo up",
            f"ip -n {node} link set eth0 up",
            f"tc -n {switch} qdisc add dev port{i} {bucket}",
            f"tc -n {node} qdisc add dev eth0 {bucket}",
        ]
        if latency_us:  # at the sender alone: a packet meets it once on its way
            commands.append(f"tc -n {node} qdisc add dev eth0 parent 1: netem delay {latency_us:g}us limit 1000000")
    return commands


@contextmanager
def _owned() -> Iterator[str]:
    """The beginning of a new cluster's names, which are this process's until the end; then what has them is removed."""
    try:
        LOCKS.mkdir(parents=True, exist_ok=True)
        lock, prefix = _locked()
    except OSError as error:
        raise CannotEmulate(f"{LOCKS} can't be written ({error.strerror}): it tells which clusters are in use") from error
    with lock:
        try:
            yield prefix
        finally:
            with _handled(signal.SIG_IGN):  # a second Ctrl-C must not leave half of it
                _remove(prefix)


def _locked() -> tuple[IO[str], str]:
    """A new file in LOCKS, locked, and its name."""
    while True:
        path = LOCKS / f"megalina-{os.getpid()}-{secrets.token_hex(4)}"
        lock = open(path, "x")  # noqa: SIM115
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return lock, path.name
        lock.close()  # a sweep has come between the two lines, and has removed it


def _sweep() -> None:
    """Removes the clusters whose owners have ended."""
    for path in sorted(LOCKS.glob("megalina-*")):
        with suppress(FileNotFoundError, BlockingIOError), open(path) as lock:  # removed meanwhile; in use
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path.name)


def _remove(prefix: str) -> None:
    """Ends the processes of a cluster's namespaces, and removes them.  The caller holds its lock."""
    names = _existing(prefix)
    kill_in(names)
    for name in names:
        call(["ip", "netns", "del", name])
    if not _existing(prefix):
        (LOCKS / prefix).unlink()


def _set_tcp(node: str) -> str:
    """Sets TCP in a node; a warning if that isn't possible."""
    script = " && ".join(f"echo {value} > /proc/sys/net/ipv4/{key}" for key, value in TCP.items())
    done = call(["ip", "netns", "exec", node, "sh", "-c", script])
    if not done.returncode:
        return ""
    return f"TCP keeps the host's settings, which may share links otherwise: {_one_line(done.stderr)}"


def _existing(prefix: str) -> list[str]:
    names = (line.split()[0] for line in call(["ip", "netns", "list"]).stdout.splitlines() if line)
    return [name for name in names if name.startswith(f"{prefix}-")]


def _must(command: str) -> None:
    done = call(command.split())
    if done.returncode == 0:
        return
    kind = next((kind for kind in ("tbf", "netem") if f" {kind} " in command), "")
    if "pecified qdisc" in done.stderr and kind == "netem":
        raise NoLatency("this kernel can't add latency, as it has no sch_netem (latency_us=0 goes without)")
    if "pecified qdisc" in done.stderr:
        raise CannotEmulate(f"this kernel can't limit a link's rate, as it has no sch_{kind}")
    if command.startswith("ip netns add"):
        raise CannotEmulate(f"no network namespaces are permitted here (a container?): {_one_line(done.stderr)}")
    raise CannotEmulate(f"`{command}` failed: {_one_line(done.stderr)}")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _stop(number: int, _: object) -> NoReturn:
    raise Stopped(number)


@contextmanager
def _handled(handler: Callable[[int, object], NoReturn] | signal.Handlers) -> Iterator[None]:
    """Signals that ask us to stop go to `handler`, unless they are ignored, as nohup ignores SIGHUP."""
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread alone
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, old in before.items():
            signal.signal(number, old if old is signal.SIG_IGN else handler)
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
