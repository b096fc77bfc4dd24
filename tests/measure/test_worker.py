"""A measurement of small sizes on two ranks: everything that figures need is timed, and both ranks find the same."""

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from megalina import launch
from megalina.measure import figures, worker
from megalina.measure.kernels import TinyStep
from megalina.measure.shapes import CPU, sent_key
from megalina.mesh import build_mesh
from megalina.perfmodel.sim.collectives import Collective
from tests.parallel.ranks import run_on_ranks

SMALL = replace(
    CPU,
    **{"sides": (1, 4, 16), "large_side": 16, "cold_bytes": 2**14, "micro_batch": 2, "seq_len": 16, "d_model": 24, "d_ff": 16},
    **{"num_heads": 6, "expert_rows": (1, 3), "copied_bytes": 2**14, "sent_bytes": (2**10, 2**12)},
)
STEP = TinyStep(lambda: sum(range(1000)), instructions=20, kernels=40.0)


def work() -> tuple[figures.Measured, figures.Figures]:
    with patch.object(worker, "sizes_of", lambda kind: SMALL), patch.object(figures, "sizes_of", lambda kind: SMALL):
        measured = worker.measure(build_mesh(), worker.device_of("cpu"), STEP, seconds=1e-4)
        return measured, figures.figures_of(measured)


@pytest.mark.full
def test_two_ranks_measure_all_that_figures_need_and_find_the_same() -> None:
    (measured, found), other = run_on_ranks(2, work)
    assert (measured, found) == other
    assert (measured.nodes, measured.ranks_per_node, measured.instructions) == (1, 2, 20)
    one, two = measured.passes
    sent = {sent_key("inside", op.value, size) for op in Collective for size in SMALL.sent_bytes}
    assert set(one) == set(two) > sent and min([*one.values(), *two.values()]) > 0
    assert set(measured.contention) == {"all-to-all under all-reduce", "all-reduce under all-to-all"}
    assert all(of["alone_s"] > 0 and of["count"] >= 0 for of in measured.contention.values())
    assert set(found.wires) == {"inside"} and found.wires["inside"].bytes_per_s > 0
    assert set(found.curves) == set(measured.dtypes) == {"float32", "bfloat16"}
    assert min(found.flops_per_s.values()) > 0 and found.kernel_s > 0


def test_one_rank_measures_what_one_rank_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's own main, in this process."""
    for name, value in launch.rank_environment(0, 1, 0, 1, "127.0.0.1", launch.free_port()).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(worker, "sizes_of", lambda kind: SMALL)
    out, spec = tmp_path / "found.json", tmp_path / "spec.json"
    spec.write_text(json.dumps({"what": "measure", "device": "cpu", "seconds": 1e-4, "out": str(out)}))
    assert worker.main(str(spec)) == 0
    found = json.loads(out.read_text())
    assert (found["nodes"], found["ranks_per_node"], found["contention"]) == (1, 1, {})
    assert found["instructions"] > 20 and not any(key.startswith(("inside", "over")) for key in found["passes"][0])
