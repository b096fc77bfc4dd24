"""The ladder: six settings in which strategies are held against each other, and the paper's own ladder beside."""

from dataclasses import dataclass, replace

from megalina.config import PretrainConfig
from megalina.perfmodel.cost.instruction_seconds import SMALLEST_SHARE
from megalina.step.candidates import PIECES_BYTES

LINK_MBIT = 500.0
EXPERT_BYTES = 16 * 6 * (2 * 512 * 32)  # one expert in each layer of conf/experiment/ladder.yaml: weights, gradients, moments
PLAIN = "eager_plain"  # eager without what lessens its bytes: a row for each of a token's experts, gradients along one ring
STRATEGIES = (
    "ddp", "eager", PLAIN, "serial", "fixed", "priority", "priority_partition", "lina_nopack", "lina", "flow", "flow_packed",
    "pair", "lina_zero", "lancet", "search", "auto",
)  # fmt: skip
OVERRIDES: dict[str, tuple[str, ...]] = {  # of a strategy's YAML
    PLAIN: ("strategy=eager", "parallel.dispatch=rows", "parallel.reduce=flat"),
    "flow_packed": ("strategy=flow", "strategy.packing=2"),
    "lina_zero": ("strategy=lina_zero", "parallel.zero=1"),
}
FINE_EXPERTS, FINE_WIDTH = 64, 4
FINE = (f"model.num_experts={FINE_EXPERTS}", f"model.d_ff={FINE_WIDTH}", "router.top_k=6", "parallel.dispatch=auto")
EAGER_PIECES = PIECES_BYTES  # the baseline runs with each, the fastest counts


@dataclass(frozen=True, slots=True)
class Setting:
    """A cluster, and what of the model differs."""

    name: str
    nodes: int
    ranks_per_node: int
    overrides: tuple[str, ...]
    slow_motion: float = 1.0  # links and devices are slower by this factor, and figures are divided by it
    fine_grained: bool = False  # 64 experts, top-6, an eighth as wide each

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def strategies(self) -> tuple[str, ...]:
        """All that differ here: with one rank a node and one expert a rank the plain baseline is eager itself."""
        return tuple(name for name in STRATEGIES if name != PLAIN or self.ranks_per_node > 1 or self.fine_grained)

    def all_overrides(self) -> tuple[str, ...]:
        """A device has room for half of all experts: with room for all, nothing would be dispatched any more, and every
        strategy would be plain data parallelism."""
        world = self.world
        all_bytes = EXPERT_BYTES * (FINE_EXPERTS * FINE_WIDTH / 32 if self.fine_grained else world)
        return (
            f"strategy.packing_memory_gb={all_bytes / 2 / 1e9}",
            *("experiment=ladder", f"model.num_experts={world}", f"parallel.ep={world}", f"train.global_batch_size={4 * world}"),
            *(FINE if self.fine_grained else ()),
            *self.overrides,
        )


def with_partners(config: PretrainConfig, world: int) -> PretrainConfig:
    """Of `strategy=pair` where a step has one micro-batch, which goes with nobody: two halves, so that the step has the same
    tokens.  Emulated devices take half as long for each, besides what an instruction costs whatever its share, as in `flow` with
    2 parts.  Any other configuration as it is."""
    train, parallel, cluster = config.train, config.parallel, config.cluster
    readers = max(1, world // (parallel.tp * parallel.cp * parallel.pp))
    if config.strategy.name != "pair" or train.global_batch_size > train.micro_batch_size * readers:
        return config
    floor_ms = cluster.kernel_floor_ms or SMALLEST_SHARE * (cluster.attention_ms + cluster.experts_ms) / 2  # on average
    half_ms = cluster.attention_ms / 2, cluster.experts_ms / 2
    cluster = replace(cluster, attention_ms=half_ms[0], experts_ms=half_ms[1], kernel_floor_ms=floor_ms)
    return replace(config, train=replace(train, micro_batch_size=max(1, train.micro_batch_size // 2)), cluster=cluster)


HEAVY = ("model.num_heads=7", "model.num_kv_heads=7")  # of 32 numbers each: 1.84 MB of dense gradients a layer
HALF = ("train.seq_len=32",)  # 128 tokens a rank
EIGHT_RANKS = 2.0  # slow motion: in real time their math and sockets fill two cores whatever the schedule
LADDER = (
    Setting("4x1 light", 4, 1, ()),
    Setting("4x1 heavy", 4, 1, HEAVY),
    Setting("4x2 light", 4, 2, HALF, EIGHT_RANKS),
    Setting("4x2 heavy", 4, 2, (*HALF, *HEAVY), EIGHT_RANKS),
    Setting("4x1 fine", 4, 1, HALF, fine_grained=True),
    Setting("4x2 fine", 4, 2, HALF, EIGHT_RANKS, fine_grained=True),
)
# Lina, section 7.2: 16 A100-40GB on 4 nodes, 100 Gb/s, against DeepSpeed's MoE layer without tuned pieces
PAPER = (
    ("everything, experts 2/4/8/16 (T1)", "1.71 / 1.37 / 1.73 / 1.47x, mean 1.57x"),
    ("priority alone (T9)", "1.10 - 1.30x in most cases, mean 1.24x"),
    ("priority and pieces, experts 2/4/8/16 (T10)", "1.36 / 1.36 / 1.41 / 1.42x"),
    ("fixed schedule (T12)", "the smallest gain nearly always; no number given"),
)
