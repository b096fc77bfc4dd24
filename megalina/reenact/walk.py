"""The paper's training steps and batches in virtual time, with the constants of its stack."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean

from megalina.config import PretrainConfig
from megalina.cost.stage_bytes import StageBytes
from megalina.cost.stage_seconds import stage_seconds
from megalina.cost.stage_work import StageWork
from megalina.forecast.forecast import program_of
from megalina.forecast.network import network_of
from megalina.forecast.sent import sizes_of
from megalina.layout import ranks_of
from megalina.parallel.shard import shape_of
from megalina.parameters import padded_vocab_size
from megalina.reenact.models import Model, config_of
from megalina.sim.memory import Memory, memory_of
from megalina.sim.virtual import simulate_alike
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Op, Program
from megalina.step.strategy import evaluation
from megalina.timeline.recorder import COMPUTE, SEND, Event

GATE = ("route", "mix", "cut", "join", "balance")  # of a MoE layer, besides its experts


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """What is fitted, see `fit.py`.  Factors multiply what conf/cluster/lina_testbed.yaml's roofline says of an instruction;
    they are
    what the paper's stack adds to it."""

    inside_factor: float  # an all-to-all inside a node takes as long as so many times its bytes would on the file's links ...
    between_factor: float  # ... and one over several nodes; both with the assumed batch of a GPU
    gradient_factor: float  # likewise of an all-reduce
    experts_factor: float
    gate_factor: float
    attention_factor: float
    outside_ms: float  # of a step or batch, besides its list


START = Constants(
    inside_factor=80.0,
    between_factor=1.2,
    gradient_factor=1.5,
    experts_factor=2.0,
    gate_factor=10.0,
    attention_factor=20.0,
    outside_ms=50.0,
)  # from where the fit begins


@dataclass(frozen=True, slots=True)
class Walk:
    """One step on rank 0; the other ranks do the same."""

    step_s: float
    events: Sequence[Event]

    def sends(self, op: str, phase: str = "") -> list[Event]:
        return [e for e in self.events if e.kind == SEND and e.op == op and phase in ("", e.phase)]

    def all_to_all_s(self, phase: str = "") -> float:
        """Time on the wire, summed over all-to-alls."""
        return sum(e.end_s - e.start_s for e in self.sends("tokens", phase))

    @property
    def all_to_all_share(self) -> float:
        return self.all_to_all_s() / self.step_s

    @property
    def compute_share(self) -> float:
        """In which the device computes."""
        return sum(e.end_s - e.start_s for e in self.events if e.kind == COMPUTE) / self.step_s

    def compute_s(self, *names: str, phase: str = "") -> float:
        return sum(e.end_s - e.start_s for e in self.events if e.kind == COMPUTE and e.name in names and phase in ("", e.phase))

    def moe_layer_s(self, phase: str) -> float:
        """From a MoE layer's first instruction to its last, mean over layers.  Attention isn't in it."""
        found: dict[int, list[Event]] = {}
        for e in self.events:
            if e.phase == phase and e.layer >= 0 and not e.name.startswith("attention") and e.op != "grads":
                found.setdefault(e.layer, []).append(e)
        return mean(max(e.end_s for e in layer) - min(e.start_s for e in layer) for layer in found.values())


@dataclass(slots=True)
class _Listed:
    config: PretrainConfig
    held: StageBytes
    program: Program
    work: StageWork


@dataclass(slots=True)
class Bed:
    """Walks and lists that were asked for, by what was asked: constants change often while they are fitted, lists never."""

    base: PretrainConfig
    _listed: dict[tuple[Model, int, Plan | None], _Listed] = field(default_factory=dict)
    _walked: dict[tuple[Model, int, Plan | None, Constants], Walk] = field(default_factory=dict)

    def step(self, model: Model, experts: int, plan: Plan, constants: Constants) -> Walk:
        """A training step, top-2."""
        return self._walk(model, experts, plan, constants)

    def batch(self, model: Model, experts: int, constants: Constants) -> Walk:
        """A forward pass without gradients, top-1, of as many tokens; routing is even."""
        return self._walk(model, experts, None, constants)

    def memory(self, model: Model, experts: int, plan: Plan) -> Memory:
        listed = self._list(model, experts, plan)
        return memory_of(listed.held, listed.program)

    def _walk(self, model: Model, experts: int, plan: Plan | None, constants: Constants) -> Walk:
        key = (model, experts, plan, constants)
        if key not in self._walked:
            listed = self._list(model, experts, plan)
            self._walked[key] = _in_virtual_time(listed, experts, constants)
        return self._walked[key]

    def _list(self, model: Model, experts: int, plan: Plan | None) -> _Listed:
        key = (model, experts, plan)
        if key not in self._listed:
            config = config_of(self.base, model, experts, top_k=2 if plan else 1)
            packing, piece_bytes = (plan.packing, plan.piece_bytes) if plan else (1, 0)
            held = StageBytes(config, experts, vocab_size=model.vocab_size, packing=packing, piece_bytes=piece_bytes, cuda=True)
            shape = shape_of(config.model, config.router, tp=1, sequence=config.parallel.sequence)
            program = program_of(config, plan, held, micro_batches=1) if plan else evaluation(shape, held.buckets)
            rows = padded_vocab_size(model.vocab_size, 1)
            work = StageWork(config, world=experts, vocab_rows=rows, buckets=held.buckets, packing=packing)
            self._listed[key] = _Listed(config, held, program, work)
        return self._listed[key]


def _in_virtual_time(listed: _Listed, ranks: int, constants: Constants) -> Walk:
    config = listed.config
    sizes = sizes_of(config, listed.held)
    timeline = simulate_alike(
        listed.program,
        ranks=ranks,
        ranks_of=ranks_of(listed.held.axes),
        seconds=_seconds(stage_seconds(config, listed.work), constants),
        network=network_of(config.cluster),
        sizes=replace(sizes, bytes_of=_bytes(sizes.bytes_of, _factors(listed, constants))),
        slowest=True,
    )
    return Walk(timeline.step_s + constants.outside_ms / 1e3, timeline.events(0))


def _seconds(roofline_s: Callable[[Instruction], float], constants: Constants) -> Callable[[Instruction], float]:
    factors = {"experts": constants.experts_factor, "attention": constants.attention_factor}
    factors |= dict.fromkeys(GATE, constants.gate_factor)
    return lambda instruction: roofline_s(instruction) * factors.get(instruction.name, 1.0)


def _factors(listed: _Listed, constants: Constants) -> dict[Op | None, float]:
    inside = listed.held.axes["ep"] <= listed.config.cluster.ranks_per_node
    return {
        Op.TOKENS: constants.inside_factor if inside else constants.between_factor,
        Op.GRADS: constants.gradient_factor,
    }


def _bytes(bytes_of: Callable[[Instruction], float], factors: Mapping[Op | None, float]) -> Callable[[Instruction], float]:
    return lambda instruction: bytes_of(instruction) * factors.get(instruction.op, 1.0)
