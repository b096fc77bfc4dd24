"""The report of a forecast: tables for the terminal, the JSON, and the command that runs what was planned, to be pasted whole."""

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megalina.blocks.heads import model_of_layer, numbers_kept, numbers_of_room, query_size
from megalina.config import BYTES, PretrainConfig
from megalina.perfmodel.forecast.forecast import MESSAGES, Forecast, Walked, memory_limit_bytes
from megalina.perfmodel.forecast.search import Candidate, UnderLoad
from megalina.perfmodel.sim.memory import Memory
from megalina.timeline.recorder import COMPUTE, SEND, Event
from megalina.timeline.spans import shared_s, union

GIB = 2**30
LANES = {
    "tokens": ("tokens",),
    "gradients": ("grads",),
    "weights": ("params",),
    "others": ("counts", "gather", "scatter", "sum", "max"),
}
CLASSES = {"a2a": "tokens", "grads": "gradients", "params": "weights", "other": "sizes, sums"}
WIDEST_HEAD = 256  # kernels of attention end there


def memory_table(memory: Memory, limit_bytes: float) -> str:
    """Of one rank at its peak; sums."""
    rows = memory.rows()
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {size / GIB:8.2f} GiB" for name, size in rows.items() if size >= GIB / 200]
    small = sum(size for size in rows.values() if size < GIB / 200)
    lines += [f"  {'less than 0.005 each':<{width}}  {small / GIB:8.2f} GiB"] if small else []
    limit = "" if limit_bytes == float("inf") else f" of {limit_bytes / GIB:.1f} that there are"
    return "\n".join([*lines, f"  {'peak':<{width}}  {memory.peak / GIB:8.2f} GiB{limit}"])


def load_table(found: Sequence[UnderLoad], limit_bytes: float, steps_s: Mapping[float, float]) -> str:
    """A column for each load.  `steps_s`: load -> seconds of a step, for those that fit."""
    rows = [["rows of the busiest rank over the mean", *(f"{u.load:g}" for u in found)]]
    for mode in found[0].peaks:
        marks = (("" if u.peaks[mode] <= limit_bytes else " too much") for u in found)
        peaks = [f"{u.peaks[mode] / GIB:.2f} GiB{mark}" for u, mark in zip(found, marks, strict=True)]
        rows.append([f"peak, recompute {mode}", *peaks])
    rows.append(["an all-to-all's rows, sent and received", *(f"{u.sent / GIB:.3f} + {u.received / GIB:.3f} GiB" for u in found)])
    rows.append(["step", *(f"{steps_s[u.load] * 1e3:.1f} ms" if u.load in steps_s else "does not fit" for u in found)])
    return aligned([["", *row] for row in rows])


def timeline_text(events: Sequence[Event], step_s: float, width: int = 100) -> str:
    """What a rank computes, and what it has on the wire, from left to right: # most of that time, + some of it."""
    lanes = {"computes": [(e.start_s, e.end_s) for e in events if e.kind == COMPUTE]}
    for name, ops in LANES.items():
        lanes[name] = [(e.start_s, e.end_s) for e in events if e.kind == SEND and e.op in ops]
    margin = max(map(len, lanes))
    return "\n".join(f"  {name:<{margin}} |{_bar(spans, step_s, width)}|" for name, spans in lanes.items())


def _bar(spans: Sequence[tuple[float, float]], step_s: float, width: int) -> str:
    cells = []
    merged = union(spans)
    for i in range(width):
        low, high = i * step_s / width, (i + 1) * step_s / width
        share = shared_s(merged, [(low, high)]) / (high - low)
        cells.append("#" if share >= 0.5 else "+" if share > 0.02 else " ")
    return "".join(cells)


def strategy_table(candidates: Sequence[Candidate], *, layouts: bool) -> str:
    """The fastest first.  `layouts`: say them, too."""
    piped = any(c.config.parallel.pp > 1 for c in candidates)
    names = {**CLASSES, **({MESSAGES: MESSAGES} if piped else {})}
    head = ["strategy", "step ms", "tokens/s", "MFU", *(f"waits for {what} ms" for what in names.values()), "GiB"]
    cut = any(c.config.parallel.cp > 1 for c in candidates)
    words = f"{'pp chunks schedule ' if piped else ''}tp ep {'cp ' if cut else ''}zero micro recompute"
    rows = [[*([words] if layouts else []), *head]]
    for c in candidates:
        train, parallel, found = c.config.train, c.config.parallel, c.found
        context = f"{parallel.cp}{f' by {parallel.cp_kind}' if parallel.cp > 1 else ''} " if cut else ""
        stages = f"{parallel.pp} {parallel.pp_chunks} {c.config.strategy.pipeline if parallel.pp > 1 else '-'} " if piped else ""
        layout = f"{stages}{parallel.tp} {parallel.ep} {context}{parallel.zero} {train.micro_batch_size} {train.recompute}"
        figures = ["does not fit", *[""] * (2 + len(names))] if found is None else figures_of(found, names)
        rows.append([*([layout] if layouts else []), str(c.plan), *figures, f"{c.memory_bytes / GIB:.1f}"])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table, a line a row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def figures_of(found: Forecast, names: Collection[str] = tuple(CLASSES)) -> list[str]:
    """Step, tokens a second, MFU, and what a rank waits for, by class."""
    mfu = "" if found.mfu is None else f"{found.mfu:.1%}"
    waits = [f"{found.exposed_s.get(name, 0.0) * 1e3:.1f}" for name in names]
    return [f"{found.step_s * 1e3:.1f}", f"{found.tokens_per_s:,.0f}", mfu, *waits]


