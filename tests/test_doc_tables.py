"""Tables in docs/*.md are what their commands print: recomputed here, to the last digit that is shown."""

import importlib.util
import re

import pytest

from megalina.step.strategy import STRATEGIES
from tests.doc_commands import ROOT, commands_in
from tools.draw_strategies import _parser, ladder_job, steps_of

STRATEGIES_MD = ROOT / "docs" / "strategies.md"
ROW = re.compile(r"^\| `(\w+)` \| (.*) \|$", re.MULTILINE)
NEW_ROW = "rows for docs/strategies.md as its commands print them (a new strategy: step 6 of 'Write your own schedule' there):"


def columns() -> list[dict[str, float]]:
    """Milliseconds a step of each strategy, by the commands below the table."""
    section = STRATEGIES_MD.read_text().split("\n## All strategies in one table\n")[1].split("\n## ")[0]
    drawn = [c for c in commands_in(section, "strategies.md") if c.script == "tools/draw_strategies.py"]
    out = []
    for command in drawn:
        steps = steps_of(_parser().parse_intermixed_args(command.words))
        out.append({name: 1e3 * step.timeline.step_s for name, step in steps.items()})
    return out


def written(name: str, found: list[dict[str, float]]) -> str:
    """A row's cells."""
    cells = [f"{column[name]:.0f}" for column in found]
    if name != "eager":
        cells = [f"{cell}, {column['eager'] / column[name]:.2f}x" for cell, column in zip(cells, found, strict=True)]
    return " | ".join(cells)


@pytest.mark.full
def test_the_table_of_strategies_is_what_its_commands_give() -> None:
    found = columns()
    assert len(found) == 3
    table = dict(ROW.findall(STRATEGIES_MD.read_text().split("\n## All strategies in one table\n")[1].split("\n## ")[0]))
    wanted = {name: written(name, found) for name in STRATEGIES}
    wrong = [f"| `{name}` | {cells} |" for name, cells in wanted.items() if table.get(name) != cells]
    assert table == wanted, "\n".join([NEW_ROW, *wrong])


def test_the_schedule_of_ones_own_takes_what_the_document_says() -> None:
    spec = importlib.util.spec_from_file_location("own_schedule", ROOT / "docs" / "examples" / "own_schedule.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    job, text = ladder_job(), STRATEGIES_MD.read_text()
    step_ms = {f.__name__: 1e3 * job.step(f(job.setting)).step_s for f in (example.eager, example.weights_under_tokens)}
    printed = re.findall(r"^(\w+): (\d+) ms a step in virtual time$", text, re.MULTILINE)
    assert printed == [(name, f"{ms:.0f}") for name, ms in step_ms.items()]
    gain = 1 - step_ms["weights_under_tokens"] / step_ms["eager"]
    assert f"It is {gain:.0%} faster on the ladder's model in virtual time" in text
