"""Routing trace: which experts each token chose in each MoE layer, as a value and as a file.

The file is an npz without pickles:

    expert_ids      [T, L, K]  unsigned or signed integers; a token's choices in a layer are distinct
    weights         [T, L, K]  float16 or float32, optional: the gate's weight of each choice
    sample_lengths  [S]        integers, sum T, optional: the tokens of each sample (one sequence); without it all are one sample
    num_experts     []         integer, optional: without it the highest id + 1, rounded up to a multiple of 4
    layers          [L]        integers, optional: the model layer of each, rising; without it 0 to L - 1
    name            []         text, optional; without it the file's name
    samples         [S]        integers, optional: the number of each sample since the start of training
    ahead_ids       [T, L, K]  integers, optional: what each router says one layer ahead (`megalina.placement.ahead_ids`)
    tokens          [T]        integers, optional: the token ids; with them a router can replay the choices (docs/router-twin.md)
    positions, documents, logprobs, known    [T], optional, beside tokens: see `megalina.placement.traced_text`

What else is in the file is left alone.  Names of experts that never occur are what `num_experts` is for: models have a multiple
of 4 experts as a rule, so the rounding is right for a trace in which only the last one, two or three were never chosen.

Shapes: T tokens, L MoE layers, K choices a token, E experts, S samples.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megalina.placement.ahead_ids import check_ahead_ids
from megalina.placement.predictors.predictor import Ids
from megalina.placement.traced_text import ARRAYS, TracedText
from megalina.whole_file import whole

Weights = NDArray[np.floating[Any]]
Counts = NDArray[np.int64]

EXPERTS_MULTIPLE = 4  # of which an unknown number of experts is taken to be one
_UNREADABLE = (
    EOFError, KeyError, MemoryError, OSError, OverflowError, RuntimeError, SyntaxError, TypeError, ValueError,
    struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """Tokens in their order, sample after sample.  ValueError, in one line, where the parts don't fit.

    `traced` makes one and fills in what is optional.  The arrays are not copied: leave them as they are."""

    expert_ids_TLK: Ids
    num_experts: int
    sample_lengths_S: Ids
    layers: tuple[int, ...]  # of the model, rising
    weights_TLK: Weights | None = None
    name: str = ""
    ahead_ids_TLK: Ids | None = None
    samples_S: Ids | None = None  # dropped where traces are cut or joined
    text: TracedText | None = None  # as well, and where choices are made up

    def __post_init__(self) -> None:
        where = f"trace {self.name}" if self.name else "trace"
        ids = self.expert_ids_TLK
        if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{where}: expert_ids must be integers [T, L, K], not {ids.dtype} {list(ids.shape)}")
        if ids.size == 0:
            raise ValueError(f"{where} is empty: expert_ids is {list(ids.shape)}")
        tokens, num_layers, top_k = ids.shape
        if top_k > self.num_experts:
            raise ValueError(f"{where}: {top_k} choices a token need as many experts, but there are {self.num_experts}")
        if int(ids.min()) < 0 or int(ids.max()) >= self.num_experts:
            raise ValueError(
                f"{where}: expert ids go from {int(ids.min())} to {int(ids.max())}, but there are experts 0 to "
                f"{self.num_experts - 1}"
            )
        sorted_TLK = np.sort(ids, axis=2)
        if (twice_TL := (sorted_TLK[..., 1:] == sorted_TLK[..., :-1]).any(axis=2)).any():
            token, layer = (int(i) for i in np.unravel_index(int(twice_TL.argmax()), twice_TL.shape))
            raise ValueError(f"{where}: token {token} chose an expert twice in layer {layer}: {ids[token, layer].tolist()}")
        weights = self.weights_TLK
        if weights is not None:
            if weights.dtype not in (np.float16, np.float32) or weights.shape != ids.shape:
                raise ValueError(
                    f"{where}: weights must be float16 or float32 {list(ids.shape)} as expert_ids are, not {weights.dtype} "
                    f"{list(weights.shape)}"
                )
            if not np.isfinite(weights).all():
                raise ValueError(f"{where}: {int((~np.isfinite(weights)).sum())} of {weights.size} weights are not finite")
        lengths = self.sample_lengths_S
        if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
            raise ValueError(f"{where}: sample_lengths must be integers [S], not {lengths.dtype} {list(lengths.shape)}")
        if (total := sum(lengths.tolist())) != tokens or int(lengths.min()) < 1:  # Python's integers don't wrap around
            raise ValueError(f"{where}: sample_lengths must be at least 1 and sum to {tokens} tokens, but sum to {total}")
        samples = self.samples_S
        if samples is not None and (samples.shape != lengths.shape or not np.issubdtype(samples.dtype, np.integer)):
            raise ValueError(
                f"{where}: samples must be integers {list(lengths.shape)}, not {samples.dtype} {list(samples.shape)}"
            )
        if len(self.layers) != num_layers or self.layers[0] < 0 or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"{where}: layers must be {num_layers} rising numbers from 0 on, not {list(self.layers)}")
        if self.ahead_ids_TLK is not None:
            check_ahead_ids(where, self.ahead_ids_TLK, ids.shape, self.num_experts)
        if self.text is not None:
            self.text.check(where, tokens)

    @property
    def num_tokens(self) -> int:
        return self.expert_ids_TLK.shape[0]

    @property
    def num_layers(self) -> int:
        return self.expert_ids_TLK.shape[1]

    @property
    def top_k(self) -> int:
        return self.expert_ids_TLK.shape[2]


def traced(
    expert_ids_TLK: Ids,
    num_experts: int | None = None,
    *,
    weights_TLK: Weights | None = None,
    sample_lengths_S: Ids | None = None,
    layers: Sequence[int] | None = None,
    name: str = "",
    ahead_ids_TLK: Ids | None = None,
    samples_S: Ids | None = None,
    text: TracedText | None = None,
) -> RoutingTrace:
    """A trace; what isn't given is filled in as where a file lacks it.  ValueError where the parts don't fit."""
    tokens, num_layers = (expert_ids_TLK.shape + (0, 0))[:2]
    if num_experts is None:
        highest = int(expert_ids_TLK.max(initial=0)) if np.issubdtype(expert_ids_TLK.dtype, np.integer) else 0
        num_experts = -(-(highest + 1) // EXPERTS_MULTIPLE) * EXPERTS_MULTIPLE
    return RoutingTrace(
        expert_ids_TLK,
        num_experts,
        np.array([tokens]) if sample_lengths_S is None else sample_lengths_S,
        tuple(range(num_layers)) if layers is None else tuple(int(layer) for layer in layers),
        weights_TLK,
        name,
        ahead_ids_TLK,
        samples_S,
        text,
    )


# files


def read_trace(path: Path, *, num_experts: int | None = None) -> RoutingTrace:
    """The whole trace, or ValueError with the file's name and what is wrong.  `num_experts`: where it is known but not in the
    file, or to be checked against what the file says.  A file that isn't there is a FileNotFoundError as usual."""
    with path.open("rb") as file:
        try:
            found = _arrays(file)
        except _UNREADABLE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is no routing trace, or damaged: {reason}") from error
    if "expert_ids" not in found:
        raise ValueError(f"{path} is no routing trace: it has no array expert_ids")
    try:
        for key, kinds, ndim in (("num_experts", "iu", 0), ("layers", "iu", 1), ("name", "U", 0)):
            if key in found and (found[key].dtype.kind not in kinds or found[key].ndim != ndim):
                raise ValueError(f"{key} is {found[key].dtype} {list(found[key].shape)}, which is none")
        said = int(found["num_experts"]) if "num_experts" in found else None
        if None not in (said, num_experts) and said != num_experts:
            raise ValueError(f"it says that there are {said} experts, not {num_experts}")
        return traced(
            found["expert_ids"],
            num_experts if said is None else said,
            weights_TLK=found.get("weights"),
            sample_lengths_S=found.get("sample_lengths"),
            layers=found["layers"].tolist() if "layers" in found else None,
            name=str(found["name"]) if "name" in found else path.stem,
            ahead_ids_TLK=found.get("ahead_ids"),
            samples_S=found.get("samples"),
            text=TracedText(found["tokens"], *(found.get(key) for key in ARRAYS[1:])) if "tokens" in found else None,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_trace(path: Path, trace: RoutingTrace) -> None:
    """Write the file, compressed; equal traces give equal bytes.  It is there as a whole, or as it was before."""
    arrays: dict[str, NDArray[Any]] = {
        "expert_ids": trace.expert_ids_TLK,
        "sample_lengths": trace.sample_lengths_S,
        "num_experts": np.array(trace.num_experts),
        "layers": np.array(trace.layers),
        "name": np.array(trace.name),
    }
    if trace.weights_TLK is not None:
        arrays["weights"] = trace.weights_TLK
    if trace.ahead_ids_TLK is not None:
        arrays["ahead_ids"] = trace.ahead_ids_TLK
    if trace.samples_S is not None:
        arrays["samples"] = trace.samples_S
    if trace.text is not None:
        arrays |= trace.text.arrays()
    with whole(path, durable=True) as aside, aside.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _arrays(file: IO[bytes]) -> dict[str, NDArray[Any]]:
    """Those of the format; ValueError and much else where the bytes are damaged."""
    found: dict[str, NDArray[Any]] = {}
    with zipfile.ZipFile(file) as archive:
        for key in (
            *("expert_ids", "weights", "sample_lengths", "num_experts", "layers", "name", "samples", "ahead_ids"),
            *ARRAYS,
        ):
            if f"{key}.npy" not in archive.namelist():
                continue
            # A damaged header may claim any shape: see that the bytes are there before memory is taken for them.
            with archive.open(f"{key}.npy") as member:
                version = np.lib.format.read_magic(member)
                if version not in ((1, 0), (2, 0)):
                    raise ValueError(f"{key} is in version {version} of the npy format")
                read_header = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
                shape, _, dtype = read_header(member)
                size_bytes, there_bytes = dtype.itemsize, archive.getinfo(f"{key}.npy").file_size - member.tell()
                for size in shape:
                    size_bytes *= size
                if dtype.hasobject or min(shape, default=0) < 0 or size_bytes != there_bytes:
                    raise ValueError(f"{key} is {dtype} {list(shape)}, {size_bytes} bytes, but has {there_bytes}")
            with archive.open(f"{key}.npy") as member:
                found[key] = np.lib.format.read_array(member, allow_pickle=False)
    return found


# parts and wholes


def batches(trace: RoutingTrace, batch_tokens: int, *, drop_last: bool = False, ahead: bool = False) -> Iterator[Ids]:
    """[up to batch_tokens, L, K], one after another.  The last one holds what is left, or is left out with `drop_last`.

    `ahead`: the ahead ids of the same tokens instead of their choices; ValueError where the trace has none."""
    if batch_tokens < 1:
        raise ValueError(f"batches of {batch_tokens} tokens: they need at least 1")
    ids_TLK = trace.ahead_ids_TLK if ahead else trace.expert_ids_TLK
    if ids_TLK is None:
        raise ValueError(f"trace {trace.name} has no ahead_ids: record it with tools/record_routing.py")
    for begin in range(0, trace.num_tokens, batch_tokens):
        batch_TLK = ids_TLK[begin : begin + batch_tokens]
        if len(batch_TLK) == batch_tokens or not drop_last:
            yield batch_TLK


def alternate(
    traces: Sequence[RoutingTrace], batch_tokens: int, *, drop_last: bool = False, ahead: bool = False
) -> Iterator[Ids]:
    """The first batch of each trace, then the second of each, and so on; a trace that has come to its end is passed over."""
    _check_alike(traces)
    waiting = [batches(trace, batch_tokens, drop_last=drop_last, ahead=ahead) for trace in traces]
    while waiting:
        still = []
        for iterator in waiting:
            if (batch_TLK := next(iterator, None)) is not None:
                yield batch_TLK
                still.append(iterator)
        waiting = still


def halves(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace]:
    """Two traces, cut at the end of a sample: the end nearest the middle, the earlier of two.  ValueError for one sample."""
    if len(trace.sample_lengths_S) < 2:
        raise ValueError(f"trace {trace.name} is one sample of {trace.num_tokens} tokens: halves need two samples or more")
    ends_S = np.cumsum(trace.sample_lengths_S.astype(np.int64))[:-1]
    samples = int(np.abs(2 * ends_S - trace.num_tokens).argmin()) + 1
    cut, weights, ahead = int(ends_S[samples - 1]), trace.weights_TLK, trace.ahead_ids_TLK
    return tuple(  # type: ignore[return-value]
        replace(
            trace,
            expert_ids_TLK=trace.expert_ids_TLK[tokens],
            sample_lengths_S=trace.sample_lengths_S[of_samples],
            weights_TLK=None if weights is None else weights[tokens],
            ahead_ids_TLK=None if ahead is None else ahead[tokens],
            samples_S=None,
            text=None,
        )
        for tokens, of_samples in ((slice(cut), slice(samples)), (slice(cut, None), slice(samples, None)))
    )


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One after another.  Weights and ahead ids only where all have them.  ValueError unless they are of one shape of model."""
    _check_alike(traces)
    weights = [trace.weights_TLK for trace in traces if trace.weights_TLK is not None]
    ahead = [trace.ahead_ids_TLK for trace in traces if trace.ahead_ids_TLK is not None]
    return replace(
        traces[0],
        expert_ids_TLK=np.concatenate([trace.expert_ids_TLK for trace in traces]),
        sample_lengths_S=np.concatenate([trace.sample_lengths_S for trace in traces]),
        weights_TLK=np.concatenate(weights) if len(weights) == len(traces) else None,
        name="+".join(trace.name for trace in traces),
        ahead_ids_TLK=np.concatenate(ahead) if len(ahead) == len(traces) else None,
        samples_S=None,
        text=None,
    )


# other routing from the same trace


def best_first(trace: RoutingTrace) -> RoutingTrace:
    """Each token's choices by falling weight, of equal ones the earlier first.  Without weights: as they are.

    Ahead ids are best first already."""
    if trace.weights_TLK is None:
        return trace
    order_TLK = np.argsort(-trace.weights_TLK, axis=2, kind="stable")
    return replace(
        trace,
        expert_ids_TLK=np.take_along_axis(trace.expert_ids_TLK, order_TLK, axis=2),
        weights_TLK=np.take_along_axis(trace.weights_TLK, order_TLK, axis=2),
    )


def top1(trace: RoutingTrace) -> RoutingTrace:
    """K = 1: each token's first choice; take `best_first` before where the gate didn't sort them."""
    weights, ahead = trace.weights_TLK, trace.ahead_ids_TLK
    return replace(
        trace,
        expert_ids_TLK=trace.expert_ids_TLK[..., :1],
        weights_TLK=None if weights is None else weights[..., :1],
        ahead_ids_TLK=None if ahead is None else ahead[..., :1],
    )


def merged_experts(trace: RoutingTrace, new_num_experts: int) -> RoutingTrace:
    """A model with fewer experts, neighbours merged: expert e becomes e // (E / new_num_experts).

    ValueError unless the number divides E, or where two choices of a token would become the same expert."""
    if new_num_experts < 1 or trace.num_experts % new_num_experts:
        raise ValueError(f"{trace.num_experts} experts can't be merged to {new_num_experts}: take a divisor")
    neighbours, ahead = trace.num_experts // new_num_experts, trace.ahead_ids_TLK
    try:
        return replace(
            trace,
            expert_ids_TLK=trace.expert_ids_TLK // neighbours,
            num_experts=new_num_experts,
            ahead_ids_TLK=None if ahead is None else ahead // neighbours,  # nobody, E, becomes the new E
        )
    except ValueError as error:
        raise ValueError(f"merging {trace.num_experts} experts to {new_num_experts} needs top1 first: {error}") from error


def rerouted_evenly(trace: RoutingTrace, probability: float, seed: int) -> RoutingTrace:
    """Less skew, less of a pattern: with the probability, independently, each choice is replaced by a uniformly random one of the
    experts that the token hasn't chosen otherwise (the present one may come again).  Weights stay where they are; ahead ids go:
    no router has chosen so, so none could say it ahead.

    The same seed with a higher probability replaces the same choices by the same draws, and more of them."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability {probability}: it must be between 0 and 1")
    random, top_k = np.random.default_rng(seed), trace.top_k
    ids_TLK = trace.expert_ids_TLK.copy()
    for k in range(top_k):
        replaced_TL = random.random(ids_TLK.shape[:2]) < probability
        drawn_TL = random.integers(0, trace.num_experts - top_k + 1, ids_TLK.shape[:2])
        # draw n is the n-th of the experts that are none of the others, which are passed over in rising order
        for other_TL in np.moveaxis(np.sort(np.delete(ids_TLK, k, axis=2), axis=2), 2, 0):
            drawn_TL += drawn_TL >= other_TL
        ids_TLK[..., k] = np.where(replaced_TL, drawn_TL, ids_TLK[..., k])
    return replace(trace, expert_ids_TLK=ids_TLK, ahead_ids_TLK=None, text=None)


