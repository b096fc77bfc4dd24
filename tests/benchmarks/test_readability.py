"""Sentences of a page in Markdown, and their figures."""

import pytest

from benchmarks.readability import at_commit, figures_of, main, sentences_of

PAGE = """# A heading isn't one

First one, in two
lines. See [the second one](there.md). `code.py. Too` is a word!

| a table | isn't. One |
|---|---|

- an item
- whoever reads 1,024 tokens

```bash
echo This is. Not one.
```
"""


def test_code_tables_and_headings_are_no_sentences() -> None:
    assert [" ".join(words) for words in sentences_of(PAGE)] == [
        "First one in two lines",
        "See the second one",
        "code is a word",
        "an item",
        "whoever reads 1,024 tokens",
    ]


def test_figures_are_means_and_shares() -> None:
    found = figures_of(PAGE + "\n" + "long " * 31)
    assert found.words == 19 + 31 and found.words_per_sentence == pytest.approx(50 / 6)
    assert found.long_share == pytest.approx(1 / 6) and found.stumbles == pytest.approx(1000 / 50)
    with pytest.raises(ValueError, match="no sentence"):
        figures_of("# Nothing")


def test_a_table_of_pages_and_mistakes_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["README.md", "docs/design.md"])
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["| README.md", "| docs/design.md"]
    with pytest.raises(SystemExit, match=r"readability: docs/nothing\.md: .*No such file"):
        main(["docs/nothing.md"])
    with pytest.raises(ValueError, match="knows no commit 'nothing'"):
        at_commit("nothing", "README.md")
