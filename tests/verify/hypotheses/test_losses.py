"""Causes of wrong losses and of a wrong norm, each with a near miss that is not named."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megalina.verify.recording import Layout, Recording
from tests.verify.changed_recording import (
    EDP,
    TP,
    WIDE,
    Change,
    diagnosed,
    first_step,
    only,
    reference_of,
    units_of,
)

GLOBAL = Layout(4, tp=2, ep=1, micro_batch=4)


def divided(tokens: Callable[[int, int], float]) -> Change:
    """Losses whose number of tokens counts more than it should: (tokens, padding) -> number."""
    batch = reference_of("plain", TP).batches[0]
    padding = int((~batch.valid_BS).sum())
    counts = {"loss": int(batch.loss_mask_BS.sum())} | dict.fromkeys(("balance_loss", "z_loss"), int(batch.valid_BS.sum()))
    return first_step("loss", lambda e: e.value * counts[e.name] / tokens(counts[e.name], padding) if e.name in counts else None)


def test_a_divisor_with_padding_is_named() -> None:
    assert diagnosed("plain", TP, divided(lambda tokens, padding: tokens + padding)).named == "padding_counted"


def test_a_divisor_with_half_of_the_padding_is_not() -> None:
    assert diagnosed("plain", TP, divided(lambda tokens, padding: tokens + padding / 2)).named == "unknown"


def test_gradients_with_padding_in_their_divisor_are_named_too() -> None:
    units, batch = units_of(TP), reference_of("plain", TP).batches[0]
    main, other = (int(m.sum()) / batch.valid_BS.numel() for m in (batch.loss_mask_BS, batch.valid_BS))
    shares = torch.tensor([main, other, other], dtype=torch.float64)
    told = diagnosed("plain", TP, first_step("gradient", lambda e: torch.tensordot(shares, units[e.name].sum(0), 1)))
    assert told.named == "padding_counted"


def balance_of_ranks(name: str, layout: Layout, scale: float) -> Change:
    """Each rank's balance loss by the formula, over its tokens alone."""
    reference = reference_of(name, layout)
    valid_T = reference.batches[0].valid_BS.flatten()
    losses = []
    for layer in range(2):
        prob_TE = reference.entry(0, "activation", f"layers.{layer}.logits").value.flatten(0, 1).softmax(1)
        choice_TK = reference.entry(0, "routing", f"layers.{layer}.expert").value.flatten(0, 1)
        total = 0.0
        for rank in range(layout.world):  # one micro-batch a rank: its tokens are contiguous
            own = slice(rank * len(valid_T) // layout.world, (rank + 1) * len(valid_T) // layout.world)
            counts = F.one_hot(choice_TK[own][valid_T[own]], 4).sum((0, 1)).double()
            probs = prob_TE[own][valid_T[own]].sum(0)
            total += 4 / 2 * float(counts @ probs) / int(valid_T[own].sum())
        losses.append(total / int(valid_T.sum()))
    return only(0, "loss", "balance_loss", torch.tensor(sum(losses) / 2 * scale, dtype=torch.float64))


def test_a_balance_loss_of_each_ranks_own_tokens_is_named() -> None:
    assert diagnosed("global", GLOBAL, balance_of_ranks("global", GLOBAL, 1.0)).named == "balance_loss_per_rank"


def test_nearly_that_balance_loss_is_not() -> None:
    assert diagnosed("global", GLOBAL, balance_of_ranks("global", GLOBAL, 1.00001)).named == "unknown"


def information_of_ranks(scale: float) -> Change:
    """Each tp rank's mutual information loss by the definition, over its own tokens of a micro-batch alone."""
    reference = reference_of("dense", TP)
    valid_T = reference.batches[0].valid_BS.flatten()
    total = 0.0
    for layer in range(2):
        prob_TE = reference.entry(0, "activation", f"layers.{layer}.logits").value.flatten(0, 1).softmax(1)
        for own in torch.arange(len(valid_T)).chunk(16):  # 8 micro-batches of a sequence, each on two ranks
            prob_tE = prob_TE[own][valid_T[own]]
            mean_E = prob_tE.mean(0)
            entropy = -(prob_tE * prob_tE.log()).sum(1).mean()
            total += len(prob_tE) * float(entropy + (mean_E * mean_E.log()).sum()) if len(prob_tE) else 0.0
    value = torch.tensor(scale * total / (2 * int(valid_T.sum())), dtype=torch.float64)
    return only(0, "loss", "mutual_information_loss", value)


def test_mutual_information_of_each_ranks_own_tokens_is_named() -> None:
    assert diagnosed("dense", TP, information_of_ranks(1.0)).named == "mutual_information_per_rank"


def test_nearly_that_mutual_information_is_not() -> None:
    assert diagnosed("dense", TP, information_of_ranks(1.00001)).named == "unknown"


def norm_of(keep: Callable[[str], bool], reference: Recording) -> Tensor:
    return torch.stack(
        [e.value.square().sum() for e in reference.entries if (e.step, e.kind) == (0, "gradient") and keep(e.name)]
    )


def test_a_norm_without_experts_is_named() -> None:
    norm = norm_of(lambda n: ".experts." not in n, reference_of("plain", TP)).sum().sqrt()
    assert diagnosed("plain", TP, only(0, "norm", "grad_norm", norm)).named == "norm_without_experts"


def test_a_norm_without_one_layers_experts_is_not() -> None:
    norm = norm_of(lambda n: "layers.1.experts." not in n, reference_of("plain", TP)).sum().sqrt()
    assert diagnosed("plain", TP, only(0, "norm", "grad_norm", norm)).named == "unknown"


def test_experts_counted_once_for_each_copy_are_said() -> None:
    reference = reference_of("plain", WIDE)
    others, experts = (norm_of(lambda n, e=e: (".experts." in n) == e, reference).sum() for e in (False, True))  # type: ignore[misc]
    told = diagnosed("plain", WIDE, only(0, "norm", "grad_norm", (others + 8 * experts).sqrt()))
    assert told.named == "unknown"
    assert "experts: counted 8 = " in told.sentence


def own_norms(share: float) -> list[Tensor]:
    """Of EDP's ranks: what is copied, and half of the experts."""
    reference = reference_of("plain", EDP)
    copied = norm_of(lambda n: ".experts." not in n, reference).sum()
    experts = [e.value for e in reference.entries if (e.step, e.kind) == (0, "gradient") and ".experts." in e.name]
    half = [torch.stack([e.chunk(2)[i].square().sum() for e in experts]).sum() for i in range(2)]
    return [(copied + half[rank % 2] * share).sqrt() for rank in range(4)]


def test_norms_of_what_each_rank_holds_are_named() -> None:
    assert diagnosed("plain", EDP, only(0, "norm", "grad_norm", own_norms(1.0))).named == "norm_per_rank"


def test_norms_that_differ_otherwise_are_not() -> None:
    assert diagnosed("plain", EDP, only(0, "norm", "grad_norm", own_norms(0.9))).named == "unknown"
