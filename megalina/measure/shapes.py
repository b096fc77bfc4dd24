"""What is measured on a kind of device: sizes, and what the cost model says is done in each of them.  Numbers alone, no torch.

Products of a small side, for the curve, with operands that come from memory, as weights do in a step; passes of the model's own
functions over activations, whose counted bytes are those of `megalina/perfmodel/cost/instruction_work.py`, so a rate found here
means there what it means here; experts with few rows, which nothing is fitted on."""

from dataclasses import dataclass
from functools import partial

from megalina.blocks.work import Work
from megalina.config import PretrainConfig
from megalina.perfmodel.cost.instruction_work import InstructionWork
from megalina.step.program import Instruction, Kind

FORWARD = {"norm": "attention_norm", "activation": "mlp_hidden", "residual": "attention_residual"}  # pass -> its instruction
MEASURED_BACKWARD = ("norm", "activation")


@dataclass(frozen=True, slots=True)
class ProductShape:
    """[rows, inner] times [inner, columns]; with a short inner side it is added to what is there, as a weight's gradient is."""

    dtype: str
    rows: int
    columns: int
    inner: int

    @property
    def key(self) -> str:
        return f"product {self.dtype} {self.rows} x {self.columns} x {self.inner}"

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.columns * self.inner


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of everything; a layer's sizes are in the model that `config` gives."""

    sides: tuple[int, ...]  # the smallest of a product's, rising
    large_side: int  # the other two
    cold_bytes: int  # operands of so many in turn: more than caches hold
    micro_batch: int  # sequences
    seq_len: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    num_experts: int
    expert_rows: tuple[int, ...]  # each expert's
    copied_bytes: int  # far beyond all caches
    sent_bytes: tuple[int, ...]  # of a collective's whole tensor

    def products(self, dtype: str) -> list[tuple[ProductShape, ProductShape, ProductShape]]:
        """For each side the product that has few rows, the one that has few columns, and the one that is of little depth."""
        large, made = self.large_side, partial(ProductShape, dtype)
        return [(made(side, large, large), made(large, side, large), made(large, large, side)) for side in self.sides]

    def config(self, dtype: str) -> PretrainConfig:
        config = PretrainConfig()
        model, train = config.model, config.train
        model.num_layers, model.d_model, model.d_ff, model.num_experts = 1, self.d_model, self.d_ff, self.num_experts
        model.num_heads, model.num_kv_heads, model.dense_d_ff = self.num_heads, self.num_kv_heads, self.d_ff
        train.micro_batch_size, train.seq_len, train.dtype = self.micro_batch, self.seq_len, dtype
        return config

    def passes(self, dtype: str) -> dict[str, Work]:
        """What passes over memory count for, forward and backward together where backward is measured too."""
        work = self._work(dtype)
        out = {}
        for name, instruction in FORWARD.items():
            found = work(_compute(instruction, "F"))
            if name in MEASURED_BACKWARD:  # without the gradients of weights, which are no passes
                found += work(_compute(instruction, "B", late=True))
            out[name] = Work((), found.moved_bytes, found.moving_kernels)
        return out

    def attention_flops(self, dtype: str) -> float:
        """Of attention's kernel, forward and backward."""
        work = self._work(dtype)
        instructions = (_compute("attention_heads", "F"), _compute("attention_heads", "B", late=True))
        return sum(p.flops for instruction in instructions for p in work(instruction).products if p.attention)

    def experts(self, dtype: str, rows: int) -> Work:
        """All experts with so many rows each, forward and backward."""
        config, work = self.config(dtype), self._work(dtype)
        load = rows * self.num_experts / (self.micro_batch * self.seq_len * config.router.top_k)
        return work(_compute("experts", "F"), load) + work(_compute("experts", "B"), load)

    def _work(self, dtype: str) -> InstructionWork:
        return InstructionWork(self.config(dtype), world=1, vocab_rows=128, buckets={})


CPU = Sizes(
    sides=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    large_side=1024,
    cold_bytes=2**26,
    micro_batch=4,
    seq_len=256,
    d_model=384,
    d_ff=768,
    num_heads=6,
    num_kv_heads=3,
    num_experts=4,
    expert_rows=(4, 16, 64, 256),
    copied_bytes=2**28,
    sent_bytes=(2**12, 2**16, 2**18, 2**20, 2**22),
)
CUDA = Sizes(
    sides=(1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    large_side=8192,
    cold_bytes=2**29,
    micro_batch=4,
    seq_len=4096,
    d_model=2048,
    d_ff=1024,
    num_heads=16,
    num_kv_heads=16,
    num_experts=8,
    expert_rows=(16, 64, 256, 1024),
    copied_bytes=2**31,
    sent_bytes=(2**14, 2**18, 2**20, 2**22, 2**24, 2**26),
)


def sizes_of(kind: str) -> Sizes:
    """`kind`: cpu | cuda."""
    return {"cpu": CPU, "cuda": CUDA}[kind]


def expert_key(dtype: str, rows: int) -> str:
    return f"experts {dtype} {rows}"


def pass_key(name: str) -> str:
    return f"pass {name}"


def sent_key(where: str, op: str, num_bytes: int) -> str:
    """`where`: inside | over, of nodes."""
    return f"{where} {op} {num_bytes}"


def _compute(name: str, phase: str, *, late: bool = False) -> Instruction:
    return Instruction(phase, Kind.COMPUTE, name, 0, late=late)
