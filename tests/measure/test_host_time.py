"""Where a host's time goes: instructions are put into groups, times add up, and what is run can run."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalina.compose import compose
from megalina.measure.host_time import (
    ARRIVED,
    BLOCKS,
    GROUPS,
    ROUTED,
    SUBMIT,
    TINY,
    UPDATE,
    HostTime,
    group_of,
    host_time,
    mean_of,
    median_of,
    overrides_of,
    table,
)
from megalina.perfmodel.forecast.priced_step import PricedStep
from megalina.step.plan import Plan
from megalina.validate import check_config
from tests.train.small_run import config_of, write_tokens

ONE = HostTime(100, 0.5, dict.fromkeys(GROUPS, 0.01), thread_s=0.08, others_s=0.2, asleep_s=0.1, queued_s=0.03)


def test_every_instruction_has_a_group() -> None:
    step = PricedStep(compose(["model=tiny", "parallel.ep=2"]), 2, Plan("flow", parts=2), vocab_size=512)
    groups = {s.tag: group_of(s) for s in step.program}
    assert set(groups.values()) == set(GROUPS)
    wanted = {"F:experts.0.0": BLOCKS, "B:route.1.1": ROUTED, "F:dispatch>.0.0": SUBMIT, "F:dispatch<.0.0": ARRIVED}
    assert {tag: groups[tag] for tag in wanted} == wanted and groups["U:verdict.-.0"] == UPDATE


def test_real_steps_are_split(tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens")
    found = host_time(config_of(tmp_path, "host"), torch.device("cpu"), steps=2)
    assert found.instructions > 20 and 0 < found.thread_s <= found.step_s * 1.2
    assert found.cpu_s[BLOCKS] > found.cpu_s[SUBMIT] >= 0 and found.cpu_s[UPDATE] > 0
    assert found.between_s == pytest.approx(found.thread_s - sum(found.cpu_s.values()))
    assert found.asleep_s >= 0 and (found.queued_s is None or found.queued_s >= 0)


def test_medians_are_of_steps_and_means_of_ranks() -> None:
    others = [replace(ONE, step_s=s, thread_s=s / 5, cpu_s=dict.fromkeys(GROUPS, s / 50)) for s in (0.4, 0.6, 0.9)]
    middle, mean = median_of(others), mean_of(others)
    assert (middle.step_s, middle.thread_s, middle.cpu_s[BLOCKS]) == (0.6, 0.12, pytest.approx(0.012))
    assert mean.step_s == 0.9 and mean.thread_s == pytest.approx(1.9 / 15)  # a step takes as long as the slowest rank's
    assert mean_of([replace(ONE, queued_s=None), ONE]).queued_s == ONE.queued_s
    assert median_of([replace(ONE, queued_s=None)]).queued_s is None


def test_a_row_has_what_any_host_would_pay() -> None:
    tiny = replace(ONE, thread_s=0.002)
    lines = table({"eager": ONE, f"eager, {TINY}": tiny, "flow": replace(ONE, queued_s=None), f"flow, {TINY}": tiny}).splitlines()
    assert len(lines) == 3 and lines[1].split()[0] == "eager" and lines[1].split()[-1] == "20"  # 2 ms for 100 instructions
    assert "30.0" in lines[1] and " - " in lines[2]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_run_passes_the_check(ranks: int) -> None:
    for name, words in overrides_of(ranks).items():
        config = compose(words)
        check_config(config, ranks)
        assert (config.model.d_model < 16) == name.endswith(TINY)