def as_json(candidates: Sequence[Candidate], *, world: int, common: Sequence[str]) -> dict[str, Any]:
    """`common`: overrides that all have."""
    return {"world": world, "candidates": [_candidate(c, common) for c in candidates]}


def _candidate(c: Candidate, common: Sequence[str]) -> dict[str, Any]:
    found = c.found
    numbers: dict[str, Any] = {}
    if found is not None:
        numbers = {
            "tokens_per_s": found.tokens_per_s,
            "compute_s": found.walked.compute_s,
            "exposed_s": dict(found.exposed_s),
            "token_bytes_between_nodes": found.token_bytes[0],
            "token_bytes_within_nodes": found.token_bytes[1],
            "memory": found.memory.rows(),
        }
    if found is not None and found.of_ranks:
        numbers |= {"pipeline_ranks": [_of_rank(own, peak) for own, peak in zip(found.of_ranks, found.peaks, strict=True)]}
    limit = memory_limit_bytes(c.config.cluster)
    return {
        "overrides": joined(common, c.overrides()),
        "strategy": c.plan.strategy,
        "plan": str(c.plan),
        "fits": c.fits,
        "memory_bytes": c.memory_bytes,
        "memory_limit_bytes": None if limit == float("inf") else limit,
        "step_s": found.step_s if found else None,
        "mfu": found.mfu if found else None,
        **numbers,
    }


def _of_rank(own: Walked, peak: int) -> dict[str, Any]:
    return {"compute_s": own.compute_s, "idle_s": own.idle_s, "exposed_s": dict(own.exposed_s), "memory_bytes": peak}


def planned_for(given: Sequence[str], config: PretrainConfig, *, world: int, vocab_size: int) -> list[str]:
    """The overrides that were given, with what else the plan is made for: so many ranks, and the vocabulary."""
    own = [] if config.model.vocab_size == vocab_size else [f"model.vocab_size={vocab_size}"]
    return joined(given, [*own, f"launch.ranks={world}"])


def joined(words: Sequence[str], chosen: Sequence[str]) -> list[str]:
    """Overrides, but where others are chosen."""
    keys = {_key(word) for word in chosen}
    return [*(word for word in words if _key(word) not in keys), *chosen]


def command(words: Sequence[str], *, nodes: int, ranks_per_node: int) -> str:
    """One line: started by this program on one node, by torchrun on each of several."""
    if nodes == 1:
        return shlex.join(["python", "pretrain_gpt_moe.py", *words])
    torchrun = f"torchrun --nnodes {nodes} --nproc-per-node {ranks_per_node} --rdzv-backend c10d --rdzv-endpoint HEAD:29500"
    kept = [word for word in words if _key(word) != "launch.ranks"]  # torchrun says it
    return f"{torchrun} {shlex.join(['pretrain_gpt_moe.py', *kept])}"


def heads(config: PretrainConfig) -> str:
    """Heads and their width, with a warning where a kernel would not take them."""
    model = config.model
    width = query_size(model)
    told = f"{model.num_heads} heads x {width}, {model.num_kv_heads} of keys and values"
    if model.attention == "mla":
        told += f", values of {model.v_head_dim}, made of {numbers_kept(model)} numbers a token"
    if model.window:
        layers, length, number_bytes = range(model.num_layers), config.train.seq_len, BYTES[config.train.dtype]
        limited = sum(model_of_layer(model, layer).window > 0 for layer in layers)
        kept, whole = (numbers_of_room(of, length) * number_bytes / 1e6 for of in (model, replace(model, window=0)))
        told += f"; windows of {model.window} tokens in {limited} of {len(layers)} layers: generation keeps {kept:.3g} MB of a "
        told += f"sequence of {length}, and {whole:.3g} without"
    if width > WIDEST_HEAD:
        told += f"; warning: heads wider than {WIDEST_HEAD} have no fast attention: set model.num_heads or model.head_dim"
    return told


def origin(given: Sequence[str], config: PretrainConfig) -> str:
    """The model that the overrides start from, where they don't name it; \"\" where they do."""
    keys = {_key(word) for word in given}
    changed = [word for word in given if word.lstrip("+").startswith("model.")]
    if not changed or keys & {"model", "experiment"}:
        return ""
    return f"{' '.join(changed)} start from model={config.model.name}, as no model=NAME is given"


def _key(word: str) -> str:
    return word.split("=", 1)[0].lstrip("+~")
