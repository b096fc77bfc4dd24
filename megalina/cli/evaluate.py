"""Evaluate a checkpoint: how well does it write, and how fast is it served under each placement of its experts?

python tools/evaluate_gpt_moe.py RUN --ranks 2                  # the newest checkpoint of a run, all modes
python tools/evaluate_gpt_moe.py RUN/checkpoints/step_00000480 --ranks 2 --modes best,ideal --tasks tasks.jsonl
python tools/evaluate_gpt_moe.py RUN --ranks 2 --modes best infer.trigger=never infer.slots_per_device=6
python tools/evaluate_gpt_moe.py RUN --ranks 2 infer.select=top_k infer.select_k=2         # a model of router=dense, sparse
python tools/evaluate_gpt_moe.py RUN --ranks 2 cluster.attention_ms=20 cluster.experts_ms=40      # on emulated devices
python tools/evaluate_gpt_moe.py RUN --lm-eval megalina_arithmetic,megalina_cloze                 # lm-evaluation-harness alone
torchrun --nproc-per-node 4 tools/evaluate_gpt_moe.py RUN
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalina.cli import harness
from megalina.cli.on_ranks import RanksFailed, on_ranks

if TYPE_CHECKING:
    from megalina.evaluate.worker import Evaluation
    from megalina.launch import Member

MODES = ("static", "lina", "window", "lookahead", "best", "ideal")
FAILED, BAD_INPUT = 1, 2  # exit codes


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = _parser().parse_intermixed_args(words)
    from megalina.checkpoint.files import left_out, read_values
    from megalina.launch import Stopped, joined

    member = joined(os.environ)
    quiet = member is not None and member.rank > 0  # rank 0 says it
    try:
        if args.lm_eval or args.write_tasks:
            harness.evaluate(args, *_checkpoint_and_out(args, member), member)
            return 0
        evaluation, out = checked(args, member, command=command_of(words, member, os.environ))
        for name, why in evaluation.settings["left_out"].items():
            if not quiet:
                print(f"mode {name} is left out: {why}", file=sys.stderr)
        if not quiet and (note := left_out(read_values(Path(evaluation.checkpoint)))):
            print(note, file=sys.stderr)
        if args.dry_run:
            if not quiet:
                print(described(evaluation, out, member.world if member else args.ranks or 1))
            return 0
        found = _join(evaluation, member) if member is not None else run(evaluation, args.ranks or 1)
        if not quiet:
            write(found, out, wandb=args.wandb)
    except Stopped as error:
        print(error, file=sys.stderr)
        return 128 + error.signum
    except RanksFailed as error:
        print(error, file=sys.stderr)
        return FAILED
    except (ValueError, OSError) as error:
        if not quiet:
            print(_line(error), file=sys.stderr)
        return BAD_INPUT
    return 0


def checked(args: argparse.Namespace, member: "Member | None", *, command: str) -> tuple["Evaluation", Path]:
    """What is to be done, and where the report goes; everything that can be is checked before a rank starts: ValueError or
    OSError.  `command`: for the report."""
    from megalina.blocks.selection import selection_of, served_top_k
    from megalina.checkpoint.files import read_values, tokenizer_path
    from megalina.compose import CONF
    from megalina.config import ModelConfig, RouterConfig
    from megalina.serve.modes import read_mode
    from megalina.validate import has_wandb_key

    if args.wandb == "online" and not has_wandb_key(os.environ, Path.home()):
        raise ValueError(
            "--wandb online: this machine has no key; set WANDB_API_KEY or run `wandb login`, or give --wandb offline"
        )
    _check_ranks(args, member)
    world = member.world if member is not None else args.ranks or 1
    names = [name for name in dict.fromkeys((args.modes or ",".join(MODES)).split(",")) if name]
    if names and "static" not in names:
        names = ["static", *names]  # what all ratios are to
    folder = CONF / "infer"
    overrides = [text for text in args.overrides if not text.startswith("cluster.")]
    modes = {name: read_mode(folder, name) for name in names}
    selects = [text for text in overrides if text.startswith("infer.select")]  # what is served, in every mode
    modes = {n: read_mode(folder, n, selects if mode.even_routing else overrides) for n, mode in modes.items()}
    if not modes:
        raise ValueError("--modes names none: choose some of static, lina, window, lookahead, best, ideal")
    if modes["static"].even_routing:
        raise ValueError("infer.even_routing=true: choose the mode ideal, what the others write must mean something")
    checkpoint = checkpoint_of(args.checkpoint)
    values = read_values(checkpoint)
    from megalina.checkpoint.profile import find_profile  # torch, which the mistakes above need not wait for
    from megalina.data.tokenizer import open_tokenizer
    from megalina.evaluate.emulation import read_cluster
    from megalina.evaluate.perplexity import open_held_out, read_documents
    from megalina.evaluate.tasks import check_tasks, read_tasks
    from megalina.evaluate.worker import Evaluation, devices_per_node
    from megalina.serve.expert_memory import check_memory, check_rows, free_memory_bytes
    from megalina.serve.policies import Served, check_infer

    cluster = read_cluster([text for text in args.overrides if text.startswith("cluster.")])
    config = values["config"]
    model, router = ModelConfig(**config["model"]), RouterConfig(**config["router"])
    if len({(mode.select, mode.select_k, mode.select_threshold) for mode in modes.values()}) > 1:
        raise ValueError("modes select experts in ways of their own: all serve one model, so give infer.select for all of them")
    for mode in modes.values():
        selection = selection_of(mode, router, model.num_experts)
    top_k = served_top_k(selection, router, model.num_experts)
    served = Served(model.num_experts, top_k, world, devices_per_node(os.environ, world) if member else 0)
    left_out = {}
    for name, mode in list(modes.items()):
        try:
            check_infer(mode, served)
        except ValueError as error:
            if args.modes or name == "static":
                raise ValueError(f"mode {name}: {error}") from error
            left_out[name] = str(error)  # nobody has asked for it
            del modes[name]
    local_ranks = member.local_ranks if member is not None else world
    free_bytes = free_memory_bytes()
    check_memory(modes, served, model, local_ranks=local_ranks, free_bytes=free_bytes)
    max_positions = model.max_positions or config["train"]["seq_len"]
    most = max_positions if args.text else config["train"]["seq_len"]
    if args.length > most:
        what = "the model reads" if args.text else "the run's held-out sequences have"
        raise ValueError(f"--length {args.length}: {what} {most} tokens; shorten it")
    tokens = args.sequences * (args.length or most)
    check_rows(served, model, tokens=tokens, local_ranks=local_ranks, free_bytes=free_bytes)
    if args.decode + 2 > max_positions:
        raise ValueError(
            f"--decode {args.decode}: with a prompt of one token and the one that prefill gives that is {args.decode + 2}, "
            f"and the model reads {max_positions} tokens; choose {max_positions - 2} or less"
        )
    if args.decode and router.kind == "expert_choice":
        raise ValueError("expert choice looks at later tokens when it routes one, so nothing can be decoded: give --decode 0")
    tasks = read_tasks(args.tasks) if args.tasks else []
    if args.text:
        read_documents(args.text)
    if (args.text or args.tasks) and not values["tokenizer_path"]:
        option = "--text" if args.text else "--tasks"
        raise ValueError(f"{option}: {checkpoint} was trained on token ids without a tokenizer; leave it out")
    if values["tokenizer_path"]:
        tokenizer = open_tokenizer(tokenizer_path(checkpoint, values))
        check_tasks(tasks, tokenizer, num_ids=values["vocab_size"], max_positions=max_positions)
    find_profile(checkpoint)
    if not args.text:
        open_held_out(checkpoint)
    run, out = _run_and_out(args, checkpoint)
    evaluation = Evaluation(
        checkpoint=str(checkpoint),
        modes=modes,
        batches=args.batches,
        sequences=args.sequences,
        length=args.length,
        decode=args.decode,
        tasks=str(args.tasks or ""),
        text=str(args.text or ""),
        settings={
            "overrides": args.overrides,
            "left_out": left_out,
            "command": command,
            "run": run.resolve().name,
            "wandb": {key: config["tracker"]["wandb"][key] for key in ("project", "group")},
        },
        cluster=cluster,
    )
    return evaluation, out


def _checkpoint_and_out(args: argparse.Namespace, member: "Member | None") -> tuple[Path, Path]:
    _check_ranks(args, member)
    checkpoint = checkpoint_of(args.checkpoint)
    return checkpoint, _run_and_out(args, checkpoint)[1]


def _check_ranks(args: argparse.Namespace, member: "Member | None") -> None:
    if member is not None and args.ranks is not None:
        raise ValueError(f"--ranks {args.ranks} under {member.launcher}, which has started {member.world}: leave it out")


def _run_and_out(args: argparse.Namespace, checkpoint: Path) -> tuple[Path, Path]:
    """The run of a checkpoint, and where results go."""
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    out = args.out if args.out is not None else run / "evaluation"
    check_folder(out)
    return run, out


def command_of(words: Sequence[str], member: "Member | None", environ: Mapping[str, str]) -> str:
    """What does this again, from the folder of the repository."""
    own = shlex.join(["python", "tools/evaluate_gpt_moe.py", *words])
    if member is None:
        return own
    nodes = -(-member.world // member.local_ranks)
    if "MEGALINA_LINK_MBIT" in environ:
        return (
            f"sudo .venv/bin/python tools/emulate_cluster.py --nodes {nodes} --ranks-per-node {member.local_ranks} --link-mbit "
            f"{environ['MEGALINA_LINK_MBIT']} -- .venv/bin/{own}"
        )
    if member.launcher == "slurm":
        return f"srun --nodes {nodes} --ntasks {member.world} {own}"
    return f"torchrun --nnodes {nodes} --nproc-per-node {member.local_ranks} {own.removeprefix('python ')}"


def checkpoint_of(path: Path) -> Path:
    """The checkpoint, or the newest one of a run; ValueError where there is none."""
    from megalina.checkpoint.files import newest_checkpoint

    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder; give a run or a checkpoint")
    if not (path / "checkpoints").is_dir():
        return path
    newest = newest_checkpoint(path / "checkpoints")
    if newest is None:
        raise ValueError(f"{path} has no checkpoint yet")
    return newest


def check_folder(folder: Path) -> None:
    """OSError or ValueError where it can't be written; nothing is made."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"--out {folder}: {there} is no folder; choose another one")
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder}: {there} can't be written ({error.strerror}); choose another one") from error


