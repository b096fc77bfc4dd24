"""Hypotheses about weights that are updated as whole matrices, and about QK-clip; gradients and the norm are right.

E experts, R rows, C columns, G groups of heads.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megalina.blocks.optimizers import optimizer_of
from megalina.verify.evidence import Cause, Evidence, Pair, agrees, close, counted
from megalina.verify.muon_by_hand import direction, largest_logits
from megalina.verify.recording import stream_name


def experts_flattened(evidence: Evidence) -> Iterator[Cause]:
    """The experts of a rank, a row each, are one matrix."""
    wrong = _wrong_matrices(evidence)
    if not wrong or not all(evidence.is_expert(p.name) for p in wrong):
        return
    for pair in wrong:
        blocks = _pursued(evidence, pair.name).chunk(evidence.layout.ep)
        found = [direction(evidence.config.optim, block.flatten(1)).view(block.shape) for block in blocks]
        if not close(_updated(evidence, pair.name, torch.cat(found)), pair.got.value):
            return
    yield Cause(
        "experts_flattened",
        f"{counted(wrong)}: all experts of a rank are made orthogonal as one matrix, a row of {wrong[0].want.value[0].numel()} "
        "numbers each; an expert's matrices must be made orthogonal by themselves",
    )


def cut_by_shards(evidence: Evidence) -> Iterator[Cause]:
    """Two runs of rows of a matrix, each made orthogonal by itself."""
    wrong = _wrong_matrices(evidence)
    if evidence.layout.zero != 1 or not wrong:
        return
    for pair in wrong:
        stacked, columns = evidence.specs[pair.name].stacked, pair.want.value.shape[-1]
        rows = pair.want.value.shape[-2] // stacked
        shape = (-1, rows, columns)
        want, got = pair.want.value.reshape(shape), pair.got.value.reshape(shape)
        pursued, old = _pursued(evidence, pair.name).reshape(shape), _old(evidence, pair.name).reshape(shape)
        for w, g, n, o in zip(want, got, pursued, old, strict=True):
            if not close(w, g) and not any(close(_moved(evidence, o, _apart(evidence, n, r)), g) for r in range(1, rows)):
                return
    yield Cause(
        "matrix_cut_by_shard",
        f"{counted(wrong)}: two runs of rows of a matrix are made orthogonal each by itself: a ZeRO-1 shard ends inside of it",
    )


def clip_of_each_rank(evidence: Evidence) -> Iterator[Cause]:
    """Rows are scaled by the largest logit of some data-parallel rank's sequences, not of all."""
    optim, layout, wrong = evidence.config.optim, evidence.layout, evidence.wrong("weight")
    if not optimizer_of(optim).clips_heads or layout.cp > 1 or not wrong or not all(evidence.specs[p.name].clip for p in wrong):
        return
    powers = {"q": optim.qk_clip_alpha, "k": 1 - optim.qk_clip_alpha, "both": 1.0, "none": 0.0}
    for pair in wrong:
        logit_BG = _logits(evidence, int(pair.name.split(".")[1]))
        own_RG = logit_BG.view(layout.dp, -1, logit_BG.shape[1]).amax(dim=1)  # sequences lie rank after rank
        factor_RG, factor_G = (optim.qk_clip / x.clamp(min=optim.qk_clip) for x in (own_RG, logit_BG.amax(dim=0)))
        pattern = evidence.specs[pair.name].clip
        predicted = []
        for ratio_G in factor_RG / factor_G:
            rows = torch.cat([ratio_G.pow(powers[how]).expand(n, -1) for n, how in pattern]).T.reshape(-1)
            predicted.append(pair.want.value * rows.view(-1, *[1] * (pair.want.value.dim() - 1)))
        if not all(any(agrees(p, value) for p in predicted) for value in pair.on_ranks):
            return
    yield Cause(
        "qk_clip_per_rank",
        f"{counted(wrong)}: queries and keys are scaled by the largest logit of one data-parallel rank's sequences, of "
        f"{layout.dp}, not of the whole batch",
    )


def _wrong_matrices(evidence: Evidence) -> list[Pair]:
    """[] unless all weights that are wrong are updated as whole matrices, and nothing else is done with them."""
    optim, wrong = evidence.config.optim, evidence.wrong("weight")
    whole = all(optimizer_of(optim).takes_whole(evidence.specs[p.name], optim) for p in wrong)
    return wrong if whole and optim.muon_tp == "gather" and not optimizer_of(optim).clips_heads else []


def _pursued(evidence: Evidence, name: str) -> Tensor:
    """What directions are made of in the step of the first difference."""
    optim, reference = evidence.config.optim, evidence.reference
    momentum = gradient = torch.zeros_like(_old(evidence, name))
    for step in range(evidence.step + 1):
        scale = reference.entry(step, "norm", "grad_scale").value.item()
        gradient = reference.entry(step, "gradient", name).value * scale
        momentum = optim.muon_momentum * momentum + gradient
    return gradient + optim.muon_momentum * momentum if optim.muon_nesterov else momentum


def _old(evidence: Evidence, name: str) -> Tensor:
    return evidence.reference.entry(evidence.step - 1, "weight", name).value


def _updated(evidence: Evidence, name: str, found: Tensor) -> Tensor:
    return _moved(evidence, _old(evidence, name), found)


def _moved(evidence: Evidence, old: Tensor, found: Tensor) -> Tensor:
    optim = evidence.config.optim
    return old * (1 - optim.lr * optim.weight_decay) - optim.lr * found


def _apart(evidence: Evidence, pursued_RC: Tensor, row: int) -> Tensor:
    optim = evidence.config.optim
    return torch.cat([direction(optim, pursued_RC[:row]), direction(optim, pursued_RC[row:])])


def _logits(evidence: Evidence, layer: int) -> Tensor:
    """[B, G]: the largest of each sequence."""
    own = evidence.model.layers[layer]
    before = f"layers.{layer - 1}" if layer else "embedded"
    if place := own.stream.index("attention"):
        before = stream_name(evidence.model.blocks, layer, own.stream[place - 1])
    x_TD = evidence.pair("activation", before).want.value.flatten(0, 1)
    logit_BH = largest_logits(own, x_TD, evidence.batch)
    return logit_BH.view(len(logit_BH), evidence.config.model.num_kv_heads, -1).amax(dim=2)
