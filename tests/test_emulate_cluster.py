"""The emulated cluster: what is refused and why, who is blamed, what is swept, what ranks are told.  Needs no root: its `ip`
makes nothing, and runs commands outside."""

import argparse
import fcntl
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from megalina import namespaces
from megalina.launch import Stopped, joined
from megalina.namespaces import CannotEmulate, Cluster, NoLatency, emulated_cluster, plan
from megalina.node_ranks import STOP_S, environment, signals_wait
from tests.cluster_tools import Planted, Tool, alive, wait_for
from tools.emulate_cluster import Setting, asked, main, slow_motion, too_fast, with_device

NO_QDISC = "echo 'Error: Specified qdisc kind is unknown.' >&2; exit 2"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    plant = Planted(tmp_path)
    monkeypatch.setenv("PATH", f"{plant.folder}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(namespaces, "LOCKS", tmp_path / "locks")
    return plant


# what is refused


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"nodes": 0}, "nodes=0 must be positive"),
        ({"nodes": 300}, "nodes=300: a cluster has at most 254"),
        ({"link_mbit": 0}, "link_mbit=0 must be positive and finite; ranks that shall share no link are of one node: nodes=1"),
        ({"link_mbit": float("nan")}, "link_mbit=nan must be"),
        ({"link_mbit": float("inf")}, "link_mbit=inf must be"),
        ({"latency_us": -1}, "latency_us=-1 must be"),
    ],
)
def test_figures_that_make_no_cluster_are_refused_before_anything_is_made(
    planted: Planted, figures: dict[str, float], said: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)), emulated_cluster(**({"nodes": 2, "link_mbit": 100.0} | figures)):  # type: ignore[arg-type]
        pass
    assert planted.calls == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--nodes 4", "there is no command: give it after --"),
        ("--slowdown 3 -- true", "--slowdown says how much slower"),
        ("--like lina_testbed --link-mbit 100 -- true", "--link-mbit follows from --like"),
        ("--like lina_tesbed -- true", "does not exist (did you mean lina_testbed?)"),
        ("--like h100 -- true", "conf/cluster/h100.yaml gives no nodes and links; there is a100_80g_ib, "),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    planted: Planted, capsys: pytest.CaptureFixture[str], arguments: str, said: str
) -> None:
    assert main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n"), planted.calls) == ("", 1, [])


