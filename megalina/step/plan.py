"""A plan: a strategy with its numbers, the same on every rank, and what a search chooses among."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megalina.step.order import checksum


@dataclass(frozen=True, slots=True)
class Plan:
    """How a step is scheduled.  Bytes are of gradients."""

    strategy: str = "eager"
    parts: int = 1  # that walk through the layers in turn (flow)
    chunks: tuple[int, ...] = (1,)  # in which the rows of each MoE layer travel; one number: of all of them
    piece_bytes: int = 0  # 0: whole buckets
    merge_bytes: int = 0  # ddp: neighbouring buckets go as one collective once they have so many
    yields: bool = False  # gradients wait while tokens are on the wire
    late_layers: int = 0  # so many MoE layers, the last ones of backward, get the gradients of experts' weights after it
    deferred_weights: str = "none"  # whose weights' gradients are instructions of their own: none | experts | all
    join_weights: bool = False  # what all parts and chunks leave out of the gradients of the same weights is one product
    deferred_bytes: int = 0  # that may be kept back for them; 0: no limit
    partition: str = "none"  # ranges of the forward pass that walk in parts: as `megalina.step.partition.ranges_from` reads them
    partition_backward: str = "whole"  # their mirrors: whole, side by side | mirrored, in turn as they went forward
    newton_schulz_after: int = 0  # Muon: under the so-manieth all-to-all after a bucket's gradients have started; 0: at the end
    gap_bytes: tuple[tuple[str, int], ...] = ()  # windows: at most so many bytes in each gap of the wire; (): no limit
    times_us: tuple[tuple[str, float], ...] = ()  # of kinds of instructions, a whole micro-batch; weights are placed by them
    measured_at: int = 0  # the step in which the windows were measured
    packing: int = 1  # times as many experts on a rank as parallel.ep says
    order: tuple[str, ...] = ()  # of all instructions, as `megalina/step/order.py` writes it; (): the strategy's own

    def __str__(self) -> str:
        """For people: "flow: 2 parts, pieces of 0.5 MiB"."""
        words = [
            f"{self.parts} parts" if self.parts > 1 else "",
            f"{chunks_text(self.chunks)} chunks" if self.chunks != (1,) else "",
            f"pieces of {self.piece_bytes / 2**20:g} MiB" if self.piece_bytes else "",
            f"buckets of {self.merge_bytes / 2**20:g} MiB" if self.merge_bytes else "",
            "tokens first" if self.yields else "",
            f"weights of {self.late_layers} layers last" if self.late_layers else "",
            f"deferred weights of {self.deferred_weights}" if self.deferred_weights != "none" else "",
            "weights of parts joined" if self.join_weights else "",
            f"{self.deferred_bytes / 2**20:g} MiB kept back" if self.deferred_bytes else "",
            _partition_words(self.partition, self.partition_backward) if self.partition != "none" else "",
            f"Newton-Schulz after {self.newton_schulz_after} all-to-alls" if self.newton_schulz_after else "",
            "windows " + "/".join(f"{gap} {size / 2**20:.2f} MiB" for gap, size in self.gap_bytes) if self.gap_bytes else "",
            f"times of step {self.measured_at}" if self.times_us else "",
            f"packing {self.packing}" if self.packing > 1 else "",
            f"order {checksum(self.order)}" if self.order else "",
        ]
        return ": ".join(filter(None, (self.strategy, ", ".join(filter(None, words)))))

    @property
    def places_weights(self) -> bool:
        """Whether weights' gradients are placed, by times as far as there are any."""
        return self.deferred_weights != "none"

    def cut(self, micro_batches: int) -> int:
        """Into how many parts each of so many micro-batches is cut.  They are parts already where there are enough of them;
        `pair` cuts each, since whole ones that walk together would be held together, beside those that they are paired with."""
        return 1 if micro_batches % self.parts == 0 and self.strategy != "pair" else self.parts

    def chunks_of(self, moe: tuple[bool, ...]) -> dict[int, int]:
        """Layer -> chunks of its rows.  ValueError where there are not as many numbers as MoE layers, or one is not above 0."""
        layers = [i for i, is_moe in enumerate(moe) if is_moe]
        numbers = self.chunks * len(layers) if len(self.chunks) == 1 else self.chunks
        if len(numbers) != len(layers) or min(numbers, default=1) < 1:
            text = chunks_text(self.chunks)
            raise ValueError(f"strategy.chunks={text} must be one number above 0, or one for each of {len(layers)} MoE layers")
        return dict(zip(layers, numbers, strict=True))

    def as_json(self) -> dict[str, Any]:
        """What differs from a plan without numbers, and the strategy; see `from_json`."""
        plain = asdict(Plan(self.strategy))
        found = {"strategy": self.strategy} | {k: v for k, v in asdict(self).items() if v != plain[k]}
        order = {"order": {"checksum": checksum(self.order), "lines": list(self.order)}} if self.order else {}
        return found | ({"chunks": chunks_text(self.chunks)} if "chunks" in found else {}) | order

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """The plan of `as_json`, of this version or an older one.  TypeError, ValueError, KeyError or AttributeError for what is
        none, or has an order that isn't of its checksum."""
        gaps = tuple((str(gap), int(size)) for gap, size in values.get("gap_bytes", ()))
        times = tuple((str(kind), float(us)) for kind, us in values.get("times_us", ()))
        order = _order_from(values["order"]) if "order" in values else ()
        chunks = chunks_from(values.get("chunks", "1"))
        plan = cls(**{**values, "gap_bytes": gaps, "times_us": times, "chunks": chunks, "order": order})
        for field in fields(cls):
            if type(getattr(plan, field.name)) is not (kind := type(field.default)):
                raise TypeError(f"{field.name} is no {kind.__name__}")
        return plan


def _partition_words(partition: str, backward: str) -> str:
    parts = f"forward in {partition} parts" if partition.isdecimal() else f"forward in parts {partition.replace(',', ' ')}"
    return f"{parts} and {backward} backward"


class WrongChecksum(ValueError):
    """The order of a plan isn't the one that was written."""


def _order_from(values: Mapping[str, Any]) -> tuple[str, ...]:
    order = tuple(str(line) for line in values["lines"])
    if checksum(order) != values["checksum"]:
        raise WrongChecksum("order")
    return order


def chunks_from(text: str) -> tuple[int, ...]:
    """Of "2" or "1,2,2"."""
    return tuple(int(number) for number in text.split(","))


def chunks_text(chunks: tuple[int, ...]) -> str:
    """As `chunks_from` reads it."""
    return ",".join(map(str, chunks))