def described(evaluation: "Evaluation", out: Path, world: int) -> str:
    """What would run."""
    lines = [
        f"{evaluation.checkpoint} on {world} ranks: {evaluation.batches} batches of {evaluation.sequences} sequences a rank, "
        f"{evaluation.decode} tokens decoded; text: {evaluation.text or 'held out of the run'}; to {out}"
    ]
    for name, config in evaluation.modes.items():
        lines.append(f"{name}: " + ", ".join(f"{key}={value}" for key, value in asdict(config).items() if key != "name"))
    return "\n".join(lines)


def run(evaluation: "Evaluation", ranks: int) -> dict[str, Any]:
    """Starts the ranks; returns what they found.  ValueError for what only they could see, RanksFailed."""
    from dataclasses import replace

    with tempfile.TemporaryDirectory(prefix="megalina_evaluate_") as name:
        folder = Path(name)
        spec = replace(evaluation, logs=str(folder / "logs"), out=str(folder / "found.json")).to_json()
        return on_ranks("megalina.evaluate.worker", spec, folder, ranks=ranks)


def _join(evaluation: "Evaluation", member: "Member") -> dict[str, Any]:
    from megalina.evaluate.worker import work

    os.environ.update(member.environment())
    return work(evaluation)


def write(found: dict[str, Any], out: Path, *, wandb: str = "") -> None:
    """The tables on stdout; eval.json and eval.html, each as a whole or not at all."""
    from megalina.evaluate.report import page
    from megalina.evaluate.report_tables import tables
    from megalina.whole_file import write_whole

    html = page(found)
    texts = {"eval.json": json.dumps(found, indent=1, allow_nan=False) + "\n", "eval.html": html}
    print(tables(found))
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_whole(out / name, text)
    print(f"\n{out / 'eval.json'}, {out / 'eval.html'}")
    if wandb:
        from megalina.config import WandbConfig
        from megalina.evaluate.tracking import track

        settings = found["settings"]
        name = f"{settings['run']}, step {settings['step']}: evaluation"
        track(found, html, out, WandbConfig(mode=wandb, name=name, tags=["evaluation"], **settings["wandb"]))


