"""A model cut across slow nodes by layers, or by experts: who competes on which cluster."""

from collections.abc import Mapping

from megalina.compare.ladder import HALF, Setting

NODES, LAYERS = 4, 8  # two stages of one layer on each node
MICRO_BATCHES = 16  # of a pipeline; of four sequences each
CHUNKS = {"1f1b": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}  # stages of each schedule on each node
PAIRED = ("1f1b", "interleaved", "dualpipev")  # those that have pairs
PAIR = ", pair"  # how the names of those that run with strategy=pair end
SCHEDULES = (*CHUNKS, *(name + PAIR for name in PAIRED))
SETTINGS = (
    Setting("4x1", NODES, 1, (), 2.0),  # slow motion: two cores are the hosts of all devices
    Setting("4x2", NODES, 2, HALF, 4.0),
)


def base_of(setting: Setting) -> tuple[str, ...]:
    """For all who compete: the ladder's model with more layers, an expert a rank, as many sequences as a pipeline takes."""
    return (
        *("experiment=ladder", "cluster=emulated", f"cluster.ranks_per_node={setting.ranks_per_node}"),
        *(f"model.num_layers={LAYERS}", f"model.num_experts={setting.world}", "model.vocab_size=320"),
        f"train.global_batch_size={MICRO_BATCHES * 4 * setting.ranks_per_node}",
        *setting.overrides,
    )


def variants_of(setting: Setting) -> Mapping[str, tuple[str, ...]]:
    """By name.  `eager`, `flow` and `pair`: experts across nodes, so tokens cross the links; the others: stages across nodes, and
    experts across the ranks of a node."""
    across = f"parallel.ep={setting.world}"
    stages = {name: _staged(setting, name.removesuffix(PAIR), paired=name.endswith(PAIR)) for name in SCHEDULES}
    return {name: (f"strategy={name}", across) for name in ("eager", "flow", "pair")} | stages


def _staged(setting: Setting, schedule: str, *, paired: bool) -> tuple[str, ...]:
    return (
        f"strategy={'pair' if paired else 'eager'}",
        f"parallel.pp={setting.nodes}",
        f"parallel.ep={setting.ranks_per_node}",
        f"parallel.pp_chunks={CHUNKS[schedule]}",
        f"strategy.pipeline={schedule}",
    )
