"""Gradients in float64, against one process: of torch's tables on our ranks, and of torch's own runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.memory import batch_of
from benchmarks.pipelining.tables import Kind, table_of
from benchmarks.pipelining.torch_model import Source, Stage, whole_model
from benchmarks.pipelining.torch_step import TorchPipeline
from megalina.batch import Batch
from megalina.config import PretrainConfig
from megalina.rank_pool import RankPool, RanksFailed
from megalina.verify.compare import EXACT, FLOOR, compare
from megalina.verify.on_ranks import Pool
from megalina.verify.recording import SEQUENCES, Layout
from megalina.verify.reference import record
from megalina.verify.shrink import shrink
from megalina.verify.start import random_batches

TIME_LIMIT_S = 60.0  # of a run of torch's, which may hang
MICRO_BATCHES = SEQUENCES  # of one sequence each


@dataclass(frozen=True, slots=True)
class Outcome:
    """`error`: the largest of a gradient, relative to the largest of its parameter's; nan where the run came to no end."""

    error: float
    said: str = ""

    @property
    def exact(self) -> bool:
        return self.error < EXACT


def small(config: PretrainConfig, ranks: int) -> PretrainConfig:
    """The model shrunk, in float64, with two layers a rank and the first one dense, as one process has it."""
    config = shrink(config, ranks)
    return replace(
        config,
        model=replace(config.model, num_layers=2 * ranks, dense_layers_first=1),
        data=replace(config.data, reset_attention=False, reset_positions=False),
        cluster=replace(config.cluster, attention_ms=0.0, experts_ms=0.0, device_gflops=0.0),
    )


def in_a_pipeline(config: PretrainConfig, kind: Kind, ranks: int, pipeline: str) -> PretrainConfig:
    """One sequence a micro-batch."""
    return replace(
        config,
        train=replace(config.train, micro_batch_size=1),
        parallel=replace(config.parallel, pp=ranks, pp_chunks=kind.chunks),
        strategy=replace(config.strategy, pipeline=pipeline),
        launch=replace(config.launch, ranks=ranks),
    )


def tables_on_our_ranks(
    config: PretrainConfig, kinds: Sequence[Kind], ranks: int, folder: Path, *, messages: bool = False
) -> dict[str, Outcome]:
    """Of legal tables, by schedule: losses, gradients, norm and weights of two steps, the largest error of all of them.
    `messages`: in torch's own order too, for those that it prints them of."""
    out = {}
    with Pool() as pool:
        for kind in (kind for kind in kinds if kind.takes_late_receives or not messages):
            table = folder / f"{kind.name}_{ranks}_{messages}.csv"
            table.write_text(table_of(kind, ranks, MICRO_BATCHES, messages=messages))
            own = small(config, ranks)
            batches = random_batches(own, 2)
            layout = Layout(ranks, pp=ranks, chunks=kind.chunks, micro_batch=1, pipeline=str(table))
            found = compare(record(own, batches), pool.record(own, layout, batches))
            out[kind.name] = Outcome(found.largest_error, str(found.first or ""))
    return out


def torchs_own_run(config: PretrainConfig, kind: Kind, ranks: int, *, late_receives: bool = False) -> Outcome:
    """Gradients of one step; a hang is reported after a minute."""
    own = small(config, ranks)
    piped = in_a_pipeline(own, kind, ranks, kind.ours)
    with RankPool(time_limit_s=TIME_LIMIT_S, preload=(__name__,)) as pool:
        try:
            of_ranks = pool.run(ranks, gradients_of_rank, piped, kind, late_receives)
        except RanksFailed as error:
            return Outcome(math.nan, str(error).splitlines()[0])
    return Outcome(largest_error(_of_one_process(own), of_ranks))


def gradients_of_rank(config: PretrainConfig, kind: Kind, late_receives: bool) -> list[tuple[Source, Tensor]]:
    """Of each parameter of this rank: where it is in the whole model, and its gradient."""
    weights = dict(whole_model(config, dtype=torch.float64, shaken=True).named_parameters())
    vocab_size = config.model.vocab_size
    run = TorchPipeline(config, kind, weights, vocab_size=vocab_size, late_receives=late_receives)
    run.gradients(_batch(config))
    return [row for module in run.modules.values() for row in gradients_of(module)]


def gradients_of(stage: Stage) -> list[tuple[Source, Tensor]]:
    """Where each parameter of a stage is in the whole model, and its gradient."""
    out = []
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None, name
        out.append((stage.sources[name], parameter.grad))
    return out


def _batch(config: PretrainConfig) -> Batch:
    return batch_of(SEQUENCES, config.train.seq_len, config.model.vocab_size, config.train.seed)


def _of_one_process(config: PretrainConfig) -> dict[str, Tensor]:
    gpt, batch = whole_model(config, dtype=torch.float64, shaken=True), _batch(config)
    (gpt(batch).loss / batch.loss_mask_BS.sum()).backward()
    return {name: p.grad for name, p in gpt.named_parameters() if p.grad is not None}


def largest_error(whole: Mapping[str, Tensor], of_ranks: Sequence[Sequence[tuple[Source, Tensor]]]) -> float:
    """As `megalina.verify.compare` measures it; infinite where a parameter is on no rank."""
    largest, error, seen = max(float(g.abs().max()) for g in whole.values()), 0.0, set[str]()
    for source, gradient in (row for rows in of_ranks for row in rows):
        seen.update(source.names)
        wanted = source.of(whole)
        scale = max(float(wanted.abs().max()), FLOOR * largest)
        error = max(error, float((gradient - wanted).abs().max()) / scale)
    return error if seen == set(whole) else math.inf
