"""A run that changes its layout at every stop: does it stay the run that never stopped?

    python benchmarks/reshard.py --json reshard.json

tp=2 ep=2 ZeRO-1 on 4 ranks, then ep=4 on 4 ranks, then one rank, then two pipeline stages, then tp=2 ep=2 again, by the public
command, each resumed with train.resume=verify; against one uninterrupted run in the first layout, in float64 and float32.  Then
one byte of a shard is flipped, and the next start must name it and go on from the checkpoint before.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {
    "tp=2 ep=2 zero=1": ["launch.ranks=4", "parallel.tp=2", "parallel.ep=2", "parallel.zero=1"],
    "tp=1 ep=4 zero=0": ["launch.ranks=4", "parallel.ep=4"],
    "one rank": ["launch.ranks=1"],
    "pp=2 tp=2 zero=1": ["launch.ranks=4", "parallel.pp=2", "parallel.tp=2", "parallel.zero=1", "strategy.pipeline=zb_h1"],
}
LEGS = ["tp=2 ep=2 zero=1", "tp=1 ep=4 zero=0", "one rank", "pp=2 tp=2 zero=1", "tp=2 ep=2 zero=1"]
LEG, INTERVAL = 10, 5  # steps; of checkpoints
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}  # relative, of the loss


def pretrain(run: Path, dtype: str, layout: str, *more: str) -> str:
    """Run the public command; what it wrote to stderr."""
    command = [
        *(sys.executable, str(ROOT / "pretrain_gpt_moe.py"), f"run.dir={run}", f"train.dtype={dtype}"),
        *("model=tiny", "router=sigmoid", "tracker=minimal", "tracker.samples=0", f"train.steps={LEG * len(LEGS)}"),
        *("train.global_batch_size=8", "train.micro_batch_size=2", "train.eval_interval=0", f"checkpoint.interval={INTERVAL}"),
        *("schedule.warmup_steps=5", *LAYOUTS[layout], *more),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{layout}: exit code {done.returncode}\n{done.stderr}")
    return done.stderr


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def said(stderr: str, word: str) -> str:
    return next((line for line in stderr.splitlines() if word in line), "")


def moved(folder: Path, dtype: str) -> dict[str, Any]:
    """The run that changes its layout against the one that doesn't."""
    whole, cut = folder / f"whole {dtype}", folder / f"cut {dtype}"
    print(f"{dtype}: uninterrupted, {LEGS[0]}", file=sys.stderr)
    pretrain(whole, dtype, LEGS[0])
    legs = []
    for i, layout in enumerate(LEGS):
        print(f"{dtype}: steps {i * LEG + 1} to {(i + 1) * LEG}, {layout}", file=sys.stderr)
        stderr = pretrain(cut, dtype, layout, f"train.exit_step={(i + 1) * LEG}", "train.resume=verify")
        first = slice(i * LEG, (i + 1) * LEG)
        worst = max(abs(a - b) / abs(a) for a, b in zip(losses(whole)[first], losses(cut)[first], strict=True))
        legs.append({"layout": layout, "largest_error": worst, "verified": said(stderr, "verified")})
    return {"dtype": dtype, "tolerance": TOLERANCE[dtype], "legs": legs, "run": cut}


def flipped(run: Path, dtype: str) -> dict[str, Any]:
    """Flip a byte in the newest checkpoint's largest shard and train on."""
    newest = max((run / "checkpoints").glob("step_*"))
    shard = max(newest.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    print(f"{dtype}: one bit flipped in the middle of {newest.name}/{shard.name}", file=sys.stderr)
    stderr = pretrain(run, dtype, LEGS[-1])
    return {
        "file": f"{newest.name}/{shard.name}",
        "named": said(stderr, shard.name).strip(),
        "resumed": said(stderr, "resumed from").replace(f"{run}/", ""),
        "set_aside": [p.name for p in (run / "checkpoints").glob("*.damaged")],
        "losses": losses(run),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here too")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        results = [moved(folder, dtype) for dtype in TOLERANCE]
        before = losses(results[0]["run"])
        damage = flipped(results[0]["run"], "float64")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    good = True
    for result in results:
        allowed = f"allowed {result['tolerance']:.0e}"
        print(f"{result['dtype']}: largest relative difference of the loss to the uninterrupted run ({allowed})")
        for leg in result["legs"]:
            good &= leg["largest_error"] <= result["tolerance"]
            print(f"  {leg['layout']:<18} {leg['largest_error']:.1e}   {leg['verified']}")
        good &= all("verified" in leg["verified"] for leg in result["legs"][1:])
        result["run"] = ""
    again = max(abs(a - b) for a, b in zip(before, damage.pop("losses"), strict=True))
    print(f"one bit flipped in {damage['file']}:\n  {damage['named']}\n  {damage['resumed']}; set aside: {damage['set_aside']}")
    print(f"  largest difference to the losses before: {again:.1e}")
    good &= is_named(damage) and again <= TOLERANCE["float64"]
    if arguments.json:
        arguments.json.write_text(json.dumps({"moved": results, "flipped": damage, "good": good}, indent=1) + "\n")
    return 0 if good else 1


def is_named(damage: dict[str, Any]) -> bool:
    before = f"step_{LEG * len(LEGS) - INTERVAL:08d}"
    return bool(damage["named"]) and len(damage["set_aside"]) == 1 and before in damage["resumed"]


if __name__ == "__main__":
    from megalina.console import command

    command(main)
