"""Causes of wrong gradients, each with a near miss that is not named."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megalina.verify.recording import Entry
from tests.verify.changed_recording import EDP, TP, WIDE, Change, diagnosed, first_step, units_of


@pytest.mark.parametrize("factor", [4.0, 0.25])
def test_expert_gradients_times_edp_are_named_with_the_number(factor: float) -> None:
    told = diagnosed("plain", WIDE, first_step("gradient", lambda e: e.value * factor if ".experts." in e.name else None))
    assert told.named == "experts_scaled_by_edp"
    assert "4 = edp times too " + ("large" if factor > 1 else "small") in told.sentence


@pytest.mark.parametrize("factor", [2.0, 3.0, 4.0001])
def test_expert_gradients_times_another_number_are_not_edps(factor: float) -> None:
    told = diagnosed("plain", WIDE, first_step("gradient", lambda e: e.value * factor if ".experts." in e.name else None))
    assert told.named == "unknown"
    assert f"{factor:g}" in told.sentence


def test_expert_gradients_of_one_layer_alone_are_scaled_too() -> None:
    told = diagnosed("plain", EDP, first_step("gradient", lambda e: e.value * 2 if e.name == "layers.1.experts.w1" else None))
    assert told.named == "experts_scaled_by_edp"
    assert any("= ep" in c.sentence for c in told.candidates[1:]), "edp and ep are 2 here, and that should be said"


def test_one_expert_tensor_by_another_number_is_no_common_factor() -> None:
    factors = {"layers.1.experts.w1": 2.0, "layers.1.experts.w2": 2.001}
    told = diagnosed("plain", EDP, first_step("gradient", lambda e: e.value * factors.get(e.name, 1.0)))
    assert told.named == "unknown"


def test_all_gradients_over_dp_are_named() -> None:
    assert diagnosed("plain", EDP, first_step("gradient", lambda e: e.value / 4)).named == "divided_by_dp_twice"


@pytest.mark.parametrize("factor", [4.0, 1 / 3, 1 / 2])
def test_all_gradients_by_another_number_are_not_dps(factor: float) -> None:
    assert diagnosed("plain", EDP, first_step("gradient", lambda e: e.value * factor)).named == "unknown"


def test_all_gradients_but_one_over_dp_are_not_all() -> None:
    told = diagnosed("plain", EDP, first_step("gradient", lambda e: e.value / 4 if e.name != "embedding" else None))
    assert told.named == "unknown"


# gradients of some micro-batches and some losses
def test_a_missing_last_micro_batch_is_named() -> None:
    units = units_of(TP)
    told = diagnosed("plain", TP, first_step("gradient", lambda e: units[e.name][[0, 1, 2, 4, 5, 6]].sum((0, 1))))
    assert told.named == "last_micro_batch_dropped"


def test_the_last_micro_batch_of_one_rank_alone_is_not_that_of_all() -> None:
    units = units_of(TP)
    told = diagnosed("plain", TP, first_step("gradient", lambda e: units[e.name][:7].sum((0, 1))))
    assert told.named == "unknown"


def test_another_missing_micro_batch_is_said_but_not_the_last() -> None:
    units = units_of(TP)
    told = diagnosed("plain", TP, first_step("gradient", lambda e: e.value - units[e.name][[1, 5]].sum((0, 1))))
    assert told.named == "unknown"
    assert "micro-batch 1 of the 4 of each rank counts 0 times" in told.sentence


def test_a_micro_batch_counted_twice_is_named() -> None:
    units = units_of(EDP)
    told = diagnosed("plain", EDP, first_step("gradient", lambda e: e.value + units[e.name][::2].sum((0, 1))))
    assert told.named == "micro_batch_counted_twice"


def test_sequences_that_are_never_computed_are_a_dropped_micro_batch() -> None:
    def holes(e: Entry) -> Tensor | None:
        return e.value.index_fill(0, torch.tensor([3, 7]), float("nan")) if e.kind == "activation" else None

    assert diagnosed("plain", TP, holes).named == "last_micro_batch_dropped"


@pytest.mark.parametrize(("term", "name"), [(1, "balance_loss_without_gradient"), (2, "z_loss_without_gradient")])
def test_an_auxiliary_loss_without_gradient_is_named(term: int, name: str) -> None:
    units = units_of(TP)
    told = diagnosed("plain", TP, first_step("gradient", lambda e: e.value - units[e.name][:, term].sum(0)))
    assert told.named == name


def test_half_of_the_z_losss_gradient_is_not_none_of_it() -> None:
    units = units_of(TP)
    told = diagnosed("plain", TP, first_step("gradient", lambda e: e.value - units[e.name][:, 2].sum(0) / 2))
    assert told.named == "unknown"
    assert "z-loss is 0.5 times" in told.sentence


def detached(aux: float) -> Change:
    """The last router has its auxiliary losses' gradient alone, what lies below something else."""
    units = units_of(TP)

    def change(e: Entry) -> Tensor | None:
        if e.name == "layers.1.router.weight":
            return units[e.name][:, 1:].sum((0, 1)) * aux
        return e.value * 1.1 if e.name.startswith("layers.0") or e.name == "embedding" else None

    return first_step("gradient", change)


