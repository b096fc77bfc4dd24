"""Determinism: kernels whose results don't depend on timing."""

import os

import torch


def make_deterministic() -> None:
    """For `train.deterministic=true`, before the first CUDA call.  An operation that has no deterministic kernel then raises."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS: NVIDIA's documentation, "Results reproducibility"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs a pass over every buffer
    torch.backends.cudnn.benchmark = False
