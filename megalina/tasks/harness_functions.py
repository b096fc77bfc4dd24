"""What lm-evaluation-harness runs of a local task.  Stands by itself: it is copied beside the tasks that are written for it."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def documents(file: str, **metadata: Any) -> dict[str, Any]:
    """Of JSON lines beside this file, the split `test`."""
    from datasets import Dataset

    lines = Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def process_results(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """`results`: of each choice its log-likelihood in nats, and whether greedy decoding writes it."""
    nats, chance = [log_likelihood for log_likelihood, _ in results], 1 / len(results)
    right = float(nats.index(max(nats)) == doc["answer"])
    num_bytes = len(doc["choices"][doc["answer"]].encode())
    return {
        "acc": right,
        "centred_acc": (right - chance) / (1 - chance),
        "bits_per_byte": -nats[doc["answer"]] / math.log(2) / num_bytes,
    }
