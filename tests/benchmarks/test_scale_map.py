"""The scale map: what a point holds, which rung is named, and that the words and the picture say what the points say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scale_map
from benchmarks.scale import grid
from benchmarks.scale.grid import Place, Variant, config_of, in_steps, places, simulated, varied
from benchmarks.scale.report import (
    findings,
    granularity_line,
    loss_line,
    packing_line,
    priority_line,
    report,
    top_k_line,
    zero_line,
)
from benchmarks.scale.rungs import Point, Rung, point_of
from megalina.perfmodel.forecast.forecast import forecast
from megalina.perfmodel.forecast.network import network_of
from megalina.perfmodel.forecast.priced_step import PricedStep
from megalina.perfmodel.sim.collectives import Collective
from megalina.perfmodel.sim.lower_bound import lower_bound
from megalina.perfmodel.sim.network import Loads
from megalina.plan_settings import strategy_of
from megalina.step.plan import Plan
from megalina.validate import check_config

VOCAB = 512
HERE = Place("scale", "NVLink", 16, 100, "paper")


def small(place: Place = HERE) -> Any:
    """Its configuration with two layers, so that a point takes little."""
    config = config_of(place, Variant())
    return replace(config, model=replace(config.model, num_layers=2))


@pytest.fixture(scope="module")
def point() -> Point:
    config = small()
    return point_of(config, 16, vocab_size=VOCAB, network=network_of(config.cluster))


def test_a_rung_takes_as_long_as_the_forecast_of_its_plan(point: Point) -> None:
    config = small()
    for name in ("eager", "priority", "chunks", "lina", "flow"):
        rung = point.rungs[name]
        planned = replace(config, strategy=strategy_of(rung.plan, config.strategy))
        found = forecast(planned, 16, vocab_size=VOCAB, plan=rung.plan)
        assert rung.step_s == pytest.approx(found.step_s, rel=1e-9), name
        assert dict(rung.exposed_s) == pytest.approx(dict(found.exposed_s)), name


def test_packing_alone_is_eager_with_smaller_groups(point: Point) -> None:
    packed, config = point.rungs["packing"], small()
    steps = []
    for packing in (2, 4, 8, 16):
        less = replace(config, parallel=replace(config.parallel, ep=16 // packing))
        steps.append(forecast(less, 16, vocab_size=VOCAB, plan=point.rungs["eager"].plan).step_s)
    first_rise = next((i for i in range(1, 4) if steps[i] >= steps[i - 1]), 4)
    assert packed.step_s == pytest.approx(min(steps[:first_rise]))


def test_the_baseline_is_tuned(point: Point) -> None:
    config = small()
    for plan in (Plan("eager"), Plan("ddp", merge_bytes=25 * 2**20)):
        planned = replace(config, strategy=strategy_of(plan, config.strategy))
        assert point.rungs["eager"].step_s <= forecast(planned, 16, vocab_size=VOCAB, plan=plan).step_s * (1 + 1e-9)


def test_bounds_are_those_of_all_ranks_and_no_schedule_of_the_layout_beats_them(point: Point) -> None:
    config, plan = small(), Plan("eager")
    step = PricedStep(config, 16, plan, vocab_size=VOCAB)
    found = lower_bound(
        [step.program] * 16,
        ranks_of=step.ranks_of,
        seconds=lambda _, instruction: step.seconds(instruction),
        network=network_of(config.cluster),
        sizes=step.sizes,
    )
    assert point.compute_s == pytest.approx(found["compute_s"]) and point.link_s == pytest.approx(found["link_s"])
    assert point.link_s > 0 and point.bound_s == max(point.compute_s, point.link_s)
    for name in ("eager", "priority", "chunks", "flow"):
        assert point.rungs[name].step_s >= point.bound_s * (1 - 1e-9), name


def test_what_the_paper_saves_is_told_by_rung_and_sums_to_all(point: Point) -> None:
    saved = point.as_json()["saved_s"]
    assert list(saved) == ["priority", "chunks", "lina"]
    assert sum(saved.values()) == pytest.approx(point.rungs["eager"].step_s - point.rungs["lina"].step_s)


def made(**step_s: float) -> Point:
    return Point({name.replace("_and_", " + "): Rung(Plan(), s, 1.0, {}) for name, s in step_s.items()}, 1.0, 0.5)


@pytest.mark.parametrize(
    ("found", "pays"),
    [
        (made(eager=10.0, priority=9.0, packing=8.0, lina=7.95), "packing"),  # as good as the best, and simpler
        (made(eager=10.0, priority=9.0, packing=8.0, lina=7.8), "lina"),
        (made(eager=10.0, priority=9.8, flow=9.75), "nothing"),
        (made(eager=10.0, priority=10.5), "nothing"),
        (made(eager=10.0, flow=9.0, flow_and_packing=8.0), "flow + packing"),
        (made(), ""),
    ],
)
def test_the_simplest_rung_that_is_as_good_as_the_best_is_named(found: Point, pays: str) -> None:
    assert found.pays == pays
    assert found.gain(found.pays) == pytest.approx(
        found.rungs["eager"].step_s / found.rungs[pays].step_s if pays in found.rungs else 1
    )


def test_a_layout_that_fits_no_memory_has_no_rungs() -> None:
    config = small()
    hardware = replace(config.cluster.hardware, memory_gib=4.001)
    tiny = replace(config, cluster=replace(config.cluster, hardware=hardware))
    found = point_of(tiny, 16, vocab_size=VOCAB, network=network_of(config.cluster))
    assert not found.rungs and found.pays == "" and found.bound_s > 0


@pytest.mark.full
def test_every_place_is_one_that_the_trainer_would_accept_and_occurs_once() -> None:
    found = places(quick=False)
    assert len({place.title for place in found}) == len(found) == 294
    assert {p.gpus for p in found} == {16, 64, 256, 1024, 4096} and {p.gbit for p in found} == {25, 100, 400, 800}
    assert {p.num_experts for p in found if p.map == "granularity"} == {8, 16, 32, 64, 128, 256}
    for place in found:
        check_config(config_of(place, Variant()), place.gpus)
    for variant, place in varied(quick=False):
        check_config(config_of(place, variant), place.gpus)


@pytest.mark.full
def test_variants_change_what_they_say() -> None:
    plain = config_of(HERE, Variant())
    less = config_of(HERE, Variant("less", (("collective_efficiency", 0.75),)))
    assert less.cluster.hardware.collective_efficiency == pytest.approx(0.75 * plain.cluster.hardware.collective_efficiency)
    assert replace(less, cluster=plain.cluster) == plain
    assert config_of(HERE, Variant(layers=2)).model.num_layers == 2 * plain.model.num_layers
    assert config_of(HERE, Variant(micro_batches=4)).train.global_batch_size == 4 * plain.train.global_batch_size
    assert (
        simulated(replace(HERE, gpus=64), Variant(flat_ring=True)).rungs["eager"].step_s
        > simulated(replace(HERE, gpus=64), Variant()).rungs["eager"].step_s
    )


def test_steps_between_domains_grow_with_their_logarithm() -> None:
    latency_s = {}
    for gpus in (64, 512):
        network = in_steps(network_of(config_of(replace(HERE, gpus=gpus), Variant()).cluster), gpus)
        loads = Loads(network, gpus)
        latency_s[gpus] = loads.alone_s(loads.of("world", Collective.ALL_REDUCE, tuple(range(gpus))), 0.0)
    hop_s = 2e-6
    assert latency_s[512] - latency_s[64] == pytest.approx(2 * hop_s * 3)  # 8 and 64 domains: 3 steps more, there and back
    one = in_steps(network_of(config_of(Place("scale", "NVL72", 64, 400, "paper"), Variant()).cluster), 64)
    assert one.algorithm == "direct"


def row(title: str = "NVLink", **changed: Any) -> dict[str, Any]:
    rung = {"plan": "p", "step_s": 1.0, "compute_s": 0.5, "exposed_s": {"a2a": 0.3, "grads": 0.1, "params": 0.0, "other": 0.0}}
    times = changed.pop("times", {})
    rungs = {name: rung | {"step_s": seconds} for name, seconds in ({"eager": 1.0} | times).items()}
    plain = {"variant": "as assumed", **replace(HERE, device=title).as_json(), "pays": "nothing", "gain": 1.0, "compute_s": 0.5}
    return plain | {"link_s": 0.4, "bound_s": 0.5, "saved_s": {}, "rungs": rungs} | changed


def test_findings_are_what_the_points_say() -> None:
    points = [
        row(times={"priority": 0.9, "packing": 0.82, "lina": 0.8}),
        row("PCIe", times={"priority": 1.25, "packing": 2.0, "lina": 0.6}),
        row("NVL72", times={"priority": 0.99, "packing": 1.0, "lina": 0.99}),
    ]
    line = packing_line(points)
    assert "in 2 points" in line and "-80% of that in the median, -250% at least, and 90% or more in 1." in line
    assert "in 1 of 3 points (NVLink 1)" in priority_line(points)
    assert "most is 1.11 (NVLink" in priority_line(points) and "least 0.80 (PCIe" in priority_line(points)
    assert "in 1 of 3 points, at worst 0.50 (PCIe" in loss_line(points)
    granular = [row(map="granularity", shape="granular", num_experts=8, top_k=k, link_s=0.2 * k) for k in (1, 2, 4)]
    assert top_k_line(granular, "NVLink", 100).endswith("8 experts: top-4.")
    packed = [g | {"rungs": row(times={"packing": g["top_k"] / 2})["rungs"]} for g in reversed(granular)]
    line = granularity_line(packed, "NVLink", 100, 8)
    assert line.startswith("NVLink 100 Gb/s, 8 experts, top-1, 2, 4: priority 1.00, 1.00, 1.00; packing 2.00, 1.00, 0.50;")
    assert any("points that fit: nothing 3" in line for line in findings(points))


def test_zero_is_held_against_the_same_place_without() -> None:
    points = [row(times={"flow": 0.8}), row(zero=1, pays="lina_zero", times={"flow": 0.8, "lina_zero": 0.5})]
    line = zero_line(points)
    assert "of 1 points" in line and "0 have the same winner; lina_zero wins 1" in line and "1.60 to 1.60 times" in line


@pytest.mark.full
@pytest.mark.usefixtures("every_status_line")
def test_the_command_writes_points_tables_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = [HERE, replace(HERE, zero=1), Place("granularity", "NVLink", 16, 100, num_experts=8, top_k=2)]
    monkeypatch.setattr(grid, "places", lambda *, quick: here)
    monkeypatch.setattr(grid, "varied", lambda *, quick: [(Variant("kernel_us +25%", (("kernel_us", 1.25),)), HERE)])
    data, picture = tmp_path / "map.json", tmp_path / "map.png"
    assert scale_map.main(["--quick", "--json", str(data), "--picture", str(picture)]) == 0
    said = capsys.readouterr()
    assert "NVLink 16 GPUs 100 Gb/s paper" in said.out and "kernel_us +25%" in said.out and "ZeRO-1: of 1 points" in said.out
    assert "4/4" not in said.err and "3/4 points" in said.err
    found = json.loads(data.read_text())
    assert len(found["points"]) == 3 and len(found["varied"]) == 1 and picture.stat().st_size > 20_000
    again = tmp_path / "again.png"
    assert scale_map.main(["--redraw", str(data), "--picture", str(again)]) == 0
    assert capsys.readouterr().out == said.out == report(found) + "\n" and again.stat().st_size == picture.stat().st_size


@pytest.mark.parametrize(("text", "said"), [("{", "is no JSON"), ("{}", "has no points"), (None, "No such file")])
def test_a_file_that_is_none_of_ours_is_one_line(
    text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "map.json"
    if text is not None:
        path.write_text(text)
    assert scale_map.main(["--redraw", str(path)]) == 2
    caught = capsys.readouterr()
    assert said in caught.err and caught.err.count("\n") == 1 and not caught.out
    assert scale_map.main(["--quick", "--json", str(tmp_path / "no" / "map.json")]) == 2
