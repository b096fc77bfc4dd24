"""What the simulator is validated on, and which half of it the constants may be fitted on: fixed before anything is measured."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalina.compare.ladder import HALF, HEAVY, LADDER, LINK_MBIT, OVERRIDES, Setting
from megalina.step.plan import Plan

EIGHT_RANKS = 2.0  # slow motion, as in the ladder: their real math needs it


@dataclass(frozen=True, slots=True)
class Case:
    """A setting and its links."""

    setting: Setting
    link_mbit: float

    @property
    def variants(self) -> Mapping[str, Sequence[str]]:
        """Who competes besides eager.  A device has room for half of all experts, so two devices can't pack."""
        return {name: words for name, words in VARIANTS.items() if self.setting.world > 2 or PACKED not in words}

    def overrides(self, name: str) -> Sequence[str]:
        """Of a competitor, also of those of the ladder."""
        return VARIANTS.get(name) or OVERRIDES.get(name) or (f"strategy={name}",)


SHORT = ("train.micro_batch_size=2",)  # half the tokens: latencies count for more
CASES = (
    Case(Setting("4x1 light 500", 4, 1, ()), 500),
    Case(Setting("4x1 heavy 500", 4, 1, HEAVY), 500),
    Case(Setting("4x1 light 250", 4, 1, ()), 250),
    Case(Setting("4x1 heavy 1000", 4, 1, HEAVY), 1000),
    Case(Setting("4x1 short 500", 4, 1, SHORT), 500),
    Case(Setting("2x1 heavy 300", 2, 1, HEAVY), 300),
    Case(Setting("2x2 light 500", 2, 2, ()), 500),
    Case(Setting("2x2 heavy 250", 2, 2, HEAVY), 250),
    Case(Setting("4x2 light 500", 4, 2, HALF, EIGHT_RANKS), 500),
    Case(Setting("4x2 heavy 750", 4, 2, (*HALF, *HEAVY), EIGHT_RANKS), 750),
)
OF_LADDER = tuple(Case(setting, LINK_MBIT) for setting in LADDER)  # to look at a result of tools/compare_strategies.py
PACKED = "strategy.packing=2"
VARIANTS: Mapping[str, Sequence[str]] = {
    "ddp": ("strategy=ddp",),
    "serial": ("strategy=serial",),
    "priority_partition": ("strategy=priority_partition",),
    "lina_nopack": ("strategy=lina_nopack",),
    "lina": ("strategy=lina", PACKED),
    "flow": ("strategy=flow",),
    "flow_packed": ("strategy=flow", PACKED),
    "lina_zero": ("strategy=lina_zero", "parallel.zero=1"),
    "lancet": ("strategy=lancet",),
    "lancet_parts": ("strategy=lancet", "strategy.partition=2", "strategy.partition_backward=mirrored"),
    "search": ("strategy=search",),
}  # eager runs with each of its pieces besides


@dataclass(frozen=True, slots=True)
class Row:
    """A configuration: what was measured of it, in the cluster's own time."""

    case: Case
    strategy: str
    measured: Mapping[str, Any]
    plan: Plan  # that ran, with measured times and searched orders

    @property
    def name(self) -> str:
        return f"{self.case.setting.name} {self.strategy}"

    @property
    def held_out(self) -> bool:
        return is_held_out(self.name)


def is_held_out(name: str) -> bool:
    """About three of five are; by the name alone, so nobody can choose."""
    return hashlib.sha256(name.encode()).digest()[0] % 5 >= 2


def rows_of(result: Mapping[str, Any]) -> list[Row]:
    """Of what tools/compare_strategies.py or benchmarks/validate_simulator.py has measured.  ValueError for a setting that
    isn't known here, and for a result without plans; settings with overruns are left out."""
    known = {case.setting.name: case for case in (*CASES, *OF_LADDER)}
    rows = []
    for setting in result["settings"]:
        if setting["name"] not in known:
            raise ValueError(f"setting {setting['name']} isn't one of {', '.join(known)}")
        if not setting["valid"]:
            continue
        for name, measured in setting["strategies"].items():
            if name == "eager":  # the fastest of its variants, which are there
                continue
            if "plan_values" not in measured:
                raise ValueError(f"{setting['name']} {name} has no plan_values: an older version measured it, measure it again")
            rows.append(Row(known[setting["name"]], name, measured, Plan.from_json(measured["plan_values"])))
    return rows
