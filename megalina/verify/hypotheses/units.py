"""Hypotheses about which micro-batches and which losses a gradient is of.

The reference knows the gradient of every unit (a micro-batch) and term (main, balance, z loss) apart.  What an error leaves
out, counts twice or sums over too few ranks is then a sum of units with small whole numbers.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megalina.verify.evidence import Cause, Evidence, Pair, close, counted, held
from megalina.verify.recording import NODES, terms_of

MAIN, BALANCE, Z = range(3)


def terms(evidence: Evidence) -> Iterator[Cause]:
    """The gradient of one loss is missing, or is a number of times too large."""
    units = _units(evidence)
    if units is None:
        return
    names = {MAIN: ("", "the main loss"), BALANCE: ("balance_loss_without_gradient", "the balance loss")}
    names[Z] = ("z_loss_without_gradient", "the router's z-loss")
    known, ranks = terms_of(evidence.model.blocks), evidence.layout.dp
    if "mtp_loss" in known:
        names[known.index("mtp_loss")] = ("", "the loss of multi-token prediction")
    for term, (name, text) in names.items():
        times = _times(evidence, {p: u[:, term].sum(0) for p, u in units.items()})
        if times is not None and known[term] == "mtp_loss" and ranks > 1 and abs(times * ranks - 1) < 1e-6:
            yield Cause(
                "mtp_loss_divided_twice", f"the gradient of {text} is divided by the {ranks} data-parallel ranks once more"
            )
        elif times is not None and abs(times) < 1e-6 and name:
            yield Cause(name, f"{text} is right, but has no gradient: every gradient is that of the other losses")
        elif times is not None:
            yield Cause("unknown", f"the gradient of {text} is {times:.6g} times as large as it should be")


def micro_batches(evidence: Evidence) -> Iterator[Cause]:
    """A micro-batch of each rank is missing from all gradients, or is counted twice."""
    units, layout = _units(evidence), evidence.layout
    if units is None or layout.micro_batches == 1:
        return
    for m in range(layout.micro_batches):
        chosen = [_unit(evidence, place, m) for place in range(layout.readers)]
        times = _times(evidence, {p: u[chosen].sum((0, 1)) for p, u in units.items()})
        if times is None:
            continue
        text = f"micro-batch {m} of the {layout.micro_batches} of each rank"
        if abs(times) < 1e-6 and m == layout.micro_batches - 1:
            yield Cause("last_micro_batch_dropped", f"{text}, the last, is in no gradient")
        elif abs(times - 2) < 1e-6:
            yield Cause("micro_batch_counted_twice", f"{text} is counted twice in all gradients")
        else:
            yield Cause("unknown", f"{text} counts {round(times, 6) + 0.0:.6g} times in all gradients")


def padding_in_divisor(evidence: Evidence) -> Iterator[Cause]:
    """The main loss and the others are divided by numbers of tokens that count padding."""
    units = _units(evidence)
    if units is None or not all(p.copies_agree for p in evidence.all("gradient")):
        return
    of_tokens, of_routers = _terms_by_divisor(evidence)
    main = _flat({p: u[:, of_tokens].sum((0, 1)) for p, u in units.items()})
    other = _flat({p: u[:, of_routers].sum((0, 1)) for p, u in units.items()})
    got = _flat({p.name: p.got.value for p in evidence.all("gradient")})
    if not got.isfinite().all():
        return
    basis = torch.stack([main, other] if other.any() else [main], 1)
    factors = torch.linalg.lstsq(basis, got[:, None]).solution[:, 0]
    if not factors.all() or not close(basis @ factors, got):
        return
    batch = evidence.batch
    tokens, valid, padding = int(batch.loss_mask_BS.sum()), int(batch.valid_BS.sum()), int((~batch.valid_BS).sum())
    allowed = ([tokens, tokens + padding, batch.valid_BS.numel()], [valid, valid + padding])
    counts = [n / f for n, f in zip((tokens, valid), factors.tolist())]
    if padding and all(any(abs(c - a) < 1e-6 * a for a in some) for c, some in zip(counts, allowed)):
        yield Cause(
            "padding_counted",
            f"gradients are those of losses divided by {' and '.join(f'{c:.0f}' for c in counts)} tokens, not by "
            f"{' and '.join(str(n) for n in (tokens, valid)[: len(counts)])}: {padding} positions of padding are counted",
        )


def router_without_main_loss(evidence: Evidence) -> Iterator[Cause]:
    """From the last layer down, the first gradient that differs is a router's, and it is that of the auxiliary losses alone.

    With multi-token prediction that of the last norm comes before it, through which layers go that have a router of their own."""
    first, units, model = evidence.first, _units(evidence), evidence.model
    if first is None or units is None or not model.moe_layers:
        return
    if model.mtp_layers and first.name.startswith("final_norm."):
        first = evidence.pair("gradient", f"layers.{model.moe_layers[-1]}.router.weight")
    if first.name != f"layers.{model.moe_layers[-1]}.router.weight" or not first.copies_agree:
        return
    _, of_routers = _terms_by_divisor(evidence)
    if close(units[first.name][:, of_routers].sum((0, 1)), first.got.value, first.floor):
        yield Cause(
            "router_detached",
            f"the gradient of {first.name} is that of its auxiliary losses alone, and what lies below differs too: the main loss "
            "has no gradient through the combine weights",
        )


def reduced_early(evidence: Evidence) -> Iterator[Cause]:
    """Ranks share the first micro-batches' gradients, and each keeps its own of the later ones (or shares none at all)."""
    wrong, units, layout = evidence.wrong("gradient"), _units(evidence), evidence.layout
    if units is None or layout.world == 1 or layout.cp > 1 or not wrong:  # a unit is of whole sequences
        return
    for shared in range(layout.micro_batches):
        if not all(_is_early(evidence, pair, units[pair.name], shared) for pair in wrong):
            continue
        text = f"gradients of {counted(wrong)}"
        if shared:
            yield Cause(
                "bucket_reduced_early",
                f"{text} are summed over the ranks after {shared} of {layout.micro_batches} micro-batches: "
                "of the later ones each rank has only its own",
            )
        elif all(evidence.is_expert(p.name) for p in wrong):
            yield Cause(
                "expert_gradient_not_reduced", f"{text} are each rank's own: they are not summed over the experts' copies"
            )
        else:
            yield Cause("unknown", f"{text} are each rank's own: they are not summed over the data-parallel ranks")


