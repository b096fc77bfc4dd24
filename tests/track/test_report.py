import json
import re
import zlib
from base64 import b64encode
from html.parser import HTMLParser

import numpy as np
import pytest

from megalina.cli.report import main
from megalina.track.expert_load import (
    DARK,
    LEVELS,
    LIGHT,
    MAX_SNAPSHOTS,
    NO_TOKEN,
    LoadHistory,
    colour_levels,
    keep_snapshot,
    layer_numbers,
    load_figure,
    png,
)
from megalina.track.report import Sample, rebuild_report, write_report
from megalina.track.svg_chart import MAX_POINTS, Reference, Series, line_chart, short, smoothed, ticks
from tests.track.fake_run import UNIGRAM_LOSS, write_run

SUMMARY = {"val_loss": 2.7, "unigram_loss": UNIGRAM_LOSS, "total_params": 23_400_000, "active_params": 9_000_000}
VOID = {"meta", "img", "br"}


class Checked(HTMLParser):
    """Fails on tags that don't close in order; collects text and what a page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.loads, self.text = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def parsed(path):
    page = Checked()
    page.feed(path.read_text())
    assert page.open == []
    return page


def test_the_page_is_well_formed_and_loads_nothing_from_elsewhere(tmp_path):
    page = parsed(write_report(write_run(tmp_path / "run"), samples=[Sample("def ", "f():")], summary=SUMMARY))
    assert "script" not in page.tags and "link" not in page.tags
    assert page.loads and all(value.startswith("data:image/png;base64,") for value in page.loads)
    assert "url(" not in (tmp_path / "run" / "report.html").read_text()


def test_the_page_shows_everything_a_reader_looks_for(tmp_path):
    page = parsed(write_report(write_run(tmp_path / "run"), samples=[Sample("def ", "spam():")], summary=SUMMARY | {"mfu": 0.41}))
    for title in (
        "Loss",
        "Expert load over time",
        "Learning rate",
        "Throughput",
        "Load entropy",
        "Load: fullest expert over mean",
    ):
        assert title in page.text
    assert f"3.60 below unigram entropy {UNIGRAM_LOSS:.2f}" in page.text
    for told in (
        "23.4M",
        "9M active",
        "41.0%",
        "def spam():",
        "num_experts: 8",
        "layer 3",
        "Dead experts",
        "No token was dropped.",
    ):
        assert told in page.text, told
    assert page.text.count("unigram entropy 6.30") == 3  # the tile, and the reference line of both widths of the chart


def test_the_commands_continue_generate_and_compare_this_run(tmp_path):
    run_dir = write_run(tmp_path / "a run")
    (run_dir / "checkpoints" / "step_00000060").mkdir(parents=True)
    overrides = ["model=tiny", "run.dir=elsewhere", "train.steps=60", "data.prefix=my data"]
    text = parsed(write_report(run_dir, samples=[], summary={"overrides": overrides})).text
    assert f"python pretrain_gpt_moe.py model=tiny 'data.prefix=my data' train.steps=120 'run.dir={run_dir}'" in text
    assert f"tools/generate.py '{run_dir}/checkpoints/step_00000060' --prompt" in text
    assert f"tools/compare_runs.py {tmp_path}" in text


def test_the_overrides_are_those_that_the_run_folder_holds_and_their_lack_is_told(tmp_path):
    run_dir = write_run(tmp_path / "run", until=40)
    assert "add the overrides of the run's own command" in parsed(rebuild_report(run_dir)).text
    (run_dir / ".hydra").mkdir()
    (run_dir / ".hydra" / "overrides.yaml").write_text("- model=tiny\n- optim.lr=1e-3\n")
    text = parsed(rebuild_report(run_dir)).text
    assert f"python pretrain_gpt_moe.py model=tiny optim.lr=1e-3 run.dir={run_dir}" in text and "add the overrides" not in text


def test_tasks_have_a_curve_each_and_their_last_scores(tmp_path):
    write_run(tmp_path / "run", steps=20)
    assert "above chance" not in parsed(write_report(tmp_path / "run", samples=[], summary={})).text
    path = tmp_path / "run" / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for step in (9, 19):
        for name in ("cloze", "brackets"):
            for key, value in (("centred_accuracy", 0.01 * step), ("centred_accuracy_error", 0.05), ("bits_per_byte", None)):
                records[step][f"eval/{name}/{key}"] = value
        records[step] |= {"eval/cloze/bits_per_byte": 2.5, "eval/seconds": 1.0}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    page = parsed(write_report(tmp_path / "run", samples=[], summary={}))
    assert "Last: cloze 0.190 ±0.050, brackets 0.190 ±0.050." in page.text and "Last: cloze 2.500." in page.text
    assert page.text.count("Tasks: ") == 2 and "chance" in page.text


def test_an_unfinished_run_continues_with_its_own_number_of_steps(tmp_path):
    run_dir = write_run(tmp_path / "run", until=40)
    text = parsed(write_report(run_dir, samples=[], summary={"overrides": ["train.steps=60", "train.exit_step=40"]})).text
    assert "step 40 of 60" in text
    assert f"python pretrain_gpt_moe.py train.steps=60 run.dir={run_dir}" in text


def test_text_that_looks_like_html_stays_text(tmp_path):
    run_dir = write_run(tmp_path / "run & <b>co</b>", layers=2, router="<i>topk</i>")
    nasty = "</pre><script>alert(1)</script> & \x00\ud800"
    page = parsed(write_report(run_dir, samples=[Sample("<em>", nasty)], summary={}))
    assert "script" not in page.tags and "em" not in page.tags and "i" in page.tags
    assert "</pre><script>alert(1)</script> &" in page.text and "<i>topk</i>" in page.text and "run & <b>co</b>" in page.text


def test_settings_that_changed_on_the_way_are_told(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {"changed_settings": {"optim.lr": [0.001, 0.003], "data.prefix": ["", "<b>"]}})
    lines[4] = json.dumps(json.loads(lines[4]) | {"warnings": ["the model is dead: <it>"]})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = parsed(write_report(run, samples=[], summary=SUMMARY))
    step = json.loads(lines[3])["step"]
    assert f"Warning, step {step + 1}: the model is dead: <it>." in page.text
    assert f"changed since step {step - 1}: optim.lr 0.001 -> 0.003, data.prefix '' -> <b>." in page.text


def test_expert_choice_runs_are_marked(tmp_path):
    marked = parsed(write_report(write_run(tmp_path / "e", router="expert_choice"), samples=[], summary={})).text
    plain = parsed(write_report(write_run(tmp_path / "t"), samples=[], summary={})).text
    assert "looks at later tokens of the group" in marked and "looks at later tokens" not in plain


def test_the_timeline_and_the_waits_are_shown_where_they_were_measured(tmp_path):
    plain = parsed(write_report(write_run(tmp_path / "plain"), samples=[], summary={}))
    assert "Timeline" not in plain.text and "Waits" not in plain.text and "timeline of a step" not in plain.text
    run_dir = write_run(tmp_path / "timed")
    (run_dir / "timeline.png").write_bytes(b"\x89PNG picture")
    (run_dir / "trace.json.gz").touch()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = [line | {"a2a_exposed_s": 0.25, "grads_exposed_s": 0.125, "params_exposed_s": 0} for line in lines]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in measured))
    page = parsed(write_report(run_dir, samples=[], summary={}))
    assert "data:image/png;base64," + b64encode(b"\x89PNG picture").decode() in page.loads
    assert "open trace.json.gz of the run folder in ui.perfetto.dev" in page.text
    assert "Waits" in page.text and "gradients" in page.text and "ZeRO-1" not in page.text
    assert "What rank 0 computed" in page.text and "pipeline rank" not in page.text
    stages = {
        "pp_exposed_s": 0.5,
        "stage_idle_shares": [0.25, 0.5],
        "stage_pp_exposed_s": [0.5, 1],
        "stage_a2a_exposed_s": [0, 2],
    }
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line | stages) + "\n" for line in measured))
    (run_dir / "config.yaml").write_text((run_dir / "config.yaml").read_text() + "\nparallel: {pp: 2}\n")
    page = parsed(rebuild_report(run_dir))
    assert "other stages" in page.text and "What the first rank of each stage computed" in page.text
    assert "025.0%500.0 ms0.0 ms150.0%1000.0 ms2000.0 ms" in page.text  # cells of a table


def test_times_of_emulated_devices_are_marked(tmp_path):
    note = "emulated devices, all times 200x dilated"
    told = parsed(write_report(write_run(tmp_path / "told"), samples=[], summary={"emulation": note})).text
    assert f"Times: {note}. Their ratios count" in told
    killed = write_run(tmp_path / "killed")
    config = (killed / "config.yaml").read_text()
    assert "Their ratios count" not in parsed(rebuild_report(killed)).text
    (killed / "config.yaml").write_text(config.replace("experts_ms: 0.0", "experts_ms: 14.0"))
    assert "Times: emulated devices. Their" in parsed(rebuild_report(killed)).text


def test_the_page_can_be_made_again_from_the_folder(tmp_path, capsys):
    run_dir = write_run(tmp_path / "run")
    before = write_report(run_dir, samples=[Sample("a", "b")], summary=SUMMARY).read_text()
    (run_dir / "report.html").unlink()
    assert main([str(run_dir)]) == 0
    assert (run_dir / "report.html").read_text() == before
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")


def test_config_and_metrics_alone_are_enough_also_of_a_killed_run(tmp_path):
    run_dir = write_run(tmp_path / "run", until=7)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    assert "step 7 of 60" in parsed(rebuild_report(run_dir)).text


@pytest.mark.parametrize("until", [0, None])
def test_a_folder_without_steps_or_without_a_run_is_an_error_of_one_line(tmp_path, capsys, until):
    run_dir = tmp_path if until is None else write_run(tmp_path / "run", until=until)
    assert main([str(run_dir)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_whose_every_loss_is_broken_still_has_a_page(tmp_path):
    run_dir = write_run(tmp_path / "run", until=1)
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": null, "skipped": true, "load_entropy": [null]}\n')
    text = parsed(rebuild_report(run_dir)).text
    assert "No step had a finite loss." in text and "1 of 1 steps were skipped" in text


def test_snapshots_of_a_long_run_are_few_evenly_spaced_and_include_the_last_step():
    for total in (1, 7, 200, 201, 999, 100_003):
        kept = [step for step in range(1, total + 1) if keep_snapshot(step, total)]
        assert kept[-1] == total and len(kept) <= MAX_SNAPSHOTS + 1
        assert len(kept) >= min(total, MAX_SNAPSHOTS // 2)
        assert len({b - a for a, b in zip(kept[:-1], kept[1:-1])}) <= 1


def test_layers_carry_the_models_numbers():
    model = {"num_layers": 7, "dense_layers_first": 1, "moe_every": 2}
    assert layer_numbers(model, 3) == [2, 4, 6]
    assert layer_numbers({}, 2) == [0, 1]


def test_colours_are_neutral_at_balance_and_apart_for_no_token():
    levels = colour_levels(np.array([0.0, 1e-9, 0.25, 0.5, 1.0, 2.0, 4.0, 100.0]))
    middle = LEVELS // 2
    assert levels.tolist() == [NO_TOKEN, 0, 0, middle // 2, middle, middle + middle // 2, LEVELS - 1, LEVELS - 1]
    for colours in (LIGHT, DARK):
        table = colours.table()
        assert tuple(table[middle]) == colours.balanced and tuple(table[NO_TOKEN]) == colours.no_token


def test_the_picture_holds_the_levels_it_was_given():
    matplotlib_image = pytest.importorskip("PIL.Image")
    import io

    levels = np.random.default_rng(0).integers(0, NO_TOKEN + 1, (5, 9), dtype=np.uint8)
    data = png(levels, LIGHT)
    shown = np.asarray(matplotlib_image.open(io.BytesIO(data)).convert("RGB"))
    assert (shown == LIGHT.table()[levels]).all()
    assert zlib.crc32(data[-8:-4]) == int.from_bytes(data[-4:], "big")


def test_the_figure_for_trackers_shows_at_most_so_many_layers():
    history = LoadHistory([1, 2], np.full((2, 40, 4), 0.25))
    assert len(load_figure(history, list(range(40)), max_layers=5).axes) == 5


def points_of(svg):
    return [tuple(map(float, point.split(","))) for line in re.findall(r'points="([^"]*)"', svg) for point in line.split()]


def test_a_chart_puts_its_points_where_a_straight_line_is_straight():
    points = points_of(line_chart([Series("a", range(11), [3.0 * x for x in range(11)], "red")], label="a"))
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(points, points[1:])]
    assert max(slopes) - min(slopes) < 0.01 and slopes[0] < 0  # up on the page is a smaller y


def test_a_long_line_is_thinned_but_keeps_its_extremes():
    ys = np.zeros(100_000)
    ys[12_345], ys[77_777] = 9.0, -9.0
    points = points_of(line_chart([Series("a", range(len(ys)), ys.tolist(), "red")], label="a"))
    assert len(points) <= MAX_POINTS + 2
    assert sorted({y for _, y in points})[0] < sorted({y for _, y in points})[1] < sorted({y for _, y in points})[2]


def test_gaps_cut_a_line_and_a_lone_point_is_a_dot():
    svg = line_chart([Series("a", range(6), [1.0, 2.0, None, 3.0, float("nan"), 1.0], "red")], label="a")
    assert svg.count("<polyline") == 1 and svg.count("<circle") == 2


@pytest.mark.parametrize("value", [0.0, 5.0, -2.0, 1e-30])
def test_a_flat_line_and_a_single_point_can_be_drawn(value):
    for xs in ([1], [1, 2, 3]):
        svg = line_chart([Series("a", xs, [value] * len(xs), "red")], label="a", references=[Reference("r", value)])
        assert "nan" not in svg and "inf" not in svg


def test_smoothing_keeps_a_constant_and_a_slope_and_gaps():
    assert smoothed([2.0, None, 2.0], 3) == [2.0, None, 2.0]
    assert smoothed([float(i) for i in range(50)], 10) == pytest.approx([float(i) for i in range(50)])


def test_ticks_are_round_and_inside():
    assert ticks(0.1, 9.9, 5) == [2.0, 4.0, 6.0, 8.0]
    assert [short(value) for value in (1_234_567, 350_000, 0.25, 1e-5, 0)] == ["1.235M", "350k", "0.25", "1e-05", "0"]
