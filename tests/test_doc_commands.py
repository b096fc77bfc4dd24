"""Commands in docs/*.md and README.md are ones that run: scripts, flags and settings exist, configurations pass the checks."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose as compose_any
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from megalina.cli import simulate
from megalina.compose import compose
from megalina.config import PretrainConfig
from megalina.explain import CONF
from megalina.plan_settings import strategy_of
from megalina.serve.modes import read_overrides
from megalina.step.plan import Plan
from megalina.validate import check_config, check_hardware
from tests.doc_commands import DOCUMENTS, ROOT, Command, commands_of
from tools.draw_strategies import ladder_job

ConfigStore.instance().store(name="schema", node=PretrainConfig)
COMMANDS = [command for path in (*DOCUMENTS, ROOT / "README.md") for command in commands_of(path)]
OWN = "cluster=this_machine"  # a file that tools/measure_cluster.py writes


WITH_COMMANDS = ("tools/checkpoint.py", "tools/import_routing.py")  # each with flags of its own


def of(*scripts: str) -> list[Command]:
    """Whole ones of these scripts."""
    return [c for c in COMMANDS if c.script in scripts and "..." not in c.words and OWN not in c.words]


def test_there_are_commands_and_lines_are_joined() -> None:
    assert len(COMMANDS) > 70 and {c.document for c in COMMANDS} > {"guide.md", "cluster.md", "simulator.md", "strategies.md"}
    assert not [c for c in COMMANDS if "\\" in str(c)]
    planned = next(c for c in COMMANDS if c.document == "cluster.md" and c.script == "tools/plan.py")
    assert "train.global_batch_size" in str(planned)  # of its second line


@pytest.mark.parametrize("script", sorted({c.script for c in COMMANDS}))
def test_scripts_and_their_flags_exist(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert (ROOT / script).is_file()
    own = [c for c in COMMANDS if c.script == script]
    flags = {(c.words[0] if script in WITH_COMMANDS else "", flag) for c in own for flag in c.flags}
    if script in ("pretrain_gpt_moe.py", "tools/simulate.py"):  # Hydra's
        assert {flag for _, flag in flags} <= {"--help", "--cfg", "--multirun"}
        return
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    monkeypatch.syspath_prepend(str(ROOT))
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main if flags else None
    for before, flag in sorted(flags):
        monkeypatch.setattr(sys, "argv", [script, *filter(None, [before]), "--help"])
        with pytest.raises(SystemExit):
            main()
        assert flag in capsys.readouterr().out, (script, flag)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("command", of("pretrain_gpt_moe.py"), ids=str)
def test_what_is_trained_passes_the_checks(command: Command) -> None:
    for job in command.jobs():
        config = compose([word for word in job if not word.startswith(("hydra.", "strategy.plan="))])  # a plan is a run's file
        check_config(config, command.world or config.launch.ranks)


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=[pytest.mark.full] * ("-m" in c.words), id=str(c)) for c in of("tools/simulate.py")],
)
def test_what_is_simulated_passes_the_checks(command: Command) -> None:
    """All jobs of a sweep, without simulating them."""
    assert command.jobs()
    for job in command.jobs():
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            found = simulate._job(compose_any("simulate", overrides=job), job)
        check_hardware(found.config.cluster)
        check_config(found.config, found.world)


@pytest.mark.parametrize("command", of("tools/plan.py"), ids=str)
def test_what_is_planned_passes_the_checks(command: Command) -> None:
    words = [f"cluster.{word}" if word.startswith("nodes=") else word for word in command.overrides]
    config = compose(words)
    check_hardware(config.cluster)
    if "--search" not in command.words:  # which chooses layout and batch itself
        eager = replace(config, strategy=strategy_of(Plan("eager"), config.strategy))
        check_config(eager, config.cluster.nodes * config.cluster.ranks_per_node)


@pytest.mark.parametrize("command", of("tools/draw_strategies.py"), ids=str)
def test_what_is_drawn_passes_the_checks(command: Command) -> None:
    ladder_job(*command.overrides)


OTHERS = ("tools/verify_layouts.py", "tools/analyze_alltoall.py", "tools/compare_strategies.py", "tools/evaluate_gpt_moe.py")


@pytest.mark.sampled(12)
@pytest.mark.parametrize("command", of(*OTHERS), ids=str)
def test_what_others_are_given_composes(command: Command) -> None:
    of_modes = [text for text in command.overrides if text.startswith("infer.")]
    read_overrides(of_modes)
    compose([text for text in command.overrides if text not in of_modes])


@pytest.mark.parametrize("text", ["train.stepz=3", "model=tinny", "parallel.ep=3"])
def test_a_command_that_would_be_refused_is_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.md").write_text(f"```sh\npython pretrain_gpt_moe.py model=tiny \\\n    {text}     # a remark\n```\n")
    (command,) = commands_of(tmp_path / "wrong.md")
    assert command.words == ("model=tiny", text)
    with pytest.raises(Exception, match=text.split("=")[1] if text.startswith("model") else text.split("=")[0].split(".")[-1]):
        test_what_is_trained_passes_the_checks(command)
