"""The learning rate of a step, and what losses weigh in it: pure functions of the step's number, so a resumed run needs no state
for them."""

import math

from megalina.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, *, peak: float, step: int, total_steps: int, tokens_per_step: int) -> float:
    """The learning rate of step `step`, counted from 1.

    It climbs linearly and reaches `peak` at the last warm-up step (without warm-up: at step 1), then falls to
    `min_ratio * peak` at step `total_steps` and stays there.  wsd stays at the peak until the last `decay_fraction` of
    all steps and falls linearly there (warm-up, stable, decay: Hu et al. 2024, MiniCPM, section 4).  A warm-up longer
    than the run is all there is of it.  ValueError where the schedule is not one.
    """
    if step < 1:
        raise ValueError(f"steps are counted from 1, got step {step}")
    if schedule.warmup_steps and schedule.warmup_tokens:
        raise ValueError(
            f"schedule.warmup_steps ({schedule.warmup_steps}) and schedule.warmup_tokens ({schedule.warmup_tokens}) "
            "exclude each other: set one of them to 0"
        )
    warmup_steps = schedule.warmup_steps or schedule.warmup_tokens / tokens_per_step
    peak_step = max(1, math.ceil(warmup_steps))
    if step < peak_step:
        return peak * step / warmup_steps
    share = _share_of_peak(schedule, step=step, peak_step=peak_step, total_steps=total_steps)
    return peak * share


def mtp_factor(schedule: ScheduleConfig, *, step: int, total_steps: int) -> float:
    """What model.mtp_loss is multiplied by in step `step`, counted from 1: schedule.mtp_final_ratio in the last
    schedule.mtp_final_fraction of all steps, 1 before (DeepSeek-V3 technical report, section 4.2)."""
    final_steps = round(schedule.mtp_final_fraction * total_steps)
    return schedule.mtp_final_ratio if step > total_steps - final_steps else 1.0


def _share_of_peak(schedule: ScheduleConfig, *, step: int, peak_step: int, total_steps: int) -> float:
    decay_from = peak_step
    if schedule.name == "wsd":
        decay_from = max(peak_step, total_steps - round(schedule.decay_fraction * total_steps))
    if step <= decay_from:
        progress = 0.0
    elif step >= total_steps:
        progress = 1.0
    else:
        progress = (step - decay_from) / (total_steps - decay_from)
    match schedule.name:
        case "constant":
            return 1.0
        case "linear" | "wsd":
            remaining = 1.0 - progress
        case "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
        case _:
            raise ValueError(f"schedule.name must be cosine, wsd, linear or constant, got {schedule.name!r}")
    return schedule.min_ratio + (1.0 - schedule.min_ratio) * remaining
