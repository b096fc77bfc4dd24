"""Keys and tokens of a user never come into what a run writes; no shell is given anything."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalina.cli import train
from megalina.config import PretrainConfig
from megalina.credentials import find_credentials, masked, refuse_credentials, text_values
from megalina.data.indexed import IndexedWriter
from tests.commands import done

ROOT = Path(__file__).resolve().parents[2]
WANDB_KEY, HF_TOKEN, PASSWORD = "5ecret" + "0123456789abcdef" * 3, "hf_" + "S3cretToken" * 4, "netrc-Passw0rd-of-mine"
TYPED = "hf_" + "Typ3dByMistake" * 3
SECRETS = (WANDB_KEY, HF_TOKEN, PASSWORD, TYPED)


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {PASSWORD}\n")
    (home / ".netrc").chmod(0o600)
    rest = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}  # wandb leaves its own to a process's children
    return {**rest, "HOME": str(home), "WANDB_API_KEY": WANDB_KEY, "HF_TOKEN": HF_TOKEN, "OMP_NUM_THREADS": "1"}


def command(folder: Path, environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    script = [sys.executable, str(ROOT / "pretrain_gpt_moe.py"), *arguments]
    return subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=False)


def leaks(folder: Path) -> list[tuple[str, str]]:
    """(file, what) of every secret below the folder, in whatever is not compressed."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [(str(path), secret) for path in files for secret in SECRETS if secret.encode() in path.read_bytes()]


@pytest.mark.full
def test_a_run_with_keys_in_its_environment_writes_none_of_them(tmp_path: Path, environment: dict[str, str]) -> None:
    with IndexedWriter(tmp_path / "tokens", np.uint16) as writer:
        for start in range(60):
            writer.add_document([(start + i * 7) % 100 for i in range(40)])
    tiny = [
        "model.num_layers=1",
        "model.d_model=16",
        "model.num_heads=2",
        "model.num_kv_heads=2",
        "model.d_ff=16",
        "model.num_experts=2",
    ]
    short = ["train.steps=2", "train.seq_len=16", "train.eval_sequences=2", "train.micro_batch_size=4", "checkpoint.interval=1"]
    data = ["data=indexed", "data.prefix=tokens", "data.cache_dir=cache", "cluster.peak_tflops=1", "model.name=${oc.env:HOME}"]
    ran = command(tmp_path, environment, *tiny, *short, *data, "run.dir=run", "tracker.tensorboard=true")
    assert ran.returncode == 0, ran.stderr[-3000:]
    written = {path.relative_to(tmp_path / "run").parts[0] for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"config.yaml", ".hydra", "metrics.jsonl", "report.html", "wandb", "tensorboard", "checkpoints", "logs"} <= written
    assert list((tmp_path / "run").glob("wandb/*/*.wandb")), ran.stderr[-3000:]
    assert environment["HOME"] in (tmp_path / "run" / "config.yaml").read_text()  # other variables may be named
    assert leaks(tmp_path) == []
    assert not any(secret in ran.stdout + ran.stderr for secret in SECRETS)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "tracker.wandb.name=${oc.env:WANDB_API_KEY}",
            "tracker.wandb.name holds the value of WANDB_API_KEY, and would be written",
        ),
        ("tracker.wandb.tags=[a,${oc.env:HF_TOKEN}]", "tracker.wandb.tags[1] holds the value of HF_TOKEN"),
        ("model.name='x-${oc.env:WANDB_API_KEY}-y'", "model.name holds the value of WANDB_API_KEY"),
        ("model.name='\\${oc.env:WANDB_API_KEY}'", "model.name is still a reference after it was resolved"),
        (f"model.name={WANDB_KEY}", "model.name holds the value of WANDB_API_KEY"),
        (f"+tracker.wandb.api_key={PASSWORD}", "+tracker.wandb.api_key holds the password for api.wandb.ai in "),
        (f"data.tokenizer={TYPED}", "data.tokenizer holds what looks like an access token"),
        ("optim.lr=${oc.env:WANDB_API_KEY}", "optim.lr=${oc.env:WANDB_API_KEY} must be a number"),
    ],
    ids=lambda text: text[:24],
)
def test_a_key_in_a_setting_is_refused_in_one_line_that_does_not_tell_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], override: str, told: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    refused = done(train.main, override, "run.dir=run")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(told) and refused.stderr.count("\n") == 1, refused.stderr
    assert not any(secret in refused.stderr for secret in SECRETS)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_does_not_write_down_a_key_that_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    swept = done(train.main, "-m", f"model.name=a,{WANDB_KEY}", "launch.dry_run=true", "hydra.sweep.dir=sweep")
    assert (swept.returncode, leaks(tmp_path), list(tmp_path.iterdir())) == (2, [], [])
    assert not any(secret in swept.stdout + swept.stderr for secret in SECRETS)


