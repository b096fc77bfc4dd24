"""The findings of an evaluation, in sentences: what was found, and what makes a number worth less.

`found` is what `megalina.evaluate.worker.evaluate` returns.
"""

from collections.abc import Mapping
from typing import Any

from megalina.evaluate.measures import IDEAL, STATIC

MOST_OVERRUN = 0.05  # of an emulated device's time: beyond, its times are wrong
FEW_ROUNDS = 20
WORTH_TELLING = 0.1  # of a batch's time
SAME_LOSS = 1e-5  # relatively; sums in another order differ by less


def chosen_mode(modes: Mapping[str, Any]) -> str:
    """`best`, or the fastest mode that can be served; `static` where there is no other."""
    others = [name for name in modes if name not in (STATIC, IDEAL)]
    if not others:
        return STATIC
    return "best" if "best" in others else min(others, key=lambda name: float(modes[name]["p50_ms"]))


def headline(found: Mapping[str, Any]) -> str:
    """One sentence."""
    modes, ranks = found["modes"], found["settings"]["ranks"]
    name = chosen_mode(modes)
    mode, static = modes[name], modes[STATIC]
    load = f"{static['load_max_over_mean_p95']:.2f} times the mean rows (95th percentile)"
    if ranks == 1:
        return f"One device has all rows, so no placement can make it faster: the median batch takes {static['p50_ms']:.0f} ms."
    if name == STATIC:
        return f"With experts where training had them the busiest of {ranks} devices has {load}."
    ratio, (low, high) = mode["ratio_to_static_in_rounds"], mode["ratio_to_static_interval"]
    before, after = static["load_max_over_mean_p95"], mode["load_max_over_mean_p95"]
    verb = "falls" if after < before - 0.005 else "rises" if after > before + 0.005 else "stays"
    loads = f"stays at {load}" if verb == "stays" else f"{verb} from {before:.2f} to {after:.2f} times the mean (95th percentile)"
    speed = f"{ratio:.2f} times as fast (95% interval {low:.2f} to {high:.2f})"
    a2a_ms = static["a2a_ms"], mode["a2a_ms"]
    if abs(a2a_ms[0] - a2a_ms[1]) > WORTH_TELLING * static["p50_ms"]:
        loads += f", and all-to-alls take {a2a_ms[1]:.0f} instead of {a2a_ms[0]:.0f} ms of a batch"
    if low > 1:
        return f"Mode {name} serves batches {speed} as static: the busiest device's rows {_plural(loads)}."
    if high < 1:
        return f"Mode {name} is slower than static, {speed}, though the busiest device's rows {_plural(loads)}."
    return f"Mode {name} is not measurably faster than static, {speed}; the busiest device's rows {_plural(loads)}."


def quality_line(found: Mapping[str, Any]) -> str:
    """Whether placements have changed what is written."""
    names, difference = [n for n, mode in found["modes"].items() if mode["loss"] is not None], found["quality_difference"]
    if len(names) < 2:
        return f"Quality of {names[0]} alone: there is no other mode to compare with."
    both = " and ".join(names)
    if difference > SAME_LOSS:
        return f"Losses of {both} differ by {difference:.1e}, relatively: placements must not change them, something is broken."
    shown = "are equal" if difference == 0 else f"differ by {difference:.1e}, relatively: rounding"
    return f"Losses of {both} {shown}. A placement never changes an answer."


def warnings(found: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the times."""
    settings, out = found["settings"], []
    late = {name: mode["overrun_share"] for name, mode in found["modes"].items() if (mode["overrun_share"] or 0) > MOST_OVERRUN}
    if late:
        name = max(late, key=lambda mode: late[mode])
        out.append(
            f"Times are not valid: real work ended later than the emulated devices would have, by {late[name]:.0%} of their time "
            f"in {name} (more than {MOST_OVERRUN:.0%}). Give cluster.attention_ms and cluster.experts_ms larger values."
        )
    emulated, ranks = settings["emulated"], settings["ranks"]
    if ranks > 1 and not emulated["device_ms"] and (settings["ranks_per_node"] > 1 or emulated["link_mbit"]):
        out.append(
            "Devices share the cores of one machine, so an idle one lends its time to the busy one: loads say more than times. "
            "cluster.attention_ms and cluster.experts_ms emulate devices of their own."
        )
    if settings["batches"] < FEW_ROUNDS:
        out.append(
            f"Only {settings['batches']} batches of each mode were timed: p95 and p99 say little, give --batches 40 or more."
        )
    if found["quality_difference"] > SAME_LOSS:
        out.append(quality_line(found))
    for tasks in [mode["tasks"] for mode in found["modes"].values() if mode["tasks"]][:1]:
        if tasks["cut_tasks"]:
            out.append(
                f"{tasks['cut_tasks']} tasks have a longer context than the model reads; up to {tasks['cut_tokens']} tokens were "
                "cut in front."
            )
    out += [f"Mode {name} was left out: {why}" for name, why in settings.get("left_out", {}).items()]
    return out


def parts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(part of the machine, what it was here)."""
    settings = found["settings"]
    emulated, ranks, per_node = settings["emulated"], settings["ranks"], settings["ranks_per_node"]
    nodes = ranks // per_node
    times = emulated["device_ms"]
    told = ", ".join(f"{name} {ms:.3g} ms" for name, ms in times.items() if name in ("attention", "experts")) if times else ""
    device = f"emulated: {told} a layer for a whole batch, experts in proportion to rows" if times else "its share of the cores"
    if emulated["link_mbit"]:
        link = f"emulated, {emulated['link_mbit']:g} Mbit/s each way between nodes; loopback within one"
    else:
        link = "loopback, as all ranks are on one node" if nodes == 1 else "the nodes' network"
    memory = f"{settings['host_expert_mb']:.1f} MB of shared memory, which fills the slots"
    of_node = f"{nodes} {'node' if nodes == 1 else 'nodes'} of {per_node} {'device' if per_node == 1 else 'devices'}"
    shown = [
        ("Device", f"a process (rank) with slots for experts and its own sequences; {ranks} of them. Speed: {device}"),
        ("Node", f"{of_node}; {settings['machine']}"),
        ("Host memory", f"all experts once a node, {memory}; real"),
        ("Link", link),
        ("Host work", "routing, planning and the split over replicas; real, as fast as this machine"),
    ]
    if emulated["slowdown"] != 1:
        shown.append(("Slow motion", f"all times are {emulated['slowdown']:g}x dilated, their ratios stay"))
    return shown


def _plural(text: str) -> str:
    """falls -> fall."""
    verb, _, rest = text.partition(" ")
    return f"{verb.removesuffix('s')} {rest}"
