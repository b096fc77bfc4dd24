"""Every mistake in a configuration is one ValueError with its numbers."""

import math
from pathlib import Path

import pytest

from megalina.config import PretrainConfig, settings
from megalina.step.strategy import STRATEGIES
from megalina.validate import (
    advice,
    check_config,
    check_machine,
    check_paths,
    has_wandb_key,
    in_words,
    nearest,
    value_at,
)

ROOT = Path(__file__).resolve().parent.parent
DOCS = (ROOT / "docs" / "config.md").read_text()


def changed(**settings: object) -> PretrainConfig:
    """The default configuration with settings like model__num_heads=3."""
    config = PretrainConfig()
    for key, value in settings.items():
        *path, name = key.split("__")
        setattr(value_at(config, ".".join(path)), name, value)
    return config


def test_the_defaults_are_good_on_1_2_and_4_ranks() -> None:
    for world in (1, 2, 4):
        check_config(PretrainConfig(), world)
    for tp in (1, 2, 4):
        for ep in (1, 2, 4):
            if tp * ep <= 4:
                check_config(changed(parallel__tp=tp, parallel__ep=ep), 4)


def test_every_number_of_the_schema_has_a_range_and_its_default_is_in_it() -> None:
    for key, value, may_be in settings(PretrainConfig()):
        if isinstance(value, int | float) and not isinstance(value, bool):
            assert may_be["low"] <= value <= may_be["high"], key
        if "choices" in may_be:
            assert value in may_be["choices"], key


def test_no_number_may_be_infinite_or_out_of_its_range(subtests: pytest.Subtests) -> None:
    for key, low in [(key, may_be["low"]) for key, _, may_be in settings(PretrainConfig()) if "low" in may_be]:
        for bad in (math.nan, math.inf, -1 if low >= 0 else 2 * low):
            with subtests.test(key, bad=bad), pytest.raises(ValueError, match=f"^{key}={bad} must be"):
                check_config(changed(**{key.replace(".", "__"): bad}), 1)


CHOICES = {key: may_be["choices"] for key, _, may_be in settings(PretrainConfig()) if "choices" in may_be}
CHOICES["strategy.name"] = (*STRATEGIES, "auto")


def test_an_unknown_choice_is_named_with_the_known_ones(subtests: pytest.Subtests) -> None:
    for key, choices in CHOICES.items():
        with subtests.test(key), pytest.raises(ValueError, match=f"^{key}=3 is not one of {choices[0]}"):
            check_config(changed(**{key.replace(".", "__"): "3"}), 1)


def test_the_docs_tell_bounds_and_choices() -> None:
    lines = {line.split("`")[1]: line for line in DOCS.splitlines() if line.startswith("| `")}
    for key, _, may_be in settings(PretrainConfig()):
        for choice in may_be.get("choices", ()):
            assert f"`{choice}`" in lines[key], key
        if "low" in may_be:
            assert in_words(may_be["low"], may_be["high"]).partition(" and ")[0] in lines[key], key
    assert "| at least 0 and below 1 |" in lines["model.dropout"] and "| at least 0 and at most 1 |" in lines["parallel.zero"]
    assert all(line.split(" | ")[-1].strip("| ") for key, line in lines.items() if "=" not in key)  # what it means


def test_the_nearest_word_is_suggested() -> None:
    assert nearest("top_k", CHOICES["router.kind"]) == " (did you mean topk?)"
    assert nearest("zzz", CHOICES["router.kind"]) == ""
    with pytest.raises(ValueError, match=r"router.kind=top-k is not one of .*\(did you mean topk\?\)"):
        check_config(changed(router__kind="top-k"), 1)


FLOW = {"strategy__name": "flow", "strategy__parts": 2}
MICRO_BATCH = {"router__group": "micro_batch"}
BY_PROBABILITY = {"router__drop": "probability", "router__capacity_factor": 1.5}
DENSE_ONCE = {
    **{"parallel__dispatch": "once_per_rank", "router__kind": "dense"},
    **{"router__balance_loss": 0.0, "router__renormalize": False},
}
GROUP_LIMITED = {"router__kind": "group_limited", "model__num_experts": 8}


