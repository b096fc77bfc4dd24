"""The scale map in words: every point, and what is found in all of them, again with each constant changed."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Point = Mapping[str, Any]
PAYS = 1.03  # a gain that counts, and as a loss 1 / PAYS


def report(result: Mapping[str, Any]) -> str:
    points, varied = result["points"], result["varied"]
    plain = [p for p in points if not p["zero"]]
    parts = [
        "Every point, milliseconds of a step, simulated.  saved: what each rung of the paper takes from the one below it.",
        point_table(plain),
        "Found in them",
        *findings(plain),
        zero_line(points),
        "The same on a part of the map with one constant changed",
        variant_table(plain, varied),
    ]
    return "\n\n".join(parts)


def title_of(p: Point) -> str:
    shape = f"{p['num_experts']} experts top-{p['top_k']}" if p["map"] == "granularity" else p["shape"]
    return f"{p['device']} {p['gpus']:,} GPUs {p['gbit']:g} Gb/s {shape}"


def point_table(points: Sequence[Point]) -> str:
    head = [
        "point",
        "eager",
        "best",
        "gain",
        "pays",
        "saved by priority",
        "chunks",
        "packing",
        "a2a waits",
        "best",
        "grads wait",
        "best",
        "devices",
        "links",
    ]
    rows = [head]
    for p in points:
        if not p["rungs"]:
            rows.append([title_of(p), *["-"] * 3, "does not fit", *[""] * 9])
            continue
        eager = p["rungs"]["eager"]
        best = p["rungs"].get(p["pays"], eager)
        saved = [f"{p['saved_s'][name] * 1e3:.1f}" if name in p["saved_s"] else "" for name in ("priority", "chunks", "lina")]
        waits = [f"{rung['exposed_s'][kind] * 1e3:.1f}" for kind in ("a2a", "grads") for rung in (eager, best)]
        times = [f"{seconds * 1e3:.1f}" for seconds in (eager["step_s"], best["step_s"])]
        bounds = [f"{p[name] * 1e3:.1f}" for name in ("compute_s", "link_s")]
        rows.append([title_of(p), *times, f"{p['gain']:.2f}", p["pays"], *saved, *waits, *bounds])
    return _aligned(rows)


def findings(points: Sequence[Point]) -> list[str]:
    """A paragraph each, with its numbers."""
    fitting = [p for p in points if p["rungs"]]
    scale = [p for p in fitting if p["map"] == "scale"]
    counts = Counter(p["pays"] for p in scale)
    out = [
        f"What pays, of {len(scale)} points that fit: " + ", ".join(f"{name} {n}" for name, n in counts.most_common()) + ".",
        packing_line(fitting),
        priority_line(fitting),
        loss_line(fitting),
        *[
            top_k_line(fitting, device, gbit)
            for device, gbit in dict.fromkeys((p["device"], p["gbit"]) for p in fitting if p["map"] != "scale")
        ],
    ]
    panels = dict.fromkeys((p["device"], p["gbit"], p["num_experts"]) for p in fitting if p["map"] != "scale")
    out += [granularity_line(fitting, *panel) for panel in panels]
    for device in dict.fromkeys(p["device"] for p in scale):
        for shape in dict.fromkeys(p["shape"] for p in scale):
            own = [p for p in scale if (p["device"], p["shape"]) == (device, shape)]
            if own:
                out.append(f"{device}, {shape}: gains {_range(p['gain'] for p in own)}; " + _counts(own) + ".")
    return out


def packing_line(points: Sequence[Point]) -> str:
    """Of what Lina saves, how much eager with the same smaller expert-parallel groups saves."""
    shares = packing_shares(points)
    if not shares:
        return "Lina with packing pays nowhere."
    most = sum(share >= 0.9 for share in shares)
    return (
        f"Lina with packing gains more than 3% in {len(shares)} points; eager with parallel.ep as small saves "
        f"{statistics.median(shares):.0%} of that in the median, {min(shares):.0%} at least, and 90% or more in {most}."
    )


def packing_shares(points: Iterable[Point]) -> list[float]:
    rungs = [p["rungs"] for p in points if gain(p, "lina") > PAYS and "packing" in p["rungs"]]
    return [saved_s(r, "packing") / saved_s(r, "lina") for r in rungs]


def saved_s(rungs: Mapping[str, Any], name: str) -> float:
    return rungs["eager"]["step_s"] - rungs[name]["step_s"]


def gain(p: Point, name: str) -> float:
    """Over tuned eager; 1 where this rung doesn't fit."""
    return p["rungs"]["eager"]["step_s"] / p["rungs"][name]["step_s"] if name in p["rungs"] else 1.0


def priority_line(points: Sequence[Point]) -> str:
    pays = [p for p in points if gain(p, "priority") > PAYS]
    most, least = max(points, key=lambda p: gain(p, "priority")), min(points, key=lambda p: gain(p, "priority"))
    where = ", ".join(f"{device} {n}" for device, n in Counter(p["device"] for p in pays).items()) or "nowhere"
    return (
        f"Priority alone gains more than 3% in {len(pays)} of {len(points)} points ({where}); the most is "
        f"{gain(most, 'priority'):.2f} ({title_of(most)}), the least {gain(least, 'priority'):.2f} ({title_of(least)})."
    )


