"""Events for tests, made by hand."""

from dataclasses import replace

from megalina.timeline.recorder import COMPUTE, SEND, WAIT, Event

ARROWS = {COMPUTE: "", WAIT: "<", SEND: ">"}


def event(kind: str, name: str, start_s: float, end_s: float, **fields: object) -> Event:
    """`event("send", "dispatch", 1, 2, layer=3, op="tokens")`; forward, part 0 unless said."""
    phase, layer, part = (str(fields.get(key, default)) for key, default in (("phase", "F"), ("layer", -1), ("part", "0")))
    tag = f"{phase}:{name}{ARROWS[kind]}.{layer.replace('-1', '-')}.{part}"
    plain = Event(kind, tag, phase, name, int(layer), part, "", "", 0, start_s, start_s, end_s)
    return replace(plain, **fields)  # type: ignore[arg-type]


def compute(name: str, start_s: float, end_s: float, **fields: object) -> Event:
    return event(COMPUTE, name, start_s, end_s, **fields)


def tokens(name: str, start_s: float, end_s: float, num_bytes: int = 1000, **fields: object) -> Event:
    return event(SEND, name, start_s, end_s, num_bytes=num_bytes, op="tokens", axis="ep", **fields)


def grads(name: str, start_s: float, end_s: float, num_bytes: int = 1000, **fields: object) -> Event:
    return event(SEND, name, start_s, end_s, num_bytes=num_bytes, op="grads", **({"axis": "dp", "phase": "B"} | fields))


def wait(name: str, start_s: float, end_s: float, exposed_s: float, op: str = "tokens", **fields: object) -> Event:
    return event(WAIT, name, start_s, end_s, exposed_s=exposed_s, op=op, axis="ep" if op == "tokens" else "dp", **fields)
