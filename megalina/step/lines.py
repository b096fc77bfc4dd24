"""Lines of a forward pass as blocks write them: instructions of part "0" by short names of their values."""

from megalina.step.program import Instruction, Kind, Op


def names(text: str, layer: int) -> tuple[str, ...]:
    """`x h` -> x.3.0 h.3.0; `x+` is the next layer's; `#batch` has no layer.  What has a dot is a name already."""

    def name(v: str) -> str:
        if v == "#batch":
            return "#batch.-.0"
        if "." in v:
            return v
        return f"{v[:-1]}.{layer + 1}.0" if v.endswith("+") else f"{v}.{'-' if layer < 0 else layer}.0"

    return tuple(map(name, text.split()))


def compute(name: str, layer: int, reads: str, writes: str, *uses: str) -> Instruction:
    """`uses`: parameter groups."""
    groups = tuple(dict.fromkeys(uses))
    return Instruction("F", Kind.COMPUTE, name, layer, "0", names(reads, layer), names(writes, layer), groups)


def exchange(name: str, layer: int, op: Op, axis: str, value: str, writes: str, also: tuple[str, ...] = ()) -> list[Instruction]:
    """START and WAIT of one value; both read `also` (whole names: sizes)."""
    (sent,) = names(value, layer)
    head, rest = sent.split(".", 1)
    wire = (f"{head}>.{rest}",)
    start = Instruction("F", Kind.START, name, layer, "0", (sent, *also), wire, op=op, axis=axis)
    wait = Instruction("F", Kind.WAIT, name, layer, "0", (*wire, *also), names(writes, layer), op=op, axis=axis)
    return [start, wait]