def loss_line(points: Sequence[Point]) -> str:
    """Packing that loses, and why."""
    loses = [p for p in points if gain(p, "packing") < 1 / PAYS]
    if not loses:
        return "Packing loses nowhere."
    worst = min(loses, key=lambda p: gain(p, "packing"))
    eager, packed = worst["rungs"]["eager"], worst["rungs"]["packing"]
    parts = [f"{kind} from {eager['exposed_s'][key] * 1e3:.0f} to {packed['exposed_s'][key] * 1e3:.0f} ms" for kind, key in WAITS]
    return (
        f"The least packing loses more than 3% in {len(loses)} of {len(points)} points, at worst {gain(worst, 'packing'):.2f} "
        f"({title_of(worst)}): the device waits for " + ", ".join(parts) + "."
    )


WAITS = (("tokens", "a2a"), ("gradients", "grads"))


def top_k_line(points: Sequence[Point], device: str, gbit: float) -> str:
    """From which top-k on the links need longer than the devices, by number of experts."""
    own = [p for p in points if p["map"] == "granularity" and (p["device"], p["gbit"]) == (device, gbit)]
    words = []
    for experts in sorted({p["num_experts"] for p in own}):
        bound = sorted(p["top_k"] for p in own if p["num_experts"] == experts and p["link_s"] > p["compute_s"])
        words.append(f"{experts} experts: " + (f"top-{', '.join(map(str, bound))}" if bound else "never"))
    return f"{device} {gbit:g} Gb/s, the links need longer than the devices at " + "; ".join(words) + "."


def granularity_line(points: Sequence[Point], device: str, gbit: float, experts: int) -> str:
    """The same active width in more and smaller experts."""
    own = [p for p in points if (p["map"], p["device"], p["gbit"], p["num_experts"]) == ("granularity", device, gbit, experts)]
    own.sort(key=lambda p: p["top_k"])
    parts = [
        f"{name} {', '.join(f'{gain(p, name):.2f}' for p in own)}"
        for name in ("priority", "packing", "lina", "flow", "flow + packing")
    ]
    return f"{device} {gbit:g} Gb/s, {experts} experts, top-{', '.join(str(p['top_k']) for p in own)}: " + "; ".join(parts) + "."


def zero_line(points: Sequence[Point]) -> str:
    """The same points with ZeRO-1 and without."""
    by_place = {(p["zero"], title_of(p)): p for p in points if p["rungs"]}
    pairs = [(by_place[0, name], p) for (zero, name), p in by_place.items() if zero and (0, name) in by_place]
    if not pairs:
        return "No point fits with ZeRO-1."
    same = sum(plain["pays"] == sharded["pays"] for plain, sharded in pairs)
    moved = [p for _, p in pairs if p["pays"] == "lina_zero"]
    ratios = [gain(p, "lina_zero") / max(gain(p, "flow"), gain(p, "flow + packing")) for _, p in pairs]
    return (
        f"ZeRO-1: of {len(pairs)} points that fit both ways {same} have the same winner; lina_zero wins {len(moved)}; it is "
        f"{_range(ratios)} times as fast as the better of flow and flow with packing."
    )


def variant_table(assumed: Sequence[Point], varied: Sequence[Point]) -> str:
    """Each variant against the same points as assumed."""
    by_title = {title_of(p): p for p in assumed}
    variants: dict[str, list[Point]] = {}
    for p in varied:
        variants.setdefault(p["variant"], []).append(p)
    if not variants:
        return "none"
    places = {title_of(p) for own in variants.values() for p in own}
    both = {"as assumed": [by_title[name] for name in by_title if name in places]} | variants
    head = [
        "variant",
        "points",
        "same winner",
        "packing's share of Lina",
        "priority pays",
        "most",
        "least",
        "packing loses",
        "NVL72 gains at most",
        "links bind from top-k",
        "what pays",
    ]
    rows = [head]
    for name, found in both.items():
        own = [p for p in found if p["rungs"]]
        same = sum(p["pays"] == by_title[title_of(p)]["pays"] for p in own if title_of(p) in by_title)
        known = sum(title_of(p) in by_title for p in own)
        shares = packing_shares(own)
        priority = [gain(p, "priority") for p in own]
        rack = [p["gain"] for p in own if p["device"] == "NVL72" and p["shape"] != "fine"]
        bound = [p["top_k"] for p in own if p["map"] == "granularity" and p["link_s"] > p["compute_s"]]
        rows.append(
            [
                name,
                str(len(own)),
                f"{same}/{known}",
                f"{statistics.median(shares):.0%}" if shares else "-",
                str(sum(g > PAYS for g in priority)),
                f"{max(priority):.2f}",
                f"{min(priority):.2f}",
                str(sum(gain(p, "packing") < 1 / PAYS for p in own)),
                f"{max(rack):.2f}" if rack else "-",
                str(min(bound)) if bound else "never",
                _counts(own),
            ]
        )
    return _aligned(rows)


def _counts(points: Sequence[Point]) -> str:
    return ", ".join(f"{name} {n}" for name, n in Counter(p["pays"] for p in points).most_common())


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{found[0]:.2f} to {found[-1]:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
