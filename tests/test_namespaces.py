"""Real namespaces: links that have their rate, clusters side by side, and nothing left behind.  Needs root and iproute2."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from megalina.namespaces import Cluster, NoLatency, emulated_cluster
from megalina.node_ranks import cores_of
from tests.cluster_tools import Tool, alive, wait_for


@pytest.fixture(scope="session")
def real() -> None:
    """Skips where the machine can't; asked without the code under test."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("ip and tc are missing (iproute2)")
    probe = f"probe-{os.getpid()}"
    try:
        for command in (
            f"ip netns add {probe}",
            f"tc -n {probe} qdisc add dev lo root tbf rate 1mbit burst 64kb limit 64kb",
            f"ip -n {probe} link add eth0 type veth peer name port0",
            f"ip -n {probe} link add bridge0 type bridge",
        ):
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"`{command}` isn't possible here: {done.stderr.strip()}")
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)


def namespaces_of(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"megalina-{pid}-")]


CONNECTED = """
import json, os, socket, threading, time
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
master = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
def connect():
    for _ in range(500):
        try:
            return socket.create_connection(master)
        except ConnectionRefusedError:
            time.sleep(0.02)
    raise SystemExit("rank 0 isn't there")
if rank == 0:
    listener = socket.create_server(master)
    peers = [listener.accept()[0] for _ in range(world - 1)]
else:
    peers = [connect()]
"""
# Rank 0 receives from all others, then sends to all, then both; three times.
RATES = (
    CONNECTED
    + """
MB = 2
def send(peer):
    peer.sendall(bytes(MB << 20))
def receive(peer):
    left = MB << 20
    while left:
        left -= len(peer.recv(min(left, 1 << 16)))
def on_all(*works):
    threads = [threading.Thread(target=work, args=(peer,)) for peer in peers for work in works]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
def acknowledged(peer):
    assert peer.recv(1) == b"."
rates = {"in": [], "out": [], "both": []}
for _ in range(3):
    for way, works in (("in", [receive]), ("out", [send]), ("both", [send, receive])):
        mirrored = [{receive: send, send: receive}[work] for work in works]
        if rank == 0:
            [peer.sendall(b".") for peer in peers]
            begin = time.perf_counter()
            on_all(*works)
            on_all(acknowledged)
            rates[way].append(len(peers) * MB * 8 * 1.048576 / (time.perf_counter() - begin))
        else:
            acknowledged(peers[0])
            on_all(*mirrored)
            peers[0].sendall(b".")
if rank == 0:
    print(json.dumps(rates))
"""
)


def heard_from(cluster: Cluster, code: str, folder: Path, *, ranks_per_node: int = 1) -> Any:
    """What rank 0 of a Python program prints last, as JSON."""
    with open(folder / "heard", "w+") as heard:
        command = [sys.executable, "-c", code]
        outcome = cluster.run(command, ranks_per_node=ranks_per_node, logs=folder, stream=heard, timeout_s=60)
        heard.seek(0)
        text = heard.read()
    assert outcome.code == 0, (outcome.reason, text)
    return json.loads(text.splitlines()[-1])


@pytest.mark.full
def test_a_node_sends_and_receives_at_its_links_rate_both_at_once(real: None, tmp_path: Path) -> None:
    """Two others share the link of node 0, so both directions of a link are tested at its own end."""
    rates: dict[str, list[float]] = {"in": [], "out": [], "both": []}
    with emulated_cluster(nodes=3, link_mbit=100) as cluster:
        for _ in range(4):  # a busy machine makes a transfer slower, nothing makes it faster
            for way, found in heard_from(cluster, RATES, tmp_path).items():
                rates[way] += found
            if all(max(mbit) > 0.85 * 100 for mbit in rates.values()):
                break
    for way, mbit in rates.items():
        assert 0.85 * 100 < max(mbit) < 1.15 * 100, (way, mbit)


