"""Why strategies rank as they do: the simulator's own account of a setting, in which things change that links can't."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks.validation.cases import Row
from benchmarks.validation.emulated import HostConstants
from benchmarks.validation.fit import Simulated, simulated
from megalina.config import PretrainConfig

SETTINGS = ("4x1 light 250", "4x2 heavy 750")
EAGER = "eager 512 KiB"
OTHERS = ("priority_partition", "lina_nopack", "flow", "flow_packed")


def explained(rows: Sequence[Row], configs: Mapping[str, PretrainConfig], host: HostConstants) -> str:
    """A table a setting, in Markdown; "" where nothing of the kind was measured."""
    tables = []
    for name in SETTINGS:
        by_strategy = {r.strategy: r for r in rows if r.case.setting.name == name}
        if EAGER in by_strategy:
            tables.append(_table(name, by_strategy, configs, host))
    return "\n\n".join(tables)


def _table(name: str, by_strategy: Mapping[str, Row], configs: Mapping[str, PretrainConfig], host: HostConstants) -> str:
    base = by_strategy[EAGER]
    setting, config = base.case.setting, configs[base.name]
    shown: dict[str, Simulated] = {
        EAGER: simulated(base, config, host),
        f"{EAGER}, sums that get as much as a flow": simulated(base, config, replace(host, sum_weight=1.0)),
        f"{EAGER}, links that let tokens pass": simulated(base, config, host, tokens_first=True),
    }
    for strategy in OTHERS:
        if strategy in by_strategy:
            row = by_strategy[strategy]
            shown[strategy] = simulated(row, configs[row.name], host)
    leaving = setting.ranks_per_node * (setting.world - setting.ranks_per_node)  # flows of an all-to-all out of a node
    share = leaving / (leaving + host.sum_weight)
    head = f"**{name}**, simulated: beside one ring the {leaving} flows of an all-to-all get {share:.0%} of a node's link"
    lines = [head, "", "| | step ms | to eager | waits: tokens ms | gradients ms | both |", "|---|---|---|---|---|---|"]
    for what, own in shown.items():
        waits = own.exposed_s["a2a"], own.exposed_s["grads"]
        cells = [
            f"{own.step_s * 1e3:.0f}",
            f"{shown[EAGER].step_s / own.step_s:.2f}",
            *(f"{w * 1e3:.0f}" for w in (*waits, sum(waits))),
        ]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)
