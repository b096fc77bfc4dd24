"""How fast and how large a training step is, at model=bench (d 512, 8 experts, top-2, 4 layers, batch 4 x 512, float32).

    python benchmarks/train_step.py --json train_step.json              (8 minutes)
    python benchmarks/train_step.py --runs 5 --json train_step.json     (five times, each in a process of its own: medians)

Four parts, each interleaved round by round so that a noisy machine disturbs all variants alike; medians, with spread:

1. One process, all cores: our step (the program, run by the executor) against Hugging Face's MixtralForCausalLM with the
   same weights, its `grouped_mm` experts and SDPA; forward, backward, gradient clipping and torch's fused AdamW on both
   sides, nothing compiled.  Theirs twice: in a process as it comes (`ratio_to_hf_mixtral`), and in ours, whose memory is kept
   (`train.keep_memory`; `ratio_to_hf_mixtral_same_malloc`).  Beside it the best matrix product rate that torch reaches here.
2. Peak memory of one process over what it must hold: weights, gradients, optimizer, and the activations as estimated
   below.
3. Two expert-parallel ranks with one thread each against one rank with one thread, same global batch: with this model's
   router, whose loads are uneven as nothing is learned here (`two_rank_speedup`), and with even ones, by `router=hash` on both
   sides (`two_rank_speedup_even_loads`), as others benchmark with forced load balancing.
4. As 1, of other shapes: fine-grained experts (64, top-6, an eighth as wide), sequences of 2,048, and bfloat16 with float32
   weights (`train.dtype=bfloat16` here, autocast there).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.counts import model_flops
from megalina.config import ModelConfig, OptimConfig, ParallelConfig, PretrainConfig, RouterConfig, TrainConfig
from megalina.mesh import build_mesh
from megalina.model.init import spec_of
from megalina.parallel.trainable import Trainable
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.train.kept_memory import keep_memory
from megalina.train.throughput import peak_memory_bytes

ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATE, BALANCE_LOSS = 1e-4, RouterConfig().balance_loss
ROUTERS = {"": "topk", "_even_loads": "hash"}  # of two ranks: what their figures' names end with -> router
WARM_UP_STEPS = 2  # of each rank
EXPERTS = "grouped_mm"  # the fastest of transformers' implementations on CPU
MATMULS = [(2048, 512, 1024), (2048, 1024, 512), (512, 512, 2048), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 2048, 512)]


@dataclass(frozen=True, slots=True)
class Shape:
    """What differs from model=bench, and a step's tokens."""

    model: dict[str, int] = field(default_factory=dict)
    top_k: int = 2
    sequences: int = 4
    length: int = 512
    dtype: str = "float32"

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


BENCH = Shape()
SHAPES = {
    "fine_grained": Shape({"num_experts": 64, "d_ff": 128}, top_k=6),
    "long": Shape(sequences=1, length=2048),
    "bfloat16": Shape(dtype="bfloat16"),
}


def bench_config(*, ep: int = 1, shape: Shape = BENCH, router: str = "topk") -> PretrainConfig:
    """conf/model/bench.yaml with everything else at its default."""
    model = ModelConfig(**yaml.safe_load((ROOT / "conf" / "model" / "bench.yaml").read_text()))
    sequences = shape.sequences
    return PretrainConfig(
        model=replace(model, **shape.model),
        router=RouterConfig(kind=router, top_k=shape.top_k, balance_loss=0.0 if router == "hash" else BALANCE_LOSS),
        parallel=ParallelConfig(ep=ep),
        optim=OptimConfig(lr=LEARNING_RATE),
        train=TrainConfig(global_batch_size=sequences, micro_batch_size=sequences // ep, seq_len=shape.length, dtype=shape.dtype),
    )


def batch_of(step: int, config: PretrainConfig) -> Batch:
    """Random tokens; the last position has no label, as in Hugging Face's loss."""
    sequences, length = config.train.global_batch_size, config.train.seq_len
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, config.model.vocab_size, (sequences, length), generator=generator)
    labels = tokens.roll(-1, 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, -1] = False
    position = torch.arange(length).repeat(sequences, 1)
    return Batch(tokens, labels, mask, torch.ones_like(mask), position, None, torch.arange(sequences) + step * sequences)


