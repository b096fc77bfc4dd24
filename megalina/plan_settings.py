"""A plan as settings: what `strategy.*` of a configuration says, as a plan, and back."""

from dataclasses import replace
from typing import Any

from megalina.config import StrategyConfig
from megalina.step.candidates import EAGER, PIECE_BYTES
from megalina.step.partition import NONE
from megalina.step.plan import Plan, chunks_from, chunks_text

AUTO = "auto"
SEARCH = "search"


def plan_of(strategy: StrategyConfig, *, packing: int | None = None) -> Plan:
    """The plan that a run begins with: numbers as given; eager, whole layers, no parts and pieces of 0.5 MiB where they say auto.

    `packing`: None takes the one that is given, 1 for auto."""
    if packing is None:
        packing = 1 if strategy.packing == AUTO else int(strategy.packing)
    if strategy.name == AUTO:
        return replace(EAGER, packing=packing)
    return Plan(
        strategy.name,
        parts=strategy.parts,
        chunks=(1,) if strategy.chunks == AUTO else chunks_from(strategy.chunks),
        piece_bytes=PIECE_BYTES if strategy.partition_bytes == AUTO else int(strategy.partition_bytes),
        merge_bytes=int(strategy.bucket_mb * 2**20),
        yields=strategy.yields,
        late_layers=strategy.late_layers,
        deferred_weights=strategy.deferred_weights,
        join_weights=strategy.join_weights,
        deferred_bytes=int(strategy.deferred_mb * 2**20),
        partition=NONE if strategy.partition == AUTO else strategy.partition,
        partition_backward=strategy.partition_backward,
        newton_schulz_after=strategy.newton_schulz_after,
        packing=packing,
        order=tuple(strategy.order.splitlines()),
    )


def settings_of(plan: Plan) -> dict[str, Any]:
    """`strategy.*` for a run that begins with this plan and searches nothing; windows are measured anew."""
    return {
        "name": plan.strategy,
        "partition_bytes": str(plan.piece_bytes),
        "bucket_mb": plan.merge_bytes / 2**20,
        "parts": plan.parts,
        "chunks": chunks_text(plan.chunks),
        "yields": plan.yields,
        "late_layers": plan.late_layers,
        "deferred_weights": plan.deferred_weights,
        "join_weights": plan.join_weights,
        "deferred_mb": plan.deferred_bytes / 2**20,
        "partition": plan.partition,
        "partition_backward": plan.partition_backward,
        "newton_schulz_after": plan.newton_schulz_after,
        "windows": AUTO if plan.gap_bytes else "none",
        "packing": str(plan.packing),
        "order": "\n".join(plan.order),
    }


def strategy_of(plan: Plan, rest: StrategyConfig) -> StrategyConfig:
    """`rest` with the plan's settings."""
    return replace(rest, **settings_of(plan))


def overrides_of(plan: Plan) -> tuple[str, ...]:
    """The plan on a command line; of what its strategy's YAML says, only what may differ.  ValueError for a plan with an order of
    its own, which is too long for one."""
    if plan.order:
        raise ValueError(f"{plan} has an order of its own: give it to a run as a file, with strategy.plan")
    told = {
        "bucket_mb": plan.merge_bytes > 0,
        "parts": plan.parts > 1,
        "chunks": plan.strategy in ("lina", "lina_nopack"),
        "yields": plan.strategy in ("flow", "pair", "lina_zero", "lancet", SEARCH),
        "late_layers": plan.strategy != "eager",
        "deferred_weights": plan.strategy == "lancet" or plan.places_weights,
        "join_weights": plan.join_weights,
        "deferred_mb": plan.deferred_bytes > 0,
        "partition": plan.partition != NONE,
        "partition_backward": plan.partition != NONE,
        "newton_schulz_after": plan.newton_schulz_after > 0,
        "order": False,
    }
    values = {key: value for key, value in settings_of(plan).items() if key != "name" and told.get(key, True)}
    return (f"strategy={plan.strategy}", *(f"strategy.{key}={_written(value)}" for key, value in values.items()))


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"'{text}'" if "," in text else text  # else Hydra takes it for a sweep
