"""A model that was trained on two ranks and exported has the same loss in transformers: the commands of docs/hugging-face.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint.hugging_face.test_prove import needs_transformers

ROOT = Path(__file__).resolve().parents[3]
SECTION = "## From a model to a tuned one, on a laptop"


@needs_transformers
@pytest.mark.full
def test_what_was_trained_has_the_same_loss_in_transformers(tmp_path: Path) -> None:
    (commands,) = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/hugging-face.md").read_text().partition(SECTION)[2], re.DOTALL)[:1]
    for name in ("docs", "tools", "conf", "megalina", "pretrain_gpt_moe.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        ["bash", "-e", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert ran.returncode == 0, ran.stderr
    said = dict(line.split(": ", 1) for line in ran.stdout.splitlines() if line.startswith(("same ", "loss ")))
    assert said["same tokens"] == "True"
    here, there = float(said["loss here"]), float(said["loss there"])
    assert abs(here - there) <= 2e-6 * max(1.0, here), said
    assert here < 5.5  # of log(512) = 6.24 in the beginning: it has learned
    report = (tmp_path / "tuned/start/import_report.json").read_text()
    assert "tokenizer.json" in report and (tmp_path / "tuned/back/tokenizer.json").is_file()
