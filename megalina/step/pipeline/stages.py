"""Which layers are in each stage: Megatron's layout strings, and cuts by what layers cost."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

NAMES = {"E": "embedding", "t": "layer", "m": "layer of multi-token prediction", "L": "head and loss"}


@dataclass(frozen=True, slots=True)
class StageLayers:
    """What a stage has; layers have the model's numbers, those of multi-token prediction come after the others."""

    layers: tuple[int, ...]
    embedding: bool = False
    head: bool = False

    def __str__(self) -> str:
        """`E 0-2`, `3`, `4-5 L`."""
        span = f"{self.layers[0]}-{self.layers[-1]}" if len(self.layers) > 1 else "".join(map(str, self.layers))
        return " ".join(filter(None, ("E" if self.embedding else "", span, "L" if self.head else ""))) or "nothing"


def stages_from(layout: str, *, num_layers: int = 0, mtp_layers: int = 0) -> tuple[StageLayers, ...]:
    """The stages of a string of Megatron's `--pipeline-model-parallel-layout`, first stage first: stage s is on rank s mod P.

    `E` embedding, `t` a layer, `m` a layer of multi-token prediction, `L` head and loss; `|` ends a stage, `x*3` is `xxx`,
    `(ab|)*2` is `ab|ab|`, commas mean nothing (megatron/core/transformer/pipeline_parallel_layer_layout.py).  `num_layers`: of
    the model, 0: any number.  ValueError for a string that isn't one, and for a model that it isn't of."""
    text = re.sub(r"\s", "", layout).replace(",", "")
    for repeated in (r"\(([^()]+)\)\*(\d+)", r"([A-Za-z])\*(\d+)"):
        text = re.sub(repeated, lambda match: match[1] * int(match[2]), text)
    if wrong := [c for c in text if c not in NAMES and c != "|"]:
        known = ", ".join(f"{letter} ({name})" for letter, name in NAMES.items())
        raise ValueError(f"pipeline layout {layout!r} has {wrong[0]!r}: write {known}, | between stages, x*3 and (x|)*3")
    order = text.replace("|", "")
    if not re.fullmatch(r"Et*m*L", order):
        raise ValueError(
            f"pipeline layout {layout!r} is {order} in a row: one E comes first, then t, then m, and one L comes last"
        )
    if "" in (parts := text.split("|")):
        raise ValueError(f"pipeline layout {layout!r}: stage {parts.index('')} of {len(parts)} has nothing in it")
    for letter, number in (("t", num_layers), ("m", mtp_layers)):
        if num_layers and order.count(letter) != number:
            raise ValueError(
                f"pipeline layout {layout!r} has {order.count(letter)} times {letter} ({NAMES[letter]}), and the model {number}"
            )
    out, first = [], 0
    for stage in parts:
        own = stage.count("t") + stage.count("m")
        out.append(StageLayers(tuple(range(first, first + own)), "E" in stage, "L" in stage))
        first += own
    return tuple(out)


def layout_of(stages: Sequence[StageLayers], *, mtp_layers: int = 0) -> str:
    """The string that `stages_from` reads, without repetitions."""
    plain = sum(len(stage.layers) for stage in stages) - mtp_layers

    def text(stage: StageLayers) -> str:
        return "E" * stage.embedding + "".join("t" if layer < plain else "m" for layer in stage.layers) + "L" * stage.head

    return "|".join(map(text, stages))


def cut(costs: Sequence[float], stages: int, *, embedding: float = 0.0, head: float = 0.0) -> tuple[StageLayers, ...]:
    """Layers in a row cut into stages, the dearest of which costs as little as can be; of such cuts the evenest.

    `costs`: of each layer, such as its seconds of forward and backward; `embedding` and `head` are in the first stage and the
    last.  These two may have no layer, all others have one at least.  ValueError for more stages than that allows."""
    number = len(costs)
    most = number + (2 if number else 0)
    if not 1 <= stages <= max(most, 1):
        raise ValueError(f"{number} layers, an embedding and a head can't be cut into {stages} stages: take at most {most}")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def cost_of(stage: int, start: int, stop: int) -> float:
        ends = (embedding if stage == 0 else 0.0) + (head if stage == stages - 1 else 0.0)
        return sums[stop] - sums[start] + ends

    def least(limit: float, power: int) -> list[list[tuple[float, int]]]:
        """Of the first s stages with the first n layers: the least maximum (power 0) or sum of powers; where the last begins."""
        table = [[(0.0 if n == 0 else float("inf"), 0) for n in range(number + 1)]]
        for stage in range(stages):
            smallest = 0 if stage in (0, stages - 1) else 1
            row = []
            for stop in range(number + 1):
                options = [(float("inf"), 0)]
                for start in range(stop - smallest + 1):
                    cost = cost_of(stage, start, stop)
                    before = table[stage][start][0]
                    if cost <= limit:
                        options.append((before + cost**power if power else max(before, cost), start))
                row.append(min(options))
            table.append(row)
        return table

    dearest = least(float("inf"), 0)[-1][number][0]
    table = least(dearest * (1 + 1e-12), 2)
    bounds = [number]
    for stage in reversed(range(stages)):
        bounds.append(table[stage + 1][bounds[-1]][1])
    bounds.reverse()
    return tuple(StageLayers(tuple(range(bounds[s], bounds[s + 1])), s == 0, s == stages - 1) for s in range(stages))
