"""The map's axis of pipelines and accumulation: what does which schedule pay for published models, on how many GPUs?

A point is a model on some H100 with so many pipeline ranks, and so many sequences a step for each GPU: the batch is the same
for every number of ranks, so a pipeline of P of them has P times the micro-batches.  Each schedule has the layout that is best
for it.  Without pipelines layouts are walked as whole lists under each strategy; with them by the cells of all ranks, which are
priced layer by layer.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.pipeline_search import PipelineSearch, pipelines_of
from megalina.perfmodel.forecast.priced_step import Shared
from megalina.perfmodel.forecast.search import RECOMPUTE, accepted, candidate, layouts_of, with_recompute
from megalina.step.candidates import EAGER, FLOW, LANCET, LINA_NOPACK, PAIR, PRIORITY
from megalina.validate_strategy import runs

MODELS = {"DeepSeek-V3": "deepseek_v3", "Mixtral 8x7B": "mixtral_8x7b"}  # title: file of conf/model
GPUS = (64, 256, 1024, 4096)
RANKS = (1, 4, 16)
SEQUENCES = (2, 8)  # of 4,096 tokens, a step, for each GPU
PLANS = (EAGER, PRIORITY, LINA_NOPACK, FLOW, PAIR, LANCET)  # without pipelines
BASELINES = ("eager", "1f1b")
LAYOUTS = 3  # of the best under the baseline, which all others are tried in
PAYS = 1.03


@dataclass(frozen=True, slots=True)
class PipedPlace:
    """A point before it is simulated."""

    model: str
    gpus: int
    ranks: int  # of a pipeline
    sequences: int  # a step, for each GPU

    @property
    def title(self) -> str:
        return f"{self.model} {self.gpus:,} GPUs pp {self.ranks}, {self.sequences} sequences a GPU"


def piped_places(*, quick: bool) -> list[PipedPlace]:
    gpus, ranks, sequences = ((64, 256), (1, 4), SEQUENCES[:1]) if quick else (GPUS, RANKS, SEQUENCES)
    return [PipedPlace(m, g, p, s) for m in MODELS for g in gpus for s in sequences for p in ranks]


def config_of(place: PipedPlace) -> PretrainConfig:
    from megalina.compose import compose

    words = (f"model={MODELS[place.model]}", "cluster=h100_400g", f"cluster.nodes={place.gpus // 8}", "train.dtype=bfloat16")
    return compose([*words, "train.seq_len=4096", f"train.global_batch_size={place.sequences * place.gpus}"])


def simulated(place: PipedPlace, config: PretrainConfig | None = None) -> dict[str, Any]:
    """Seconds of a step by schedule, with the layout of each; none of what does not fit.  `config`: in place of the model's."""
    config = config or config_of(place)
    found = _one_list(config, place.gpus) if place.ranks == 1 else _piped(config, place.gpus, place.ranks)
    schedules = {name: {"step_s": step_s, "layout": layout} for name, (step_s, layout) in found.items()}
    base = next((schedules[name]["step_s"] for name in BASELINES if name in schedules), None)
    best = min(schedules, key=lambda name: schedules[name]["step_s"], default="")
    gain = base / schedules[best]["step_s"] if base is not None else None
    pays = "does not fit" if gain is None else best if gain > PAYS else "nothing"
    return {**asdict(place), "schedules": schedules, "pays": pays, "gain": gain}


def layout_text(config: PretrainConfig) -> str:
    parallel, train = config.parallel, config.train
    return f"tp {parallel.tp} ep {parallel.ep} micro {train.micro_batch_size} recompute {train.recompute}"


def _layouts(config: PretrainConfig, ranks: int) -> Iterator[PretrainConfig]:
    """Of a stage, with ZeRO-1 and up to two sequences in a micro-batch, whole ones."""
    for layout in layouts_of(config, ranks):
        if layout.parallel.zero and layout.train.micro_batch_size <= 2 and layout.parallel.cp == 1 and accepted(layout, ranks):
            yield layout


Found = Mapping[str, tuple[float, str]]


def _one_list(config: PretrainConfig, world: int) -> Found:
    shared, walked = Shared(), []
    for layout in _layouts(config, world):
        for mode in RECOMPUTE:
            one = candidate(with_recompute(layout, mode), EAGER, world, vocab_size=config.model.vocab_size, shared=shared)
            if one.found is not None:
                walked.append(one)
                break
    out: dict[str, tuple[float, str]] = {}
    for one in sorted(walked, key=lambda c: c.found.step_s if c.found else 0.0)[:LAYOUTS]:
        for plan in PLANS:
            if runs(one.config, plan, world):
                tried = candidate(one.config, plan, world, vocab_size=config.model.vocab_size, shared=shared)
                if tried.found is not None:
                    _better(out, plan.strategy, tried.found.step_s, one.config)
    return out


def _piped(config: PretrainConfig, world: int, ranks: int) -> Found:
    search, out = PipelineSearch(world, vocab_size=config.model.vocab_size, shared=Shared()), dict[str, tuple[float, str]]()
    layouts = list(_layouts(config, world // ranks))
    for piped in pipelines_of(config, world):
        if piped.parallel.pp != ranks:
            continue
        weighed = []
        for layout in layouts:
            parallel = replace(piped.parallel, tp=layout.parallel.tp, ep=layout.parallel.ep)
            for mode in RECOMPUTE:
                one = search.weighed(with_recompute(replace(piped, parallel=parallel, train=layout.train), mode))
                if one is not None and one.fits:
                    weighed.append(one)
                    break
        for one in sorted(weighed, key=lambda w: w.step_s)[:LAYOUTS]:
            name = piped.strategy.pipeline + (" + pair" if piped.strategy.name == PAIR.strategy else "")
            _better(out, name, search.walked(one).step_s, one.config)
    return out


def _better(out: dict[str, tuple[float, str]], name: str, step_s: float, config: PretrainConfig) -> None:
    if name not in out or step_s < out[name][0]:
        out[name] = step_s, layout_text(config)


def piped_table(points: Sequence[Mapping[str, Any]]) -> str:
    """A line a point: the baseline's step, and how many times as fast each schedule is."""
    names = list(dict.fromkeys(name for p in points for name in p["schedules"] if name not in BASELINES))
    rows = [["point", "eager or 1f1b ms", *names, "pays", "layout of the best"]]
    for p in points:
        title = PipedPlace(p["model"], p["gpus"], p["ranks"], p["sequences"]).title
        own = p["schedules"]
        base = next((own[name]["step_s"] for name in BASELINES if name in own), None)
        if base is None:
            rows.append([title, "-", *("" for _ in names), p["pays"], ""])
            continue
        best = min(own, key=lambda name: own[name]["step_s"])
        ratios = [f"{base / own[name]['step_s']:.2f}" if name in own else "-" for name in names]
        rows.append([title, f"{base * 1e3:.0f}", *ratios, p["pays"], own[best]["layout"]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