@pytest.mark.parametrize(
    ("world", "settings", "message"),
    [
        (4, {"parallel__tp": 3}, r"parallel.tp \(3\) x parallel.ep \(1\) must divide .* \(4\): use a multiple of 3"),
        (4, {"parallel__tp": 4, "parallel__ep": 2}, r"parallel.tp \(4\) x parallel.ep \(2\) must divide .* \(4\)"),
        (3, {"parallel__ep": 3}, r"parallel.ep \(3\) must divide model.num_experts \(4\)"),
        (8, {"parallel__tp": 8, "train__global_batch_size": 2}, r"parallel.tp \(8\) must divide model.num_heads \(4\)"),
        (4, {"parallel__tp": 4, "model__num_kv_heads": 2}, r"parallel.tp \(4\) must divide model.num_kv_heads \(2\)"),
        (4, {"parallel__tp": 4, "train__seq_len": 130}, r"parallel.tp \(4\) must divide train.seq_len \(130\)"),
        (2, {"parallel__tp": 2, "model__shared_d_ff": 33}, r"parallel.tp \(2\) must divide model.shared_d_ff \(33\)"),
        (2, {"parallel__tp": 2, "model__moe_every": 2, "model__dense_d_ff": 33}, r"must divide model.dense_d_ff \(33\)"),
        (
            2,
            {"parallel__cp": 4},
            r"parallel.tp \(1\) x parallel.cp \(4\) x parallel.ep \(1\) must divide .* \(2\): use a multiple of 4",
        ),
        (1, {"parallel__cp_kind": "all_to_all"}, "parallel.cp_kind=all_to_all does nothing with parallel.cp=1"),
        (2, {"parallel__dispatch": "once_per_rank"}, "parallel.dispatch=once_per_rank does nothing with parallel.ep=1"),
        (
            2,
            {**DENSE_ONCE, "parallel__ep": 2},
            "parallel.dispatch=once_per_rank with router=dense: every token goes",
        ),
        (
            2,
            {"parallel__cp": 2, "train__seq_len": 130},
            r"train.seq_len \(130\) must be a multiple of .* = 4, .*: set it to 128 or 132",
        ),
        (
            *(8, {"parallel__cp": 2, "parallel__tp": 4, "train__seq_len": 12}),
            r"parallel.tp \(4\) must divide the 6 tokens that a rank of parallel.cp \(2\) has .* take a multiple of 16",
        ),
        (
            2,
            {"parallel__cp": 2, "train__global_batch_size": 3},
            r"x 1 data-parallel ranks \(2 ranks / parallel.tp 1 / parallel.cp 2\)",
        ),
        (
            *(8, {"parallel__cp": 8, "parallel__cp_kind": "all_to_all", "train__global_batch_size": 8}),
            r"parallel.cp \(8\) must divide model.num_heads \(4\) = 4; set parallel.cp_kind=all_gather",
        ),
        (
            *(
                4,
                {
                    "parallel__cp": 4,
                    "parallel__cp_kind": "all_to_all",
                    "model__num_heads": 12,
                    "model__num_kv_heads": 6,
                    "model__head_dim": 8,
                },
            ),
            r"model.num_kv_heads \(6\) = 6 must be a multiple of parallel.cp \(4\), or divide it",
        ),
        (1, {"model__num_heads": 5}, r"model.num_heads \(5\) must divide model.d_model \(64\)"),
        (1, {"model__num_kv_heads": 3}, r"model.num_kv_heads \(3\) must divide model.num_heads \(4\)"),
        (1, {"model__head_dim": 17}, "needs an even head size, not 17"),
        (1, {"model__shared_gate": True}, "model.shared_gate=true does nothing with model.shared_d_ff=0"),
        (1, {"model__activation_limit": 3.0}, "activation_limit=3 does nothing with model.activation=swiglu"),
        (1, {"model__mtp_loss": 0.1}, "model.mtp_loss=0.1 does nothing with model.mtp_layers=0"),
        (1, {"schedule__mtp_final_ratio": 0.5}, "schedule.mtp_final_ratio=0.5 does nothing with model.mtp_layers=0"),
        (1, {"model__mtp_layers": 1, "schedule__mtp_final_ratio": 0.5}, "schedule.mtp_final_ratio=0.5 go together"),
        (1, {"model__mtp_layers": 1, "schedule__mtp_final_fraction": 0.5}, "schedule.mtp_final_ratio=1 go together"),
        (1, {"model__mtp_layers": 128}, r"predicts 129 tokens ahead, and train.seq_len is 128"),
        (1, {"model__dense_layers_first": 3}, r"\(3\) is more than model.num_layers \(2\)"),
        (1, {"model__max_positions": 64}, r"train.seq_len \(128\) is more than model.max_positions \(64\)"),
        (1, {"model__num_experts": 0}, "model.num_experts=0 must be at least 1"),
        (1, {"model__dropout": 1.0}, "model.dropout=1.0 must be at least 0 and below 1"),
        (1, {"parallel__zero": 2}, "parallel.zero=2 must be at least 0 and at most 1"),
        (1, {"router__top_k": 5}, r"router.top_k \(5\) is more than model.num_experts \(4\)"),
        (1, {**GROUP_LIMITED, "router__num_groups": 3}, r"router.num_groups \(3\) must divide model.num_experts \(8\)"),
        (1, {**GROUP_LIMITED, "router__num_groups": 2, "router__groups_per_token": 3}, r"\(3\) is more than .* \(2\)"),
        (1, {**GROUP_LIMITED, "router__num_groups": 8}, r"router.top_k \(2\) is more than the 1 experts"),
        (1, {"router__num_groups": 2}, "works with router=group_limited or group_limited_softmax alone, not with topk"),
        (1, {"router__bias_update_rate": 0.1}, r"\(0.1\) works with router=sigmoid or group_limited alone, not with topk"),
        (1, {"router__noise_std": 0.1}, r"\(0.1\) works with router=noisy_topk alone, not with topk"),
        (1, {"router__group": "global"}, r"gradient accumulation \(4 micro-batches a step\): set train.micro_batch_size=8"),
        (4, {"router__group": "global", "router__capacity_factor": 1.5}, "router.capacity_factor=1.5 would need the scores"),
        (4, {"router__group": "global", "router__kind": "expert_choice"}, "router=expert_choice would need the scores"),
        (4, {**FLOW, "router__group": "global"}, "balances all ranks' tokens .* strategy.parts=2: set router.group=micro"),
        (4, {**FLOW, **MICRO_BATCH, "router__kind": "expert_choice"}, "=expert_choice route a whole .*: set router.group=seq"),
        (4, {**FLOW, **MICRO_BATCH, **BY_PROBABILITY}, r"factor=1.5 route a whole .*: set router.drop=position,"),
        (4, {"train__global_batch_size": 12}, r"\(12\) .* \(2\) x 4 .* = 8: set it to 8 or 16, or train.micro_batch_size to 1"),
        (4, {"train__global_batch_size": 3}, r"\(3\) must be a multiple .* = 8: set it to 8$"),
        (1, {"train__exit_step": 101}, r"train.exit_step \(101\) is beyond train.steps \(100\)"),
        (1, {"schedule__warmup_steps": 5, "schedule__warmup_tokens": 6}, r"\(5\) and schedule.warmup_tokens \(6\) exclude"),
        (1, {"train__init_from": "a", "train__resume": "b"}, "train.init_from=a and train.resume=b exclude"),
        (1, {"data__kind": "indexed"}, "data=indexed needs data.prefix=PREFIX"),
        (1, {"data__kind": "indexed", "data__prefix": "p", "data__blend": ["1", "q"]}, "data.prefix=p and data.blend exclude"),
        (1, {"data__prefix": "p"}, "data.prefix=p needs data=indexed, not data=stdlib"),
        (1, {"data__kind": "indexed", "data__blend": ["1", "p", "2"]}, "has 3 entries"),
        (1, {"data__kind": "indexed", "data__blend": ["-0.1", "p"]}, "the weight of p is -0.1; weights must be"),
        (1, {"data__kind": "indexed", "data__blend": ["nan", "p"]}, "the weight of p is nan; weights must be"),
        (1, {"data__kind": "indexed", "data__blend": ["p", "1"]}, "the weight of 1 is 'p', not a number"),
        (1, {"data__kind": "indexed", "data__blend": ["0", "p", "0", "q"]}, "all weights are zero"),
        (1, {"data__split": "969,-30,1"}, "data.split=969,-30,1 must be shares"),
        (1, {"data__split": "0,1,1"}, "data.split=0,1,1 must be shares"),
        (1, {"data__split": "all"}, "a share is 'all', not a number"),
    ],
)
def test_bad_input_is_named_with_its_numbers(world: int, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check_config(changed(**settings), world)
    assert "\n" not in str(error.value)


def test_global_balance_without_accumulation_is_good() -> None:
    check_config(changed(router__group="global"), 4)
    check_config(changed(router__group="global", train__micro_batch_size=8), 1)


def test_micro_batches_are_cut_where_a_tokens_routing_needs_none_behind_it() -> None:
    check_config(changed(**FLOW, **MICRO_BATCH), 4)
    check_config(changed(**FLOW, **MICRO_BATCH, router__drop="probability"), 4)  # dropless
    check_config(changed(**FLOW, **MICRO_BATCH, router__capacity_factor=1.5), 4)
    check_config(changed(**FLOW, **MICRO_BATCH, **BY_PROBABILITY), 1)  # parts are whole micro-batches


MACHINE = {"local_ranks": 1, "num_cores": 2, "num_gpus": 0, "apex": False, "wandb_key": False}


@pytest.mark.parametrize(
    ("settings", "machine", "message"),
    [
        ({}, {"local_ranks": 129}, r"launch.ranks \(129\) is more than 64 ranks for each of 2 cores: .* launch.dry_run=true"),
        ({"launch__device": "cuda"}, {}, "torch sees no GPU: set launch.device=cpu"),
        ({}, {"local_ranks": 4, "num_gpus": 2}, "4 local ranks need as many GPUs, torch sees 2: set launch.ranks=2"),
        ({"tracker__wandb__mode": "online"}, {}, "stay offline with tracker.wandb.mode=offline"),
        ({"optim__implementation": "apex", "train__dtype": "float64"}, {}, "apex has no float64"),
        ({"optim__implementation": "apex", "optim__name": "sgd"}, {}, "apex has no sgd: set optim.implementation=torch"),
        ({"optim__implementation": "apex"}, {"apex": True}, "apex needs GPUs"),
        ({"optim__implementation": "apex"}, {"num_gpus": 1}, "needs NVIDIA Apex with its CUDA extensions, which isn't"),
    ],
)
def test_what_this_machine_cannot_do(settings: dict[str, object], machine: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_machine(changed(**settings), **{**MACHINE, **machine})  # type: ignore[arg-type]


def test_what_this_machine_can_do() -> None:
    check_machine(changed(tracker__wandb__mode="online"), **{**MACHINE, "local_ranks": 128, "wandb_key": True})  # type: ignore[arg-type]
    check_machine(changed(launch__device="cpu"), **{**MACHINE, "local_ranks": 4, "num_gpus": 2})  # type: ignore[arg-type]
    check_machine(changed(optim__implementation="apex"), **{**MACHINE, "num_gpus": 1, "apex": True})  # type: ignore[arg-type]


def test_more_ranks_than_cores_is_a_warning_with_both_numbers() -> None:
    assert advice(PretrainConfig(), local_ranks=4, num_cores=2, num_gpus=0) == ["4 ranks share 2 cores: right, but slow"]
    assert advice(PretrainConfig(), local_ranks=4, num_cores=2, num_gpus=4) == []
    assert advice(PretrainConfig(), local_ranks=2, num_cores=2, num_gpus=0) == []


def test_a_warm_up_longer_than_the_run_is_a_warning() -> None:
    (line,) = advice(changed(schedule__warmup_steps=100), local_ranks=1, num_cores=2, num_gpus=0)
    assert "schedule.warmup_steps (100) is not below train.steps (100)" in line


def test_paths_are_checked(tmp_path: Path) -> None:
    check_paths(changed(run__dir=str(tmp_path / "new" / "run")))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file, not a folder: choose another run.dir"):
        check_paths(changed(run__dir=str(tmp_path / "file" / "run")))
    for key in ("run__dir", "data__cache_dir"):
        with pytest.raises(ValueError, match=rf"{key.replace('__', '.')} is empty: give a folder"):
            check_paths(changed(**{key: " "}))
    with pytest.raises(ValueError, match="train.resume=nowhere: there is no such folder"):
        check_paths(changed(run__dir=str(tmp_path), train__resume="nowhere"))
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for name in ("resume", "init_from"):
        with pytest.raises(ValueError, match=f"train.{name}=.*run has no checkpoint yet: name another run's folder"):
            check_paths(changed(run__dir=str(tmp_path), **{f"train__{name}": str(tmp_path / "run")}))
    (tmp_path / "run" / "checkpoints" / "step_00000003").mkdir()
    check_paths(changed(run__dir=str(tmp_path), train__resume=str(tmp_path / "run"), train__init_from=str(tmp_path / "run")))
    with pytest.raises(ValueError, match="train.init_from=nowhere: there is no such folder"):
        check_paths(changed(run__dir=str(tmp_path), train__init_from="nowhere"))


def test_a_wandb_key_is_found_in_the_environment_or_in_netrc(tmp_path: Path) -> None:
    assert not has_wandb_key({}, tmp_path)
    assert has_wandb_key({"WANDB_API_KEY": "k"}, tmp_path)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password k\n")
    assert has_wandb_key({}, tmp_path)
    assert not has_wandb_key({"WANDB_BASE_URL": "https://wandb.example.org"}, tmp_path)
    assert not has_wandb_key({"NETRC": str(tmp_path / "other")}, tmp_path)
