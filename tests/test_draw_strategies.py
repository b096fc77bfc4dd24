"""The pictures of docs/strategies.md: all are there, to one scale; times follow from bytes and devices; bad input is one line."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

from megalina.mesh import build_mesh
from megalina.parallel.trainable import Trainable
from megalina.step.strategy import STRATEGIES, training_step
from tools.draw_strategies import EXTRA, Cluster, Drawn, figures_of, ladder_job, main

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = (ROOT / "docs" / "strategies.md").read_text()
LAYERS = 2
MOST_BYTES = 60_000


def drawn(name: str, *overrides: str, cluster: Cluster | None = None) -> Drawn:
    job = ladder_job(
        f"strategy={name}", f"model.num_layers={LAYERS}", *EXTRA.get(name, ()), *overrides, cluster=cluster or Cluster()
    )
    return Drawn(job.plan, job.step(training_step(name, job.setting)))


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_document_has_a_section_the_numbers_and_a_picture_of_each_strategy(name: str) -> None:
    _, heading, rest = DOCUMENT.partition(f"\n### {name}\n")
    assert heading, f'docs/strategies.md has no section "### {name}"; what it needs: "Write your own schedule" there, step 6'
    section = rest.split("\n## ")[0].split("\n### ")[0]
    picture = ROOT / "docs" / "images" / "strategies" / f"{name}.png"
    assert f"(images/strategies/{name}.png)" in section and picture.stat().st_size < MOST_BYTES
    for line in (ROOT / "conf" / "strategy" / f"{name}.yaml").read_text().splitlines():
        if not line.startswith(("#", "name:")):
            assert line.strip().replace(": ", "=") in section, line


def test_an_exchange_with_the_wire_to_itself_takes_its_bytes_and_the_latency() -> None:
    """Serial has no gradients beside its tokens: 256 tokens go to 2 experts each, 512 numbers of 4 bytes, a quarter stays."""
    sent_s = [e.end_s - e.start_s for e in drawn("serial").timeline.events(0) if e.op == "tokens" and e.kind == "send"]
    assert sent_s == pytest.approx([256 * 2 * 512 * 4 * 3 / 4 / 62.5e6 + 1e-3] * 4 * LAYERS)
    heavier = drawn("serial", "router.top_k=4", cluster=Cluster(link_mbit=1000, latency_ms=0)).timeline.events(0)
    assert [e.end_s - e.start_s for e in heavier if e.op == "tokens" and e.kind == "send"] == pytest.approx(
        [256 * 4 * 512 * 4 * 3 / 4 / 125e6] * 4 * LAYERS
    )


def test_a_device_computes_as_long_as_the_ladder_says() -> None:
    """Forward 10 and 14 ms a layer and 2% of each; backward twice that; small instructions take no time here."""
    computes = [e for e in drawn("eager").timeline.events(0) if e.kind == "compute"]
    large_s = sum(e.end_s - e.start_s for e in computes if e.name in ("attention", "experts"))
    assert large_s == pytest.approx(LAYERS * 3 * 24e-3 * 1.02)
    assert {round((e.end_s - e.start_s) * 1e3, 3) for e in computes if e.name not in ("attention", "experts")} == {0}


@pytest.mark.parametrize("zero", [0, 1])
def test_buckets_are_those_of_the_model_but_for_their_padding(zero: int) -> None:
    overrides = f"model.num_layers={LAYERS}", "model.num_experts=2", f"parallel.zero={zero}", "strategy=lina_nopack"
    job = ladder_job(*overrides, cluster=Cluster(ranks=1))
    real = Trainable(job.config, build_mesh(), vocab_size=320, device=torch.device("cpu"), wish_to_stop=lambda: False)
    assert job.setting.buckets.keys() == real.setting.buckets.keys()
    for name, spec in real.setting.buckets.items():
        found = job.setting.buckets[name]
        assert (found.axis, found.sharded, found.piece) == (spec.axis, spec.sharded, spec.piece)
        assert 0.97 * spec.numel < found.numel <= spec.numel, name


def test_packing_halves_the_group_and_doubles_the_experts() -> None:
    one, two = (ladder_job("strategy=lina", f"strategy.packing={k}").setting.buckets["experts.0"].numel for k in (1, 2))
    assert two == 2 * one


@pytest.mark.full
def test_all_pictures_have_one_scale_and_say_that_their_time_is_virtual() -> None:
    steps = {name: drawn(name) for name in ("eager", "flow")}
    figures = figures_of(steps, note="virtual time")
    assert figures.keys() == {"eager", "flow", "all"}
    assert len({figure.axes[0].get_xlim() for figure in figures.values()}) == 1
    assert [axis.get_title(loc="left") for axis in figures["all"].axes] == [step.title for step in steps.values()]
    for figure in figures.values():
        assert "virtual time" in figure.axes[-1].get_xlabel()
    assert f"{steps['flow'].timeline.step_s * 1e3:.0f} ms a step" in steps["flow"].title


@pytest.mark.full
def test_files_are_written_and_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "new"), "--strategies", "eager,lina_zero", f"model.num_layers={LAYERS}"]) == 0
    files = sorted((tmp_path / "new").iterdir())
    assert [file.name for file in files] == ["all.png", "eager.png", "lina_zero.png"]
    assert all(1000 < file.stat().st_size < MOST_BYTES for file in files)
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["--strategies", "eager,quick"], "quick: choose among eager"),
        (["--strategies", "flow", "strategy.parts=3"], "strategy.parts (3)"),
        (["parallel.tp=2", "parallel.ep=2", "model.num_heads=4", "model.num_kv_heads=4"], "parallel.tp is 2"),
        (["cluster.attention_ms=0", "cluster.experts_ms=0"], "how fast is a device?"),
        (["model.num_leyers=2"], "num_leyers"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], wrong: str) -> None:
    assert main(["--out", str(tmp_path), *arguments]) == 2
    said = capsys.readouterr()
    assert wrong in said.err and len(said.err.strip().splitlines()) == 1 and not said.out
    assert not list(tmp_path.iterdir())


def test_a_folder_in_a_folder_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "a" / "b")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_overrides_in_a_list_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^ladder_job\(\['model.num_heads=7'\]\): give overrides one by one, as in ladder_job"):
        ladder_job(["model.num_heads=7"])  # type: ignore[arg-type]


def test_the_steps_to_a_schedule_of_ones_own_run_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    how_to = DOCUMENT.split("\n## Write your own schedule\n")[1].split("\n[docs/examples/own_schedule.py]")[0]
    blocks = [textwrap.dedent(block) for block in re.findall(r"^   ```python\n(.*?)^   ```$", how_to, re.DOTALL | re.MULTILINE)]
    assert len(blocks) == 3
    exec("\n".join(blocks), {})
    printed = capsys.readouterr().out.splitlines()
    assert {"F:embed.-.0", "B:dense.1>.-.0"} <= {tag.partition("[")[0] for tag in printed}
