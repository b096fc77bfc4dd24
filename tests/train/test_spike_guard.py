"""The spike guard tells a jump from noise and from the way down, and does so alike wherever it goes on."""

import random

from megalina.config import GuardConfig
from megalina.train.guard import SpikeGuard
from megalina.train.sample_windows import after, pairs


def falling(steps: int, seed: int = 0) -> list[float]:
    """Losses of a run that learns, with noise and a bad batch now and then."""
    noise = random.Random(seed)
    return [2.0 + 4.0 * 0.98**i + noise.gauss(0.0, 0.05) for i in range(steps)]


def spikes(losses: list[float], **settings: object) -> list[int]:
    guard = SpikeGuard(GuardConfig(**({"spike": "skip"} | settings)))  # type: ignore[arg-type]
    found = []
    for i, loss in enumerate(losses):
        if guard.is_spike(loss):
            found.append(i)
        else:
            guard.accept(loss)
    return found


def test_a_run_that_learns_has_no_spikes() -> None:
    assert [spikes(falling(600, seed)) for seed in range(20)] == [[]] * 20


def test_a_jump_is_a_spike_and_does_not_move_the_measure() -> None:
    losses = falling(300)
    for i in (200, 201, 202, 250):
        losses[i] += 1.5
    assert spikes(losses) == [200, 201, 202, 250]
    assert spikes(losses, spike="none") == []


def test_no_verdict_before_a_quarter_of_the_window() -> None:
    losses = [5.0, 5.01] * 8
    assert spikes([*losses[:15], 9.0], window=64) == []
    assert spikes([*losses, 9.0], window=64) == [16]


def test_steps_without_noise_need_a_rise_in_nats() -> None:
    """The deviation of equal losses is zero: any rise is infinitely many of it."""
    assert spikes([5.0] * 30 + [5.1, 5.3], min_rise=0.2) == [31]


def test_the_state_goes_on_in_another_guard() -> None:
    losses = falling(100)
    one, other = SpikeGuard(GuardConfig(spike="skip")), SpikeGuard(GuardConfig(spike="skip"))
    for loss in losses:
        one.accept(loss)
    other.load(one.state())
    assert [one.score(x) for x in (1.0, 2.5, 4.0)] == [other.score(x) for x in (1.0, 2.5, 4.0)]


def test_batches_start_behind_the_windows_that_they_would_touch() -> None:
    windows = pairs([16, 24, 40, 41])
    assert [after(first, 8, windows) for first in (0, 8, 9, 16, 23, 24, 32, 33, 41)] == [0, 8, 24, 24, 24, 24, 32, 41, 41]
    assert after(0, 8, []) == 0
    assert after(10, 8, pairs([16, 24, 24, 48])) == 48
