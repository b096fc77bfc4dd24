"""A router of your own, and an auxiliary loss of your own.

`CosineTopK` scores a token by its cosine with each expert's row, times a temperature.  `ENTROPY` is small where each
token is sure of its experts.  No other file knows of them:

    python pretrain_gpt_moe.py router.kind=docs/examples/own_router.py:CosineTopK \
        'router.losses=["docs/examples/own_router.py:ENTROPY"]'
"""

import json
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from megalina.blocks.moe import RouterLoss
from megalina.blocks.routers import RouterKind
from megalina.compose import compose
from megalina.model.routers import Router

HERE, TEMPERATURE = str(Path(__file__).resolve()), 10.0


class CosineTopK(RouterKind):
    functions = f"{HERE}:CosineTopKRouter"
    scores_kept = 4  # those of any top-k, and the tokens' lengths
    rows_kept = 1  # the normalized tokens


class CosineTopKRouter(Router):
    def logits(self, x_TD: Tensor) -> Tensor:
        assert self.weight is not None
        wide = x_TD.to(super().logits(x_TD[:0]).dtype)  # never below float32
        return TEMPERATURE * F.linear(F.normalize(wide, dim=1), F.normalize(self.weight.to(wide.dtype), dim=1))


def entropy(logits_TE: Tensor, expert_TK: Tensor, valid_T: Tensor) -> Tensor:
    log_TE = logits_TE.log_softmax(1)
    return -((log_TE.exp() * log_TE).sum(1) * valid_T).sum()


ENTROPY = RouterLoss("entropy_loss", weight=0.02, functions=f"{HERE}:entropy")

if __name__ == "__main__":
    from megalina.verify.proof import prove

    own = [f"router.kind={HERE}:CosineTopK", f'router.losses=["{HERE}:ENTROPY"]']
    print(json.dumps(prove(compose(["model=tiny", *own]))))
