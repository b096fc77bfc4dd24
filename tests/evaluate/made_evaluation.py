"""A made evaluation, as eval.json would have it, for tests of what is said and shown of one."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megalina.evaluate.emulation import emulated_parts, emulation_note
from megalina.evaluate.measures import DEFINITIONS, Measured

FAST: dict[str, Sequence[float]] = {
    "static": [20.0] * 30,
    "best": [10.0] * 30,
    "window": [16.0] * 30,
    "ideal": [9.0] * 30,
}  # latencies by mode


def made(
    latency_ms: dict[str, Sequence[float]], *, load: dict[str, float] | None = None, ranks: int = 2, **settings: Any
) -> dict[str, Any]:
    """Modes by their latencies, `static` among them; `load`: of the busiest device over the mean."""
    emulated = settings.pop("emulated", emulated_parts(None, {}))
    loads = {"static": 1.5, "ideal": 1.0} | (load or {})
    shown = {
        "checkpoint": "run/checkpoints/step_00000007", "step": 7, "model": {"name": "tiny", "num_experts": 4}, "top_k": 1,
        "ranks": ranks, "ranks_per_node": ranks, "emulated": emulated, "machine": "2 cores", "host_expert_mb": 3.0,
        "batches": len(latency_ms["static"]), "sequences": 2, "tokens_a_sequence": 16, "text": "held out of the run",
        "profile": "recorded before", "modes": {}, "command": "python tools/evaluate_gpt_moe.py RUN --text 'a b'",
    }  # fmt: skip
    modes = {name: of_mode(name, own, latency_ms["static"], loads.get(name, 1.1)) for name, own in latency_ms.items()}
    return {
        "modes": modes,
        "quality_difference": 0.0,
        "settings": shown | settings,
        "definitions": DEFINITIONS,
        "note": emulation_note(emulated),
    }


def of_mode(name: str, own_ms: Sequence[float], static_ms: Sequence[float], load: float) -> dict[str, Any]:
    ratios = sorted(a / b for a, b in zip(static_ms, own_ms, strict=True))
    foresees = None if name in ("static", "ideal") else 0.75
    layer = {
        "layer": 1, "p50_ms": 3.0, "p95_ms": 4.0, "stage_ms": {"attention": 1.0, "experts": 2.0, "dispatch": 0.5},
        "load_max_over_mean": load, "device_load": [load, 2 - load], "popularity": [0.4, 0.3, 0.2, 0.1],
        "accuracy_ordered": foresees, "accuracy_recall": foresees,
    }  # fmt: skip
    middle = ratios[len(ratios) // 2]
    measured = Measured(
        p50_ms=own_ms[0], p95_ms=own_ms[0], p99_ms=own_ms[0], p50_ratio_to_static=middle, p95_ratio_to_static=middle,
        p50_ratio_to_ideal=None, p95_ratio_to_ideal=None, ratio_to_static_quartiles=(ratios[0], ratios[-1]),
        ratio_to_ideal_quartiles=None, ratio_to_static_in_rounds=middle, ratio_to_static_interval=(ratios[0], ratios[-1]),
        active_fraction=0.5,
        load_max_over_mean=load, load_max_over_mean_p95=load, idle_share=0.1, load_idle_share=0.1, phase2_rate=None,
        planner_ms=None, planner_calls=0.0, swapped_mb=0.0, fetch_wait_ms=0.0, a2a_ms=1.0, a2a_share=0.1, a2a_exposed_ms=1.0,
        prefill_tokens_per_s=100.0, decode_tokens_per_s=None, decode_pass_ms=None, accuracy_ordered=foresees,
        accuracy_recall=foresees, misordered_experts=foresees, overrun_share=None, latency_ms=list(own_ms),
        layers=[layer, layer | {"layer": 3}],
    )  # fmt: skip
    judged = {"loss": 3.0, "perplexity": 20.1, "bits_per_byte": None} if name in ("static", "best") else {}
    none = dict.fromkeys(("loss", "perplexity", "bits_per_byte", "tasks"))
    return none | judged | asdict(measured) | {"expert_mb": 1.0}