def probability_for_skew(trace: RoutingTrace, most_over_least: float, *, seed: int = 0) -> float:
    """The probability with which `rerouted_evenly`, with this seed, brings `skew` to the ratio (Lina, figure 6, inference: 4.02
    for 4 experts and 5.56 for 16).

    ValueError where the trace is more even already, or chance alone (probability 1) is less even than that."""
    low, high = 0.0, 1.0
    most, least = skew(trace), skew(rerouted_evenly(trace, 1.0, seed))
    if not least <= most_over_least <= most:
        raise ValueError(
            f"trace {trace.name}: the most popular expert has {most:.4g} times the least popular one's tokens, {least:.4g} times "
            f"when all are rerouted: {most_over_least} is not between them"
        )
    for _ in range(24):
        probability = (low + high) / 2
        reached = skew(rerouted_evenly(trace, probability, seed))
        low, high = (probability, high) if reached > most_over_least else (low, probability)
    return high


def counts_LE(trace: RoutingTrace) -> Counts:
    """[L, E], how often each expert was chosen; each row sums to T x K."""
    return counts_of(trace.expert_ids_TLK, trace.num_experts)


def counts_of(ids_TLK: Ids, num_experts: int) -> Counts:
    """[L, E], of a batch."""
    num_layers = ids_TLK.shape[1]
    flat = ids_TLK.astype(np.int64) + np.arange(num_layers)[:, None] * num_experts
    return np.bincount(flat.ravel(), minlength=num_layers * num_experts).reshape(num_layers, num_experts).astype(np.int64)


def skew(trace: RoutingTrace) -> float:
    """The most popular expert's tokens over the least popular one's: the median over layers.  inf where nobody chose that one."""
    counts = counts_LE(trace)
    least_L = counts.min(axis=1)
    ratio_L = np.where(least_L > 0, counts.max(axis=1) / np.maximum(least_L, 1), np.inf)
    return float(np.sort(ratio_L)[(len(ratio_L) - 1) // 2])  # the lower of two in the middle: inf - inf is no number


def _check_alike(traces: Sequence[RoutingTrace]) -> None:
    if not traces:
        raise ValueError("there is no trace to join")
    kinds = [(trace.num_experts, trace.top_k, trace.layers) for trace in traces]
    for trace, kind in zip(traces, kinds, strict=True):
        if kind != kinds[0]:
            raise ValueError(
                f"traces {traces[0].name} and {trace.name} are not of one shape of model: {kinds[0][0]} and {kind[0]} experts, "
                f"top-{kinds[0][1]} and top-{kind[1]}, layers {list(kinds[0][2])} and {list(kind[2])}"
            )
