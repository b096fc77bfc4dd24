"""Writes docs/what-works.md: which two features go together, as the check of a configuration says, and why others don't.

python tools/write_support_matrix.py
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from megalina.compose import compose
from megalina.validate import check_config

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "what-works.md"
RANKS = 4  # of the base: two ranks share the experts, twice
BASE = ("model=tiny", "model.num_layers=8", "parallel.ep=2", "train.seq_len=64", "train.micro_batch_size=4",
        "train.global_batch_size=64")  # fmt: skip
HEADER = """# What works with what

Made by `python tools/write_support_matrix.py` from the check that every run begins with (`megalina/validate.py`); change that,
not this file.

Each pair of the features below was put into one configuration, with as many ranks as it takes, and checked.
The rest is `{base}`. **{works} of {pairs} pairs are accepted**; the others are
listed with the reason that a run prints. That an accepted pair gives the numbers of one process is what `tests/verify/` shows:
all pairs of layouts, strategies, routers, models and optimizers in `make test-full`, a part of them in `make test`. For a
configuration of your own: `tools/verify_layouts.py`. Generation and serving have their own limits: [inference.md](inference.md).
"""


@dataclass(frozen=True, slots=True)
class Feature:
    """`ranks`: how many times as many ranks it takes."""

    name: str
    overrides: tuple[str, ...]
    ranks: int = 1


def of_files(group: str, *names: str) -> list[Feature]:
    return [Feature(name, (f"{group}={name}",)) for name in names]


def _pipeline(name: str, chunks: int = 1) -> Feature:
    return Feature(name, ("parallel.pp=2", f"strategy.pipeline={name}", f"parallel.pp_chunks={chunks}"), ranks=2)


KINDS: Mapping[str, Sequence[Feature]] = {
    "layouts": (
        Feature("tp", ("parallel.tp=2",), ranks=2),
        Feature("cp, keys gathered", ("parallel.cp=2",), ranks=2),
        Feature("cp, heads exchanged", ("parallel.cp=2", "parallel.cp_kind=all_to_all"), ranks=2),
        Feature("ZeRO-1", ("parallel.zero=1",)),
        Feature("full recompute", ("train.recompute=full",)),
        Feature("bfloat16", ("train.dtype=bfloat16",)),
        Feature("experts that change ranks", ("parallel.rebalance_interval=10", "model.num_experts=8")),
        Feature("tokens sent once per rank", ("parallel.dispatch=once_per_rank",)),
        Feature(
            "tokens sent once per node",
            ("parallel.dispatch=once_per_node", "parallel.ep=4", "train.global_batch_size=128"),
            ranks=2,
        ),
        Feature("gradients by node", ("parallel.reduce=by_node",)),
    ),
    "pipelines": (
        *(_pipeline(name) for name in ("gpipe", "1f1b", "zb_h1", "greedy")),
        *(_pipeline(name, chunks=2) for name in ("interleaved", "zbv", "dualpipev")),
    ),
    "strategies": (
        *of_files("strategy", "eager", "ddp", "priority_partition", "lina", "flow", "pair", "lancet", "search", "auto"),
        Feature("lina_zero", ("strategy=lina_zero", "parallel.zero=1")),
    ),
    "routers": of_files(
        *("router", "topk", "switch", "sigmoid", "group_limited", "noisy_topk", "hash", "expert_choice"),
        *("locmoe", "locmoe_plus", "dense"),
    ),
    "routing": (
        Feature("capacity", ("router.capacity_factor=1.25",)),
        Feature("groups of whole micro-batches", ("router.group=micro_batch",)),
        Feature("balance over all ranks", ("router.group=global", "train.micro_batch_size=16")),
    ),
    "models": (
        Feature(
            "latent attention",
            (
                *("model.attention=mla", "model.kv_lora_rank=32", "model.qk_nope_head_dim=16"),
                *("model.qk_rope_head_dim=8", "model.v_head_dim=16"),
            ),
        ),
        Feature("multi-token prediction", ("model.mtp_layers=1",)),
        Feature("sliding window", ("model.window=16",)),
        Feature("attention sinks", ("model.attention_sinks=true",)),
        Feature("QK-norm of all heads", ("model.qk_norm=projection",)),
        Feature("shared experts", ("model.shared_d_ff=64",)),
        Feature("dense first layer", ("model.dense_layers_first=1", "model.dense_d_ff=128")),
        Feature("dropout", ("model.dropout=0.1",)),
    ),
    "optimizers": of_files("optim", "adamw", "muon", "muon_clip", "sgd"),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    PAGE.write_text(document())
    print(PAGE.relative_to(ROOT))
    return 0


def refusal(*features: Feature) -> str:
    """Why these can't be in one configuration; "" where they can."""
    world = RANKS
    for feature in features:
        world *= feature.ranks
    config = compose([*BASE, *(word for feature in features for word in feature.overrides)])
    try:
        check_config(config, world)
    except ValueError as error:
        return str(error)
    return ""


def pairs() -> list[tuple[Feature, Feature]]:
    """Of different kinds, and of one kind where their settings differ."""
    features = [feature for of_kind in KINDS.values() for feature in of_kind]
    return [(a, b) for a, b in combinations(features, 2) if not _settings(a) & _settings(b)]


def _settings(feature: Feature) -> set[str]:
    return {word.partition("=")[0] for word in feature.overrides}


def document() -> str:
    alone = {feature.name: refusal(feature) for of_kind in KINDS.values() for feature in of_kind}
    if wrong := {name: why for name, why in alone.items() if why}:
        raise ValueError(f"features that don't even work alone: {wrong}")
    found = {(a, b): refusal(a, b) for a, b in pairs()}
    refused = {pair: why for pair, why in found.items() if why}
    works = len(found) - len(refused)
    lines = [HEADER.format(base=" ".join(BASE), works=f"{works:,}", pairs=f"{len(found):,}"), "## Features", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {kind} | {'; '.join(_shown(f) for f in of_kind)} |" for kind, of_kind in KINDS.items()]
    lines += ["", "## Pairs that are refused", "", "| | with | because |", "|---|---|---|"]
    lines += [f"| {a.name} | {b.name} | {_cell(why)} |" for (a, b), why in refused.items()]
    return "\n".join(lines) + "\n"


def _shown(feature: Feature) -> str:
    return f"{feature.name} (`{' '.join(feature.overrides)}`)"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
