"""The paper's training steps and batches in virtual time, with the constants of its stack."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean

from megalina.blocks.model import shape_of
from megalina.config import PretrainConfig
from megalina.perfmodel.forecast.priced_step import PricedStep
from megalina.perfmodel.sim.memory import Memory
from megalina.step.plan import Plan
from megalina.step.program import Instruction, Op, Program
from megalina.step.strategy import evaluation
from megalina.timeline.recorder import COMPUTE, SEND, Event
from papers.lina.models import Model, config_of

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
    step: PricedStep
    program: Program  # its own, or an evaluation's


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
        return self._list(model, experts, plan).step.memory

    def _walk(self, model: Model, experts: int, plan: Plan | None, constants: Constants) -> Walk:
        key = (model, experts, plan, constants)
        if key not in self._walked:
            listed = self._list(model, experts, plan)
            self._walked[key] = _in_virtual_time(listed, constants)
        return self._walked[key]

    def _list(self, model: Model, experts: int, plan: Plan | None) -> _Listed:
        key = (model, experts, plan)
        if key not in self._listed:
            config = config_of(self.base, model, experts, top_k=2 if plan else 1)
            step = PricedStep(config, experts, plan or Plan(), vocab_size=model.vocab_size)
            shape = shape_of(config.model, config.router, tp=1, sequence=config.parallel.sequence)
            self._listed[key] = _Listed(step, step.program if plan else evaluation(shape, step.held.buckets))
        return self._listed[key]


def _in_virtual_time(listed: _Listed, constants: Constants) -> Walk:
    step = listed.step
    timeline = step.walk(
        program=listed.program,
        seconds=_seconds(step.seconds, constants),
        sizes=replace(step.sizes, bytes_of=_bytes(step.sizes.bytes_of, _factors(step, constants))),
    )
    return Walk(timeline.step_s + constants.outside_ms / 1e3, timeline.events(0))


def _seconds(roofline_s: Callable[[Instruction], float], constants: Constants) -> Callable[[Instruction], float]:
    factors = {"experts": constants.experts_factor, "attention": constants.attention_factor}
    factors |= dict.fromkeys(GATE, constants.gate_factor)
    return lambda instruction: roofline_s(instruction) * factors.get(instruction.name, 1.0)


def _factors(step: PricedStep, constants: Constants) -> dict[Op | None, float]:
    inside = step.held.axes["ep"] <= step.config.cluster.ranks_per_node
    return {
        Op.TOKENS: constants.inside_factor if inside else constants.between_factor,
        Op.GRADS: constants.gradient_factor,
    }


def _bytes(bytes_of: Callable[[Instruction], float], factors: Mapping[Op | None, float]) -> Callable[[Instruction], float]:
    return lambda instruction: bytes_of(instruction) * factors.get(instruction.op, 1.0)
