"""An emulated device: stages take the time that they would take on another device, while the real math is done here.

It is asynchronous, as a GPU is: a stage adds its time to the moment at which the device is free, and the host goes on.  What
is sent leaves when the device is ready (the lanes wait for that), and a rank sleeps only where its program waits.  So many
ranks fit on few cores, and an idle device's time is not given to a busy one.
"""

import time
from collections.abc import Callable

from megalina.config import PretrainConfig
from megalina.step.program import Stage

SMALLEST_SHARE = 0.02  # of the full time, whatever the share: half a batch never takes exactly half the time


class EmulatedDevice:
    """`seconds(stage)`: how long the device takes for a compute stage; 0: as long as the host does."""

    def __init__(self, seconds: Callable[[Stage], float]):
        self.seconds = seconds
        self.free_s = 0.0  # the moment at which all that was asked for is done
        self.busy_s = 0.0
        self.overrun_s = 0.0  # by which the real math ended later than the device would have

    def ran(self, stage: Stage, began_s: float, ended_s: float) -> tuple[float, float]:
        """A stage's real math was done between these moments; returns when the device begins and ends it."""
        seconds = self.seconds(stage)
        start_s = max(self.free_s, began_s)
        end_s = start_s + seconds
        if seconds > 0:
            self.busy_s += seconds
            self.overrun_s += max(0.0, ended_s - end_s)
        self.free_s = max(end_s, ended_s)
        return start_s, self.free_s

    def synchronize(self) -> None:
        """Sleep until the device is free."""
        if (early_s := self.free_s - time.perf_counter()) > 0:
            time.sleep(early_s)


def stage_seconds(full_s: Callable[[str], float], *, floor_s: float) -> Callable[[Stage], float]:
    """Costs of stages from the forward times of whole micro-batches.

    `full_s(name)`: the time of a stage for a whole micro-batch; 0: it isn't emulated, and takes as long as it takes here, which
    holds up what comes after it.  A part costs `floor_s` (0: 2% of the full time) and its share of the full time.
    Backward is twice forward (once where the gradients of weights are a stage of their own, which is once too), and once more
    where activations are computed again.
    """

    def seconds(stage: Stage) -> float:
        full = full_s(stage.name)
        if stage.phase == "U" or not full:
            return 0.0
        times = 1 if stage.phase in "FW" else 2 + stage.recompute - stage.late
        share = stage.share / stage.chunk[1]
        return times * ((floor_s or SMALLEST_SHARE * full) + share * full)

    return seconds


def emulated_device(config: PretrainConfig) -> EmulatedDevice | None:
    """The device that `cluster` asks for; None where it asks for none."""
    cluster = config.cluster
    if cluster.attention_ms or cluster.experts_ms:
        times = dict.fromkeys(("attention", "attention_heads"), cluster.attention_ms / 1e3)
        times |= dict.fromkeys(("experts", "mlp", "mlp_hidden"), cluster.experts_ms / 1e3)
    elif cluster.device_gflops:
        times = {name: flops / (cluster.device_gflops * 1e9) for name, flops in _stage_flops(config).items()}
    else:
        return None
    return EmulatedDevice(stage_seconds(lambda name: times.get(name, 0.0), floor_s=cluster.kernel_floor_ms / 1e3))


def _stage_flops(config: PretrainConfig) -> dict[str, float]:
    """Of a micro-batch's forward on one rank, by stage; experts with even routing."""
    model, tp = config.model, config.parallel.tp
    tokens, width = config.train.micro_batch_size * config.train.seq_len, model.d_model
    head_dim = model.head_dim or width // model.num_heads
    matrices = 3 if model.activation == "swiglu" else 2
    heads = 2 * width * head_dim * (model.num_heads + model.num_kv_heads)  # parameters of q, k, v and output
    scores = config.train.seq_len * model.num_heads * head_dim  # products a token, half of them masked
    dense_d_ff = model.dense_d_ff or config.router.top_k * model.d_ff
    attention = 2 * tokens * (heads + scores) / tp
    mlp = 2 * tokens * matrices * width * dense_d_ff / tp
    head = 2 * tokens * width * model.vocab_size / tp
    return {
        "attention": attention,
        "attention_heads": attention,
        "mlp": mlp,
        "mlp_hidden": mlp,
        "experts": 2 * tokens * config.router.top_k * matrices * width * model.d_ff / tp,
        "shared": 2 * tokens * matrices * width * model.shared_d_ff / tp,
        "loss": head,
        "logits": head,
    }
