"""The calibration's line, and what it measures on ranks whose links have a known speed."""

import time
from typing import Any

import pytest

from megalina.collective_log import CollectiveLog
from megalina.comm import calibration
from megalina.comm.calibration import calibrate, fastest, fit
from megalina.comm.exchange import Pending
from megalina.mesh import build_mesh
from megalina.timeline.contention import Alone
from tests.parallel.ranks import run_on_ranks

LATENCY_S, S_PER_BYTE = 0.003, 2e-8
LATE_S = 0.15
SIZES = {"tokens": [120_000, 1_200_000], "grads": [120_000, 1_200_000], "params": [120_000, 1_200_000]}


def test_the_line_goes_through_its_points() -> None:
    line = fit([(1000, 0.003), (2000, 0.004), (4000, 0.006)])
    assert (line.latency_s, line.s_per_byte) == (pytest.approx(0.002), pytest.approx(1e-6))
    assert line.seconds(3000) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ([(1000, 1.0), (2000, 3.0)], Alone(0.0, pytest.approx(7 / 5000))),  # would start below zero
        ([(1000, 3.0), (2000, 1.0)], Alone(2.0, 0.0)),  # would fall
        ([(1000, 3.0), (1000, 1.0)], Alone(0.0, 0.002)),
        ([(0, 2.0)], Alone(2.0, 0.0)),
        ([], Alone(0.0, 0.0)),
    ],
)
def test_the_line_never_falls_and_is_never_negative(points: list[tuple[int, float]], line: Alone) -> None:
    assert fit(points) == line


def test_of_two_calibrations_the_faster_one_counts_for_each_op() -> None:
    quiet, busy = Alone(0.001, 1e-9), Alone(0.004, 0.5e-9)  # the same at 6 MB
    first, second = {"tokens": quiet, "grads": busy}, {"tokens": busy, "grads": quiet}
    assert fastest(first, second, {"tokens": [10**6], "grads": [10**6, 2 * 10**6]}) == {"tokens": quiet, "grads": quiet}
    assert fastest(first, second, {"tokens": [10**6, 2 * 10**7]}) == {"tokens": busy}


def test_one_rank_has_nothing_to_measure() -> None:
    assert calibrate(build_mesh(), CollectiveLog(0), SIZES) == dict.fromkeys(SIZES, Alone(0.0, 0.0))


class LateClock:
    """Whoever reads it to begin an exchange comes late."""

    reads = 0

    def perf_counter(self) -> float:
        self.reads += 1
        if self.reads % 2:
            time.sleep(LATE_S)
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def _calibrated() -> list[tuple[dict[str, Alone], list[tuple[str, str]]]]:
    """On a wire of known speed, to which rank 1 always comes late: whole and sharded, and what was submitted for it."""
    mesh, seen = build_mesh(ep=2), []
    log = CollectiveLog(mesh.world.rank)
    wait, submit = Pending.wait, log.submit

    def slow_wait(pending: Pending) -> Any:
        arrived = wait(pending)
        time.sleep(LATENCY_S + S_PER_BYTE * pending.num_bytes)
        return arrived

    def noted(axis: str, ranks: tuple[int, ...], kind: str, *rest: Any) -> None:
        seen.append((axis, kind))
        submit(axis, ranks, kind, *rest)

    Pending.wait, log.submit = slow_wait, noted
    if mesh.world.rank == 1:
        calibration.time = LateClock()
    out = []
    for sharded in (False, True):
        seen.clear()
        out.append((calibrate(mesh, log, SIZES, repeats=3, sharded=sharded), list(seen)))
    return out


@pytest.mark.full
def test_ranks_agree_on_the_speed_of_the_wire_however_late_one_comes() -> None:
    ranks = run_on_ranks(4, _calibrated)
    assert all(found == ranks[0] for found in ranks)
    per_op = 2 * (1 + 3)  # sizes x (a first one + repeats)
    for (lines, submitted), grads in zip(ranks[0], ("sum", "scatter"), strict=True):
        kinds = [("ep", "all-to-all"), ("dp", grads), ("dp", "gather")]
        assert submitted == [kind for kind in kinds for _ in range(per_op)]
        for line in lines.values():
            for num_bytes in SIZES["tokens"]:
                wire_s = LATENCY_S + S_PER_BYTE * num_bytes
                assert wire_s < line.seconds(num_bytes) < wire_s + LATE_S / 2  # gloo itself takes some milliseconds