def nodes_not_summed(evidence: Evidence) -> Iterator[Cause]:
    """Each rank has the sum of its own node's ranks."""
    wrong, units, layout = evidence.wrong("gradient"), _units(evidence), evidence.layout
    if layout.reduce != "by_node" or units is None or not wrong or layout.world != layout.dp or layout.cp > 1:
        return
    per_node = layout.world // NODES
    for pair in wrong:
        by_unit = units[pair.name].sum(1)
        for rank, value in enumerate(pair.on_ranks):
            node = range(rank // per_node * per_node, (rank // per_node + 1) * per_node)
            own = by_unit[[_unit(evidence, place, m) for place in node for m in range(layout.micro_batches)]].sum(0)
            if not close(own.where(held(value), 0.0), value.where(held(value), 0.0), pair.floor):
                return
    yield Cause(
        "nodes_not_summed",
        f"gradients of {counted(wrong)} are the sums of each node's {per_node} ranks: they are not summed over nodes",
    )


def _is_early(evidence: Evidence, pair: Pair, units: Tensor, shared: int) -> bool:
    """Whether each rank has the sum over all ranks of the first `shared` micro-batches, and its own of the others.

    What is copied over tp has a part of its own gradient on each tp rank, so their sum is compared.
    """
    layout, expert = evidence.layout, evidence.is_expert(pair.name)
    by_unit = units.sum(1)
    early = by_unit[[_unit(evidence, place, m) for place in range(layout.dp) for m in range(shared)]].sum(0)
    cut = evidence.is_cut(pair.name) or layout.tp == 1
    for row in [[r] for r in range(layout.world)] if cut else evidence.rows["tp"]:
        place = row[0] % (layout.world // layout.pp) // layout.tp
        first = place // layout.ep * layout.ep
        own = range(first, first + layout.ep) if expert else [place]  # rows come to an expert from its whole ep row
        late = by_unit[[_unit(evidence, p, m) for p in own for m in range(shared, layout.micro_batches)]].sum(0)
        value = torch.stack([pair.on_ranks[r] for r in row]).sum(0)
        here = held(value)
        if not any(held(pair.on_ranks[r]).any() for r in row):
            continue  # of a ZeRO-1 shard it may have nothing
        if not here.any() or not close((len(row) * early + late).where(here, 0.0), value.where(here, 0.0), pair.floor):
            return False
    return True


def _terms_by_divisor(evidence: Evidence) -> tuple[list[int], list[int]]:
    """The losses over labels, and those of routers."""
    known = enumerate(terms_of(evidence.model.blocks))
    places = {i: name in ("loss", "mtp_loss") for i, name in known}
    return [i for i, of_labels in places.items() if of_labels], [i for i, of_labels in places.items() if not of_labels]


def _unit(evidence: Evidence, place: int, micro_batch: int) -> int:
    """The unit that is a data-parallel rank's micro-batch."""
    return place * evidence.layout.micro_batches + micro_batch


def _units(evidence: Evidence) -> dict[str, Tensor] | None:
    """They are of the first step."""
    return evidence.reference.unit_gradients if evidence.step == 0 and evidence.reference.unit_gradients else None


def _flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten() for name in sorted(values)])


def _times(evidence: Evidence, part: dict[str, Tensor]) -> float | None:
    """How often a part of all gradients is in them, if that alone is their difference: 1 if it is right."""
    pairs = evidence.all("gradient")
    direction = _flat({p.name: part[p.name] for p in pairs})
    if not direction.any() or not all(p.copies_agree for p in pairs):
        return None
    want = _flat({p.name: p.want.value for p in pairs})
    got = _flat({p.name: p.got.value for p in pairs})
    times = torch.dot(got - want, direction) / torch.dot(direction, direction)
    more = times * direction
    explained = close(want + more, got) and close(more, got - want, tolerance=1e-6)
    return round(1 + times.item(), 7) if explained else None
