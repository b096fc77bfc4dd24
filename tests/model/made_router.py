"""A router with a gate of its own, without a model around it."""

import torch
from torch import nn

from megalina.config import RouterConfig
from megalina.model.routers import Router, router_class

STD = 0.02


def made_router(config: RouterConfig, *, d_model: int, num_experts: int, layer: int, seed: int) -> Router:
    router = router_class(config)(config, num_experts=num_experts, layer=layer, seed=seed)
    if config.kind != "hash":
        router.weight = nn.Parameter(torch.empty(num_experts, d_model).normal_(std=STD))
    return router