def test_one_cluster_runs_several_commands_with_tcp_as_it_should_be(real: None, tmp_path: Path) -> None:
    keys = ("tcp_congestion_control", "tcp_slow_start_after_idle", "tcp_rmem", "tcp_wmem")
    script = "; ".join(f"cat /proc/sys/net/ipv4/{key}" for key in keys)
    with emulated_cluster(nodes=2, link_mbit=200) as cluster:
        assert cluster.warnings == ()
        for turn in ("first", "second"):
            assert cluster.run(["sh", "-c", script], ranks_per_node=1, logs=tmp_path / turn).code == 0
    for turn in ("first", "second"):
        assert (tmp_path / turn / "rank_1.log").read_text() == "reno\n0\n4096\t131072\t1048576\n4096\t131072\t1048576\n"


def test_what_a_rank_leaves_behind_ends_with_its_command(real: None, tmp_path: Path) -> None:
    with emulated_cluster(nodes=2, link_mbit=100) as cluster:
        leave = ["sh", "-c", f"setsid sleep 60 & echo $! > {tmp_path}/child.$RANK"]
        assert cluster.run(leave, ranks_per_node=1, logs=tmp_path).code == 0
        assert not any(alive(int(path.read_text())) for path in tmp_path.glob("child.*"))


GLOO = """
import json, time, torch, torch.distributed as dist
dist.init_process_group("gloo")
def sent():
    return int(open("/sys/class/net/eth0/statistics/tx_bytes").read())
seen = {}
for name, ranks in (("near", (0, 1)), ("far", (0, 2))):
    group = dist.new_group(ranks)
    if dist.get_rank() in ranks:
        dist.all_reduce(torch.ones(1 << 18), group=group)
        seconds, before = [], sent()
        for _ in range(3):
            begin = time.perf_counter()
            dist.all_reduce(torch.ones(1 << 18), group=group)
            seconds.append(time.perf_counter() - begin)
        seen[name] = [(sent() - before) // 3, min(seconds)]
    dist.barrier()
if dist.get_rank() == 0:
    print(json.dumps(seen))
dist.destroy_process_group()
"""


@pytest.mark.full
def test_gloo_ranks_of_one_node_talk_past_the_link(real: None, tmp_path: Path) -> None:
    with emulated_cluster(nodes=2, link_mbit=20) as cluster:
        seen = heard_from(cluster, GLOO, tmp_path, ranks_per_node=2)
    (near_bytes, near_s), (far_bytes, far_s) = seen["near"], seen["far"]
    assert near_bytes < 10_000 and far_bytes > 1 << 20  # of 1 MiB
    assert near_s < far_s / 5 and far_s > 0.8 * (1 << 20) * 8 / 20e6


TRIP = (
    CONNECTED
    + """
peers[0].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for turn in range(2):
    begin = time.perf_counter()
    if rank == 0:
        peers[0].sendall(b".")
    peers[0].recv(1)
    if rank == 1:
        peers[0].sendall(b".")
if rank == 0:
    print(time.perf_counter() - begin)
"""
)


def test_latency_is_added_once_each_way_or_said_to_be_impossible(real: None, tmp_path: Path) -> None:
    try:
        with emulated_cluster(nodes=2, link_mbit=100, latency_us=50_000) as cluster:
            assert 0.1 <= heard_from(cluster, TRIP, tmp_path) < 0.15
    except NoLatency as error:
        assert namespaces_of(os.getpid()) == []
        pytest.skip(str(error))


