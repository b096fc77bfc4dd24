"""The map of pipelines and accumulation: a point without stages and one with, what pays, and the table."""

from dataclasses import replace

import pytest

from benchmarks.scale.pipelines import PipedPlace, piped_places, piped_table, simulated
from megalina.compose import compose
from megalina.config import PretrainConfig


def small() -> PretrainConfig:
    """Two large experts a layer, which few GPUs hold without stages."""
    words = ("model=bench", "model.num_layers=4", "model.num_experts=2", "model.vocab_size=512", "train.dtype=bfloat16")
    return compose([*words, "cluster=h100_400g", "cluster.nodes=1", "train.seq_len=512", "train.global_batch_size=64"])


@pytest.mark.full
def test_a_point_names_the_fastest_schedule_beside_its_baseline() -> None:
    points = [simulated(PipedPlace("DeepSeek-V3", 8, ranks, 8), small()) for ranks in (1, 2)]
    whole, piped = points
    assert {"eager", "flow"} <= set(whole["schedules"]) and {"1f1b", "zb_h1", "zbv", "dualpipev + pair"} <= set(
        piped["schedules"]
    )
    for point, base in zip(points, ("eager", "1f1b"), strict=True):
        fastest = min(found["step_s"] for found in point["schedules"].values())
        assert point["gain"] == pytest.approx(point["schedules"][base]["step_s"] / fastest)
        assert point["pays"] in (*point["schedules"], "nothing")
    table = piped_table(points).splitlines()
    assert len(table) == 3 and "DeepSeek-V3 8 GPUs pp 2, 8 sequences a GPU" in table[2] and "tp " in table[2]


@pytest.mark.full
def test_what_fits_nowhere_is_said() -> None:
    config = small()
    hardware = replace(config.cluster.hardware, memory_gib=4.01)
    place = PipedPlace("Mixtral 8x7B", 8, 2, 8)
    point = simulated(place, replace(config, cluster=replace(config.cluster, hardware=hardware)))
    assert point["pays"] == "does not fit" and point["gain"] is None and not point["schedules"]
    assert "does not fit" in piped_table([point])


def test_places_occur_once() -> None:
    found = piped_places(quick=False)
    assert len({place.title for place in found}) == len(found) == 2 * 4 * 3 * 2
    assert set(piped_places(quick=True)) < set(found)
