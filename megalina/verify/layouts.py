"""The rows of a verification: which layouts run which routers with which strategies, all of them or so that all pairs occur."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random
from typing import Any

from megalina.blocks.dispatch import ONCE_PER_NODE, ONCE_PER_RANK, ROWS
from megalina.blocks.pipelined import TABLE, read_table, schedule_of
from megalina.config import ModelConfig, OptimConfig, PretrainConfig, RouterConfig, StrategyConfig
from megalina.layout import axis_sizes, by_node, rows
from megalina.step.pipeline.schedules.schedule import Size
from megalina.step.pipeline.schedules.table import SCHEDULES
from megalina.validate import check_config
from megalina.verify.on_ranks import layout_config
from megalina.verify.recording import NODES, SEQUENCES, Layout
from megalina.verify.shrink import power_below

CAPACITY = 0.8  # of routers that come without one: some tokens are always dropped
MOST_ROWS = 400  # of a product; beyond, pairs
TRIES = 2000  # random rows with a pair before it counts as never allowed
TRIES_ALONE = 60  # of sizes that fit, with one choice
PIECE_MB = 0.002  # MiB: many pieces a bucket
NO_PIPELINE = "none"  # among schedules: rows of one stage
LAYOUT_AXES = ("place", "context", "pp", "schedule", "cut", "zero", "micro_batch", "strategy")  # of pipelines
CHUNKS = (1, 2)  # stages on each pipeline rank, where a schedule takes any number of them
Values = dict[str, Any]  # axis -> choice
Pair = tuple[tuple[str, Hashable], tuple[str, Hashable]]  # (axis, choice) of two axes, in the order of the axes


@dataclass(frozen=True, slots=True)
class Choices:
    """What rows choose from, by name.  All sizes are shrunk."""

    base: PretrainConfig
    routers: Mapping[str, RouterConfig]
    strategies: Mapping[str, StrategyConfig]
    models: Mapping[str, ModelConfig]
    optimizers: Mapping[str, OptimConfig]
    schedules: Sequence[str] = field(default_factory=lambda: (NO_PIPELINE, *SCHEDULES))  # of pipelines


@dataclass(frozen=True, slots=True)
class Row:
    """One thing to run."""

    layout: Layout
    router: str
    capacity: float  # 0: dropless
    model: str
    optimizer: str

    @property
    def router_text(self) -> str:
        return self.router + (f", capacity {self.capacity:g}" if self.capacity else "")


def only(choices: Choices, words: Sequence[str]) -> Choices:
    """Those of `choices` that words such as "strategy=flow,lina", "router=topk" or "schedule=zbv" name.

    ValueError for what isn't there."""
    there: dict[str, Mapping[str, Any]] = {
        "strategy": choices.strategies,
        "router": choices.routers,
        "schedule": dict.fromkeys(choices.schedules),
    }
    for word in words:
        kind, _, names = word.partition("=")
        if kind not in there:
            raise ValueError(f"--only {word}: give {' or '.join(f'{name}=A,B' for name in there)}")
        if missing := [name for name in names.split(",") if name not in there[kind]]:
            raise ValueError(f"--only {word}: there is no {kind} {missing[0]!r}; there are {', '.join(there[kind])}")
        there[kind] = {name: there[kind][name] for name in names.split(",")}
    return replace(choices, strategies=there["strategy"], routers=there["router"], schedules=tuple(there["schedule"]))


def places(ranks: int) -> list[tuple[int, int, int, bool]]:
    """(world, tp, ep, sequence parallel) for every world of 1, 2, 4, ... up to `ranks`."""
    powers = [1 << i for i in range(power_below(ranks).bit_length())]
    return [
        (world, tp, ep, sequence)
        for world in powers
        for tp, ep in itertools.product(powers, powers)
        if world % (tp * ep) == 0
        for sequence in ((True, False) if tp > 1 else (True,))
    ]


def contexts(ranks: int) -> list[tuple[int, str]]:
    """(cp, how) for every power of two up to `ranks`."""
    powers = [1 << i for i in range(1, power_below(ranks).bit_length())]
    return [(1, "all_gather"), *((cp, how) for cp in powers for how in ("all_gather", "all_to_all"))]


def axes(choices: Choices, ranks: int) -> dict[str, Sequence[Any]]:
    """What varies in rows of one stage: axis -> its choices."""
    return {
        "place": places(ranks),
        "context": contexts(ranks),
        # one rank has nobody to send to, and two nodes of one rank each nobody to pass rows on to
        "dispatch": [ROWS, *[ONCE_PER_RANK] * (ranks > 1), *[ONCE_PER_NODE] * (ranks > 2)],
        "reduce": ["flat", *["by_node"] * (ranks > 2)],  # two nodes of one rank each have nothing to sum inside
        "zero": [(0, 0.0), (1, 0.0), (1, PIECE_MB), (0, PIECE_MB)],  # ZeRO stage, size of a gradient piece in MiB
        "micro_batch": [2, 1, 0],  # 0: all of a rank's sequences at once
        "recompute": ["none", "selective", "full"],
        "router": list(choices.routers),
        "capacity": [False, True],
        "strategy": list(choices.strategies),
        "model": list(choices.models),
        "optimizer": list(choices.optimizers),
    }


