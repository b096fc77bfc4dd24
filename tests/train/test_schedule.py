"""Learning rates, each against a hand-made value or a list that torch's own scheduler makes."""

import pytest
import torch

from megalina.config import ScheduleConfig
from megalina.train.schedule import learning_rate, mtp_factor


def rates(schedule: ScheduleConfig, total: int, tokens_per_step: int = 100) -> list[float]:
    return [
        learning_rate(schedule, peak=2.0, step=s, total_steps=total, tokens_per_step=tokens_per_step) for s in range(1, total + 1)
    ]


def test_warmup_climbs_from_above_zero_to_the_peak() -> None:
    assert rates(ScheduleConfig(name="constant", warmup_steps=4), 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_warmup_in_tokens_equals_warmup_in_steps() -> None:
    for name in ("cosine", "wsd", "linear", "constant"):
        in_steps = rates(ScheduleConfig(name=name, warmup_steps=5), 20)
        assert rates(ScheduleConfig(name=name, warmup_tokens=500), 20, tokens_per_step=100) == in_steps


def test_warmup_in_tokens_that_is_no_whole_number_of_steps_never_exceeds_the_peak() -> None:
    values = rates(ScheduleConfig(name="constant", warmup_tokens=250), 4, tokens_per_step=100)
    assert values == pytest.approx([0.8, 1.6, 2.0, 2.0], abs=1e-15)


@pytest.mark.parametrize("warmup", [0, 5])
def test_cosine_is_torchs_cosine_after_the_warmup(warmup: int) -> None:
    total, peak_step = 25, max(1, warmup)
    sgd = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=total - peak_step, eta_min=0.2)
    expected = []
    for _ in range(total - peak_step + 1):
        expected.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step()
    values = rates(ScheduleConfig(name="cosine", warmup_steps=warmup, min_ratio=0.1), total)
    assert values[peak_step - 1 :] == pytest.approx(expected, rel=1e-12)


def test_linear_falls_by_equal_amounts_to_the_smallest_rate() -> None:
    values = rates(ScheduleConfig(name="linear", min_ratio=0.5), 5)
    assert values == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0], abs=1e-15)


def test_wsd_is_stable_until_the_last_share_of_the_steps() -> None:
    values = rates(ScheduleConfig(name="wsd", warmup_steps=2, decay_fraction=0.4, min_ratio=0.0), 10)
    assert values == pytest.approx([1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0], abs=1e-15)


def test_a_warmup_longer_than_the_run_only_climbs() -> None:
    for name in ("cosine", "wsd", "linear"):
        assert rates(ScheduleConfig(name=name, warmup_steps=40), 4) == pytest.approx([0.05, 0.1, 0.15, 0.2])


def test_steps_beyond_the_end_keep_the_last_rate() -> None:
    for name in ("cosine", "wsd", "linear"):
        schedule = ScheduleConfig(name=name, min_ratio=0.25)
        assert learning_rate(schedule, peak=2.0, step=31, total_steps=10, tokens_per_step=1) == 0.5


def test_multi_token_prediction_weighs_less_in_the_last_share_of_the_steps() -> None:
    schedule = ScheduleConfig(mtp_final_fraction=0.3, mtp_final_ratio=0.25)
    assert [mtp_factor(schedule, step=s, total_steps=10) for s in range(1, 11)] == [1.0] * 7 + [0.25] * 3
    assert [mtp_factor(ScheduleConfig(), step=s, total_steps=10) for s in range(1, 11)] == [1.0] * 10


def test_a_single_step_runs_at_the_peak() -> None:
    for name in ("cosine", "wsd", "linear", "constant"):
        assert rates(ScheduleConfig(name=name), 1) == [2.0]


def test_contradictions_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps \(3\).*warmup_tokens \(7\)"):
        rates(ScheduleConfig(warmup_steps=3, warmup_tokens=7), 2)
    with pytest.raises(ValueError, match="'cosin'"):
        rates(ScheduleConfig(name="cosin"), 2)
    with pytest.raises(ValueError, match="got step 0"):
        learning_rate(ScheduleConfig(), peak=1.0, step=0, total_steps=1, tokens_per_step=1)
