"""Pack the wheels that a machine with torch, but without a network, may lack for `tools/gpu_check.py`; the same as: make gpu-kit

    python tools/gpu_kit.py --out gpu-kit                  for Python 3.11, 3.12 and 3.13 on Linux, x86-64
    python tools/gpu_kit.py --out gpu-kit --python 3.12    for one of them

Carry the folder there, and install with the command that is printed.  torch and numpy are not packed: such a machine has them.
Exit code 1: it is larger than 60 MB.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megalina.arguments import Parser
from megalina.console import command

PYTHONS = ("3.11", "3.12", "3.13")
PACKAGES = ("hydra-core", "omegaconf", "sentencepiece", "safetensors", "rich", "packaging", "pyyaml")
SOURCE_ALONE = "antlr4-python3-runtime==4.9.*"  # omegaconf's; pure Python, built here
PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64")
MOST_MB = 60.0
ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-kit"), metavar="FOLDER", help="default: gpu-kit")
    parser.add_argument("--python", default=",".join(PYTHONS), metavar="A,B", help=f"versions (default: {','.join(PYTHONS)})")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for words in commands(args.out, args.python.split(",")):
        if subprocess.run(words).returncode:
            print(f"this failed: {' '.join(words)}", file=sys.stderr)
            return 1
    wheels = sorted(args.out.glob("*.whl"))
    megabytes = sum(file.stat().st_size for file in wheels) / 1e6
    print(f"{len(wheels)} wheels, {megabytes:.1f} MB, in {args.out}; on the machine with the GPU, in this checkout:")
    print(f"  pip install --no-index --find-links {args.out.name} {' '.join(PACKAGES)}")
    print("  python tools/gpu_check.py --out gpu-check")
    return int(megabytes > MOST_MB)


def commands(out: Path, pythons: Sequence[str]) -> list[list[str]]:
    """pip's, one after another, in the versions of the lock."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    lines = [[*pip, "wheel", "--no-deps", "--wheel-dir", str(out), SOURCE_ALONE]]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    for version in pythons:
        target = ["--only-binary=:all:", "--python-version", version, *platforms, "-c", str(LOCK)]
        lines.append([*pip, "download", *target, "--find-links", str(out), "--dest", str(out), *PACKAGES])
    return lines


if __name__ == "__main__":
    command(main)
