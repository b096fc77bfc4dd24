"""The log's index: every entry, every negative result, and nothing by hand."""

import re

from tools import write_log_index
from tools.write_log_index import MOST_LETTERS, PAGE, Entry, entries_of, shortened, with_index

PAGE_OF_TWO = """# Log

Machine A.

## 2026-12-02: `auto`, and what it's worth

It is faster. **Negative**: not on 4x2,
where it takes 5.5 ms more. So be it.

**Negative: tests are slow.** They take long.

## 2026-12-01: first

Nothing went wrong.
"""


def test_it_has_all_entries_and_all_that_went_wrong() -> None:
    page = with_index(PAGE_OF_TWO)
    assert "| 2026-12-02 | [`auto`, and what it's worth](#2026-12-02-auto-and-what-its-worth) |" in page
    assert "- not on 4x2, where it takes 5.5 ms more ([2026-12-02](#2026-12-02-auto-and-what-its-worth))" in page
    assert "- tests are slow (" in page
    assert page.count("\n- ") == 2 and page.index("| 2026-12-01 |") < page.index("## 2026-12-02")
    assert with_index(page) == page


def test_a_long_result_is_cut_between_words() -> None:
    text = shortened("`code " + "word " * 100)
    assert len(text) < MOST_LETTERS + 6 and text.endswith("word ...`")


def test_the_log_has_its_index() -> None:
    assert write_log_index.main(["--check"]) == 0
    entries = entries_of(PAGE.read_text())
    assert len(entries) > 25 and all(re.match(r"2026-\d\d-\d\d", entry.when) and entry.title for entry in entries)
    assert sum(len(entry.negatives) for entry in entries) >= 30
    assert len({entry.anchor for entry in entries}) == len(entries)


def test_an_anchor_has_no_punctuation() -> None:
    assert Entry("2026-11-26: inference on slow devices, all 26 layers", "").anchor == (
        "2026-11-26-inference-on-slow-devices-all-26-layers"
    )