class Ours:
    """A training step of this rank."""

    def __init__(self, config: PretrainConfig):
        self.mesh = build_mesh(tp=config.parallel.tp, ep=config.parallel.ep, cp=config.parallel.cp)
        device = torch.device("cpu")
        self.config, self.vocab_size = config, config.model.vocab_size
        self.trainable = Trainable(config, self.mesh, vocab_size=self.vocab_size, device=device, wish_to_stop=lambda: False)
        self.optimizer = BucketOptimizer(config.optim, self.trainable.buckets)
        self.load_max_over_mean = self.fuller_half_over_mean = 0.0

    def step(self, number: int) -> float:
        own = self.config.train.global_batch_size // self.mesh.readers
        batch = batch_of(number, self.config).split(own)[self.mesh.reader]
        verdict = self.trainable.step(batch, self.optimizer.update, directions=self.optimizer)
        chosen_LE = verdict.loads[:, :-1].double()
        self.load_max_over_mean = (chosen_LE.amax(1) / chosen_LE.mean(1)).mean().item()
        half_L2 = chosen_LE.unflatten(1, (2, -1)).sum(2)
        self.fuller_half_over_mean = (half_L2.amax(1) / half_L2.mean(1)).mean().item()
        return verdict.loss


class HuggingFace:
    """The same step by transformers, with its best experts implementation on this machine's kind."""

    def __init__(self, config: PretrainConfig, experts: str):
        from transformers import MixtralConfig, MixtralForCausalLM

        m = config.model
        self.config, self.clip_norm = config, config.optim.clip_norm
        self.model: nn.Module = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=m.vocab_size,
                hidden_size=m.d_model,
                intermediate_size=m.d_ff,
                num_hidden_layers=m.num_layers,
                num_attention_heads=m.num_heads,
                num_key_value_heads=m.num_kv_heads,
                num_local_experts=m.num_experts,
                num_experts_per_tok=config.router.top_k,
                max_position_embeddings=config.train.seq_len,
                rms_norm_eps=m.norm_eps,
                rope_theta=m.rope_theta,
                tie_word_embeddings=False,
                output_router_logits=False,
                use_cache=False,
                attn_implementation="sdpa",
                experts_implementation=experts,
            )
        )
        self.model.train()
        o = config.optim
        settings: dict[str, Any] = {"lr": o.lr, "betas": (o.beta1, o.beta2), "eps": o.eps, "weight_decay": o.weight_decay}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True, **settings)

    def copy_from(self, ours: Ours) -> None:
        """Our weights, under transformers' names."""
        names = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight", "final_norm.weight": "model.norm.weight"}
        inside = {
            "attention_norm.weight": "input_layernorm.weight",
            "attention.q": "self_attn.q_proj.weight",
            "attention.k": "self_attn.k_proj.weight",
            "attention.v": "self_attn.v_proj.weight",
            "attention.proj": "self_attn.o_proj.weight",
            "mlp_norm.weight": "post_attention_layernorm.weight",
            "router.weight": "mlp.gate.weight",
            "experts.w1": "mlp.experts.gate_up_proj",
            "experts.w2": "mlp.experts.down_proj",
        }
        theirs = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, p in ours.trainable.gpt.named_parameters():
                if name.startswith("layers."):
                    _, layer, rest = name.split(".", 2)
                    target = f"model.layers.{layer}.{inside[rest]}"
                else:
                    target = names[name]
                theirs.pop(target).copy_(p[: spec_of(p).rows or len(p)])  # without the padding of the vocabulary
        assert not theirs, f"not copied: {list(theirs)}"

    def step(self, number: int) -> float:
        tokens = batch_of(number, self.config).tokens_BS
        self.optimizer.zero_grad(set_to_none=True)
        half = self.config.train.dtype == "bfloat16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm, foreach=True)
        self.optimizer.step()
        return loss.item()


