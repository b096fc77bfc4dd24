"""The files in conf/: they compose and fit; and the command says what is wrong."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from megalina.blocks.optimizers import OPTIMIZERS
from megalina.checkpoint.checksums import sum_of, write_sums
from megalina.cli import train
from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.dry_run import describe
from megalina.model.gpt import GPT
from megalina.model.init import spec_of
from megalina.perfmodel.cost.instruction_bytes import bucket_specs
from megalina.validate import check_config
from megalina.worker import load_config
from tests.conf_files import ALONE, FILES, MODELS, ROOT, ROUTERS, of_several, with_setting
from tests.test_validate import CHOICES
from tools import write_config_docs

# files


@pytest.mark.full
def test_a_file_chosen_with_others_gives_what_it_gives_alone() -> None:
    for group, names in ALONE.items():
        found, alone = of_several(group, len(names) - 1), compose([f"{group}={names[-1]}"])
        assert found == replace(alone, run=found.run)  # whose folder is named by the clock


def test_every_file_composes_and_passes_the_checks(subtests: pytest.Subtests) -> None:
    for path in FILES:
        with subtests.test(str(path)):
            group, name = path.parent.name, path.stem
            extra = ["data.prefix=PREFIX"] if "data: indexed" in (ROOT / "conf" / path).read_text() or name == "indexed" else []
            extra += ["parallel.zero=1"] if name == "lina_zero" else []
            if group == "pipeline":
                extra = ["launch.ranks=2", "parallel.pp=2", "model.num_layers=4", "train.micro_batch_size=1"]
            config = compose([f"{group}={name}", *extra]) if extra else with_setting(f"{group}={name}")
            check_config(config, config.launch.ranks)
            if group in ("model", "strategy", "optim", "schedule", "cluster"):
                part = getattr(config, group)
                assert part.name == name or ".py:" in part.name or (group, name) == ("cluster", "h100")
            if group == "pipeline":  # one of your own names a file
                assert config.strategy.pipeline == name or ".py:" in config.strategy.pipeline


def test_the_tiny_model_runs_on_1_to_4_ranks_with_every_router() -> None:
    for router in [path.stem for path in FILES if path.parent.name == "router"]:
        config = replace(compose(["model=tiny"]), router=with_setting(f"router={router}").router)
        assert (config.data.vocab_size, config.model.vocab_size) == (512, 0)
        check_config(config, 1)
        for tp, ep in ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)):
            config.parallel.tp, config.parallel.ep = tp, ep
            check_config(config, 4)


def test_a_router_keeps_what_the_model_says_unless_it_is_about_that() -> None:
    olmoe = compose(["model=olmoe_1b_7b"])
    assert (olmoe.router.kind, olmoe.router.top_k, olmoe.router.renormalize) == ("topk", 8, False)
    assert compose(["model=qwen3_30b_a3b", "router=topk_raw"]).router.renormalize is False
    assert compose(["model=qwen3_30b_a3b", "router.top_k=4"]).router.top_k == 4


def test_an_experiment_is_a_recipe_on_top_of_the_groups() -> None:
    config = compose(["experiment=laptop", "train.steps=7"])
    assert (config.model.name, config.launch.ranks, config.parallel.ep, config.train.steps) == ("laptop", 2, 2, 7)
    for path in (ROOT / "conf" / "experiment").glob("*.yaml"):
        head = path.read_text().splitlines()
        assert head[0] == "# @package _global_"
        assert any(line.startswith("#") and f"pretrain_gpt_moe.py experiment={path.stem}" in line for line in head)


def test_the_configuration_survives_its_yaml() -> None:
    config = compose(["data=blend", "optim.eps=1e-12", "tracker.wandb.tags=[a,1]"])
    assert config.data.blend == ["0.7", "stdlib", "0.3", "prose"]
    assert load_config(OmegaConf.to_yaml(OmegaConf.structured(config))) == config


def test_the_documentation_is_current() -> None:
    assert (ROOT / "docs" / "config.md").read_text() == write_config_docs.document(), "run python tools/write_config_docs.py"


def test_every_optimizer_is_a_choice_and_has_a_file() -> None:
    files = [path.stem for path in FILES if path.parent.name == "optim"]
    assert set(files) == set(OPTIMIZERS) == set(CHOICES["optim.name"])
    for reference, said in (
        ("nowhere.py:Lion", "nowhere.py: there is no such file"),
        ("megalina.batch:Batch", "optim.name=megalina.batch:Batch is no OptimizerKind"),
    ):
        config = compose([f"optim.name={reference}"])
        with pytest.raises(ValueError, match=said):
            check_config(config, 1)


def test_every_kind_of_router_has_a_file() -> None:
    assert {with_setting(f"router={name}").router.kind for name in ROUTERS} == set(CHOICES["router.kind"])


# the dry run


def test_a_dry_run_tells_layout_and_sizes() -> None:
    config = compose(["model=mixtral_8x7b", "parallel.tp=8", "parallel.ep=8", "train.global_batch_size=64"])
    text = describe(config, 64, vocab_size=32000)
    assert "64 ranks = edp 1 x ep 8 x tp 8" in text
    assert "46,7" in text
    assert "4 x 2 sequences on each of 8 data-parallel ranks" in text


@pytest.mark.parametrize("zero", [0, 1])
def test_a_dry_run_counts_what_a_rank_allocates(zero: int) -> None:
    """Norms and routers too, which tp doesn't cut; with ZeRO-1 each copy of a parameter has its share of the moments."""
    config = compose(["model=tiny", "parallel.tp=2", f"parallel.zero={zero}", "train.global_batch_size=8"])
    buckets = bucket_specs(config, 4, vocab_size=512).values()
    numel = sum(bucket.numel for bucket in buckets)
    moments = sum(2 * bucket.numel // ({"world": 4, "copies": 4, "dp": 2}[bucket.axis] if zero else 1) for bucket in buckets)
    weights, state = f"{numel * 4 / 1e6:.1f} MB of weights", f"{(numel + moments) * 4 / 1e6:.1f} MB of gradients and optimizer"
    assert f"{weights}, {state}" in describe(config, 4, vocab_size=512)


# the command, in this process


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs pretrain_gpt_moe with ranks that only write a summary: (exit code, stdout lines, stderr)."""
    rank = tmp_path / "fake_rank.py"
    rank.write_text(
        "import sys\nfrom megalina.worker import main\n"
        "def train(config):\n"
        "    if config.optim.lr > 1: raise FloatingPointError('too fast')\n"
        "    return dict(run_dir=config.run.dir, steps=config.train.steps, val_loss=config.optim.lr, top=float('inf'))\n"
        "sys.exit(main(sys.argv[1:], train))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "WORKER", (sys.executable, str(rank)))
    monkeypatch.setattr(train, "check_data", lambda config: 512)

    def run(*arguments: str) -> tuple[int, list[str], str]:
        code = train.main(arguments)
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("optm.lr=1", "there is no setting optm.lr (did you mean optim.lr?); see --help", marks=pytest.mark.full),
        ("optim.lrr=1", "there is no setting optim.lrr (did you mean optim.lr?); see --help"),
        pytest.param("lr=1", "there is no setting lr (did you mean optim.lr?); see --help", marks=pytest.mark.full),
        ("+zz=1", "there is no setting zz; see --help"),
        ("+train.stepz=1", "there is no setting train.stepz (did you mean train.steps?); see --help"),
        pytest.param("modle=tiny", "there is no setting modle (did you mean model?); see --help", marks=pytest.mark.full),
        ("experiment=lapto", "experiment=lapto: there is no such file in conf/experiment (did you mean laptop?); there are "),
        ("router=3", "router=3: router wants the name of a file in conf/router"),
        pytest.param("router.kind=3", "router.kind=3 is not one of topk, ", marks=pytest.mark.full),
        ("optim.lr=abc", "optim.lr=abc must be a number"),
        pytest.param("model.num_layers=2.5", "model.num_layers=2.5 must be a whole number", marks=pytest.mark.full),
        pytest.param(
            "train.steps=null",
            "train.steps=null: train.steps needs a value; leave it out for its default",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "optim.lr=${optim.rate}",
            "optim.lr=${optim.rate}: optim.lr refers to optim.rate, and there is no setting optim.rate; optim has name, lr",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "optim.lr", "optim.lr: a setting is given as NAME=VALUE, as in train.steps=100; see --help", marks=pytest.mark.full
        ),
        ("parallel.ep=3", "parallel.tp (1) x parallel.ep (3) must divide the number of ranks (1)"),
        pytest.param("run.dir=fake_rank.py/run", "run.dir=fake_rank.py/run: ", marks=pytest.mark.full),
        ("run.dir=/proc/nothing", "/proc/nothing: No such file or directory; run.dir must be a folder that can be written"),
        pytest.param("hydra.run.dir=here", "hydra.run.dir=here: the run folder is set by run.dir", marks=pytest.mark.full),
        ("launch.ranks=100000", "launch.ranks (100000) is more than 64 ranks for each of "),
        ("tracker.wandb.mode=onlin", "tracker.wandb.mode=onlin is not one of offline, online, disabled (did you mean online?)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path: Path, override: str, message: str) -> None:
    more = ["train.global_batch_size=200000"] if override.startswith("launch.ranks") else []
    code, out, err = command(override, *more)
    assert (code, out) == (2, [])
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("here",)] == ["fake_rank.py"]


def test_bad_data_leaves_no_folder(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: PretrainConfig) -> int:
        raise ValueError("the data is no good")

    monkeypatch.setattr(train, "check_data", refuse)
    assert command("run.dir=a/b") == (2, [], "the data is no good\n")
    assert not (tmp_path / "a" / "b").exists()


def test_a_run_leaves_its_configuration_and_ends_with_one_json_line(command, tmp_path: Path) -> None:
    code, out, err = command("run.dir=here", "optim.lr=0.5", "launch.ranks=2", "parallel.ep=2")
    assert (code, err) == (0, "")
    assert json.loads(out[-1]) == {"run_dir": "here", "steps": 100, "val_loss": 0.5, "top": None}
    assert {path.name for path in (tmp_path / "here").iterdir()} == {".hydra", ".lock", "config.yaml", "logs", "summary.json"}
    assert load_config((tmp_path / "here" / "config.yaml").read_text()).optim.lr == 0.5
    assert "optim.lr=0.5" in (tmp_path / "here" / ".hydra" / "overrides.yaml").read_text()
    assert not (tmp_path / "outputs").exists()


def test_a_rank_that_raises_gives_its_traceback_and_exit_code_1(command) -> None:
    code, out, err = command("run.dir=here", "optim.lr=2")
    assert (code, out) == (1, [])
    assert "FloatingPointError: too fast" in err
    again = "python pretrain_gpt_moe.py optim.lr=2 run.dir=here"
    assert err.splitlines()[-1] == f"next, from the beginning, without a checkpoint: {again}"


def test_a_folder_in_use_is_refused(command, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    holder = "import fcntl, time; f = open('here/.lock', 'w'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        code, _, err = command("run.dir=here")
        process.kill()
    assert code == 2
    assert err.startswith("run.dir=here: another job is running there")
    assert command("run.dir=here")[0] == 0


def test_a_sweep_has_one_run_folder_a_job_and_survives_a_failure(command, tmp_path: Path) -> None:
    code, out, err = command("-m", "hydra.sweep.dir=sweep", "router=topk,hash", "optim.lr=2,0.5")
    assert code == 1
    assert [json.loads(line)["run_dir"] for line in out if line.startswith("{")] == ["sweep/1", "sweep/3"]
    assert err.count("job 0: rank 0 of 1 failed") == 1
    configs = [load_config((tmp_path / "sweep" / job / "config.yaml").read_text()) for job in "0123"]
    settings = [(config.router.kind, config.optim.lr) for config in configs]
    assert settings == [("topk", 2), ("topk", 0.5), ("hash", 2), ("hash", 0.5)]
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"0", "1", "2", "3", "multirun.yaml"}


@pytest.mark.full
def test_bad_input_of_one_job_does_not_stop_a_sweep(command) -> None:
    code, out, err = command("-m", "hydra.sweep.dir=sweep", "parallel.ep=3,1")
    assert code == 2
    assert [json.loads(line)["run_dir"] for line in out if line.startswith("{")] == ["sweep/1"]
    assert "job 0: parallel.tp (1) x parallel.ep (3) must divide" in err


@pytest.mark.full
def test_the_jobs_of_a_sweep_may_not_share_a_folder(command, tmp_path: Path) -> None:
    code, _, err = command("-m", "run.dir=here", "optim.lr=0.1,0.2")
    assert code == 2
    assert "run.dir=here holds a job with other overrides" in err
    assert command("-m", "run.dir=run_${optim.lr}", "optim.lr=0.1,0.2")[0] == 0
    assert (tmp_path / "run_0.1" / "config.yaml").exists()


def test_a_dry_run_starts_and_writes_nothing(command, tmp_path: Path) -> None:
    code, out, err = command("launch.dry_run=true", "launch.ranks=100000", "train.global_batch_size=200000")
    assert (code, err) == (0, "")
    assert any("100000 ranks = edp 100000 x ep 1 x tp 1" in line for line in out)
    assert [path.name for path in tmp_path.iterdir()] == ["fake_rank.py"]


def test_help_names_the_groups_and_the_settings(tmp_path: Path) -> None:
    """In a process of its own, from another folder, as a user starts it."""
    script = [sys.executable, str(ROOT / "pretrain_gpt_moe.py")]
    done = subprocess.run([*script, "--help"], cwd=tmp_path, capture_output=True, text=True, env={**os.environ}, timeout=60)
    assert done.returncode == 0
    assert f"model: {', '.join(MODELS)}" in done.stdout
    for word in ("experiment=laptop", "train.exit_step", "--multirun", "num_kv_heads: 4", "torchrun", "docs/cluster.md"):
        assert word in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_data_of_more_pieces_than_the_model_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Data:
        vocab_size = 600

    monkeypatch.setitem(sys.modules, "megalina.data.source", SimpleNamespace(open_data=lambda data, seq_len, seed: Data))
    assert train.check_data(compose(["model.vocab_size=0"])) == 600
    assert train.check_data(compose(["model.vocab_size=1000"])) == 1000
    with pytest.raises(ValueError, match=r"model.vocab_size \(512\) is below the 600 pieces of the data: set model.vocab_size=0"):
        train.check_data(compose(["model.vocab_size=512"]))


# checkpoints


def saved_checkpoint(path: Path, config: PretrainConfig, vocab_size: int) -> Path:
    """A checkpoint's description, without its weights."""
    gpt = GPT(config.model, config.router, vocab_size=vocab_size, max_positions=config.train.seq_len, seed=0)
    tensors = {f"model/{name}": {"shape": list(spec_of(p).shape), "dtype": "float32"} for name, p in gpt.named_parameters()}
    tensors |= {f"exp_avg/{name}": {"shape": [1], "dtype": "float32"} for name, _ in gpt.named_parameters()}
    path.mkdir(parents=True)
    (path / ".metadata").touch()
    values = {"step": int(path.name[5:]), "config": asdict(config), "vocab_size": vocab_size}
    (path / "values.json").write_text(json.dumps({"values": values, "tensors": tensors}))
    write_sums(path, {p.name: sum_of(p) for p in list(path.iterdir())})
    return path


@pytest.mark.parametrize("setting", [pytest.param("train.init_from", marks=pytest.mark.full), "train.resume"])
def test_a_checkpoint_of_another_model_is_refused_before_a_rank_starts(command, tmp_path: Path, setting: str) -> None:
    path = saved_checkpoint(tmp_path / "old" / "step_00000020", compose(["model=tiny"]), 512)
    code, out, err = command("model=tiny", "model.d_ff=64", "run.dir=new", f"{setting}={path}")
    assert (code, out, err.count("\n")) == (2, [], 1)
    assert "is of another model: model.d_ff 128 -> 64: set back what differs" in err
    assert not (tmp_path / "new").exists()
    code, _, err = command("model=tiny", "model.num_layers=3", "run.dir=new", f"{setting}={path}")
    assert (code, "is of another model: model.num_layers 2 -> 3: " in err) == (2, True)
    assert command("model=tiny", "run.dir=new", f"{setting}={path}")[0] == 0


def test_changed_settings_are_refused_before_text_is_prepared(command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_checkpoint(tmp_path / "here" / "checkpoints" / "step_00000020", compose(["model=tiny"]), 512)

    def prepared(config: PretrainConfig) -> int:
        raise AssertionError("text is prepared")

    monkeypatch.setattr(train, "check_data", prepared)
    code, out, err = command("model=tiny", "run.dir=here", "train.dtype=bfloat16")
    assert (code, out, err.count("\n")) == (2, [], 1) and "number type: train.dtype float32 -> bfloat16: set back" in err
    code, out, err = command("model=tiny", "run.dir=here", "train.seed=1", "optim.lr=1")
    assert (code, out, err.count("\n")) == (2, [], 1) and "another run: train.seed 1234 -> 1: " in err
    path = saved_checkpoint(tmp_path / "old" / "step_00000020", compose(["model=tiny"]), 512)
    code, out, err = command("model=tiny", "model.d_ff=64", "run.dir=new", f"train.init_from={path}")
    assert (code, out, err.count("\n")) == (2, [], 1) and "another model: model.d_ff 128 -> 64: " in err


@pytest.mark.full
def test_a_run_folder_with_another_models_checkpoints_is_refused(command, tmp_path: Path) -> None:
    saved_checkpoint(tmp_path / "here" / "checkpoints" / "step_00000020", compose(["model=tiny"]), 512)
    code, _, err = command("model.num_experts=8", "run.dir=here")
    assert (code, "is of another model: model.num_experts 4 -> 8: " in err) == (2, True)
    code, _, err = command("train.resume=none", "run.dir=here")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("train.resume=none, but here has a checkpoint of step 20: choose another run.dir")
    assert command("run.dir=here")[0] == 0


def test_a_folder_that_is_no_checkpoint_is_refused(command, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    assert command("train.init_from=nothing")[::2] == (2, "nothing is not a complete checkpoint: it has no values.json\n")


@pytest.mark.full
def test_a_warning_does_not_hide_a_mistake(command, tmp_path: Path) -> None:
    many = ("launch.ranks=16", "train.global_batch_size=32", "model=tiny")
    assert "warning: 16 ranks share" in command(*many, "run.dir=good")[2]
    saved_checkpoint(tmp_path / "bad" / "checkpoints" / "step_00000020", compose(["model=tiny"]), 512)
    assert command(*many, "run.dir=bad", "model.num_experts=8")[2].startswith("checkpoint bad/")
