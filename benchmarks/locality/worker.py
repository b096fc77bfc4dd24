"""One rank: python benchmarks/locality/worker.py SPEC, with torchrun's variables.

SPEC is JSON: configs {name: YAML}, job ("timed" or "trained"), ranks_per_node, out, and rounds, turn, wired (names), repeats, or
steps, eval_sequences, placed (name).  Rank 0 writes OUT.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.link_counters import sent_by_links
from megalina.comm import exchange
from megalina.compare.interleaved import run_interleaved
from megalina.config import BYTES, PretrainConfig
from megalina.console import StatusLine
from megalina.data.source import TokenData, open_data
from megalina.mesh import Axis, all_gather_object
from megalina.model.routing_recorder import RoutingRecorder, trace_of
from megalina.parallel.step_result import StepResult
from megalina.placement.expert_order import counts_of, local_share, order_of
from megalina.train.guard import LoadWatch
from megalina.train.step_runner import StepRunner
from megalina.worker import load_config

WAYS = 4  # of a token's row: there and back, forward and backward
LAST = 0.2  # of a training's steps, of which figures are means
PROFILED_STEPS = 8  # to place experts by, and as many to judge it by


def main(spec_path: str) -> int:
    spec: dict[str, Any] = json.loads(Path(spec_path).read_text())
    os.environ["LOCAL_WORLD_SIZE"] = str(spec["ranks_per_node"])  # nodes are declared, also where they aren't emulated
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    configs = {name: load_config(text) for name, text in spec["configs"].items()}
    first = next(iter(configs.values()))
    data = open_data(first.data, seq_len=first.train.seq_len, seed=first.train.seed)
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=first.cluster.timeout_s))
    status, began_s = StatusLine(), time.monotonic()

    def progress(done: int, total: int, name: str) -> None:
        if rank == 0:
            left_s = (time.monotonic() - began_s) / done * (total - done) if done else 0.0
            status.show(f"{spec['title']}: {done}/{total}, {left_s:.0f} s left  {name}")

    found = (timed if spec["job"] == "timed" else trained)(spec, configs, data, progress)
    if rank == 0:
        status.end()
        Path(spec["out"]).write_text(json.dumps(found, allow_nan=False))
    dist.destroy_process_group()
    return 0


Progress = Callable[[int, int, str], None]
Found = dict[str, Any]


# step times, in turns, and the wire


def timed(spec: Mapping[str, Any], configs: Mapping[str, PretrainConfig], data: TokenData, progress: Progress) -> Found:
    def prepare(name: str, runner: StepRunner) -> None:
        if name in spec["starts"]:
            runner.state.load_weights(Path(spec["starts"][name]))

    turns = {"rounds": spec["rounds"], "turn": spec["turn"]}
    competitors = run_interleaved(configs, data, **turns, prepare=prepare, progress=progress)
    out: Found = {}
    for competitor in competitors:
        runner = competitor.runner
        every = all_gather_object(runner.mesh, (competitor.step_s, sum(competitor.busy_s), sum(competitor.overrun_s)))
        step_s = [max(of_step) for of_step in zip(*(times for times, *_ in every), strict=True)]  # of the slowest rank
        quarters = statistics.quantiles(step_s, n=4) if len(step_s) > 1 else step_s * 3
        steps_an_epoch = data.train.num_sequences // runner.config.train.global_batch_size
        out[competitor.name] = {
            "step_s": statistics.median(step_s),
            "step_s_quarters": [quarters[0], quarters[2]],
            "steps": len(step_s),
            "epoch_s": statistics.median(step_s) * steps_an_epoch,
            "overrun": sum(over for *_, over in every) / max(sum(busy for _, busy, _ in every), 1e-9),
            **of_results(competitor.results, runner.config),
            **whole_steps(runner, count=2),
        }
        if competitor.name in spec["wired"]:
            out[competitor.name]["wire"] = wire(runner, repeats=spec["repeats"])
    for competitor in competitors:
        competitor.runner.close()
    return out


def of_results(results: Sequence[StepResult], config: PretrainConfig) -> Found:
    """Means over steps."""
    row_bytes = WAYS * config.model.d_model * BYTES[config.train.dtype]
    kept = statistics.mean(float(result.loads[:, :-1].sum() - result.loads[:, -1].sum()) for result in results)
    between, within = (
        statistics.mean(getattr(result, f"token_bytes_{where}_nodes") for result in results) for where in ("between", "within")
    )
    loads = [LoadWatch(len(result.loads), result.loads.shape[1] - 1).report(0, result.loads) for result in results]
    return {
        "token_bytes_between_nodes": between,
        "token_bytes_within_nodes": within,
        "at_home": 1 - between / max(row_bytes * kept, 1),  # of what was not dropped
        "load_entropy": statistics.mean(layer for load in loads for layer in load.load_entropy),
        "dropped_fraction": statistics.mean(layer for load in loads for layer in load.dropped_fraction),
        "train_loss": results[-1].loss,
    }


def whole_steps(runner: StepRunner, *, count: int) -> Found:
    """What the links say of whole steps: tokens, gradients and all else."""
    before = sent_by_links(runner.mesh)
    results = [runner.compute(runner.state.step + 1)[0] for _ in range(count)]
    sent = sent_by_links(runner.mesh) - before
    tokens = sum(result.token_bytes_between_nodes for result in results)
    return {"link_bytes_a_step": sent.num_bytes / count, "tokens_share_of_link": tokens / max(sent.num_bytes, 1)}


def wire(runner: StepRunner, *, repeats: int) -> Found:
    """The exchanges of tokens of one step, alone, `repeats` times: what was counted, and what the links have sent."""
    with _noted() as exchanges:
        result, _ = runner.compute(runner.state.step + 1)
    before = sent_by_links(runner.mesh)
    nothing = sent_by_links(runner.mesh) - before  # what asking costs
    before = sent_by_links(runner.mesh)
    for _ in range(repeats):
        for x, send, receive, axis in exchanges:
            exchange.start_all_to_all(x, send, receive, axis, runner.log).wait()
    sent = sent_by_links(runner.mesh) - before - nothing
    counted = result.token_bytes_between_nodes * repeats
    me, per_node = dist.get_rank(), runner.trainable.instruction_functions.token_bytes.ranks_per_node
    away = [sum(rank // per_node != me // per_node for rank in axis.ranks) for _, _, _, axis in exchanges]
    messages = sum(all_gather_object(runner.mesh, sum(away))) * repeats
    return {
        "counted_bytes": counted,
        "link_bytes": sent.num_bytes,
        "link_packets": sent.packets,
        "messages": messages,
        "difference": sent.num_bytes / max(counted, 1) - 1,
    }


@contextmanager
def _noted() -> Iterator[list[tuple[Tensor, list[int], list[int], Axis]]]:
    """The exchanges of tokens in the body."""
    noted: list[tuple[Tensor, list[int], list[int], Axis]] = []
    start = exchange.start_all_to_all

    def watched(x: Tensor, send: list[int], receive: list[int], axis: Axis, log: Any) -> Any:
        if x.is_floating_point():
            noted.append((torch.zeros_like(x), send, receive, axis))
        return start(x, send, receive, axis, log)

    exchange.start_all_to_all = watched
    try:
        yield noted
    finally:
        exchange.start_all_to_all = start


# losses at equal steps


def trained(spec: Mapping[str, Any], configs: Mapping[str, PretrainConfig], data: TokenData, progress: Progress) -> Found:
    out: Found = {}
    for number, (name, config) in enumerate(configs.items()):
        runner = StepRunner(config, data, device=torch.device("cpu"))
        results = []
        for step in range(1, spec["steps"] + 1):
            progress(number * spec["steps"] + step, len(configs) * spec["steps"], name)
            results.append(runner.compute(step)[0])
        last = results[-max(1, round(LAST * len(results))) :]
        out[name] = of_results(last, config) | {"val_loss": validation_loss(runner, data, spec["eval_sequences"])}
        out[name]["locality_loss"] = last[-1].auxiliary.get("locality_loss")
        runner.state.save()
        runner.state.wait()
        out[name]["checkpoint"] = str(Path(config.run.dir) / "checkpoints" / f"step_{spec['steps']:08d}")
        if name == spec["placed"]:
            out[name]["placed"] = placed(runner, spec["ranks_per_node"])
        runner.close()
    return out


def validation_loss(runner: StepRunner, data: TokenData, sequences: int) -> float:
    """Nats, over the first sequences of the validation text."""
    trainable, mesh, size = runner.trainable, runner.mesh, runner.config.train.micro_batch_size
    assert data.valid is not None and sequences % (size * mesh.readers) == 0
    total = torch.zeros(2, dtype=torch.float64)
    for first in range(0, sequences, size * mesh.readers):
        total += trainable.evaluate(data.valid.batch(first + mesh.reader * size, size))
    return (total[0] / total[1]).item()


def placed(runner: StepRunner, ranks_per_node: int) -> Found:
    """Shares of choices at home on steps that were not seen, as experts lie and as an order by the steps before has them."""
    mesh, gpt, nodes = runner.mesh, runner.trainable.gpt, runner.config.router.locality_nodes
    counts = []
    for _ in range(2):
        decisions = []
        for _ in range(PROFILED_STEPS):
            recorder = RoutingRecorder(1 << 20)
            with recorder.watching(gpt):
                runner.compute(runner.state.step + 1)
            decisions.append(recorder.decisions())
        found = [part for own in all_gather_object(mesh, decisions) for part in own]
        counts.append(counts_of(trace_of(found, gpt, max_tokens=1 << 24, name="steps"), nodes))
    shares = {"as_they_are": [], "placed": []}  # type: dict[str, list[float]]
    for seen_NE, new_NE in zip(*counts, strict=True):
        shares["as_they_are"].append(local_share(new_NE, tuple(range(new_NE.shape[1]))))
        shares["placed"].append(local_share(new_NE, order_of(seen_NE, ranks_per_node)))
    return {name: float(np.mean(values)) for name, values in shares.items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