class AsItComes:
    """`HuggingFace` in a process of its own, in which malloc is as it comes."""

    def __init__(self, shape: str):
        command = [sys.executable, __file__, "--worker", "hugging_face", shape]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self, number: int) -> tuple[float, float]:
        """Its loss and seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(number, file=self._process.stdin, flush=True)
        loss, seconds = json.loads(self._process.stdout.readline())
        return loss, seconds

    def close(self) -> None:
        self._process.communicate()


def hugging_face_worker(shape: str) -> None:
    """A step for each number that comes in."""
    config = bench_config(shape=(SHAPES | {"bench": BENCH})[shape])
    model = HuggingFace(config, EXPERTS)
    model.copy_from(Ours(config))
    for line in sys.stdin:
        start_s = time.perf_counter()
        loss = model.step(int(line))
        print(json.dumps([loss, time.perf_counter() - start_s]), flush=True)


def timed_s(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


def timed_step(model: Ours | HuggingFace, number: int) -> tuple[float, float]:
    """Its loss and seconds."""
    start_s = time.perf_counter()
    loss = model.step(number)
    return loss, time.perf_counter() - start_s


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def matmul_flops(dtype: torch.dtype) -> float:
    """The best rate of any of the shapes, one timing each."""
    best = 0.0
    for n, k, m in MATMULS:
        a, b, out = (torch.randn(size).to(dtype) for size in ((n, k), (k, m), (n, m)))
        torch.mm(a, b, out=out)
        best = max(best, max(2 * n * k * m / timed_s(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) for _ in range(5)))  # type: ignore[misc]
    return best


def against_hugging_face(rounds: int, steps: int, name: str = "bench") -> dict[str, Any]:
    shape = (SHAPES | {"bench": BENCH})[name]
    config = bench_config(shape=shape)
    if not keep_memory():
        raise RuntimeError("memory can't be kept here: this needs glibc")
    ours, theirs, as_it_comes = Ours(config), HuggingFace(config, EXPERTS), AsItComes(name)
    theirs.copy_from(ours)
    runners: dict[str, Callable[[int], tuple[float, float]]] = {
        "ours": partial(timed_step, ours),
        "hugging_face": as_it_comes.step,
        "hugging_face_same_malloc": partial(timed_step, theirs),
    }
    first = {who: step(0)[0] for who, step in runners.items()}
    for who, loss in first.items():
        if abs(loss - first["ours"]) > (1e-4 if shape.dtype == "float32" else 1e-2):
            raise RuntimeError(f"not the same work: first loss {first['ours']} here, {loss} by {who}")
    times: dict[str, list[float]] = {who: [] for who in runners}
    ratios: dict[str, list[float]] = {who: [] for who in runners}
    peaks: list[float] = []
    fractions: dict[str, list[float]] = {who: [] for who in runners}
    of_token = model_flops(config.model, config.router, vocab_size=config.model.vocab_size, seq_len=shape.length).per_token
    flops = of_token * shape.tokens
    number = 1
    for run in range(rounds + 1):
        round_s: dict[str, list[float]] = {who: [] for who in runners}
        rates = []
        for _ in range(steps):
            for who, step in runners.items():
                round_s[who].append(step(number)[1])
            rates.append(matmul_flops(getattr(torch, shape.dtype)))
            number += 1
        if run == 0:
            continue  # warm-up
        median = {who: statistics.median(values) for who, values in round_s.items()}
        peaks.append(max(rates))
        for who in runners:
            times[who].append(median[who])
            fractions[who].append(flops / median[who] / peaks[-1])
            ratios[who].append(median[who] / median["ours"])
        print(
            f"{name}, round {run}/{rounds}: " + ", ".join(f"{who} {s * 1e3:.0f} ms" for who, s in median.items()),
            file=sys.stderr,
            flush=True,
        )
    as_it_comes.close()
    return {
        "first_loss": first,
        "step_s": {who: summary(values) for who, values in times.items()},
        "tokens_per_s": {who: shape.tokens / statistics.median(values) for who, values in times.items()},
        "ratio_to_hf_mixtral": statistics.median(ratios["hugging_face"]),
        "ratio_to_hf_mixtral_spread": summary(ratios["hugging_face"]),
        "ratio_to_hf_mixtral_same_malloc": statistics.median(ratios["hugging_face_same_malloc"]),
        "ratio_to_hf_mixtral_same_malloc_spread": summary(ratios["hugging_face_same_malloc"]),
        "matmul_peak_gflops": {k: v / 1e9 for k, v in summary(peaks).items()},
        "model_gflops_a_step": flops / 1e9,
        "fraction_of_matmul_peak": statistics.median(fractions["ours"]),
        "fraction_of_matmul_peak_spread": {who: summary(values) for who, values in fractions.items()},
        "load_max_over_mean": ours.load_max_over_mean,
    }


def activation_bytes(config: PretrainConfig) -> int:
    """The estimate: what one step must keep for backward, and the largest things it needs at once.

    A layer and token keeps, in numbers: 7 x width of residuals, norms and attention's projections and output, queries, keys
    and values twice (before and after their rotation), half a row of attention weights a head, and for each of its experts the
    row, its place in the sum, and the first matrix's output.  At the end: the logits, in whose memory their gradient is made.
    """
    m, k = config.model, config.router.top_k
    head = m.d_model // m.num_heads
    attention = 7 * m.d_model + 2 * (m.num_heads + 2 * m.num_kv_heads) * head + m.num_heads * config.train.seq_len // 2
    experts = k * (3 * m.d_model + 2 * m.d_ff)
    tokens = config.train.global_batch_size * config.train.seq_len
    return 4 * tokens * (m.num_layers * (attention + experts) + m.vocab_size)


def memory_worker() -> None:
    """In a process of its own: what steps add to what the interpreter and libraries need."""
    torch.mm(torch.randn(512, 512), torch.randn(512, 512))
    start = peak_memory_bytes(torch.device("cpu"))
    config = bench_config()
    ours = Ours(config)
    for number in range(6):
        ours.step(number)
    weights = sum(b.numel * 4 for b in ours.trainable.buckets.values())
    activations = activation_bytes(config)
    peak = peak_memory_bytes(torch.device("cpu")) - start
    print(json.dumps({"state_bytes": 4 * weights, "activation_bytes": activations, "peak_bytes": peak}))


def memory() -> dict[str, Any]:
    found = json.loads(run_worker("memory", threads=os.cpu_count() or 1))
    found["peak_over_estimate"] = found["peak_bytes"] / (found["state_bytes"] + found["activation_bytes"])
    return found


def ranks_worker(steps: str, router: str) -> None:
    """One of the ranks of part 3: prints the seconds of each step, the processor's seconds of all of its threads per step, and
    how many more tokens than the mean the fuller half of the experts has, mean of steps and layers."""
    keep_memory()
    world = int(os.environ["WORLD_SIZE"])
    if world > 1:
        dist.init_process_group("gloo")
    ours = Ours(bench_config(ep=world, router=router))
    for number in range(WARM_UP_STEPS):
        ours.step(number)
    start_s = time.process_time()
    times, fuller = [], []
    for number in range(WARM_UP_STEPS, int(steps) + WARM_UP_STEPS):
        times.append(timed_s(partial(ours.step, number)))
        fuller.append(ours.fuller_half_over_mean)
    print(json.dumps([times, (time.process_time() - start_s) / len(times), statistics.fmean(fuller)]))
    if world > 1:
        dist.destroy_process_group()


def run_worker(*arguments: str, threads: int, environment: dict[str, str] | None = None) -> str:
    env = os.environ | {"OMP_NUM_THREADS": str(threads)} | (environment or {})
    done = subprocess.run(
        [sys.executable, __file__, "--worker", *arguments], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.strip().splitlines()[-1]


def run_ranks(world: int, steps: int, router: str) -> tuple[float, float, float]:
    """Seconds of the median step, the processor's seconds per step of all ranks together, the fuller half's load over mean."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": str(world)}
    command = [sys.executable, __file__, "--worker", "ranks", str(steps), router]
    with tempfile.TemporaryFile("w+") as errors:
        ranks = [
            subprocess.Popen(command, env=env | {"RANK": str(r)}, stdout=subprocess.PIPE, stderr=errors, text=True)
            for r in range(world)
        ]
        outputs = [rank.communicate()[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            errors.seek(0)
            raise RuntimeError(errors.read())
    found = [json.loads(output.strip().splitlines()[-1]) for output in outputs]
    return statistics.median(found[0][0]), sum(processor_s for _, processor_s, _ in found), found[0][2]


def two_ranks(rounds: int, steps: int) -> dict[str, Any]:
    """`two_rank_speedup_limit`: of two ranks that never wait, with the processor time that they take and a core for each.  What
    the speedup is below it are waits, on the wire and for the rank whose experts have more tokens (`fuller_rank_over_mean`)."""
    found: dict[str, list[float]] = {}
    for run in range(rounds):
        for suffix, router in ROUTERS.items():
            (one_s, one_processor_s, _), (two_s, two_processor_s, fuller) = (run_ranks(world, steps, router) for world in (1, 2))
            measured = {
                "two_rank_speedup": one_s / two_s,
                "two_rank_speedup_limit": 2 * one_processor_s / two_processor_s,
                "fuller_rank_over_mean": fuller,
                "one_rank_step_s": one_s,
                "two_rank_step_s": two_s,
            }
            for key, value in measured.items():
                found.setdefault(f"{key}{suffix}", []).append(value)
            print(
                f"ranks {run + 1}/{rounds}, router={router}: one {one_s * 1e3:.0f} ms, two {two_s * 1e3:.0f} ms, "
                f"{two_processor_s * 500:.0f} of them on the processor, fuller rank {fuller:.2f} of the mean",
                file=sys.stderr,
                flush=True,
            )
    spreads = {f"two_rank_speedup{suffix}_spread": summary(found[f"two_rank_speedup{suffix}"]) for suffix in ROUTERS}
    return {key: statistics.median(values) for key, values in found.items()} | spreads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of part 1 (default 7)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each variant a round (default 3)")
    parser.add_argument("--rank-rounds", type=int, default=5, help="rounds of part 3 (default 5)")
    parser.add_argument("--parts", default="step,memory,ranks,shapes", help="which parts (default step,memory,ranks,shapes)")
    parser.add_argument("--runs", type=int, default=1, help="of all parts, in processes of their own; medians (default 1)")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        workers = {"memory": memory_worker, "ranks": ranks_worker, "hugging_face": hugging_face_worker}
        return workers[options.worker[0]](*options.worker[1:])
    if options.runs > 1:
        names = ("rounds", "steps", "rank_rounds", "parts")
        words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
        return write(middle_of([run_again(words) for _ in range(options.runs)]), options.json)
    parts = options.parts.split(",")
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if "memory" in parts:
        found |= memory()
    if "ranks" in parts:
        found |= two_ranks(options.rank_rounds, 6)
    if "step" in parts:
        found |= against_hugging_face(options.rounds, options.steps)
    if "shapes" in parts:
        found["shapes"] = {}
        for name in SHAPES:
            measured = against_hugging_face(options.rounds, options.steps, name)
            found["shapes"][name] = {key.replace("ratio_to_hf_mixtral", "ratio_to_hf"): value for key, value in measured.items()}
    return write(found, options.json)


def run_again(words: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="megalina_train_step_") as folder:
        out = Path(folder) / "found.json"
        subprocess.run([sys.executable, __file__, *words, "--json", str(out)], stdout=subprocess.DEVNULL, check=True)
        return dict(json.loads(out.read_text()))


def middle_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of numbers the median over runs, of spreads the median, the smallest and the largest; ratios of each run beside them."""
    out: dict[str, Any] = {}
    for key, value in runs[0].items():
        values = [run[key] for run in runs]
        if isinstance(value, dict) and value.keys() == {"median", "min", "max"}:
            out[key] = {
                "median": statistics.median(v["median"] for v in values),
                "min": min(v["min"] for v in values),
                "max": max(v["max"] for v in values),
            }
        elif isinstance(value, dict):
            out[key] = middle_of(values)
        else:
            out[key] = value if isinstance(value, str) else statistics.median(values)
        if key.startswith("ratio_to_hf") and not key.endswith("_spread") or key.removeprefix("two_rank_speedup") in ROUTERS:
            out[f"{key}_of_runs"] = values
    return out


def write(found: dict[str, Any], path: Path | None) -> None:
    text = json.dumps(found, indent=1)
    print(text)
    if path:
        path.write_text(text + "\n")


if __name__ == "__main__":
    from megalina.console import command

    command(main)
