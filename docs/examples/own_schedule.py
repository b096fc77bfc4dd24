"""A schedule of your own: gradients of experts' weights are computed while tokens are on the wire (after Lancet, section 4).

Backward through a layer's experts gives first only what the all-to-all waits for.  Run python docs/examples/own_schedule.py"""

import sys

import torch

sys.path.insert(0, ".")  # for `tools`: start it in the repository's folder

from megalina.batch import Batch
from megalina.compose import compose
from megalina.mesh import build_mesh
from megalina.parallel.trainable import Trainable
from megalina.rank_pool import RankPool
from megalina.step.forward import plain
from megalina.step.passes import defer_weights, finish, place_gradients, recompute, step
from megalina.step.program import Program, check
from megalina.step.strategy import Setting, Strategy, eager, given
from megalina.train.bucket_optimizer import BucketOptimizer
from tools.draw_strategies import ladder_job


def weights_under_tokens(setting: Setting) -> Program:
    forward = defer_weights(plain(setting.shape), ["experts"])
    forward = recompute(forward, setting.shape.recomputed(setting.recompute_mode, forward))
    both = step(forward, setting.micro_batches)  # the weights' gradients, phase W, come after all of backward ...
    late = {f"B:dispatch>.{w.layer}.{w.part}": [w] for w in both if w.phase == "W"}  # ... but here after this instruction each
    moved = [s for instruction in both if instruction.phase != "W" for s in (instruction, *late.get(instruction.tag, []))]
    program = finish(place_gradients(tuple(moved), setting.buckets), setting.buckets, router_state=setting.shape.router_state)
    check(program, given(program, setting), setting.buckets)  # ValueError unless complete, in order, and free of deadlock
    return program


def train(schedule: Strategy) -> list[float]:
    config, mesh = compose(["model=tiny", "train.dtype=float64", "parallel.ep=2"]), build_mesh(ep=2)
    words, every = torch.randint(512, (4, 17), generator=torch.Generator().manual_seed(mesh.world.rank)), torch.ones(4, 16).bool()
    batch = Batch(words[:, :-1], words[:, 1:], every, every, torch.arange(16).expand(4, 16), None, torch.arange(4))
    trainable = Trainable(config, mesh, vocab_size=512, device=torch.device("cpu"), wish_to_stop=lambda: False)
    trainable.run_with(schedule(trainable.setting), trainable.functions)
    update = BucketOptimizer(config.optim, trainable.buckets).update
    return [trainable.step(batch, update).loss for _ in range(3)]


if __name__ == "__main__":
    with RankPool() as pool:
        for schedule, job in ((eager, ladder_job()), (weights_under_tokens, ladder_job())):
            print(f"{schedule.__name__}: {job.step(schedule(job.setting)).step_s * 1e3:.0f} ms a step in virtual time")
            for rank, losses in enumerate(pool.run(2, train, schedule)):
                print(f"rank {rank}, {schedule.__name__}: losses {losses}")
