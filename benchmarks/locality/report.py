"""What was found, in tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.link_counters import FRAME_BYTES

Found = Mapping[str, Any]


def report(found: Found) -> str:
    parts = []
    if "timed" in found:
        where = f"{found['nodes']} x {found['ranks_per_node']} ranks, {found['link_mbit']:g} Mbit/s"
        parts += [_timed(found["timed"], where), _wire(found["timed"])]
    if "trained" in found:
        parts.append(_trained(found["trained"], found["train_steps"], found["data"]))
    if "few" in found:
        parts.append(_few(found["few"]))
    return "\n\n".join(filter(None, parts))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _timed(timed: Found, where: str) -> str:
    base = timed["hash"]["step_s"] if "hash" in timed else next(iter(timed.values()))["step_s"]
    rows = [
        [
            name,
            f"{of['step_s'] * 1e3:.0f} ({of['step_s_quarters'][0] * 1e3:.0f} to {of['step_s_quarters'][1] * 1e3:.0f})",
            f"{of['epoch_s'] / 60:.1f}",
            f"{base / of['step_s']:.2f}x",
            f"{of['token_bytes_between_nodes'] / 2**20:.2f}",
            f"{of['token_bytes_within_nodes'] / 2**20:.2f}",
            f"{of['at_home']:.1%}",
            f"{of['link_bytes_a_step'] / 2**20:.2f}",
            f"{of['load_entropy']:.3f}",
            f"{of['dropped_fraction']:.1%}",
            f"{of['overrun']:.1%}",
        ]
        for name, of in timed.items()
    ]
    head = ["router", "step, ms (quarters)", "epoch, min", "to hash", "MiB between", "within", "at home", "on links"]
    head += ["entropy", "dropped", "overrun"]
    return f"Steps in turns, {where}; tokens' MiB a step as counted, all MiB a step as the links say\n\n{_table(head, rows)}"


def _wire(timed: Found) -> str:
    rows = []
    for name, of in timed.items():
        if (wire := of.get("wire")) is None:
            continue
        frames = wire["link_packets"] * FRAME_BYTES
        rest = wire["link_bytes"] - wire["counted_bytes"] - frames
        rows.append(
            [
                name,
                f"{wire['counted_bytes']:,}",
                f"{wire['link_bytes']:,}",
                f"{wire['difference']:+.3%}",
                f"{frames:,} of {wire['link_packets']:,} packets",
                f"{rest:,}, {rest / max(wire['messages'], 1):.0f} a message",
            ]
        )
    head = ["router", "counted, bytes", "sent by links, bytes", "difference", "of it frames' headers", "of it gloo's own"]
    return f"Exchanges of tokens alone, counted and by the links' counters\n\n{_table(head, rows)}" if rows else ""


def _trained(trained: Found, steps: int, data: str) -> str:
    rows = [
        [
            name,
            f"{of['val_loss']:.4f}",
            f"{of['train_loss']:.4f}",
            "" if of["locality_loss"] is None else f"{of['locality_loss']:.3f}",
            f"{of['token_bytes_between_nodes'] / 2**20:.3f}",
            f"{of['at_home']:.1%}",
            f"{of['load_entropy']:.3f}",
            f"{of['dropped_fraction']:.1%}",
            f"{of['placed']['as_they_are']:.1%} to {of['placed']['placed']:.1%}" if "placed" in of else "",
        ]
        for name, of in trained.items()
    ]
    head = ["router", "validation loss", "training loss", "locality loss", "MiB between", "at home", "entropy", "dropped"]
    head.append("at home, placed")
    return f"After {steps} steps, the nodes' text {data}; figures of the last fifth\n\n{_table(head, rows)}"


def _few(few: Found) -> str:
    lines = [f"{few['nodes']} nodes and {few['experts']} experts: {few['refused']}"]
    return "\n\n".join([*lines, _timed(few["timed"], "without homes")]) if few["timed"] else lines[0]
