"""Every number of a command line has a range, every file a folder; a mistake is one line that names it and the reason."""

import argparse
import ast
from pathlib import Path

import pytest

from megalina.arguments import Parser, new_file, number, whole

TOOLS = sorted((Path(__file__).resolve().parent.parent / "tools").glob("*.py"))


@pytest.mark.parametrize(
    ("read", "text", "said"),
    [
        (whole(1, 8), "0", "0 must be a whole number from 1 to 8"),
        (whole(1, 8), "nine", "nine must be a whole number from 1 to 8"),
        (whole(1, 8), "1.5", "1.5 must be a whole number from 1 to 8"),
        (whole(), "9" * 5000, "9" * 40 + " must be a whole number from 0 to 9223372036854775807"),
        (number(0, 5), "nan", "nan must be a number from 0 to 5"),
        (number(0, 5), "inf", "inf must be a number from 0 to 5"),
        (number(0, 5, above=True), "0", "0 must be a number above 0 and at most 5"),
        (number(), "-5", "-5 must be a number from 0 to 1e+18"),
        (new_file, "/no/such/x.json", "/no/such/x.json: there is no folder /no/such"),
    ],
)
def test_what_can_not_be_is_named_with_the_reason(read, text, said, capsys) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        read(text)
    assert str(raised.value) == said
    parser = Parser()
    parser.add_argument("--count", type=read)
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--count", text])
    assert capsys.readouterr().err == f"argument --count: {said}; see --help\n"


def test_numbers_in_their_range_are_read() -> None:
    assert [whole(1, 8)("8"), number(0, 5)("0"), number(0, 5, above=True)("5e-324"), whole(-1)("-1")] == [8, 0.0, 5e-324, -1]
    assert isinstance(whole()("3"), int) and isinstance(number()("3"), float)


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_no_tool_takes_a_number_without_a_range(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    types = [word.value for call in calls for word in call.keywords if word.arg == "type"]
    assert not [node.lineno for node in types if isinstance(node, ast.Name) and node.id in ("int", "float")]
    bounded = [node for node in types if isinstance(node, ast.Call) and ast.unparse(node.func) in ("whole", "number")]
    parsers = [node.lineno for node in calls if ast.unparse(node.func) == "argparse.ArgumentParser"]
    assert not (bounded and parsers), "megalina.arguments.Parser says a mistake in one line"


@pytest.mark.parametrize("words", [["--vocab-size", "-5"], ["--tokens", "-5"], ["--tokens", "nan"], ["--tokens", "inf"]], ids=str)
def test_the_planner_refuses_such_numbers(words, capsys) -> None:
    from megalina.cli.plan import main

    with pytest.raises(SystemExit, match="2"):
        main(["model=tiny", "cluster=h100_400g", *words])
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith(f"argument {words[0]}: {words[1]} must be a ")
