"""A model cut across slow nodes by layers, or by experts: who competes on which cluster."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from megalina.compare.ladder import HALF, Setting
from megalina.step.pipeline.cell import Pipeline
from megalina.step.pipeline.schedules.schedule import Size
from megalina.step.pipeline.schedules.table import SCHEDULES as PAIRED
from megalina.step.pipeline.torch_table import to_csv

NODES, LAYERS = 4, 8  # two stages of one layer on each node
MICRO_BATCHES = 16  # of a pipeline; of four sequences each
OWN = Path(__file__).resolve().parents[2] / "docs" / "examples" / "own_pipeline.py"
SCHEDULES = {  # with stages on each node; cells of those that are paired take turns
    "1f1b": 1,
    "1f1b, paired": 1,
    "interleaved": 2,
    "zbv": 2,
    "dualpipev, unpaired": 2,
    "dualpipev": 2,
}
SETTINGS = (
    Setting("4x1", NODES, 1, (), 2.0),  # slow motion: two cores are the hosts of all devices
    Setting("4x2", NODES, 2, HALF, 4.0),
)


def base_of(setting: Setting) -> tuple[str, ...]:
    """For all who compete: the ladder's model with more layers, an expert a rank, as many sequences as a pipeline takes."""
    return (
        *("experiment=ladder", f"model.num_layers={LAYERS}", f"model.num_experts={setting.world}", "model.vocab_size=320"),
        f"train.global_batch_size={MICRO_BATCHES * 4 * setting.ranks_per_node}",
        *setting.overrides,
    )


def variants_of(setting: Setting, folder: Path) -> Mapping[str, tuple[str, ...]]:
    """By name.  `eager` and `flow`: experts across nodes, so tokens cross the links; the others: stages across nodes, and experts
    across the ranks of a node.  Tables are written to `folder`."""
    across = f"parallel.ep={setting.world}"
    inside = ("strategy=eager", f"parallel.pp={setting.nodes}", f"parallel.ep={setting.ranks_per_node}")
    (table := folder / "unpaired.csv").write_text(to_csv(unpaired(PAIRED["dualpipev"].pipeline(Size(NODES, 2, MICRO_BATCHES)))))
    pipeline = {"1f1b, paired": f"{OWN}:SCHEDULE", "dualpipev, unpaired": str(table)}
    stages = {
        name: (*inside, f"parallel.pp_chunks={chunks}", f"strategy.pipeline={pipeline.get(name, name)}")
        for name, chunks in SCHEDULES.items()
    }
    return {"eager": ("strategy=eager", across), "flow": ("strategy=flow", across), **stages}


def unpaired(pipeline: Pipeline) -> Pipeline:
    """The same cells, of a pair the forward first: so torch runs them."""
    lists = tuple(tuple((cell,) for entry in entries for cell in entry) for entries in pipeline.lists)
    return replace(pipeline, lists=lists)