def test_a_command_that_does_not_exist_is_named_before_anything_is_made(
    planted: Planted, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--logs", str(tmp_path / "logs"), "--", "no-such-command"]) == 2
    assert capsys.readouterr().err == "there is no command no-such-command\n"
    assert planted.calls == [] and not (tmp_path / "logs").exists()
    with pytest.raises(ValueError, match="^there is no command$"):
        Cluster(("a",)).run([], ranks_per_node=1, logs=tmp_path / "logs")


# what a machine lacks


def test_without_root_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main(["--", "true"]) == 2
    assert capsys.readouterr().err == "a cluster of network namespaces needs root: run it with sudo\n"


def test_without_iproute2_one_line_says_how_to_get_it(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(planted.folder))
    (planted.folder / "tc").unlink()
    with (
        pytest.raises(CannotEmulate, match="^there is no tc here: apt-get install iproute2$"),
        emulated_cluster(nodes=1, link_mbit=1),
    ):
        pass
    (planted.folder / "ip").unlink()
    with pytest.raises(CannotEmulate, match="^there is no ip and no tc here: "), emulated_cluster(nodes=1, link_mbit=1):
        pass


@pytest.mark.parametrize(
    ("ip", "tc", "error", "said"),
    [
        (
            'case "$*" in "netns add "*) echo "mount /run/netns failed: Operation not permitted" >&2; exit 1;; esac',
            "",
            CannotEmulate,
            "no network namespaces are permitted here (a container?): mount /run/netns failed: Operation not permitted",
        ),
        (
            'case "$*" in *"type veth"*) echo "RTNETLINK answers: Operation not supported" >&2; exit 2;; esac',
            "",
            CannotEmulate,
            "type veth peer name port0 netns",
        ),
        ("", f'case "$*" in *" tbf "*) {NO_QDISC};; esac', CannotEmulate, "as it has no sch_tbf"),
        ("", f'case "$*" in *" netem "*) {NO_QDISC};; esac', NoLatency, "as it has no sch_netem (latency_us=0 goes without)"),
    ],
)
def test_what_the_kernel_lacks_is_named_in_one_line_and_nothing_is_left(
    planted: Planted, ip: str, tc: str, error: type[CannotEmulate], said: str
) -> None:
    planted.change(ip=ip, tc=tc)
    with pytest.raises(CannotEmulate) as raised, emulated_cluster(nodes=2, link_mbit=100, latency_us=5):
        pass
    assert type(raised.value) is error
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert planted.names == []


def test_tcp_that_cannot_be_set_is_a_warning(planted: Planted) -> None:
    reason = "sh: 1: cannot create /proc/sys/net/ipv4/tcp_congestion_control: Read-only file system"
    planted.change(ip=f'case "$*" in *" > /proc/sys/"*) echo "{reason}" >&2; exit 2;; esac')
    with emulated_cluster(nodes=2, link_mbit=100) as cluster:
        assert cluster.warnings == (f"TCP keeps the host's settings, which may share links otherwise: {reason}",)


@pytest.mark.full
def test_latency_of_a_cluster_to_be_like_is_left_out_where_it_must_be_and_said(
    planted: Planted, capfd: pytest.CaptureFixture[str]
) -> None:
    planted.change(tc=f'case "$*" in *" netem "*) {NO_QDISC};; esac')
    assert main(["--like", "lina_testbed", "--", "true"]) == 0
    warning, setting, slowed = capfd.readouterr().err.splitlines()
    assert warning.startswith("warning: without the 400 us of latency of lina_testbed: ")
    assert setting == "4 x 4 ranks; links of 500 Mbit/s each way"
    assert "all times are dilated by 200, their ratios stay" in slowed
    assert main(["--like", "lina_testbed", "--latency-us", "400", "--", "true"]) == 2  # asked for


# what is swept


def test_a_start_sweeps_what_dead_launchers_left_and_nothing_else(planted: Planted) -> None:
    tool = Tool(planted.folder.parent, "sleep 60")
    tool.pids()
    dead = planted.names
    assert len(dead) == 3
    tool.process.kill()
    tool.process.wait()
    others = ["somebody", "megalina-1-abc-node0"]  # without a lock: not one of ours to judge
    planted.names_path.write_text("\n".join([*others, *dead]) + "\n")
    with emulated_cluster(nodes=1, link_mbit=100):
        assert planted.names[:2] == others and len(planted.names) == 4  # and our own two
        with emulated_cluster(nodes=1, link_mbit=100):  # of the same process
            assert len(planted.names) == 6
        assert len(planted.names) == 4
    assert planted.names == others and list(namespaces.LOCKS.iterdir()) == []


def test_a_cluster_in_use_is_kept_by_sweeps_of_another_process(planted: Planted) -> None:
    tool = Tool(planted.folder.parent, "while test ! -e go; do sleep 0.02; done".replace("go", f"{planted.folder}/go"))
    pids, names = tool.pids(), planted.names
    for _ in range(3):
        with emulated_cluster(nodes=1, link_mbit=100):
            assert set(names) < set(planted.names)
    assert planted.names == names and all(map(alive, pids))
    (planted.folder / "go").touch()
    assert tool.finish()[0] == 0 and planted.names == []


def test_a_sweep_that_takes_a_new_lock_for_an_abandoned_one_does_no_harm(
    planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may come between the lock's creation and its locking, and removes the file."""
    flock = fcntl.flock
    swept: list[str] = []

    def first_a_sweep(lock: int, how: int) -> None:
        if not swept:
            swept.extend(path.name for path in namespaces.LOCKS.iterdir())
            (namespaces.LOCKS / swept[0]).unlink()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", first_a_sweep)
    with emulated_cluster(nodes=1, link_mbit=100) as cluster:
        (lock,) = namespaces.LOCKS.iterdir()
        assert lock.name not in swept and cluster.nodes == (f"{lock.name}-node0",)


def test_a_folder_of_locks_that_cannot_be_is_one_line(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(namespaces, "LOCKS", planted.names_path / "locks")
    with (
        pytest.raises(CannotEmulate, match="names/locks can't be written .Not a directory.: it tells"),
        emulated_cluster(nodes=1, link_mbit=100),
    ):
        pass
    assert planted.names == []


# what a rank is told


def test_ranks_are_numbered_node_by_node_as_torchrun_does() -> None:
    places = [environment(node, local, nodes=2, ranks_per_node=3) for node in range(2) for local in range(3)]
    members = [joined(place) for place in places]
    assert [member.rank for member in members if member] == list(range(6))
    assert {(m.launcher, m.world, m.local_ranks, m.address) for m in members if m} == {("torchrun", 6, 3, "10.0.0.1")}
    assert [(p["NODE_RANK"], p["GROUP_RANK"], p["LOCAL_RANK"]) for p in places[2:4]] == [("0", "0", "2"), ("1", "1", "0")]
    assert {place["GLOO_SOCKET_IFNAME"] for place in places} == {"eth0"}


def test_a_packet_meets_two_buckets_and_one_latency_on_its_way() -> None:
    commands = plan("p", nodes=3, link_mbit=2.5, latency_us=70)
    buckets = [c for c in commands if "root handle 1: tbf rate 2500000bit" in c]
    assert len(buckets) == 6 and sum("-n p-switch" in c for c in buckets) == 3
    assert [c for c in commands if "netem" in c] == [
        f"tc -n p-node{i} qdisc add dev eth0 parent 1: netem delay 70us limit 1000000" for i in range(3)
    ]
    assert not [c for c in plan("p", nodes=3, link_mbit=2.5, latency_us=0) if "netem" in c]


# slow motion


def test_the_testbed_of_the_paper_is_slowed_until_its_links_have_500_mbit() -> None:
    assert slow_motion("lina_testbed") == Setting(4, 4, 500.0, 400.0, 200.0, peak_gflops=780.0)


@pytest.mark.parametrize("factor", [1.0, 37.5, 1000.0])
def test_slow_motion_slows_everything_by_the_same_factor(factor: float) -> None:
    real, slow = slow_motion("lina_testbed", 1), slow_motion("lina_testbed", factor)
    assert 1 / slow.link_mbit == pytest.approx(factor / real.link_mbit)  # time of a megabit
    assert 1 / slow.device_gflops == pytest.approx(factor / real.device_gflops)  # of a GFLOP
    assert slow.latency_us == pytest.approx(factor * real.latency_us)


def test_flags_come_before_the_cluster_to_be_like() -> None:
    flags = argparse.Namespace(
        like="lina_testbed", slowdown=1000.0, link_mbit=None, nodes=2, ranks_per_node=None, latency_us=0.0, timeout_s=1.0
    )
    assert asked(flags) == Setting(2, 4, 100.0, 0.0, 1000.0, peak_gflops=156.0)


@pytest.mark.parametrize(
    ("own", "added"),
    [
        ("model=tiny", "cluster.peak_tflops=0.78 cluster.device_gflops=312"),
        ("cluster.device_gflops=1", "cluster.peak_tflops=0.78"),
        ("cluster.attention_ms=10 cluster.experts_ms=14", "cluster.peak_tflops=0.78"),
        ("cluster.attention_ms=0 cluster.experts_ms=0", "cluster.peak_tflops=0.78 cluster.device_gflops=312"),
        ("+cluster.peak_tflops=2", "cluster.device_gflops=312"),
    ],
)
def test_training_is_told_the_speed_of_its_device_unless_it_says_so_itself(own: str, added: str) -> None:
    setting = Setting(peak_gflops=780.0)
    for program in ("some/where/pretrain_gpt_moe.py", "tools/analyze_alltoall.py"):
        command = ["python", program, *own.split()]
        assert with_device(command, setting) == [*command, *added.split()]
        assert with_device(command, Setting()) == command
    assert with_device(["python", "other.py"], setting) == ["python", "other.py"]


def test_devices_that_are_faster_than_the_cores_are_warned_of(
    planted: Planted, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tools.emulate_cluster.num_cores", lambda: 2)
    assert too_fast(Setting(4, 4, slowdown=10, peak_gflops=15)) == ""  # 16 x 6 GFLOP/s on 2 cores of 50
    said = too_fast(Setting(4, 4, slowdown=10, peak_gflops=31.25))
    assert said.startswith("16 devices of 12.5 GFLOP/s on 2 cores of about 50: ") and "--slowdown 20 " in said
    train = tmp_path / "pretrain_gpt_moe.py"
    train.touch()
    for own, warned in (("model=tiny", True), ("cluster.attention_ms=1", False)):
        assert main(["--like", "lina_testbed", "--nodes", "1", "--", "sh", str(train), own]) == 0
        assert ("devices of 312 GFLOP/s" in capfd.readouterr().err) is warned


def test_ranks_know_how_much_they_are_slowed(planted: Planted, capfd: pytest.CaptureFixture[str]) -> None:
    show = ["--", "sh", "-c", 'test "$RANK" = 0 && echo "slowed by $MEGALINA_SLOWDOWN, links of $MEGALINA_LINK_MBIT."; true']
    assert main(["--like", "lina_testbed", "--slowdown", "50", *show]) == 0
    assert capfd.readouterr().out == "slowed by 50, links of 2000.\n"
    assert main(show) == 0
    assert capfd.readouterr().out == "slowed by , links of 500.\n"
    assert main(["--nodes", "1", *show]) == 0  # no link is met
    assert capfd.readouterr().out == "slowed by , links of .\n"


# how a command ends; no root needed: an `ip` that runs it outside


def rank_script(code: str) -> list[str]:
    return ["sh", "-c", code]


def test_rank_0_is_heard_and_the_others_are_kept(planted: Planted, tmp_path: Path) -> None:
    cluster, logs = Cluster(("a", "b")), tmp_path / "logs"
    with open(tmp_path / "heard", "w+") as heard:
        command = rank_script("echo rank $RANK of $WORLD_SIZE, $WORD; echo oh >&2")
        outcome = cluster.run(command, ranks_per_node=2, logs=logs, env={"WORD": "hello"}, stream=heard)
        heard.seek(0)
        assert heard.read() == "rank 0 of 4, hello\noh\n"
    assert (outcome.code, outcome.reason) == (0, "")
    assert {path.name: path.read_text() for path in logs.iterdir()} == {
        f"rank_{rank}.log": f"rank {rank} of 4, hello\noh\n" for rank in (1, 2, 3)
    }
    assert sum(call.startswith("ip netns exec a") for call in planted.calls) == 2


@pytest.mark.full
def test_the_first_failure_ends_all_with_its_code_and_its_last_words(planted: Planted, tmp_path: Path) -> None:
    script = f"echo $$ > {tmp_path}/pid.$RANK; test $RANK = 2 || exec sleep 60; echo the cause; exit 7"
    begin = time.monotonic()
    outcome = Cluster(("a", "b")).run(rank_script(script), ranks_per_node=2, logs=tmp_path / "logs")
    assert time.monotonic() - begin < 10
    assert (outcome.code, outcome.reason) == (7, "rank 2 of 4 failed with exit code 7\n[rank 2] the cause")
    assert not any(alive(int(path.read_text())) for path in tmp_path.glob("pid.*"))


def test_the_rank_that_failed_is_blamed_and_not_the_one_that_lost_it(planted: Planted, tmp_path: Path) -> None:
    script = f"""
        if test $RANK = 1; then
            while test ! -e {tmp_path}/there; do sleep 0.02; done; echo "RuntimeError: Connection closed by peer"; exit 1
        fi
        if test $RANK = 2; then touch {tmp_path}/there; sleep 0.3; echo the cause; exit 5; fi
        exec sleep 60"""
    outcome = Cluster(("a", "b")).run(rank_script(script), ranks_per_node=2, logs=tmp_path / "logs")
    assert (outcome.code, outcome.reason) == (5, "rank 2 of 4 failed with exit code 5\n[rank 2] the cause")


@pytest.mark.full
def test_of_two_failures_the_first_one_counts_and_both_are_shown(planted: Planted, tmp_path: Path) -> None:
    script = f"""
        if test $RANK = 2; then touch {tmp_path}/over; exit 3; fi
        if test $RANK = 1; then while test ! -e {tmp_path}/over; do sleep 0.02; done; sleep 0.3; exit 4; fi
        exec sleep 60"""
    outcome = Cluster(("a", "b")).run(rank_script(script), ranks_per_node=2, logs=tmp_path / "logs")
    assert outcome.code == 3
    assert outcome.reason == "rank 2 of 4 failed with exit code 3\nrank 1 of 4 failed with exit code 4"


def test_a_rank_that_is_killed_ends_the_command_with_the_code_of_a_shell(planted: Planted, tmp_path: Path) -> None:
    outcome = Cluster(("a",)).run(rank_script("kill -KILL $$"), ranks_per_node=1, logs=tmp_path / "logs")
    assert (outcome.code, outcome.reason) == (128 + 9, "rank 0 of 1 was ended by SIGKILL (out of memory?)")


def test_a_command_without_end_is_ended(planted: Planted, tmp_path: Path) -> None:
    script = f"test $RANK = 0 && exit 0; echo $$ > {tmp_path}/pid; exec sleep 60"
    outcome = Cluster(("a", "b")).run(rank_script(script), ranks_per_node=1, logs=tmp_path / "logs", timeout_s=0.5)
    assert (outcome.code, outcome.reason) == (124, "no end after 0.5 s: rank(s) 1 still ran")
    assert not alive(int((tmp_path / "pid").read_text()))


def test_a_cluster_runs_one_command_at_a_time(planted: Planted, tmp_path: Path) -> None:
    """The end of one ends every process of the nodes."""
    cluster, outcomes = Cluster(("a",)), []
    first = ["sh", "-c", f"touch {tmp_path}/there; while test ! -e {tmp_path}/go; do sleep 0.02; done"]
    thread = threading.Thread(target=lambda: outcomes.append(cluster.run(first, ranks_per_node=1, logs=tmp_path)))
    thread.start()
    wait_for((tmp_path / "there").exists, "the first command doesn't start")
    with pytest.raises(RuntimeError, match="one command at a time"):
        cluster.run(["true"], ranks_per_node=1, logs=tmp_path)
    (tmp_path / "go").touch()
    thread.join()
    assert outcomes[0].code == cluster.run(["true"], ranks_per_node=1, logs=tmp_path).code == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_signal_lets_the_ranks_save_and_leaves_nothing(planted: Planted, tmp_path: Path, number: signal.Signals) -> None:
    saves = f"trap 'sleep 0.2; touch {tmp_path}/saved.'$RANK'; exit' TERM"
    tool = Tool(tmp_path, "while :; do sleep 0.05; done", traps=saves)
    pids = tool.pids()
    assert len(planted.names) == 3
    tool.process.send_signal(number)
    code, _, err = tool.finish()
    assert (code, err.splitlines()[-1]) == (128 + number, f"stopped by {number.name}")
    assert len(list(tmp_path.glob("saved.*"))) == 2
    assert planted.names == [] and not any(map(alive, pids))


def test_a_signal_while_a_rank_starts_is_handled_when_it_has_its_place() -> None:
    ranks = []

    def stop(number: int, _: object) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Stopped), signals_wait():
            os.kill(os.getpid(), signal.SIGTERM)
            ranks.append("the rank")
        assert ranks == ["the rank"] and signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_signal_does_not_wait_for_ranks_that_go_on(planted: Planted, tmp_path: Path) -> None:
    tool = Tool(tmp_path, "while :; do sleep 0.05; done", traps="trap '' TERM")
    pids = tool.pids()
    begin = time.monotonic()
    tool.process.terminate()
    time.sleep(0.3)
    tool.process.terminate()
    assert tool.finish()[0] == 128 + signal.SIGTERM
    assert time.monotonic() - begin < STOP_S / 2
    assert planted.names == []
    wait_for(lambda: not any(map(alive, pids)), "a rank outlives its SIGKILL", 2.0)  # which takes a moment on a busy machine


def test_the_tool_gives_the_failing_ranks_code_and_says_where_the_output_is(planted: Planted, tmp_path: Path) -> None:
    code, out, err = Tool(tmp_path, "echo rank $RANK; test $RANK = 1 && exit 9; exec sleep 60").finish()
    assert (code, out) == (9, "rank 0\n")
    failed, words, where = err.splitlines()[-3:]
    assert (failed, words) == ("rank 1 of 2 failed with exit code 9", "[rank 1] rank 1")
    assert (Path(where.split()[-1]) / "rank_1.log").read_text() == "rank 1\n"


def test_a_command_that_ends_well_leaves_no_files_unless_they_are_asked_for(planted: Planted, tmp_path: Path) -> None:
    before = {"bin", "calls", "names"}
    assert Tool(tmp_path, "true").finish()[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == before | {"locks", "pid.0", "pid.1"}
    assert Tool(tmp_path, "echo kept", "--logs", str(tmp_path / "logs")).finish()[:2] == (0, "kept\n")
    assert (tmp_path / "logs" / "rank_1.log").read_text() == "kept\n"
