"""Who competes: the routers of LocMoE's comparison, with the same model, batches, capacity and homes of sequences."""

from collections.abc import Mapping, Sequence

from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.validate import check_config

CAPACITY = "router.capacity_factor=1.25"
ONE = ("router.top_k=1", "router.renormalize=false", CAPACITY)
LOCMOE = ("router=locmoe", *ONE)
MODEL = (
    "experiment=ladder", "model.num_layers=2", "model.d_model=256", "model.num_heads=4", "model.num_kv_heads=4",
    "model.head_dim=16", "train.micro_batch_size=4", "train.global_batch_size=16", "train.eval_interval=0", "guard.spike=none",
    "data.vocab_size=512",
)  # fmt: skip
EMULATED = ("cluster.attention_ms=6", "cluster.experts_ms=8")
REAL = ("cluster.attention_ms=0", "cluster.experts_ms=0", "optim.lr=0.003", "schedule.warmup_steps=20")
# Sequences alternate between the corpora, so each of two nodes is at home in one of them; or all nodes have the same.
DATA: Mapping[str, Sequence[str]] = {
    "apart": ("data=blend", "data.blend=[0.5,stdlib,0.5,prose]"),
    "alike": ("data=stdlib",),
}
WEIGHTS = (0.01, 0.1, 1.0)  # mu, of the locality loss; 0 is "locmoe"
ROUTERS: Mapping[str, Sequence[str]] = {
    "hash": ("router=hash", *ONE),
    "switch": ("router=topk", *ONE),
    "topk 2": ("router=topk", "router.top_k=2", CAPACITY),
    "locmoe": LOCMOE,
    **{f"locmoe mu={mu:g}": (*LOCMOE, f"router.locality_loss={mu}") for mu in WEIGHTS},
    "locmoe bound": (*LOCMOE, "router.capacity_bound=locmoe", "router.capacity_delta=mean"),
    "locmoe_plus": ("router=locmoe_plus", *ONE),
    "locmoe_plus learned": ("router=locmoe_plus_learned", *ONE),
}
TRAINED = (*ROUTERS, "switch mu=0.1")
FEW = ("hash", "locmoe")  # compete where nodes are more than experts


def words_of(name: str) -> Sequence[str]:
    """A competitor's overrides.  KeyError for one that isn't there."""
    if name in ROUTERS:
        return ROUTERS[name]
    router, _, mu = name.rpartition(" mu=")
    return (*ROUTERS[router], f"router.locality_loss={mu}")


def config_of(
    words: Sequence[str], *, data: str, nodes: int, ranks_per_node: int, experts: int, ep: int, homes: int, real: bool = False
) -> PretrainConfig:
    """ValueError where it can't be.  `homes`: nodes where sequences and experts are at home, 0: nowhere."""
    world = nodes * ranks_per_node
    sizes = (f"model.num_experts={experts}", f"parallel.ep={ep}", f"launch.ranks={world}", f"router.locality_nodes={homes}")
    config = compose([*MODEL, *(REAL if real else EMULATED), *DATA[data], *words, *sizes])
    check_config(config, world)
    return config
