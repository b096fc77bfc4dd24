"""A machine that is made up: seconds that follow from known rates, so that figures can be held against them."""

from megalina.measure.figures import Measured, hops_and_bytes
from megalina.measure.shapes import CPU, expert_key, pass_key, sent_key
from megalina.perfmodel.sim.collectives import Collective

FLOPS_PER_S = {"float32": 4e10, "bfloat16": 8e10}
HALF_SIZE = 16.0  # a product with so few rows, or columns, reaches half; the rate of the largest there is counts as the whole
COPY_BYTES_PER_S, PASS_BYTES_PER_S = 2e10, 1e10
KERNEL_S, HOST_INSTRUCTION_S = 2e-6, 1e-4
ATTENTION_SHARE = 0.25
HOP_S = {"inside": 5e-5, "over": 2e-4}
WIRE_BYTES_PER_S = {"inside": 2e9, "over": 1e8}
TINY_OPS, INSTRUCTIONS, INSTRUCTION_KERNELS = 50, 40, 500.0


def share(side: float) -> float:
    return side / (side + HALF_SIZE)


def seconds(nodes: int, ranks_per_node: int) -> dict[str, float]:
    largest = share(max(CPU.sides)) * share(CPU.large_side) ** 2
    out = {
        "copy": 2 * CPU.copied_bytes / COPY_BYTES_PER_S,
        "tiny": TINY_OPS * KERNEL_S,
        "tiny step": INSTRUCTIONS * HOST_INSTRUCTION_S + INSTRUCTION_KERNELS * KERNEL_S,
        "attention": CPU.attention_flops("float32") / (ATTENTION_SHARE * FLOPS_PER_S["float32"]),
    }
    for dtype, rate in FLOPS_PER_S.items():
        for shape in (s for of_side in CPU.products(dtype) for s in of_side):
            sides = share(shape.rows) * share(shape.columns) * share(shape.inner)
            out[shape.key] = shape.flops / (rate * sides / largest)
    for name, work in CPU.passes("float32").items():
        out[pass_key(name)] = work.moved_bytes / PASS_BYTES_PER_S + work.kernels * KERNEL_S
    for rows in CPU.expert_rows:
        out[expert_key("float32", rows)] = 0.01 * rows
    for where, ranks, beside in (("inside", ranks_per_node, 1), ("over", nodes, ranks_per_node)):
        for op in Collective if ranks > 1 else ():
            hops, sent = hops_and_bytes(op, ranks)
            for num_bytes in CPU.sent_bytes:
                wire_s = sent * beside * num_bytes / WIRE_BYTES_PER_S[where]
                out[sent_key(where, op.value, num_bytes)] = KERNEL_S + hops * HOP_S[where] + wire_s
    return out


def machine(nodes: int = 1, ranks_per_node: int = 2, *, disturbed: float = 1.0) -> Measured:
    """`disturbed`: by how much longer the first pass took all that comes first in its order, and the second one the rest."""
    found = seconds(nodes, ranks_per_node)
    half = set(list(found)[: len(found) // 2])
    first = {key: s * (disturbed if key in half else 1.0) for key, s in found.items()}
    second = {key: s * (1.0 if key in half else disturbed) for key, s in found.items()}
    contended = {"count": 20, "median": 1.5, "p95": 2.5}
    return Measured(
        kind="cpu",
        device="a made processor, 4 cores",
        torch="2.13.0",
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        threads=1,
        memory_gib=16.0,
        dtypes=("float32", "bfloat16"),
        instructions=INSTRUCTIONS,
        instruction_kernels=INSTRUCTION_KERNELS,
        tiny_ops=TINY_OPS,
        passes=(first, second),
        contention={"all-to-all under all-reduce": contended} if nodes * ranks_per_node > 1 else {},
        core_share=0.99,
        load=0.1,
    )
