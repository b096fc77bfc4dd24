"""Layers in stages: Megatron's layout strings as Megatron reads them, and cuts that no other cut beats."""

from itertools import combinations_with_replacement

import pytest

from megalina.step.pipeline.stages import StageLayers, cut, layout_of, stages_from

LAYOUTS = ("Et*3|(tt|)*29,m|L", "Et*6|t*6|t*6|t*5|t*5|t*5|t*5|t*5L", "EtL", "E|(t|)*4L", "E,(t|t)*2,t|mL", "Ettt|(tt|t|)*3tmL")


def test_a_layout_of_megatron_is_read() -> None:
    stages = stages_from("Et*3|(tt|)*2,m|L", num_layers=7, mtp_layers=1)
    assert stages == (
        StageLayers((0, 1, 2), True),
        StageLayers((3, 4)),
        StageLayers((5, 6)),
        StageLayers((7,)),
        StageLayers((), head=True),
    )
    assert list(map(str, stages)) == ["E 0-2", "3-4", "5-6", "7", "L"]
    assert layout_of(stages, mtp_layers=1) == "Ettt|tt|tt|m|L"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_that_is_written_is_the_one_that_was_read(layout: str) -> None:
    stages = stages_from(layout)
    assert stages_from(layout_of(stages, mtp_layers=layout.count("m"))) == stages


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_as_megatron_reads_it(layout: str) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout as Theirs

    letters = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.mtp: "m", LayerType.loss: "L"}
    theirs = ["".join(letters[layer] for layer in stage) for stage in Theirs.parse_str_to_list(layout)]
    assert layout_of(stages_from(layout), mtp_layers=layout.count("m")).split("|") == theirs


@pytest.mark.parametrize(
    ("layout", "error"),
    [
        ("Ext|L", "has 'x': write E .embedding., t .layer."),
        ("tE|L", "is tEL in a row: one E comes first, then t, then m, and one L comes last"),
        ("Emt|L", "is EmtL in a row"),
        ("E||tL", "stage 1 of 3 has nothing in it"),
        ("Et|L", "has 1 times t .layer., and the model 7"),
        ("Et*7|L", "has 0 times m .layer of multi-token prediction., and the model 1"),
    ],
)
def test_a_wrong_layout_is_refused(layout: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        stages_from(layout, num_layers=7, mtp_layers=1)


def costs_of(stages: tuple[StageLayers, ...], costs: list[float], embedding: float, head: float) -> list[float]:
    return [sum(costs[layer] for layer in s.layers) + embedding * s.embedding + head * s.head for s in stages]


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(("embedding", "head"), [(0.0, 0.0), (0.5, 2.5), (3.0, 0.1)])
def test_no_cut_has_a_cheaper_dearest_stage_or_is_evener(stages: int, embedding: float, head: float) -> None:
    costs = [1.0, 2.0, 1.5, 1.0, 3.0, 0.5]
    found = costs_of(cut(costs, stages, embedding=embedding, head=head), costs, embedding, head)
    best = (float("inf"), 0.0)
    for bounds in combinations_with_replacement(range(len(costs) + 1), stages - 1):
        ends = [0, *bounds, len(costs)]
        sizes = [b - a for a, b in zip(ends, ends[1:])]
        if any(size == 0 for size in sizes[1:-1]):
            continue
        sums = [sum(costs[a:b]) for a, b in zip(ends, ends[1:])]
        sums[0] += embedding
        sums[-1] += head
        best = min(best, (round(max(sums), 9), round(sum(s * s for s in sums), 9)))
    assert (round(max(found), 9), round(sum(s * s for s in found), 9)) == best


def test_first_and_last_stage_may_have_no_layer_and_no_more_stages_than_that() -> None:
    assert list(map(str, cut([1.0] * 2, 4, embedding=1.0, head=1.0))) == ["E", "0", "1", "L"]
    with pytest.raises(ValueError, match="2 layers, an embedding and a head can't be cut into 5 stages: take at most 4"):
        cut([1.0] * 2, 5)
