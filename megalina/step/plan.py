"""A plan: a strategy with its numbers, the same on every rank, and what a search chooses among."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megalina.step.forward import Shape
from megalina.step.program import BucketSpec
from megalina.step.strategy import Setting, chunks_of

DDP_FIRST_BYTES = 2**20  # torch.distributed._DEFAULT_FIRST_BUCKET_BYTES


@dataclass(frozen=True, slots=True)
class Plan:
    """How a step is scheduled.  Bytes are of gradients."""

    strategy: str = "eager"
    parts: int = 1
    chunks: str = "1"  # as `strategy.chunks`
    piece_bytes: int = 0  # 0: whole buckets
    merge_bytes: int = 0  # ddp
    yields: bool = False
    late_layers: int = 0  # of which backward leaves the gradients of experts' weights to the end
    gap_bytes: tuple[tuple[str, int], ...] = ()  # windows: at most so many bytes in each gap of the wire; (): no limit
    measured_at: int = 0  # the step in which the windows were measured
    packing: int = 1

    def __str__(self) -> str:
        """For people: "flow: 2 parts, pieces of 0.5 MiB"."""
        words = [
            f"{self.parts} parts" if self.parts > 1 else "",
            f"{self.chunks} chunks" if self.chunks != "1" else "",
            f"pieces of {self.piece_bytes / 2**20:g} MiB" if self.piece_bytes else "",
            f"buckets of {self.merge_bytes / 2**20:g} MiB" if self.merge_bytes else "",
            "tokens first" if self.yields else "",
            f"weights of {self.late_layers} layers last" if self.late_layers else "",
            "windows " + "/".join(f"{gap} {size / 2**20:.2f} MiB" for gap, size in self.gap_bytes) if self.gap_bytes else "",
            f"packing {self.packing}" if self.packing > 1 else "",
        ]
        return ": ".join(filter(None, (self.strategy, ", ".join(filter(None, words)))))

    def as_json(self) -> dict[str, Any]:
        """What differs from a plan without numbers, and the strategy; see `plan_of`."""
        plain = asdict(Plan(self.strategy))
        return {"strategy": self.strategy} | {k: v for k, v in asdict(self).items() if v != plain[k]}

    def setting(
        self, shape: Shape, buckets: Mapping[str, BucketSpec], *, micro_batches: int, recompute_mode: str, element_bytes: int
    ) -> Setting:
        """For `training_step`.  The pieces of sharded buckets stay: shards belong to them."""
        piece = max(1, self.piece_bytes // element_bytes) if self.piece_bytes else None
        return Setting(
            shape,
            {name: spec if spec.sharded else replace(spec, piece=piece) for name, spec in buckets.items()},
            micro_batches=micro_batches,
            recompute_mode=recompute_mode,
            parts=self.parts,
            chunks_of=chunks_of(self.chunks, shape.moe),
            merge=self.merge_bytes // element_bytes,
            merge_first=min(DDP_FIRST_BYTES, self.merge_bytes) // element_bytes,
            yields=self.yields,
            late_layers=self.late_layers,
            gaps={gap: size // element_bytes for gap, size in self.gap_bytes} or None,
        )


def plan_of(values: Mapping[str, Any]) -> Plan:
    """The plan of `Plan.as_json`."""
    gaps = tuple((str(gap), int(size)) for gap, size in values.get("gap_bytes", ()))
    return Plan(**{**values, "gap_bytes": gaps})