def test_a_router_without_the_main_losss_gradient_is_detached() -> None:
    assert diagnosed("plain", TP, detached(1.0)).named == "router_detached"


def test_a_router_with_another_gradient_is_not_detached() -> None:
    assert diagnosed("plain", TP, detached(1.01)).named == "unknown"


def early(e: Entry, share: float = 1.0) -> list[Tensor] | None:
    """Of micro-batch 1 each rank has only its own."""
    if not e.name.startswith("layers.1.attention."):
        return None
    unit = units_of(EDP)[e.name].sum(1)
    return [unit[::2].sum(0) + unit[2 * rank + 1] * share for rank in range(4)]


def test_a_bucket_that_goes_out_before_the_last_micro_batch_is_early() -> None:
    assert diagnosed("plain", EDP, first_step("gradient", early)).named == "bucket_reduced_early"


def test_a_bucket_with_part_of_a_micro_batch_is_not_early() -> None:
    told = diagnosed("plain", EDP, first_step("gradient", lambda e: early(e, 0.9)))
    assert told.named == "unknown"
    assert "ranks that hold the same parameters have different gradients" in told.sentence


def test_an_experts_bucket_keeps_the_micro_batches_of_a_whole_ep_row() -> None:
    """Rows come to an expert from its ep row: of micro-batch 1 a rank has that of both ranks of it."""

    def change(e: Entry) -> list[Tensor] | None:
        if ".experts." not in e.name:
            return None
        unit = units_of(EDP)[e.name].sum(1)
        return [unit[::2].sum(0) + unit[[first + 1, first + 3]].sum(0) for first in (0, 0, 4, 4)]

    assert diagnosed("plain", EDP, first_step("gradient", change)).named == "bucket_reduced_early"


# gradients summed over other ranks
def expert_parts(name: str) -> list[Tensor]:
    """What each rank of EDP would have of all experts, before any sum: rows come to it from its ep row."""
    unit = units_of(EDP)[name].sum(1)
    return [unit[:4].sum(0), unit[:4].sum(0), unit[4:].sum(0), unit[4:].sum(0)]


def test_expert_gradients_that_nobody_sums_are_named() -> None:
    change = first_step("gradient", lambda e: expert_parts(e.name) if ".experts." in e.name else None)
    assert diagnosed("plain", EDP, change).named == "expert_gradient_not_reduced"


def exchanged(e: Entry) -> list[Tensor] | None:
    """Ranks 0 and 1, 2 and 3 sum their different experts."""
    if ".experts." not in e.name:
        return None
    return [sum_of_halves(p) for p in expert_parts(e.name)]


def sum_of_halves(whole: Tensor) -> Tensor:
    half = len(whole) // 2
    return (whole[:half] + whole[half:]).repeat(2, *[1] * (whole.dim() - 1))


def test_expert_gradients_summed_over_other_experts_are_exchanged_groups() -> None:
    assert diagnosed("plain", EDP, first_step("gradient", exchanged)).named == "groups_exchanged"


def test_experts_in_the_wrong_order_are_not_exchanged_groups() -> None:
    told = diagnosed("plain", EDP, first_step("gradient", lambda e: e.value.flip(0) if ".experts." in e.name else None))
    assert told.named == "unknown"


def parts_over_tp(e: Entry, share: float = 0.3) -> list[Tensor] | None:
    return [e.value * (share if rank % 2 else 0.7) for rank in range(4)] if "norm" in e.name else None


def test_norms_whose_parts_sum_over_tp_are_named() -> None:
    assert diagnosed("plain", TP, first_step("gradient", parts_over_tp)).named == "sequence_norm_not_summed"


def test_norms_whose_parts_do_not_sum_over_tp_are_not() -> None:
    assert diagnosed("plain", TP, first_step("gradient", lambda e: parts_over_tp(e, 0.31))).named == "unknown"


def test_parts_over_tp_of_shards_are_found_where_a_rank_holds_them() -> None:
    def change(e: Entry) -> list[Tensor] | None:
        parts = parts_over_tp(e)
        if parts is None:
            return None
        nothing = torch.full_like(e.value, float("nan"))
        return [*parts[:2], nothing, nothing]  # ZeRO-1: data-parallel rank 1 has nothing of these

    assert diagnosed("plain", replace(TP, zero=1), first_step("gradient", change)).named == "sequence_norm_not_summed"


def test_gradients_with_holes_are_not_explained() -> None:
    def change(e: Entry) -> Tensor | None:
        return e.value.index_fill(0, torch.tensor([1]), float("nan")) if ".experts." in e.name else None

    assert diagnosed("plain", EDP, first_step("gradient", change)).named == "unknown"


def test_parts_over_tp_without_sequence_parallelism_are_said_but_not_its_fault() -> None:
    told = diagnosed("plain", replace(TP, sequence=False), first_step("gradient", parts_over_tp))
    assert told.named == "unknown"
    assert "sum over the 2 tp ranks" in told.sentence
