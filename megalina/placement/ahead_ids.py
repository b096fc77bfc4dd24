"""Ahead ids: what a trace's routers would have chosen had they been asked one MoE layer before their time.

They stand beside a trace's choices and are laid out like them, [T, L, K], best first: what MoE layer l's norm and router say of
the hidden state that MoE layer l - 1 has read.  E, the number of experts, is nobody: in the first MoE layer everywhere, since no
layer was there to ask in, elsewhere for a choice that capacity would have taken away.  This is what an engine asks for look-ahead
predictors, so that they can be judged without weights.

Shapes: T tokens, L MoE layers, K choices a token, E experts.
"""

import numpy as np

from megalina.placement.predictors.predictor import Ids


def check_ahead_ids(where: str, ahead_TLK: Ids, shape: tuple[int, ...], num_experts: int) -> None:
    """ValueError, beginning with `where`, for ids that can't belong to choices of that shape."""
    if ahead_TLK.shape != shape or not np.issubdtype(ahead_TLK.dtype, np.integer):
        raise ValueError(
            f"{where}: ahead_ids must be integers {list(shape)} as expert_ids are, not {ahead_TLK.dtype} {list(ahead_TLK.shape)}"
        )
    if int(ahead_TLK.min()) < 0 or int(ahead_TLK.max()) > num_experts:
        raise ValueError(
            f"{where}: ahead_ids go from {int(ahead_TLK.min())} to {int(ahead_TLK.max())}, but there are experts 0 to "
            f"{num_experts - 1}, and {num_experts} is nobody"
        )
    if said := int((ahead_TLK[:, 0] != num_experts).sum()):
        raise ValueError(
            f"{where}: {said} of the first layer's ahead_ids name an expert, but no layer before could be asked: {num_experts} "
            "is nobody"
        )
    sorted_TLK = np.sort(ahead_TLK, axis=2)
    twice_TLK = (sorted_TLK[..., 1:] == sorted_TLK[..., :-1]) & (sorted_TLK[..., 1:] != num_experts)
    if (twice_TL := twice_TLK.any(axis=2)).any():
        token, layer = (int(i) for i in np.unravel_index(int(twice_TL.argmax()), twice_TL.shape))
        raise ValueError(
            f"{where}: ahead_ids name an expert twice for token {token} in layer {layer}: {ahead_TLK[token, layer].tolist()}"
        )