def test_what_is_a_credential_and_what_only_sounds_like_one(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text(f"machine a.org login me password {PASSWORD}\nmachine b.org login me password short\n")
    secret = {
        name: f"value of {name}" for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "db_password", "GITHUB_PAT")
    }
    plain = {
        "TOKENIZERS_PARALLELISM": "false-and-long",
        "SSH_KEY_PATH": "long/enough/path",
        "KEY": "short",
        "MY_TOKEN": "/a/long/path",
    }
    plain |= {"KEYBOARD_LAYOUT": "a-long-layout", "WANDB_IDENTITY_TOKEN_FILE": "long/enough/path"}
    found = find_credentials({**secret, **plain}, tmp_path)
    assert set(found) == {*secret.values(), PASSWORD}
    assert found[PASSWORD] == f"the password for a.org in {tmp_path}/.netrc"
    (tmp_path / ".netrc").write_bytes(b"\xff broken")
    assert find_credentials({}, tmp_path) == {}


def test_every_text_of_the_configuration_is_looked_at() -> None:
    config = PretrainConfig()
    config.data.blend = ["1", "corpus"]
    texts = text_values(config)
    assert (
        texts["data.blend[1]"] == "corpus" and texts["tracker.wandb.project"] == "megalina" and texts["run.dir"] == config.run.dir
    )
    for key in texts:
        with pytest.raises(ValueError, match=re.escape(f"{key} holds the value of K, and would be written into the run folder")):
            refuse_credentials({**texts, key: "in <a long secret> here"}, {"a long secret": "the value of K"})
    refuse_credentials(texts, {"a long secret": "the value of K"})
    assert masked("x a long secret, hf_" + "a" * 34, {"a long secret": ""}) == "x ***, ***"


SHELLS_OF_FIXED_TEXT = (
    *("tests/cluster_tools.py", "tests/test_namespaces.py"),  # any command can be a rank
    "tests/checkpoint/hugging_face/test_continued_training.py",  # a page's commands, as its reader pastes them
    "tests/typed_page.py",  # likewise
)


def shell_uses(source: str) -> list[str]:
    """Calls in Python source that hand a text to a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            if re.fullmatch(
                r"os\.(system|popen)|subprocess\.(getoutput|getstatusoutput)|asyncio\.create_subprocess_shell|pty\.spawn", name
            ):
                found.append(f"line {node.lineno}: {name}")
        if isinstance(node, ast.ImportFrom) and node.module in ("os", "subprocess", "pty", "commands"):
            names = {alias.name for alias in node.names} & {"system", "popen", "getoutput", "getstatusoutput", "spawn"}
            found += [f"line {node.lineno}: {node.module}.{name}" for name in sorted(names)]
        if isinstance(node, ast.Call):
            shells = [word.value for word in node.keywords if word.arg == "shell"]
            if any(not (isinstance(value, ast.Constant) and value.value is False) for value in shells):
                found.append(f"line {node.lineno}: shell=")
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if called not in ("run", "Popen", "call", "check_call", "check_output"):
                continue
            words = {item.value for item in ast.walk(node) if isinstance(item, ast.Constant) and isinstance(item.value, str)}
            if {"sh", "bash", "/bin/sh", "/bin/bash"} & words:
                found.append(f"line {node.lineno}: a shell")
    return found


@pytest.mark.full
def test_no_program_of_the_repository_uses_a_shell() -> None:
    files = [
        ROOT / "pretrain_gpt_moe.py",
        *(
            p
            for top in ("megalina", "papers", "placement_lab", "tools", "benchmarks", "tests")
            for p in (ROOT / top).rglob("*.py")
        ),
    ]
    assert len(files) > 100
    found = {str(p.relative_to(ROOT)): uses for p in files if (uses := shell_uses(p.read_text(encoding="utf-8")))}
    for name in SHELLS_OF_FIXED_TEXT:
        assert all(use.endswith(": a shell") for use in found.pop(name)), name
    assert found == {}


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess\nsubprocess.run(line, shell=True)",
        "subprocess.Popen(line, shell=flag)",
        "import os\nos.system(f'rm {x}')",
        "run = os.popen",
        "from subprocess import getoutput as g\ng('ls')",
        "from os import system",
        "subprocess.run(['sh', '-c', line])",
        "subprocess.check_output(('bash', '-c', line))",
    ],
)
def test_a_shell_would_be_found(source: str) -> None:
    assert shell_uses(source)


def test_a_program_without_a_shell_is_not_accused() -> None:
    assert shell_uses("import subprocess\nsubprocess.run(['ls', x], shell=False)\nsystem = os.name\nself.system('x')") == []
