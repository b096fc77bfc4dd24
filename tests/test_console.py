"""A command's console: text that the terminal can't show, and readers that go away, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megalina.console import READER_GONE, check_text, console

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "import sys\nfrom megalina.console import command\ndef main():\n{body}\ncommand(main)\n"


def run(body: str, *, environment: dict[str, str] | None = None, flags: tuple[str, ...] = ()) -> tuple[int, bytes, str]:
    """Exit code, what was on stdout, and on stderr."""
    text = SCRIPT.format(body="\n".join(f"    {line}" for line in body.splitlines()))
    done = subprocess.run(
        [sys.executable, *flags, "-c", text],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr.decode()


def run_without_reader(body: str, *flags: str, also_stderr: bool = False) -> tuple[int, str]:
    """Exit code and stderr of a command whose reader closes its end before anything is written."""
    text = SCRIPT.format(body="\n".join(f"    {line}" for line in body.splitlines()))
    reading, writing = os.pipe()
    stderr = writing if also_stderr else subprocess.PIPE
    with subprocess.Popen([sys.executable, *flags, "-c", text], cwd=ROOT, stdout=writing, stderr=stderr) as process:
        os.close(reading)
        os.close(writing)
        said = b"" if process.stderr is None else process.stderr.read()
        return process.wait(), said.decode()


@pytest.mark.parametrize("flags", [(), ("-u",)])
@pytest.mark.parametrize(
    "body",
    [
        "print('x')",  # seen at the last flush
        "for i in range(10**5): print(i)",  # while it runs
        "try:\n    print('x', flush=True)\nexcept OSError as error:\n    print(error, file=sys.stderr)",  # as programs do
        "import argparse\nargparse.ArgumentParser().parse_args(['--help'])",
    ],
)
def test_a_reader_that_goes_away_ends_a_command_without_a_word(body: str, flags: tuple[str, ...]) -> None:
    assert run_without_reader(body, *flags) == (READER_GONE, "")


def test_the_reader_of_errors_may_go_away_too() -> None:
    assert run_without_reader("print('wrong', file=sys.stderr, flush=True)\nreturn 2", also_stderr=True)[0] == READER_GONE


def test_what_is_to_be_done_at_the_end_is_done(tmp_path: Path) -> None:
    body = f"try:\n    print('x', flush=True)\nfinally:\n    print('y', flush=True)\n    open({str(tmp_path / 'done')!r}, 'w')"
    assert run_without_reader(body) == (READER_GONE, "")
    assert (tmp_path / "done").exists()


def test_a_socket_that_was_closed_is_an_error_like_any_other() -> None:
    body = "import socket\na, b = socket.socketpair()\nb.close()\na.send(b'x')"
    code, _, said = run(body)
    assert code == 1 and "BrokenPipeError" in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_a_terminal_lacks_are_replaced(encoding: str) -> None:
    body = "print('caf\\xe9 \\u4e2d \\udce9')\nprint('\\u4e2d', file=sys.stderr)"
    code, out, said = run(body, environment={"PYTHONIOENCODING": encoding})
    assert (code, out.decode(encoding)) == (0, "café 中 \udce9\n".encode(encoding, "replace").decode(encoding))
    assert said == ("中\n" if encoding == "utf-8" else "\\u4e2d\n")


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("return 2", 2, ""),
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no')", 1, "no\n"),
        ("raise KeyboardInterrupt", 130, ""),
    ],
)
def test_the_exit_code_is_the_commands(body: str, code: int, said: str) -> None:
    assert run(body) == (code, b"", said)


def test_errors_keep_their_tracebacks() -> None:
    code, _, said = run("print('x')\n1 / 0")
    assert code == 1 and said.startswith("Traceback") and said.endswith("ZeroDivisionError: division by zero\n")


def test_a_stream_that_is_no_file_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert console(sys.stdout) is sys.stdout


def test_bytes_that_are_no_text_are_named() -> None:
    check_text(["--prompt", "café 中"], "--prompt")
    with pytest.raises(ValueError, match=r"^--prompt 'é\?b' is not UTF-8 \(byte 3 is 0xe9\): convert it, or set "):
        check_text(["é\udce9b"], "--prompt")
