"""The points of the scale map: devices, shapes, links, numbers of GPUs, and the constants that are assumed."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from benchmarks.scale.rungs import Point, point_of
from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.network import network_of
from megalina.perfmodel.sim.network import Network

DEVICES = {"PCIe": "rtx4090_pcie", "NVLink": "h100_400g", "NVL72": "gb200_nvl72"}  # title: file of conf/cluster
DOMAIN = 64  # of a rack's 72 devices, since experts and batches come in powers of two
GPUS = (16, 64, 256, 1024, 4096)
GBITS = (25, 100, 400, 800)
LARGEST_GBIT = 400  # of the largest clusters, at this rate alone: they take a minute each
EXPERTS = (8, 16, 32, 64, 128, 256)
TOP_K = (1, 2, 4, 8)
VOCAB = 16384  # where a shape says none
LAYERS = 8  # of the shapes of width 2,048, so that 24 GiB hold them
SEQUENCES = 4  # a micro-batch, and all that a rank has of a step

OWN_SHAPE = (  # a decoder of width 2,048, to be completed
    *("model.d_model=2048", "model.num_heads=16", "model.num_kv_heads=16", "model.tie_embeddings=false"),
    *(f"model.vocab_size={VOCAB}", f"model.num_layers={LAYERS}"),
)
SHAPES = {
    "paper": ("model=lina_12l_16e",),  # 16 experts of 2,048, top-2, width 512
    "coarse": (*OWN_SHAPE, "model.num_experts=8", "model.d_ff=7168"),  # Mixtral 8x7B at half its width: top-2
    # half of OLMoE: 64 experts of 1,024, top-8; with half of its vocabulary, so that the head has its share
    "fine": ("model=olmoe_1b_7b", f"model.num_layers={LAYERS}", "model.vocab_size=25152"),
}
GRANULAR_WIDTH = 8192  # of all experts that a token visits, together


@dataclass(frozen=True, slots=True)
class Place:
    """A point before it is simulated."""

    map: str  # "scale": GPUs x links; "granularity": experts x top-k
    device: str
    gpus: int
    gbit: float  # of each GPU's adapter; PCIe: of a node's only one
    shape: str = "granular"
    num_experts: int = 0  # of a granular shape
    top_k: int = 0
    zero: int = 0

    @property
    def title(self) -> str:
        shape = f"{self.num_experts} experts top-{self.top_k}" if self.shape == "granular" else self.shape
        return f"{self.device} {self.gpus} GPUs {self.gbit:g} Gb/s {shape}" + (" ZeRO-1" if self.zero else "")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Variant:
    """Assumed constants that are other than in the files of conf/cluster."""

    title: str = "as assumed"
    factors: tuple[tuple[str, float], ...] = ()  # of cluster.hardware
    flat_ring: bool = False  # reductions go from rank to rank around all of them
    micro_batches: int = 1  # of a step
    layers: int = 1  # times as many


VARIANTS = (
    *(
        Variant(f"{name} {factor - 1:+.0%}", ((name, factor),))
        for name in ("collective_efficiency", "kernel_us", "product_efficiency")
        for factor in (0.75, 1.25)
    ),
    Variant("reductions as one flat ring", flat_ring=True),
    Variant("4 micro-batches a step", micro_batches=4),
    Variant("twice as many layers", layers=2),
)


def places(*, quick: bool) -> list[Place]:
    """All points as assumed."""
    gpus, gbits = ((16, 256), (100, 400)) if quick else (GPUS, GBITS)
    axes = [(g, x) for g in gpus for x in gbits if g < 4096 or x == LARGEST_GBIT]
    scale = [Place("scale", d, g, x, s) for s in SHAPES for d in DEVICES for g, x in axes]
    sharded = [replace(place, zero=1) for place in scale if place.gpus in (64, 256)]
    experts, top_k = ((8, 64), (1, 8)) if quick else (EXPERTS, TOP_K)
    panels = (("NVLink", 100), ("NVLink", 400), ("NVL72", 400))
    granular = [
        Place("granularity", d, 64, x, num_experts=e, top_k=k) for d, x in panels for e in experts for k in top_k if k < e
    ]
    return [*scale, *sharded, *granular]


def varied(*, quick: bool) -> Iterator[tuple[Variant, Place]]:
    """A part of the map with other constants."""
    gpus, gbits = ((16,), (100,)) if quick else ((64, 256), (100, 400))
    scale = [Place("scale", d, g, x, s) for s in SHAPES for d in DEVICES for g in gpus for x in gbits]
    granular = [Place("granularity", "NVLink", 64, 400, num_experts=64, top_k=k) for k in ((1, 8) if quick else TOP_K)]
    for variant in VARIANTS:
        for place in (*scale, *granular):
            yield variant, place


def simulated(place: Place, variant: Variant) -> Point:
    config = config_of(place, variant)
    world = place.gpus
    network = network_of(config.cluster) if variant.flat_ring else in_steps(network_of(config.cluster), world)
    return point_of(config, world, vocab_size=config.model.vocab_size or VOCAB, network=network)


def config_of(place: Place, variant: Variant) -> PretrainConfig:
    """One expert a GPU where there are as many of both; else experts, or GPUs, share."""
    base = _base(place.device, place.shape)
    model, router = base.model, base.router
    if place.shape == "granular":
        model = replace(model, num_experts=place.num_experts, d_ff=GRANULAR_WIDTH // place.top_k)
        router = replace(router, top_k=place.top_k)
    model = replace(model, num_layers=model.num_layers * variant.layers)
    cluster, world = base.cluster, place.gpus
    factors = {name: getattr(cluster.hardware, name) * factor for name, factor in variant.factors}
    factors = {name: min(value, 1.0) if name.endswith("efficiency") else value for name, value in factors.items()}
    domain = min(DOMAIN, world) if cluster.hardware.domain_ranks > DOMAIN else cluster.hardware.domain_ranks
    return replace(
        base,
        model=model,
        router=router,
        cluster=replace(
            cluster,
            nodes=world // cluster.ranks_per_node,
            link_gbit=float(place.gbit * cluster.hardware.nics_per_node),
            hardware=replace(cluster.hardware, domain_ranks=domain, **factors),
        ),
        parallel=replace(base.parallel, ep=math.gcd(model.num_experts, world), zero=place.zero),
        train=replace(base.train, global_batch_size=SEQUENCES * world * variant.micro_batches),
    )


@cache
def _base(device: str, shape: str) -> PretrainConfig:
    from megalina.compose import compose

    seq_len = 1024 if device == "PCIe" else 2048  # what fits
    shapes = SHAPES | {"granular": OWN_SHAPE}
    return compose(
        [
            *shapes[shape],
            f"cluster={DEVICES[device]}",
            "train.dtype=bfloat16",
            f"train.micro_batch_size={SEQUENCES}",
            f"train.seq_len={seq_len}",
        ]
    )


def in_steps(network: Network, ranks: int) -> Network:
    """Reductions by level: inside domains in one step each way, between them in log2 steps, as trees do, over all adapters.

    A flat ring's steps grow with the ranks, and NCCL leaves it for trees where that is what a reduction takes.  All-to-alls are
    direct, and keep their one step."""
    nodes = ranks // network.ranks_per_node
    if nodes <= 1:
        return replace(network, algorithm="direct")
    hop_s = network.hop_s * math.log2(nodes) / (nodes - 1)  # of each of the nodes - 1 steps that `hierarchical` counts
    return replace(network, algorithm="hierarchical", rings=1, hop_s=hop_s, latency_s=network.latency_s + network.hop_s)
