"""Bytes of tokens on the links between nodes, for each dispatch: by formula, as the ledger counts them, as the kernel does.

    sudo python benchmarks/link_bytes.py --json link_bytes.json      (some 6 minutes on 2 cores; root, iproute2)
    sudo python benchmarks/link_bytes.py --shapes 2x2 --top-k 2,6

64 experts on 4x1, 2x2 and 4x2 nodes x ranks; top-1, 2, 6 and 8; routing as it begins, and with a bias towards the first experts;
parallel.dispatch rows, once_per_rank and, where nodes have several ranks, once_per_node.  The formula counts the places that
each token's experts are on; the kernel's counters are read around the same exchanges alone, and without frames' headers and what
gloo adds to each message they should give the same.  The last line is JSON with all of it; exit code 1: formula and ledger
differ, or the links carried less than was counted, or more than 2% above it besides headers.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.link_counters import FRAME_BYTES  # noqa: E402

SHAPES: Mapping[str, tuple[int, int]] = {"4x1": (4, 1), "2x2": (2, 2), "4x2": (4, 2)}  # nodes, ranks on each
TOP_K = (1, 2, 6, 8)
ROUTINGS = ("as it begins", "skewed")
EXPERTS = 64
MODEL = (
    *("experiment=ladder", "model.num_layers=1", "model.d_model=256", "model.d_ff=16", "model.num_heads=4"),
    *("model.num_kv_heads=4", "model.head_dim=16", f"model.num_experts={EXPERTS}", "router=sigmoid"),
    *("train.seq_len=128", "train.micro_batch_size=4", "train.eval_interval=0", "guard.spike=none"),
    *("data=stdlib", "data.vocab_size=512", "strategy=eager", "parallel.reduce=flat"),
    *("cluster.attention_ms=0", "cluster.experts_ms=0"),
)
MOST_MORE = 0.02  # that gloo may add to what was counted, headers aside


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    from megalina.cli.compare import exit_code

    found: dict[str, Any] = {}
    code = exit_code(lambda: found.update(measured(args)))
    if code:
        return code
    print(report(found))
    line = json.dumps(found, allow_nan=False)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)
    return int(any(wrong(row) for row in found["rows"]))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    from megalina.cli.train import check_data

    shapes, top_k = args.shapes.split(","), [int(k) for k in args.top_k.split(",")]
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        raise ValueError(f"--shapes {args.shapes}: {unknown[0]} is none of {', '.join(SHAPES)}")
    cases = {shape: cases_of(shape, top_k) for shape in shapes}
    check_data(next(iter(cases[shapes[0]].values()))[0])
    rows = []
    for shape, configs in cases.items():
        with tempfile.TemporaryDirectory(prefix="megalina_link_bytes_") as folder:
            rows += [{"shape": shape} | row for row in _run(shape, configs, Path(folder), args)]
    return {"experts": EXPERTS, "link_mbit": args.link_mbit, "repeats": args.repeats, "rows": rows}


def cases_of(shape: str, top_k: Sequence[int]) -> dict[str, Any]:
    """Name -> its configuration and what its row says.  ValueError where one can't be."""
    from megalina.blocks.dispatch import ONCE_PER_NODE, ONCE_PER_RANK, ROWS
    from megalina.compose import compose
    from megalina.validate import check_config

    nodes, per_node = SHAPES[shape]
    world, out = nodes * per_node, {}
    for k in top_k:
        for routing in ROUTINGS:
            for dispatch in (ROWS, ONCE_PER_RANK, *([ONCE_PER_NODE] if per_node > 1 else [])):
                words = (f"router.top_k={k}", f"parallel.dispatch={dispatch}", f"parallel.ep={world}", f"launch.ranks={world}")
                sizes = (f"train.global_batch_size={4 * world}", f"cluster.nodes={nodes}", f"cluster.ranks_per_node={per_node}")
                config = compose([*MODEL, *words, *sizes])
                check_config(config, world)
                what = {"top_k": k, "routing": routing, "dispatch": dispatch}
                out[f"top-{k}, {routing}, {dispatch}"] = config, what
    return out


def _run(shape: str, cases: Mapping[str, Any], folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    from dataclasses import replace

    from omegaconf import OmegaConf

    from megalina.cli.compare import RanksFailed
    from megalina.namespaces import emulated_cluster

    nodes, per_node = SHAPES[shape]
    texts = {}
    for number, (name, (config, _)) in enumerate(cases.items()):
        run = replace(config.run, dir=str(folder / "runs" / str(number)))
        texts[name] = OmegaConf.to_yaml(OmegaConf.structured(replace(config, run=run)))
    spec, out = folder / "spec.json", folder / "found.json"
    skewed = [name for name, (_, what) in cases.items() if what["routing"] == "skewed"]
    told = {"configs": texts, "skewed": skewed, "ranks_per_node": per_node, "repeats": args.repeats, "out": str(out)}
    spec.write_text(json.dumps(told))
    command = [sys.executable, str(ROOT / "benchmarks" / "dispatching" / "worker.py"), str(spec)]
    with emulated_cluster(nodes=nodes, link_mbit=args.link_mbit) as cluster:
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        outcome = cluster.run(command, ranks_per_node=per_node, logs=folder / "logs", env=env)
    if outcome.code:
        raise RanksFailed(f"{shape}: {outcome.reason}")
    found = json.loads(out.read_text())
    return [what | found[name] for name, (_, what) in cases.items()]


def more(row: Mapping[str, Any]) -> float:
    """What the links carried above what was counted, frames' headers aside; over what was counted."""
    return float((row["link_bytes"] - FRAME_BYTES * row["link_packets"]) / row["counted_bytes"] - 1)


def wrong(row: Mapping[str, Any]) -> bool:
    return bool(row["formula_bytes"] != row["counted_bytes"] or not -1e-3 <= more(row) <= MOST_MORE)


def report(found: Mapping[str, Any]) -> str:
    lines = [
        f"Tokens' bytes between nodes, {found['experts']} experts, {found['repeats']} times the exchanges of one step",
        "",
        "| nodes x ranks | top-k | routing (fullest over mean) | dispatch | formula | ledger | kernel, less headers | to rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows_bytes = {_case(row): row["counted_bytes"] for row in found["rows"] if row["dispatch"] == "rows"}
    for row in found["rows"]:
        lines.append(
            f"| {row['shape']} | {row['top_k']} | {row['routing']} ({row['fullest_expert']:.1f}) | {row['dispatch']} "
            f"| {row['formula_bytes']:,} | {row['counted_bytes']:,} | {more(row):+.2%} "
            f"| {row['counted_bytes'] / rows_bytes[_case(row)]:.2f} |"
        )
    bad = [row for row in found["rows"] if wrong(row)]
    lines += ["", f"{len(found['rows']) - len(bad)} of {len(found['rows'])} agree"]
    return "\n".join(lines)


def _case(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["shape"], row["top_k"], row["routing"]


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, new_file, number, whole

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), metavar="A,B", help=f"of {', '.join(SHAPES)} (default: all)")
    parser.add_argument("--top-k", default=",".join(map(str, TOP_K)), metavar="K,L", help="experts of a token (default: 1,2,6,8)")
    parser.add_argument("--repeats", type=whole(1, 1000), default=3, metavar="N", help="of a step's exchanges (default: 3)")
    parser.add_argument("--link-mbit", type=number(1, 1e6), default=2000.0, metavar="X", help="of a node (default: 2000)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="all numbers")
    return parser


if __name__ == "__main__":
    sys.exit(main())
