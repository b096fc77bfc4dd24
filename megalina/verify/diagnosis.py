"""The diagnosis: why a layout's numbers differ from one process's, as far as the numbers themselves tell.

A set of hypotheses, each of which must give the recorded numbers to nine digits before its cause is named.  Those are asked
that fit the kind of the first quantity, in the order of computation, that differs: all before it is right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megalina.verify.evidence import Cause, Evidence, Hypothesis
from megalina.verify.hypotheses import (
    attention,
    deferred,
    dense_experts,
    losses,
    norms,
    pipelines,
    reductions,
    regrouping,
    replay,
    residuals,
    routing,
    scales,
    sent_once,
    sequences,
    units,
    vocabulary,
    weights,
    whole_matrices,
)
from megalina.verify.recording import INITIAL, Recording

UNKNOWN = "unknown"
HYPOTHESES: Mapping[str, Sequence[Hypothesis]] = {  # the most specific first
    "activation": (
        pipelines.message_swapped,
        sequences.last_micro_batch_missing,
        vocabulary.embedding_of_first_words,
        residuals.bias_on_each_rank,
        attention.other_pairs,
        attention.norm_of_own_heads,
        attention.another_window,
        attention.no_sinks,
        attention.out_of_order,
        attention.another_piece,
        regrouping.rows_in_arrival_order,
        dense_experts.left_out,
        sent_once.counted_otherwise,
        replay.scores_zeroed,
        residuals.noise_of_each_rank,
    ),
    "routing": (
        routing.capacity_of_pieces,
        routing.capacity_of_parts,
        routing.groups_by_other_rule,
        replay.of_places,
        replay.shifted,
        routing.load_counted_again,
    ),
    "loss": (
        losses.padding,
        losses.balance_of_pieces,
        losses.information_of_pieces,
        losses.homes_of_ranks,
        losses.ahead_of_other_documents,
        losses.first_words_in_head,
    ),
    "gradient": (
        deferred.not_once,
        pipelines.divided,
        pipelines.weights_cell,
        pipelines.balance_unseeded,
        pipelines.embedding_apart,
        units.terms,
        units.micro_batches,
        units.router_without_main_loss,
        scales.experts_scaled,
        scales.all_scaled,
        reductions.copied_over_tp,
        reductions.experts_over_other_ranks,
        units.nodes_not_summed,
        units.reduced_early,
        units.padding_in_divisor,
        scales.group_scaled,
        reductions.copies_disagree,
    ),
    "norm": (pipelines.norm_of_stages, norms.without_experts, norms.of_each_rank, norms.counted_often),
    "weight": (
        whole_matrices.experts_flattened,
        whole_matrices.cut_by_shards,
        whole_matrices.clip_of_each_rank,
        weights.old_weights,
        weights.decay_on_everything,
    ),
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`named`: "" where nothing differs, "unknown" where no cause explains the difference, else the cause's name."""

    named: str
    sentence: str  # for people
    candidates: tuple[Cause, ...] = ()  # all that explains it, the named cause first, then what can be said without a cause


def diagnose(reference: Recording, layout: Recording) -> Diagnosis:
    """Pure: it reads the two recordings.  `reference.unit_gradients` should be filled for this layout where a gradient
    differs: without them fewer causes are known."""
    evidence = Evidence(reference, layout)
    if evidence.first is None:
        return Diagnosis("", "nothing differs by more than rounding")
    want = evidence.first.want
    if want.step == INITIAL:
        return Diagnosis(UNKNOWN, f"the initial value of {want.name} differs: ranks start from other weights")
    causes = [cause for hypothesis in HYPOTHESES[want.kind] for cause in hypothesis(evidence)]
    named = list({c.name: c for c in reversed(causes) if c.name != UNKNOWN}.values())[::-1]
    causes = named + [c for c in causes if c.name == UNKNOWN]
    if causes:
        return Diagnosis(causes[0].name, causes[0].sentence, tuple(causes))
    return Diagnosis(
        UNKNOWN, f"{want.kind} {want.name} of step {want.step} is the first that differs; no known cause explains it"
    )
