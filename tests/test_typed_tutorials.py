"""Tutorials typed as they stand: every block of shell and of Python runs, one after another, in a copy of the repository."""

from pathlib import Path

import pytest

from tests.typed_page import ROOT, type_page, typed


def test_a_block_that_fails_fails_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    page = tmp_path / "page.md"
    page.write_text("""Save as `conf/own.yaml`:
```yaml
x: 1
```
```python
word = "kept"
```
```sh
test "$(cat conf/own.yaml)" = "x: 1"
echo from the shell > said.txt
```
```python
assert word == "kept" and open("said.txt").read() == "from the shell\\n"
```
```bash
make .venv && exit 1
```
""")
    type_page(page)
    page.write_text(page.read_text() + "```sh\nfalse | cat\n```\n")
    with pytest.raises(Exception, match="false"):
        type_page(page)


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs").glob("tutorial-*.md")))
def test_every_block_of_a_tutorial_runs(name: str) -> None:
    _, said = typed(name)
    assert not said
