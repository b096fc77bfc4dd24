"""Pictures of the site that `make docs` has built, on a wide and on a narrow screen.

    make docs && python tools/draw_site.py --out docs/images/site

Needs Chromium (on Debian: apt-get install chromium).  The pages are served from this machine, so what is drawn came from here.
"""

import argparse
import functools
import http.server
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megalina.arguments import Parser  # noqa: E402

PAGES = {"start": "", "tutorial": "tutorial-first-training/", "api": "api/", "results": "results/"}
SCREENS = {"wide": (1280, 900), "narrow": (390, 844)}  # pixels; the second is a phone's
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
TIME_LIMIT_S = 60.0  # of a picture


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Requests are no news."""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address under which a browser on this machine finds the files."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def draw(browser: str, address: str, size: tuple[int, int], file: Path) -> None:
    """A picture of what fits on the screen.  RuntimeError with what the browser said where it drew none."""
    with tempfile.TemporaryDirectory(prefix="megalina_site_") as profile:
        width, height = size
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        command += [f"--window-size={width},{height}", "--virtual-time-budget=3000", f"--screenshot={file}", address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
    if not file.exists():
        raise RuntimeError(f"{browser} drew nothing of {address}: {(done.stderr or 'it said nothing').strip().splitlines()[-1]}")


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    browser = args.browser or next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        if browser is None:
            raise ValueError("there is no Chromium: apt-get install chromium, or name a browser of its kind with --browser")
        if not (args.site / "index.html").is_file():
            raise ValueError(f"{args.site} has no index.html: run make docs first")
        args.out.mkdir(parents=True, exist_ok=True)
        with served(args.site) as address:
            for page, path in PAGES.items():
                for screen, size in SCREENS.items():
                    file = args.out / f"{page}-{screen}.png"
                    file.unlink(missing_ok=True)
                    draw(browser, address + path, size, file)
                    print(file)
    except (ValueError, RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where PAGE-SCREEN.png go")
    parser.add_argument("--site", type=Path, default=ROOT / "site", metavar="FOLDER", help="what make docs wrote (default: site)")
    parser.add_argument("--browser", metavar="PROGRAM", help=f"default: the first of {', '.join(BROWSERS)}")
    return parser


if __name__ == "__main__":
    from megalina.console import command

    command(main)
