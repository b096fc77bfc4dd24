"""Runs parts, each in a process of its own with a time limit and a log, and writes the page."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from megalina.gpu_check.commands import LAST_LINES, ROOT
from megalina.gpu_check.found import FAILED, OK, SKIPPED, Found
from megalina.gpu_check.parts import Part

TOOL = ROOT / "tools" / "gpu_check.py"
LEAST_S = 5.0  # no part is started with less


def check(parts: Sequence[Part], device: str, out: Path, seconds: float) -> int:
    """Returns the exit code: 1 where a part failed.  JSON and page are written anew after each part."""
    out.mkdir(parents=True, exist_ok=True)
    about, until_s = machine(device), time.perf_counter() + seconds
    found: dict[str, Found] = {}
    for part in parts:
        left_s = until_s - time.perf_counter()
        if part.gpu_only and device != "cuda":
            found[part.name] = Found(SKIPPED, why="it needs a GPU")
        elif left_s < LEAST_S:
            found[part.name] = Found(SKIPPED, why=f"the {seconds:.0f} s are over: --only {part.name}")
        else:
            print(f"{part.name}: {part.about} ...", end=" ", flush=True)
            found[part.name] = one = run(part, device, out, min(part.limit_s, left_s))
            print(f"{outcome(one)} ({one.seconds:.0f} s)", flush=True)
        result = {"machine": about, "parts": {name: asdict(one) for name, one in found.items()}}
        (out / "gpu_check.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "gpu_check.md").write_text(page(about, [(part, found[part.name]) for part in parts if part.name in found]))
    print(f"the page: {out / 'gpu_check.md'}")
    return int(any(one.outcome == FAILED for one in found.values()))


def run(part: Part, device: str, out: Path, limit_s: float) -> Found:
    """What it says on stdout and stderr is in OUT/PART.log.  After `limit_s` it is ended with all that it has started."""
    log, folder, began_s = out / f"{part.name}.log", out.absolute(), time.perf_counter()
    own = (sys.executable, str(TOOL), "--part", part.name, "--device", device, "--out", str(folder))
    words = part.command(device, folder) if part.command is not None else own
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with log.open("w+") as file:
        file.write(f"$ {' '.join(words)}\n")
        file.flush()
        began = file.tell()
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file.seek(began)
        said = file.read()
    if code is None:
        found = Found(FAILED, why=f"not done within {limit_s:.0f} s")
    elif code:
        found = Found(FAILED, why=f"exit code {code}")
    else:
        try:
            whole = part.look is None
            found = part.read(said, folder) if whole else Found(**json.loads((folder / f"{part.name}.json").read_text()))
        except (OSError, KeyError, ValueError, TypeError) as error:
            found = Found(FAILED, why=f"what it left can't be read: {type(error).__name__}: {error}")
    found.seconds = time.perf_counter() - began_s
    if found.outcome == FAILED:
        found.lines += ["", *said.splitlines()[-LAST_LINES:]]
    return found


def machine(device: str) -> dict[str, str]:
    """What stands at the top of the page."""
    out = {"Python": platform.python_version(), "torch": torch.__version__, "system": platform.platform(), "device": device}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        out |= {
            "GPU": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "memory": f"{total / 1e9:.1f} GB, {free / 1e9:.1f} free",
            "CUDA": str(torch.version.cuda),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return out


def page(about: Mapping[str, str], found: Sequence[tuple[Part, Found]]) -> str:
    """In Markdown."""
    counts = {what: sum(one.outcome == what for _, one in found) for what in (OK, FAILED, SKIPPED)}
    lines = ["# GPU check", "", ", ".join(f"{n} {what}" for what, n in counts.items() if n) + ".", ""]
    lines += [*(f"- {key}: {value}" for key, value in about.items()), "", "| part | what | outcome | s |", "|---|---|---|---|"]
    lines += [f"| {part.name} | {part.about} | {outcome(one)} | {one.seconds:.0f} |" for part, one in found]
    for part, one in found:
        if one.lines:
            lines += ["", f"## {part.name}", "", "```", *one.lines, "```"]
    return "\n".join(lines) + "\n"


def outcome(one: Found) -> str:
    return f"{one.outcome}: {one.why}" if one.why else one.outcome
