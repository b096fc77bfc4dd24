"""One rank: python benchmarks/dispatching/worker.py SPEC, with torchrun's variables.

SPEC is JSON: configs {name: YAML}, skewed (names), ranks_per_node, repeats, out.  Rank 0 writes OUT.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.link_counters import sent_by_links
from megalina.blocks.dispatch import ONCE_PER_NODE, ROWS
from megalina.comm import exchange
from megalina.comm.by_node import Relay
from megalina.comm.exchange import Pending
from megalina.config import BYTES, PretrainConfig
from megalina.data.source import open_data
from megalina.mesh import all_gather_object
from megalina.model.routing_recorder import RoutingRecorder
from megalina.parallel import executor
from megalina.train.step_runner import StepRunner
from megalina.worker import load_config

SKEW = 0.1  # of the bias of the first expert, which falls evenly to 0 at the last
Again = Callable[[Relay], Pending]


def main(spec_path: str) -> int:
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    configs = {name: load_config(text) for name, text in spec["configs"].items()}
    first = next(iter(configs.values()))
    data = open_data(first.data, seq_len=first.train.seq_len, seed=first.train.seed)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=first.cluster.timeout_s))
    found = {}
    for name, config in configs.items():
        runner = StepRunner(config, data, device=torch.device("cpu"))
        found[name] = counted(runner, skewed=name in spec["skewed"], per_node=spec["ranks_per_node"], repeats=spec["repeats"])
        runner.close()
        if rank == 0:
            print(name, found[name], flush=True)
    if rank == 0:
        Path(spec["out"]).write_text(json.dumps(found, allow_nan=False))
    dist.destroy_process_group()
    return 0


def counted(runner: StepRunner, *, skewed: bool, per_node: int, repeats: int) -> dict[str, Any]:
    """Bytes of the tokens of a step between nodes: by the formula from what routers chose, as the ledger counts them, and as the
    links do when the exchanges are repeated alone."""
    gpt, mesh = runner.trainable.gpt, runner.mesh
    for layer in gpt.layers:
        if skewed:
            bias_E = layer.router.bias_E
            bias_E.copy_(torch.linspace(SKEW, 0.0, len(bias_E)))
    recorder = RoutingRecorder(1 << 20)
    with recorder.watching(gpt), _noted() as exchanges:
        result, _ = runner.compute(runner.state.step + 1)
    formula = sum(all_gather_object(mesh, _bytes_between_nodes(recorder.decisions().expert_ids_TLK, runner.config, per_node)))
    relay = Relay()
    before = sent_by_links(mesh)
    nothing = sent_by_links(mesh) - before  # what asking costs
    before = sent_by_links(mesh)
    for _ in range(repeats):
        for again in exchanges:
            again(relay).wait()
    sent = sent_by_links(mesh) - before - nothing
    relay.close()
    loads = np.asarray(result.loads[:, :-1].sum(0), dtype=float)
    return {
        "formula_bytes": formula * repeats,
        "counted_bytes": result.token_bytes_between_nodes * repeats,
        "counted_within_bytes": result.token_bytes_within_nodes * repeats,
        "link_bytes": sent.num_bytes,
        "link_packets": sent.packets,
        "fullest_expert": float(loads[: runner.config.model.num_experts].max() / loads[: runner.config.model.num_experts].mean()),
    }


def _bytes_between_nodes(expert_TLK: NDArray[np.int32], config: PretrainConfig, per_node: int) -> int:
    """Of this rank's tokens, there and back, forward and backward; `expert_TLK`: all different in a token, on one MoE layer."""
    kind, experts, ep, element = (
        config.parallel.dispatch,
        config.model.num_experts,
        config.parallel.ep,
        BYTES[config.train.dtype],
    )
    token, own = config.model.d_model * element, dist.get_rank() // per_node
    expert_TK = expert_TLK[:, 0]
    rank_TK = expert_TK // (experts // ep)
    if kind == ROWS:
        return 4 * token * int((rank_TK // per_node != own).sum())
    places = ep if kind != ONCE_PER_NODE else ep // per_node
    visits_TP = np.zeros((len(expert_TK), places), dtype=bool)
    np.put_along_axis(visits_TP, expert_TK // (experts // places), True, axis=1)
    node_P = np.arange(places) // (1 if kind == ONCE_PER_NODE else per_node)
    weights = experts // places * max(4, element)
    return int(visits_TP[:, node_P != own].sum()) * (4 * token + 2 * weights)  # weights there, and their gradients back


@contextmanager
def _noted() -> Iterator[list[Again]]:
    """The exchanges of tokens in the body, to be repeated with zeros of the same sizes."""
    noted: list[Again] = []
    flat, outward, back = exchange.start_all_to_all, executor.start_rows_outward, executor.start_rows_back

    def watched(x: Tensor, send: list[int], receive: list[int], axis: Any, log: Any) -> Pending:
        if x.is_floating_point():
            zeros = torch.zeros_like(x)
            noted.append(lambda relay: flat(zeros, send, receive, axis, log))
        return flat(x, send, receive, axis, log)

    def by_node(start: Callable[..., Pending]) -> Callable[..., Pending]:
        def watched(x: Tensor, send: list[int], receive: list[int], way: Any, axis: Any, log: Any, *rest: Any) -> Pending:
            zeros = torch.zeros_like(x)
            noted.append(lambda relay: start(zeros, send, receive, way, axis, log, relay, None))
            return start(x, send, receive, way, axis, log, *rest)

        return watched

    exchange.start_all_to_all = watched  # type: ignore[assignment]
    executor.start_rows_outward, executor.start_rows_back = by_node(outward), by_node(back)  # type: ignore[attr-defined]
    try:
        yield noted
    finally:
        exchange.start_all_to_all = flat
        executor.start_rows_outward, executor.start_rows_back = outward, back  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
