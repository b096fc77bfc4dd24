"""Hypotheses about what a pipeline has to do once over all its stages."""

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

from megalina.blocks.pipelined import pipelined
from megalina.step.pipeline.cell import Work
from megalina.step.pipeline.job import Pipelined
from megalina.verify.evidence import Cause, Evidence, Pair, agrees, close, counted, held, merged, total
from megalina.verify.hypotheses.scales import common_factor
from megalina.verify.reference import forward


def message_swapped(evidence: Evidence) -> Iterator[Cause]:
    """What goes from stage to stage has two micro-batches in each other's place on the ranks of one stage."""
    first, layout = evidence.first, evidence.layout
    if layout.pp == 1 or first is None or not close(first.want.value, first.got.value, first.floor):
        return
    size = layout.world // layout.pp
    wrong = [rank for rank, value in enumerate(first.on_ranks) if not agrees(first.want.value, value, first.floor)]
    if not wrong or {rank // size for rank in wrong} != {wrong[0] // size}:
        return
    for a, b in combinations(range(layout.micro_batches), 2):
        if all(agrees(_exchanged(first.want.value, layout.sequences(rank), a, b), first.on_ranks[rank]) for rank in wrong):
            yield Cause(
                "message_swapped",
                f"{first.name}: pipeline rank {wrong[0] // size} has micro-batches {a} and {b} in each other's place: two "
                "messages are taken for each other",
            )


def _exchanged(value: Tensor, micro_batches: Sequence[range], a: int, b: int) -> Tensor:
    """The sequences of two micro-batches in each other's place."""
    out = value.clone()
    here, there = list(micro_batches[a]), list(micro_batches[b])
    out[here], out[there] = value[there], value[here]
    return out


def divided(evidence: Evidence) -> Iterator[Cause]:
    """All gradients, by the number of micro-batches."""
    wrong, number = evidence.wrong("gradient"), evidence.layout.micro_batches
    if evidence.layout.pp == 1 or number == 1 or any(p.equal and not p.is_nothing for p in evidence.all("gradient")):
        return
    factor = common_factor(wrong)
    if factor is not None and abs(factor * number - 1) < 1e-8:
        yield Cause(
            "divided_by_micro_batches",
            f"all gradients ({len(wrong)} tensors) are {number} times too small: losses are divided by the number of tokens of "
            "the step, and then by that of its micro-batches, too",
        )


def weights_cell(evidence: Evidence) -> Iterator[Cause]:
    """Weights of one stage lack what one micro-batch of each data-parallel rank adds to them."""
    units, wrong, layout = evidence.reference.unit_gradients, evidence.wrong("gradient"), evidence.layout
    if layout.pp == 1 or evidence.step or not units or not wrong:
        return
    job = _job(evidence)
    if not any(cell.work is Work.WEIGHT_GRADIENTS for rank in range(job.ranks) for _, cell in job.pipeline.cells(rank)):
        return
    ranks = [rank for rank in range(job.ranks) if {p.name for p in wrong} <= _names(evidence, [rank])]
    for m in range(layout.micro_batches if ranks else 0):
        chosen = [place * layout.micro_batches + m for place in range(layout.readers)]
        if all(close(p.want.value - units[p.name][chosen].sum((0, 1)), p.got.value, p.floor) for p in wrong):
            yield Cause(
                "weights_cell_left_out",
                f"gradients of {counted(wrong)} lack micro-batch {m} of {layout.micro_batches}: a cell W of pipeline rank "
                f"{ranks[0]} is left out",
            )


def balance_unseeded(evidence: Evidence) -> Iterator[Cause]:
    """Gradients lack those of the balance losses of all stages but the one that has the main loss."""
    layout, router = evidence.layout, evidence.config.router
    if layout.pp == 1 or not router.balance_loss or router.group == "global":
        return
    job = _job(evidence)
    layers = {layer for rank in range(job.ranks) if not job.held(rank).last for layer in job.held(rank).layers}
    missing = _of_balance(evidence, layers)
    pairs = evidence.all("gradient")
    if missing and all(close(p.want.value - missing[p.name], p.got.value, p.floor) for p in pairs):
        yield Cause(
            "balance_of_first_stages_unseeded",
            f"gradients of {counted(evidence.wrong('gradient'))} lack those of the balance losses of layers "
            f"{', '.join(map(str, sorted(layers)))}: pipeline ranks that don't have the main loss start no backward of theirs",
        )


def embedding_apart(evidence: Evidence) -> Iterator[Cause]:
    """Each stage that holds the embedding has its own part of its gradient."""
    wrong = evidence.wrong("gradient")
    if evidence.layout.pp == 1 or [p.name for p in wrong] != ["embedding"] or len(_job(evidence).words_ranks) == 1:
        return
    (pair,) = wrong
    parts = [merged(_of_stage(evidence, pair, rank), pair.floor) for rank in _job(evidence).words_ranks]
    if all(part is not None for part in parts):
        whole = total([part for part in parts if part is not None])
        if held(whole).all() and close(pair.want.value, whole, pair.floor):
            yield Cause(
                "embedding_summed_by_stages",
                f"pipeline ranks {' and '.join(map(str, _job(evidence).words_ranks))} hold the embedding, and each has the "
                "gradient of its own use of it alone: nobody sums them",
            )


def norm_of_stages(evidence: Evidence) -> Iterator[Cause]:
    """Ranks have the norm of their own stage."""
    pair, layout = evidence.pair("norm", "grad_norm"), evidence.layout
    if layout.pp == 1:
        return
    stage, job = layout.world // layout.pp, _job(evidence)
    gradients = {p.name: p for p in evidence.all("gradient")}
    squares = {name: p.want.value.square().sum() for name, p in gradients.items()}
    for rank, value in enumerate(pair.on_ranks):
        own = {name: squares[name] for name in _names(evidence, [rank // stage])}
        if "embedding" in own and len(job.words_ranks) > 1:  # a share of what other stages hold, too
            shards = [of.nan_to_num().square().sum() for of in _of_stage(evidence, gradients["embedding"], rank // stage)]
            own["embedding"] = sum(shards, torch.zeros(())) if layout.zero else squares["embedding"] / len(job.words_ranks)
        if not close(torch.as_tensor(sum(own.values())).sqrt(), value):
            return
    norms = ", ".join(f"{v.item():.6g}" for v in pair.on_ranks[::stage])
    yield Cause(
        "norm_of_own_stage",
        f"pipeline ranks have norms of their own ({norms}) instead of {pair.want.value:.6g}: the squares of a stage's gradients "
        "are not summed over the stages",
    )


def _job(evidence: Evidence) -> Pipelined:
    return pipelined(evidence.config, evidence.layout.world)


def _names(evidence: Evidence, ranks: Collection[int]) -> set[str]:
    """Of the parameters on these pipeline ranks."""
    out = set()
    for part in map(_job(evidence).held, ranks):
        for name in evidence.specs:
            head, _, rest = name.partition(".")
            own = int(rest.partition(".")[0]) in part.layers if head == "layers" else part.has(head)
            out |= {name} if own else set()
    return out


def _of_stage(evidence: Evidence, pair: Pair, rank: int) -> list[Tensor]:
    size = evidence.layout.world // evidence.layout.pp
    return pair.on_ranks[rank * size : (rank + 1) * size]


def _of_balance(evidence: Evidence, layers: Collection[int]) -> dict[str, Tensor]:
    """The gradients of these layers' balance losses."""
    gpt, batch = evidence.model, evidence.batch
    parameters = dict(gpt.named_parameters())
    places = [i for i, layer in enumerate(gpt.moe_layers) if layer in layers]
    parts = [forward(gpt, part) for part in batch.split(evidence.layout.micro_batch)]
    weight = evidence.config.router.balance_loss / int(batch.valid_BS.sum())
    loss = sum((part.routed[i].losses[0] for part in parts for i in places), torch.zeros((), dtype=torch.float64)) * weight
    if not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: (torch.zeros_like(p) if g is None else g).reshape(evidence.specs[name].shape)
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }
