"""The map's axis of dispatches: where does it pay to send a token once to each GPU, or to each domain of fast links?

A point is a model of fine-grained experts on some H100, with experts over so many of them.  The same two schedules, tuned for
nothing else, walk with each dispatch: eager, where the step waits for tokens, and flow, which hides them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from benchmarks.scale.grid import OWN_SHAPE, SEQUENCES, VOCAB, in_steps
from megalina.blocks.dispatch import ONCE_PER_NODE, ONCE_PER_RANK, ROWS, bytes_of_rows, nodes_along_ep
from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.network import network_of
from megalina.perfmodel.forecast.priced_step import PricedStep, Shared
from megalina.step.candidates import EAGER, FLOW

# experts, top-k, width of an expert: of layers as those models have, all at the width of OWN_SHAPE
MODELS: Mapping[str, tuple[int, int, int]] = {
    "64 experts top-6 (DeepSeek-V2-Lite)": (64, 6, 1408),
    "128 experts top-8 (Qwen3-30B-A3B)": (128, 8, 768),
    "256 experts top-8 (DeepSeek-V3)": (256, 8, 2048),
}
GPUS = (64, 256, 1024, 4096)
EP = (16, 64)
GBITS = (100, 400)
DISPATCHES = (ROWS, ONCE_PER_RANK, ONCE_PER_NODE)
PLANS = {"eager": EAGER, "flow": FLOW}
PAYS = 1.03


@dataclass(frozen=True, slots=True)
class DispatchPlace:
    """A point before it is simulated."""

    model: str
    gpus: int
    ep: int
    gbit: int  # of each GPU's adapter

    @property
    def title(self) -> str:
        return f"{self.model}, {self.gpus:,} GPUs, ep {self.ep}, {self.gbit} Gb/s"


def dispatch_places(*, quick: bool) -> Iterator[DispatchPlace]:
    for model in list(MODELS)[: 1 if quick else None]:
        for gpus in GPUS[: 1 if quick else None]:
            for ep in EP:
                for gbit in GBITS:
                    yield DispatchPlace(model, gpus, ep, gbit)


def config_of(place: DispatchPlace) -> PretrainConfig:
    experts, top_k, width = MODELS[place.model]
    base = _base()
    cluster = replace(base.cluster, nodes=place.gpus // base.cluster.ranks_per_node)
    return replace(
        base,
        model=replace(base.model, num_experts=experts, d_ff=width),
        router=replace(base.router, top_k=top_k),
        cluster=replace(cluster, link_gbit=float(place.gbit * cluster.hardware.nics_per_node)),
        parallel=replace(base.parallel, ep=place.ep),
        train=replace(base.train, global_batch_size=SEQUENCES * place.gpus),
    )


@cache
def _base() -> PretrainConfig:
    from megalina.compose import compose

    words = ("cluster=h100_400g", "train.dtype=bfloat16", f"train.micro_batch_size={SEQUENCES}", "train.seq_len=2048")
    return compose([*OWN_SHAPE, *words])


def simulated(place: DispatchPlace) -> dict[str, Any]:
    """Seconds of a step by schedule and dispatch; of bytes between domains, those of rows over those of each."""
    config, shared = config_of(place), Shared()
    network = in_steps(network_of(config.cluster), place.gpus)
    step_s: dict[str, dict[str, float]] = {name: {} for name in PLANS}
    for dispatch in DISPATCHES:
        own = replace(config, parallel=replace(config.parallel, dispatch=dispatch))
        for name, plan in PLANS.items():
            step = PricedStep(own, place.gpus, plan, vocab_size=VOCAB, shared=shared)
            step_s[name][dispatch] = step.walk(network).step_s
    nodes = nodes_along_ep(config)
    saved = {ROWS: 1.0, ONCE_PER_RANK: bytes_of_rows(config, place.ep), ONCE_PER_NODE: bytes_of_rows(config, nodes or place.ep)}
    return {**asdict(place), "domains": nodes, "bytes_to_rows": saved, "step_s": step_s}


def dispatch_table(points: Sequence[Mapping[str, Any]]) -> str:
    """A line a point: the step with rows, how many times as fast it is with each other dispatch, and which pays."""
    head = ["point", "bytes to rows: rank, node"]
    for name in PLANS:
        head += [f"{name} ms", f"{name} {ONCE_PER_RANK}", f"{name} {ONCE_PER_NODE}"]
    rows = [[*head, "pays"]]
    for p in points:
        title = DispatchPlace(p["model"], p["gpus"], p["ep"], p["gbit"]).title
        row = [title, f"{p['bytes_to_rows'][ONCE_PER_RANK]:.2f}, {p['bytes_to_rows'][ONCE_PER_NODE]:.2f}"]
        for own in p["step_s"].values():
            row += [f"{own[ROWS] * 1e3:.0f}", *(f"{own[ROWS] / own[name]:.2f}" for name in DISPATCHES[1:])]
        rows.append([*row, pays(p)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def pays(point: Mapping[str, Any]) -> str:
    """The dispatch of the fastest of all steps here, if it is faster than the fastest with rows; else nothing."""
    best = {dispatch: min(own[dispatch] for own in point["step_s"].values()) for dispatch in DISPATCHES}
    fastest = min(best, key=best.__getitem__)
    return fastest if best[ROWS] / best[fastest] > PAYS else "nothing"
