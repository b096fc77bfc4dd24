"""How long a device takes for instructions of an inference step: from times of a full batch, or by the roofline of a cluster's
file.

Experts take as long as the rows that really came to the device's slots.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from megalina.blocks.heads import model_of_layer, numbers_kept, tokens_seen
from megalina.blocks.work import Work
from megalina.config import BYTES, PretrainConfig
from megalina.perfmodel.cost.instruction_seconds import SMALLEST_SHARE, device_of
from megalina.perfmodel.cost.instruction_work import InstructionWork
from megalina.step.program import Instruction, Kind

# Compute instructions of inference, and those of training that do the same.  Planning has seconds of its own (`PlannerSeconds`).
TWINS = {
    **{name: name for name in ("embed", "attention", "mlp", "score", "shared", "mix", "join")},
    **{"assign": "select", "final": "head_norm"},
}


class DeviceSeconds(Protocol):
    """Of one device, which is like the others."""

    def instruction_s(self, name: str, tokens: int) -> float:
        """A compute instruction that is none of the experts, for so many tokens of this rank; without planning."""

    def experts_s(self, rows_S: Sequence[int]) -> float:
        """The experts of a layer, or of a chunk of it: rows of each slot here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenTimes:
    """As `benchmarks/inference.py` emulates devices: in proportion to tokens and rows.  `others_s`: of further instructions, by
    name,
    whatever the number of tokens: what a host takes that nothing hides."""

    attention_s: float  # a layer, of an even share of tokens
    experts_full_s: float  # a layer, of an even share of rows; 2% of it whatever the rows, besides
    even_tokens: float
    even_rows: float
    others_s: Mapping[str, float] = field(default_factory=dict)

    def instruction_s(self, name: str, tokens: int) -> float:
        return (self.attention_s * tokens / self.even_tokens if name == "attention" else 0.0) + self.others_s.get(name, 0.0)

    def experts_s(self, rows_S: Sequence[int]) -> float:
        return self.experts_full_s * (SMALLEST_SHARE + sum(rows_S) / self.even_rows)


class RooflineSeconds:
    """Of a device of `config.cluster`, for `config.model` and `config.router` in `config.train.dtype`.

    `context`: 0: prefill of sequences of `config.train.seq_len` tokens; else decoding, a token of each sequence, which attends to
    so many before it: their keys and values are read from the device's memory, a window of them where a layer has one.
    ValueError where the cluster's file lacks figures, and for less than no context."""

    def __init__(self, config: PretrainConfig, *, context: int = 0):
        if context < 0:
            raise ValueError(f"a context of {context} tokens: give 0 for prefill, or the tokens that are decoded from")
        self._device = device_of(config.cluster, config.train.dtype)
        model = config.model
        self._context, self._layers = context, dict[int, list[int]]()  # by the window that they have
        for layer in range(model.num_layers):
            self._layers.setdefault(model_of_layer(model, layer).window, []).append(layer)
        train = replace(config.train, micro_batch_size=1, seq_len=1 if context else config.train.seq_len)
        self._config = replace(config, train=train)
        self._work = InstructionWork(self._config, world=1, vocab_rows=model.vocab_size, buckets={})
        self._known: dict[tuple[str, int, int], float] = {}

    def instruction_s(self, name: str, tokens: int) -> float:
        twin = name if self._work.blocks.is_own(0, name) else TWINS.get(name)
        if twin is None or not tokens:
            return 0.0
        key = name, tokens, 0
        if key not in self._known:
            share = tokens / self._config.train.seq_len
            whole_s = self._attention_s if name == "attention" else lambda s: self._device.seconds(self._work(_stage(twin, s)))
            self._known[key] = whole_s(share)
        return self._known[key]

    def _attention_s(self, share: float) -> float:
        """The mean over layers, which may have windows."""
        config, total_s = self._config, 0.0
        token_bytes = numbers_kept(config.model) * BYTES[config.train.dtype]
        for window, layers in self._layers.items():
            read_bytes = share * config.train.seq_len * tokens_seen(window, self._context) * token_bytes
            total_s += len(layers) * self._device.seconds(
                self._work(_stage("attention", share, layers[0])) + Work((), read_bytes)
            )
        return total_s / config.model.num_layers

    def experts_s(self, rows_S: Sequence[int]) -> float:
        """One kernel for all slots that have rows, in bfloat16, else a kernel for each.

        Its time is linear in the rows of a slot, so slots may count as if each had the mean of those that have any."""
        rows, active = sum(rows_S), sum(n > 0 for n in rows_S)
        if not rows:
            return 0.0
        key = "experts", rows, active
        if key not in self._known:
            config = self._config
            slots = replace(  # so many experts on each of two ranks: their rows are sorted by rank when they arrive
                config,
                model=replace(config.model, num_experts=2 * active),
                parallel=replace(config.parallel, ep=2, tp=1),
            )
            work = InstructionWork(slots, world=2, vocab_rows=config.model.vocab_size, buckets={})
            share = rows / (config.router.top_k * config.train.seq_len)
            self._known[key] = self._device.seconds(work(_stage("experts", share)))
        return self._known[key]


def row_s(device: DeviceSeconds, even_rows: int, slots: int) -> float:
    """What a row more on a device costs, where `slots` of it have an even share of rows: what the trigger `gain` asks for."""
    part = max(1, even_rows // slots)
    return (device.experts_s([2 * part] * slots) - device.experts_s([part] * slots)) / (part * slots)


def _stage(name: str, share: float, layer: int = 0) -> Instruction:
    return Instruction("F", Kind.COMPUTE, name, layer, share=share)
