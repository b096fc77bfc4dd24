"""An optimizer of your own: Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2).

It moves each weight by the sign of a running mean of its gradients, and stores only that mean.  No other file knows of it:

    python pretrain_gpt_moe.py optim.name=docs/examples/own_optimizer.py:Lion optim.lr=1e-4
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from megalina.blocks.optimizers import OptimizerKind
from megalina.compose import compose
from megalina.train.optim import Group, Rule

HERE = str(Path(__file__).resolve())


class Lion(OptimizerKind):
    functions = f"{HERE}:LionRule"
    states = ("exp_avg",)
    passes = 5  # reads gradient, weight and mean, writes the last two
    magnifies_rounding = True  # a mean that is nothing but rounding has a sign, too


class LionRule(Rule):
    description = "Lion: docs/examples/own_optimizer.py"

    def update(self, group: Group, lr: float, divisor: Tensor | None) -> None:
        weights, grads, means = [t.param for t in group.tensors], [t.grad for t in group.tensors], group.column("exp_avg")
        moves = torch._foreach_lerp(means, grads, 1 - self.config.beta1)
        torch._foreach_sign_(moves)
        torch._foreach_mul_(weights, 1 - lr * group.weight_decay)
        torch._foreach_add_(weights, moves, alpha=-lr)
        torch._foreach_lerp_(means, grads, 1 - self.config.beta2)


if __name__ == "__main__":
    from megalina.verify.proof import prove

    own = [f"optim.name={HERE}:Lion", "optim.lr=1e-4"]
    print(json.dumps(prove(compose(["model=tiny", *own]), without=compose(["model=tiny"]))))
