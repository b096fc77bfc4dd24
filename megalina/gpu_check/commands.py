"""Parts that are commands of this project, as a user types them, and what is read of what they leave in OUT."""

import json
import subprocess
import sys
from pathlib import Path

from megalina.gpu_check.found import FAILED, OK, Found

ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 25  # of what was printed, on the page
QUIET = ("tracker=minimal", "launch.ranks=1", "parallel.ep=1")
CPU_SIZES = ("model=tiny", "train.seq_len=64", "train.dtype=float32")
TRAINED = ("experiment=laptop", "schedule.warmup_steps=5", "train.eval_interval=10", "checkpoint.interval=10")
KEPT = ("steps", "train_loss", "val_loss", "tokens_per_s", "mfu", "peak_memory_gb", "total_params", "active_params")
GPT2 = ("model=gpt2_moe", "train.seq_len=1024", "train.micro_batch_size=16", "train.global_batch_size=16")
OLMOE = ("model=olmoe_1b_7b", "model.num_layers=2", "train.seq_len=2048", "train.micro_batch_size=4", "train.global_batch_size=4")
SPEED = ("train.steps=14", "train.eval_interval=0", "checkpoint.interval=0", "train.dtype=bfloat16", "schedule.warmup_steps=2")


def py(*words: str) -> list[str]:
    return [sys.executable, *words]


def printed(said: str, folder: Path) -> Found:
    """What it printed stands on the page as it is."""
    return Found(lines=said.strip().splitlines()[-LAST_LINES:])


def star(device: str, folder: Path) -> list[str]:
    words = ("--ranks", "1", "--json", str(folder / "star.json"), f"launch.device={device}", "model=laptop")
    return py("tools/verify_layouts.py", *words)


def read_star(said: str, folder: Path) -> Found:
    rows = json.loads((folder / "star.json").read_text())["rows"]
    equal = sum(row["equal"] for row in rows)
    return Found(numbers={"rows": len(rows), "equal": equal}, lines=[f"{equal} of {len(rows)} rows equal one process on the CPU"])


def pretrain(device: str, run: Path, *words: str) -> list[str]:
    return py("pretrain_gpt_moe.py", *words, *QUIET, f"launch.device={device}", f"run.dir={run}")


def train(device: str, folder: Path) -> list[str]:
    return pretrain(device, folder / "run", *TRAINED, "train.steps=20", *_sizes(device))


def resume(device: str, folder: Path) -> list[str]:
    words = (*TRAINED, "train.steps=22", f"train.resume={folder / 'run'}")
    return pretrain("cpu", folder / "resumed", *words, *_sizes(device))


def _sizes(device: str) -> tuple[str, ...]:
    return ("train.dtype=bfloat16",) if device == "cuda" else CPU_SIZES


def read_run(name: str, said: str, folder: Path) -> Found:
    """What a run says of itself in OUT/`name`."""
    summary = json.loads((folder / name / "summary.json").read_text())
    mfu = f", MFU {summary['mfu']:.1%}" if summary["mfu"] else ""
    line = (
        f"{summary['steps']} steps, loss {summary['train_loss']:.3f}, {summary['tokens_per_s']:,.0f} tokens/s{mfu}, "
        f"at most {summary['peak_memory_gb']:.2f} GB"
    )
    why = "" if summary["finished"] else "the run did not finish"
    return Found(FAILED if why else OK, why=why, numbers={key: summary[key] for key in KEPT}, lines=[line])


def generate(device: str, folder: Path) -> list[str]:
    words = ("--prompt", "def ", "--max-tokens", "40", "--temperature", "0", "--device", device)
    return py("tools/generate.py", str(folder / "run"), *words)


def read_text(said: str, folder: Path) -> Found:
    text = said.strip()
    return Found(OK if text else FAILED, why="" if text else "no text", lines=[repr(text[:120])])


def evaluate(device: str, folder: Path) -> list[str]:
    return py("tools/evaluate_gpt_moe.py", str(folder / "run"), "--batches", "10", "--decode", "4", "--out", str(folder / "eval"))


def read_eval(said: str, folder: Path) -> Found:
    modes = json.loads((folder / "eval" / "eval.json").read_text())["modes"]
    p50_ms = {name: mode["p50_ms"] for name, mode in modes.items()}
    text = ", ".join(f"{name} {ms:.1f} ms" for name, ms in p50_ms.items())
    return Found(numbers={"p50_ms": p50_ms}, lines=[f"a batch in the median: {text}"])


def measure(device: str, folder: Path) -> list[str]:
    out = ("--out", str(folder / "this_gpu.yaml"), "--json", str(folder / "measured.json"))
    return py("tools/measure_cluster.py", "--ranks", "1", "--device", device, "--seconds", "0.1", *out)


def forecasts(device: str, folder: Path) -> Found:
    """From what `measure` has found, which is cluster=this_gpu meanwhile."""
    conf, found = ROOT / "conf" / "cluster" / "this_gpu.yaml", folder / "check.json"
    conf.write_text((folder / "this_gpu.yaml").read_text())
    try:
        words = ("--ranks", "1", "--device", device, "--out", str(conf), "--json", str(found))
        code = subprocess.run(py("tools/measure_cluster.py", "--check", *words), cwd=ROOT).returncode
    finally:
        conf.unlink()
    if code:
        return Found(FAILED, why=f"exit code {code}")
    rows = {name: (1e3 * row["predicted_s"], 1e3 * row["measured_s"]) for name, row in json.loads(found.read_text()).items()}
    lines = [f"{name}: {predicted:.1f} ms forecast, {took:.1f} measured" for name, (predicted, took) in rows.items()]
    return Found(numbers={"predicted_and_measured_ms": rows}, lines=lines)


def host(device: str, folder: Path) -> list[str]:
    words = ("--ranks", "1", "--device", device, "--json", str(folder / "host.json"))
    return py("tools/measure_cluster.py", "--host", *words)


def read_host(said: str, folder: Path) -> Found:
    steps = json.loads((folder / "host.json").read_text())
    us = {name: 1e6 * step["thread_s"] / step["instructions"] for name, step in steps.items()}
    text = ", ".join(f"{name} {value:.0f}" for name, value in us.items())
    line = f"CPU time of the program's thread per instruction, us: {text}"
    return Found(numbers={"us_per_instruction": us, "steps": steps}, lines=[line])
