"""What is said and shown of an evaluation, in the terminal, on the page and in W&B."""

import re

import numpy as np
import pytest

from megalina.evaluate.findings import headline, parts, quality_line, warnings
from megalina.evaluate.measures import median_interval
from megalina.evaluate.report import page
from megalina.evaluate.report_tables import tables
from tests.evaluate.made_evaluation import FAST, made

NOISY = {"static": [20.0] * 30, "best": [19.0, 21.0] * 15}
DEVICES = {"device_ms": {"attention": 5.0, "experts": 10.0}, "link_mbit": 200.0, "slowdown": 25.0}


@pytest.mark.parametrize(
    ("latency_ms", "said"),
    [
        (
            FAST,
            "Mode best serves batches 2.00 times as fast (95% interval 2.00 to 2.00) as static: the busiest device's rows fall",
        ),
        ({"static": [10.0] * 30, "best": [20.0] * 30}, "Mode best is slower than static, 0.50 times as fast"),
        (NOISY, "Mode best is not measurably faster than static"),
        ({"static": [20.0] * 30, "lina": [19.0] * 30, "window": [16.0] * 30}, "Mode window serves batches 1.25 times"),
        ({"static": [20.0] * 30}, "With experts where training had them the busiest of 2 devices has 1.50 times the mean rows"),
    ],
)
def test_the_headline_says_what_was_found_in_one_sentence(latency_ms: dict[str, list[float]], said: str) -> None:
    line = headline(made(latency_ms))
    assert line.startswith(said) and line.endswith(".") and "\n" not in line


def test_the_headline_tells_of_loads_and_of_all_to_alls_that_changed() -> None:
    found = made(FAST)
    assert "fall from 1.50 to 1.10 times the mean (95th percentile)." in headline(found)
    found["modes"]["static"]["a2a_ms"] = 9.0
    assert "and all-to-alls take 1 instead of 9 ms of a batch." in headline(found)
    assert "rows rise from 1.50 to 1.70" in headline(made(FAST, load={"best": 1.7}))
    assert "rows stay at 1.50 times" in headline(made(FAST, load={"best": 1.5}))
    assert headline(made(FAST, ranks=1)).startswith("One device has all rows")


@pytest.mark.parametrize("count", [1, 4, 40, 41, 400])
def test_the_interval_holds_the_median_in_about_95_of_100_samples(count: int) -> None:
    random = np.random.default_rng(0)
    held = []
    for _ in range(400):
        low, high = median_interval(random.exponential(size=count).tolist())
        held.append(low <= np.log(2) <= high)
    assert (0.93 <= np.mean(held) <= 0.99) if count > 4 else low <= high
    assert median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_what_makes_times_worth_less_is_said() -> None:
    told = warnings(made({"static": [20.0] * 5}, left_out={"lina": "too few slots"}))
    assert [text.split(" ")[0] for text in told] == ["Devices", "Only", "Mode"]
    assert warnings(made(FAST, ranks=1)) == [] == warnings(made(FAST, emulated=DEVICES))
    assert warnings(made(FAST, ranks_per_node=1)) == []  # nodes of their own
    found = made(FAST, emulated=DEVICES)
    found["modes"]["window"]["overrun_share"] = 0.2
    assert "Times are not valid" in warnings(found)[0] and "20% of their time in window" in warnings(found)[0]
    found["quality_difference"] = 1e-3
    assert "something is broken" in quality_line(found) and quality_line(found) in warnings(found)
    found["modes"]["best"]["tasks"] = {"multiple_choice": None, "cloze": None, "cut_tasks": 3, "cut_tokens": 40}
    assert warnings(found)[-1].startswith("3 tasks have a longer context") and "up to 40 tokens" in warnings(found)[-1]


def test_each_part_of_the_machine_is_named_as_emulated_or_real() -> None:
    real, emulated = dict(parts(made(FAST))), dict(parts(made(FAST, emulated=DEVICES, ranks_per_node=1)))
    assert "share of the cores" in real["Device"] and "loopback" in real["Link"] and "1 node of 2 devices" in real["Node"]
    assert "experts 10 ms" in emulated["Device"] and "emulated, 200 Mbit/s" in emulated["Link"]
    assert "2 nodes of 1 device;" in emulated["Node"] and "25x dilated" in emulated["Slow motion"]


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    found = made(FAST, emulated=DEVICES, ranks_per_node=1)
    html, text = page(found), tables(found)
    for said in (
        headline(found),
        "emulated: devices (attention 5 ms, experts 10 ms",
        "links between nodes (200 Mbit/s each way)",
    ):
        assert said in text and said[1:].replace("'", "&#x27;") in html
    assert "tools/evaluate_gpt_moe.py RUN --text &#x27;a b&#x27;" in html
    for name in (
        "share of batches",
        "latency of a batch, milliseconds",
        "rows of a device / mean",
        "MoE layer",
        "milliseconds in a",
    ):
        assert name in html  # axes
    assert html.count("<h2>") == len(set(re.findall("<h2>(.*?)</h2>", html))) == 11  # a card each
    assert html.count("<svg") == html.count("</svg>") == 8  # each for a desk and for a phone
    assert "http" not in html and "<script" not in html and "src=" in html and 'src="data:' in html
    assert "Foresight" not in page(made({"static": [20.0] * 30, "ideal": [9.0] * 30})).split("<details>")[0]


def test_many_devices_and_layers_are_lines_not_bars() -> None:
    found = made(FAST)
    for mode in found["modes"].values():
        mode["layers"] = [mode["layers"][0] | {"layer": i, "device_load": [1.5] + [0.9] * 15} for i in range(26)]
    assert "rows of the busiest device / mean" in page(found) and page(found).count("<rect") < 100