def _line(error: Exception) -> str:
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
    return " ".join(text.split())


def _parser() -> argparse.ArgumentParser:
    from megalina.arguments import Parser, whole

    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run folder: its newest checkpoint")
    option = parser.add_argument
    option("overrides", nargs="*", metavar="infer.KEY=VALUE", help="for all modes; with even routing (ideal) only "
           "infer.select... counts; "
           "cluster.KEY=VALUE emulates devices: attention_ms and experts_ms (of a layer, for a whole batch of a device; experts "
           "in proportion to their rows) or device_gflops, and kernel_floor_ms")  # fmt: skip
    option(
        "--ranks",
        type=whole(1, 1_000_000),
        metavar="N",
        help="processes to start, each a device with own sequences (default: 1); leave it out under torchrun and Slurm",
    )
    option("--modes", default="", metavar="A,B", help="files of conf/infer; static always runs (default: of "
           f"{','.join(MODES)} those that fit)")  # fmt: skip
    option("--batches", type=whole(1, 1_000_000), default=40, metavar="N", help="timed batches of each mode (default: 40)")
    option("--sequences", type=whole(1, 1 << 24), default=2, metavar="N", help="sequences of a rank in a batch (default: 2)")
    option(
        "--length",
        type=whole(0, 2**31 - 1),
        default=0,
        metavar="N",
        help="tokens of a sequence that is timed (default: as in training; with --text all that the model reads)",
    )
    option(
        "--decode", type=whole(0, 2**31 - 1), default=16, metavar="N", help="tokens decoded after a prompt (default: 16; 0: none)"
    )
    option("--tasks", type=Path, metavar="FILE", help='JSON lines {"context", "choices", "answer"} or {"context", "target"}')
    option("--text", type=Path, metavar="FILE", help="instead of the run's held-out text: a text, a .jsonl or a folder")
    option("--lm-eval", default="", metavar="A,B", help="run these tasks of lm-evaluation-harness and nothing else; "
           "megalina_local and megalina_TASK are made of the run's held-out text")  # fmt: skip
    option("--include-path", type=Path, metavar="FOLDER", help="with --lm-eval: tasks of your own, as --write-tasks makes them")
    option("--write-tasks", type=Path, metavar="FOLDER", help="write the run's local tasks as files of lm-evaluation-harness")
    option("--examples", type=whole(0, 1 << 20), default=0, metavar="N", help="of a local task (default: eval.examples)")
    option("--limit", type=whole(0, 2**31 - 1), default=0, metavar="N", help="with --lm-eval: examples of a task (default: all)")
    option("--batch-size", type=whole(1, 1 << 20), default=8, metavar="N", help="with --lm-eval: texts of a rank at a time")
    option("--out", type=Path, metavar="FOLDER", help="for eval.json and eval.html (default: RUN/evaluation)")
    option("--wandb", default="", choices=("offline", "online"), help="log numbers, tables, plots and page to Weights & Biases "
           "too, to the project of the run; offline: to FOLDER/wandb")  # fmt: skip
    option("--dry-run", action="store_true", help="check everything, show what would run, start and write nothing")
    return parser


if __name__ == "__main__":
    from megalina.console import command

    command(main)