def axes_of_pipelines(choices: Choices, ranks: int) -> dict[str, Sequence[Any]]:
    """What varies in rows of several pipeline ranks; without those of all other axes that no pipeline has at all."""
    plain = axes(choices, ranks)
    options = {
        "place": [place for place in plain["place"] if place[0] >= 2 * place[1] * place[2]],
        "context": contexts(max(1, ranks // 2)),
        "pp": [1 << i for i in range(1, power_below(ranks).bit_length())],
        "schedule": [(name, chunks) for name in choices.schedules if name != NO_PIPELINE for chunks in _chunks(name)],
        "cut": ["even", "uneven"],
        **{axis: plain[axis] for axis in ("zero", "micro_batch", "strategy")},  # first: they depend on sizes
        **{axis: values for axis, values in plain.items() if axis not in ("place", "context", "zero", "micro_batch", "strategy")},
    }
    if not all(options.values()):
        return dict.fromkeys(options, ())
    return {axis: [c for c in values if _is_ever_allowed(choices, options, axis, c)] for axis, values in options.items()}


def _chunks(schedule: str) -> Sequence[int]:
    number = 0 if schedule.endswith(TABLE) else schedule_of(schedule).chunks
    return (number,) if number else CHUNKS


def _is_ever_allowed(choices: Choices, options: Mapping[str, Sequence[Any]], axis: str, choice: Any) -> bool:
    """Of a strategy whose lists go over all layers, say: never."""
    random = Random(f"{axis} {choice}")
    drawn = ({a: random.choice(values) for a, values in options.items()} | {axis: choice} for _ in range(TRIES))
    fitting = itertools.islice(filter(fits, drawn), TRIES_ALONE)
    return any(runs(choices, row_of(choices, values)) for values in fitting)


def fits(values: Mapping[str, Any]) -> bool:
    """Whether the sizes among some axes' choices may be of one row: what costs next to nothing to know."""
    if "place" not in values:
        return True
    world, tp, ep, _ = values["place"]
    (cp, _), pp = values.get("context", (1, "")), values.get("pp", 1)
    if world % (tp * ep * cp * pp) or (values.get("reduce") == "by_node" and world < 4):
        return False
    if values.get("dispatch") == ONCE_PER_NODE and not _on_several_nodes(world, tp, ep, cp, pp):
        return False
    if not values.keys() >= {"context", "pp", "schedule", "micro_batch"}:
        return True
    readers, (name, chunks) = world // (tp * cp * pp), values["schedule"]
    micro_batch = values["micro_batch"] or max(1, SEQUENCES // readers)
    return SEQUENCES % (micro_batch * readers) == 0 and _is_made_for(name, pp, chunks, SEQUENCES // (micro_batch * readers))


@cache
def _on_several_nodes(world: int, tp: int, ep: int, cp: int, pp: int) -> bool:
    """Whether ranks of ep are, several on each."""
    row = rows(axis_sizes(world // pp, tp=tp, ep=ep, cp=cp))["ep"][0]
    return world >= 2 * NODES and bool(by_node(row, world // NODES))


@cache
def _is_made_for(schedule: str, ranks: int, chunks: int, micro_batches: int) -> bool:
    try:
        if schedule.endswith(TABLE):
            table = read_table(schedule, micro_batches)
            return (table.ranks, table.stages) == (ranks, ranks * chunks)
        schedule_of(schedule).pipeline(Size(ranks, chunks, micro_batches))
    except ValueError:
        return False
    return True


def row_of(choices: Choices, values: Mapping[str, Any]) -> Row:
    world, tp, ep, sequence = values["place"]
    zero, piece_mb = values["zero"]
    cp, cp_kind = values["context"]
    pp, (pipeline, chunks) = values.get("pp", 1), values.get("schedule", (StrategyConfig().pipeline, 1))
    layout = Layout(
        world,
        tp,
        ep,
        sequence,
        zero,
        values["micro_batch"] or max(1, SEQUENCES * tp * cp * pp // world),
        values["recompute"],
        piece_mb,
        values["strategy"],
        cp,
        cp_kind,
        pp,
        chunks,
        pipeline,
        uneven_stages(choices.models[values["model"]], pp * chunks) if values.get("cut") == "uneven" else "",
        values.get("dispatch", "rows"),
        values.get("reduce", "flat"),
    )
    router = str(values["router"])
    capacity = (choices.routers[router].capacity_factor or CAPACITY) if values["capacity"] else 0.0
    return Row(layout, router, capacity, str(values["model"]), str(values["optimizer"]))


def uneven_stages(model: ModelConfig, stages: int) -> str:
    """As Megatron writes it: the embedding alone in the first stage, a layer in each of those between, all others in the last."""
    last = layers_for(model, stages) - (stages - 2)
    return "E|" + "t|" * (stages - 2) + "t" * last + "m" * model.mtp_layers + "L"


def layers_for(model: ModelConfig, stages: int) -> int:
    """Each stage has one at least."""
    return max(model.num_layers, stages)


def config_of(choices: Choices, row: Row) -> PretrainConfig:
    """The configuration that a row runs."""
    model = choices.models[row.model]
    config = replace(
        choices.base,
        model=replace(model, num_layers=layers_for(model, row.layout.pp * row.layout.chunks)),
        router=replace(choices.routers[row.router], capacity_factor=row.capacity),
        strategy=choices.strategies[row.layout.strategy],
        optim=choices.optimizers[row.optimizer],
    )
    return layout_config(config, row.layout)


def runs(choices: Choices, row: Row) -> bool:
    """Whether megalina accepts a row, on `NODES` nodes."""
    of = row.layout
    try:
        if of.dispatch == ONCE_PER_NODE and not _on_several_nodes(of.world, of.tp, of.ep, of.cp, of.pp):
            return False
        check_config(config_of(choices, row), of.world)
    except ValueError:
        return False
    return True


def product(
    choices: Choices, ranks: int, crossed: Sequence[str] = (), options: Mapping[str, Sequence[Any]] | None = None
) -> Iterator[Row]:
    """Every combination that megalina accepts.  `crossed`: only of these axes, the others are drawn, always alike.  `options`:
    those of `axes_of_pipelines`, or some of them; None: rows of one stage."""
    options = dict(axes(choices, ranks) if options is None else options)
    crossed = crossed or list(options)
    drawn = [axis for axis in options if axis not in crossed]
    drawn_alike = [axis for axis in ("context", "dispatch", "reduce") if axis in drawn]
    options |= {axis: options[axis][:1] for axis in drawn_alike}  # others fit few places
    random = Random(0)  # not in turns: their periods would tie choices together
    seen: set[Row] = set()
    for chosen in itertools.product(*(options[axis] for axis in crossed)):
        values = dict(zip(crossed, chosen, strict=True)) | {axis: random.choice(options[axis]) for axis in drawn}
        if fits(values) and (row := row_of(choices, values)) not in seen and runs(choices, row):
            seen.add(row)
            yield row


def pairwise(choices: Choices, ranks: int, *, only: bool = False) -> list[Row]:
    """Few rows of one stage, by world size, in which every pair of choices that megalina accepts together occurs.

    `only`: in the world of just so many ranks."""
    options = axes(choices, ranks)
    if only:
        options["place"] = [place for place in options["place"] if place[0] == ranks]
    return _pairwise(choices, options)


def pairwise_in_pipelines(choices: Choices, ranks: int) -> list[Row]:
    """The same for rows of several pipeline ranks."""
    return pairwise_of(choices, axes_of_pipelines(choices, ranks))


def _pairwise(choices: Choices, options: Mapping[str, Sequence[Any]]) -> list[Row]:
    found = pairs(options, lambda values: fits(values) and runs(choices, row_of(choices, values)), may_be_allowed=fits)
    return in_order(dict.fromkeys(row_of(choices, values) for values in found))


def pairwise_of(choices: Choices, options: Mapping[str, Sequence[Any]]) -> list[Row]:
    """For those of `axes_of_pipelines`, or some of them.

    A strategy's parts need micro-batches of sizes that the place allows, some routers none at all, and so on.  What no model is
    needed to refuse is refused before models and optimizers are tried, of which there are many."""
    if not all(options.values()):
        return []
    first = {axis: values[0] for axis, values in options.items()}
    known: dict[tuple[Any, ...], bool] = {}

    def may_run(values: Mapping[str, Any]) -> bool:
        if not fits(values):
            return False
        if not values.keys() >= set(LAYOUT_AXES):
            return True
        routers = [values["router"]] if "router" in values else options["router"]
        capacities = [values["capacity"]] if "capacity" in values else options["capacity"][:1]
        return any(of_first(values, router, capacity) for router in routers for capacity in capacities)

    def of_first(values: Mapping[str, Any], router: str, capacity: bool) -> bool:
        own = {axis: values[axis] for axis in LAYOUT_AXES} | {"router": router, "capacity": capacity}
        key = tuple(own.values())
        if key not in known:
            known[key] = runs(choices, row_of(choices, {**first, **own}))
        return known[key]

    found = pairs(options, lambda v: may_run(v) and runs(choices, row_of(choices, v)), may_be_allowed=may_run)
    return in_order(dict.fromkeys(row_of(choices, values) for values in found))


def chosen_rows(choices: Choices, ranks: int, mode: str) -> tuple[list[Row], str]:
    """The rows, and for people how they were chosen.  `mode`: pairs always | never | auto: where there are many combinations."""
    plain = NO_PIPELINE in choices.schedules
    if mode != "always":
        piped = product(choices, ranks, options=axes_of_pipelines(choices, ranks))
        whole = itertools.chain(product(choices, ranks) if plain else (), piped)
        rows = list(itertools.islice(whole, None if mode == "never" else MOST_ROWS + 1))
        if mode == "never" or len(rows) <= MOST_ROWS:
            return in_order(rows), f"every combination: {_counted(rows)}"
    rows = in_order([*(pairwise(choices, ranks) if plain else ()), *pairwise_in_pipelines(choices, ranks)])
    return rows, f"every pair of choices occurs together: {_counted(rows)}"


def _counted(rows: Sequence[Row]) -> str:
    piped = sum(row.layout.pp > 1 for row in rows)
    return f"{len(rows)} rows" + (f", {piped} of them pipelines" if piped else "")


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By world size: a pool starts each size once."""
    return sorted(rows, key=lambda row: row.layout.world)


def pairs(
    options: Mapping[str, Sequence[Any]],
    allowed: Callable[[Values], bool],
    costs: Mapping[tuple[str, Hashable], float] | None = None,
    may_be_allowed: Callable[[Values], bool] = lambda values: True,
) -> Iterator[Values]:
    """Greedy: combinations until every pair of choices of two axes has occurred, but for pairs that are never allowed.

    `costs`: what a row with a choice (axis, choice) costs, 1 where nothing is said.  Where choices serve equally well, a costly
    one is taken that much more rarely.  `may_be_allowed`: False of a combination that lacks axes,
    where no choice of them helps."""
    costs = costs or {}
    names = list(options)
    missing = {
        ((a, x), (b, y)): None  # a set in a fixed order
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(options[a], options[b])
    }
    never = _never_allowed(options, missing, allowed)
    used: dict[tuple[str, Hashable], float] = defaultdict(float)
    while missing:
        first, second = next(iter(missing))
        found = (
            None
            if (first, second) in never
            else _completed(dict((first, second)), names, options, missing, never, used, allowed, may_be_allowed)
        )
        if found is None:
            del missing[first, second]
            continue
        for pair in itertools.combinations(((name, found[name]) for name in names), 2):
            missing.pop(pair, None)
        for choice in found.items():
            used[choice] += costs.get(choice, 1)
        yield found


def _never_allowed(options: Mapping[str, Sequence[Any]], of: Iterable[Pair], allowed: Callable[[Values], bool]) -> set[Pair]:
    """The pairs with which no random row is allowed.  The search below would prove it by trying all rows, of which there are
    some ten thousand for a pair, and again for each row on whose way such a pair lies."""
    random, left = Random(0), dict.fromkeys(of)
    never: set[Pair] = set()
    while left:
        first, second = next(iter(left))
        for _ in range(TRIES):
            values = {axis: random.choice(choices) for axis, choices in options.items()} | dict((first, second))
            if allowed(values):
                for pair in itertools.combinations(values.items(), 2):
                    left.pop(pair, None)
                break
        else:
            del left[first, second]
            never.add((first, second))
    return never


def _completed(
    chosen: Values,
    names: Sequence[str],
    options: Mapping[str, Sequence[Any]],
    missing: Mapping[Pair, None],
    never: Set[Pair],
    used: Mapping[tuple[str, Hashable], float],
    allowed: Callable[[Values], bool],
    may_be_allowed: Callable[[Values], bool],
) -> Values | None:
    """The other axes one by one, each by how many missing pairs it adds, then the choice that was used least; and back where
    the end is not allowed."""
    left = [name for name in names if name not in chosen]
    if not left:
        return chosen if allowed(chosen) else None
    if not may_be_allowed(chosen):
        return None
    axis = left[0]

    place = {name: i for i, name in enumerate(names)}

    def with_chosen(choice: Hashable) -> list[Pair]:
        own = axis, choice
        return [(own, other) if place[axis] < place[other[0]] else (other, own) for other in chosen.items()]

    def gain(choice: Hashable) -> int:
        return sum(pair in missing for pair in with_chosen(choice))

    for choice in sorted(options[axis], key=lambda c: (-gain(c), used[axis, c])):
        if never.isdisjoint(with_chosen(choice)):
            found = _completed({**chosen, axis: choice}, names, options, missing, never, used, allowed, may_be_allowed)
            if found is not None:
                return found
    return None
