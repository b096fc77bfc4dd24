"""Measurements for tests, made by hand."""

from dataclasses import replace

from megalina.compare.results import Measured

PLAIN = Measured(
    plan="eager",
    plan_values={"strategy": "eager"},
    median_step_s=1.0,
    ratio_to_eager=1.0,
    ratio_spread=(0.9, 1.1),
    ratio_to_ddp=None,
    ratio_to_plain=None,
    a2a_exposed_s=0.3,
    a2a_exposed_forward_s=0.1,
    a2a_exposed_backward_s=0.2,
    grads_exposed_s=0.2,
    messages_exposed_s=0.0,
    other_exposed_s=0.05,
    idle_s=0.55,
    compute_s=0.4,
    a2a_slowdown_median=None,
    a2a_slowdown_p95=None,
    slowdowns=[],
    device_s=0.4,
    critical_path_s=0.7,
    link_s=0.25,
    in_turn_s=0.3,
    overrun_fraction=0.0,
    peak_mb=12.0,
    search_steps=0,
    largest_loss_difference=0.0,
    step_s=[1.0, 1.0],
    tail_s=[0.1, 0.1],
)


def measured(**fields: object) -> Measured:
    """`measured(median_step_s=0.5)`."""
    return replace(PLAIN, **fields)  # type: ignore[arg-type]