def as_ip_sees(pids: list[int]) -> set[str]:
    """The network namespaces of processes."""
    return {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_namespace_and_no_process(real: None, tmp_path: Path, number: signal.Signals) -> None:
    tool = Tool(tmp_path, "sleep 60 & wait")
    pids = tool.pids()
    assert len(namespaces_of(tool.process.pid)) == 3
    assert len(as_ip_sees([*pids, os.getpid()])) == 3  # two nodes, and the machine
    tool.process.send_signal(number)
    assert tool.finish()[0] == 128 + number
    assert namespaces_of(tool.process.pid) == [] and not any(map(alive, pids))


def test_a_failing_rank_ends_all_with_its_code(real: None, tmp_path: Path) -> None:
    tool = Tool(tmp_path, "test $RANK = 1 && exit 9; sleep 60")
    assert tool.finish()[0] == 9
    assert namespaces_of(tool.process.pid) == [] and not any(map(alive, tool.pids()))


def test_after_sigkill_the_ranks_are_gone_and_the_next_start_sweeps(real: None, tmp_path: Path) -> None:
    tool = Tool(tmp_path, f"sleep 60 & echo $! > {tmp_path}/child.$RANK; wait")
    written = [tmp_path / f"child.{rank}" for rank in range(2)]
    wait_for(lambda: all(path.exists() and path.read_text().endswith("\n") for path in written), "a child doesn't start")
    pids, children = tool.pids(), [int(path.read_text()) for path in written]
    tool.process.kill()
    tool.process.wait()
    wait_for(lambda: not any(map(alive, pids)), "ranks outlive their launcher")
    assert len(namespaces_of(tool.process.pid)) == 3 and all(map(alive, children))
    with emulated_cluster(nodes=1, link_mbit=100):
        assert namespaces_of(tool.process.pid) == []
        wait_for(lambda: not any(map(alive, children)), "a rank's child outlives its namespace")


@pytest.mark.full
def test_clusters_of_threads_and_processes_live_side_by_side(real: None, tmp_path: Path) -> None:
    """Others come, sweep and go meanwhile; a thread that ends takes none of another's ranks with it."""
    tool = Tool(tmp_path, f"while test ! -e {tmp_path}/go; do sleep 0.05; done")
    pids = tool.pids()
    codes: list[int] = []

    def cluster_of_a_thread(number: int, turns: int, seconds: float) -> None:
        for turn in range(turns):
            with emulated_cluster(nodes=2, link_mbit=100) as cluster:
                logs = tmp_path / f"{number}.{turn}"
                codes.append(cluster.run(["sleep", str(seconds)], ranks_per_node=1, logs=logs).code)

    threads = [threading.Thread(target=cluster_of_a_thread, args=args) for args in ((0, 1, 2.0), (1, 3, 0.1), (2, 1, 0.1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0] * 5 and namespaces_of(os.getpid()) == []
    assert len(namespaces_of(tool.process.pid)) == 3 and all(map(alive, pids))
    (tmp_path / "go").touch()
    assert tool.finish()[0] == 0 and namespaces_of(tool.process.pid) == []


MEETING = (
    CONNECTED
    + """
import sys
if rank == 0:
    peers[0].sendall(sys.argv[1].encode())
    time.sleep(0.5)
else:
    print(peers[0].recv(100).decode())
"""
)


@pytest.mark.full
def test_clusters_at_the_same_time_have_the_same_addresses_and_do_not_meet(real: None, tmp_path: Path) -> None:
    words = ("one", "two")
    tools = []
    for word in words:
        (tmp_path / word).mkdir()
        (tmp_path / word / "meeting.py").write_text(MEETING)
        meet = f"{sys.executable} {tmp_path / word / 'meeting.py'} {word}"
        tools.append(Tool(tmp_path / word, meet, "--logs", str(tmp_path / word)))
    for tool in tools:
        tool.pids()
    assert [len(namespaces_of(tool.process.pid)) for tool in tools] == [3, 3]
    assert [tool.finish()[0] for tool in tools] == [0, 0]
    assert [(tmp_path / word / "rank_1.log").read_text() for word in words] == ["one\n", "two\n"]


def test_nodes_have_cores_of_their_own_or_take_them_in_turn() -> None:
    assert [cores_of(node, 2, [0, 1, 2, 5]) for node in range(2)] == [[0, 1], [2, 5]]
    assert [cores_of(node, 3, [4, 5, 6, 7]) for node in range(3)] == [[4], [5], [6]]
    assert [cores_of(node, 4, [0, 3]) for node in range(4)] == [[0], [3], [0], [3]]
