"""Host experts for CUDA: page-locked as long as they are there, on a made-up CUDA runtime."""

import gc
from types import SimpleNamespace

import pytest
import torch

from megalina.mesh import build_mesh
from megalina.serve.host_experts import ExpertShape, share_experts

SHAPE = ExpertShape(("w1",), (torch.Size((2, 3)),), torch.float32)


class Runtime:
    def __init__(self, code: int):
        self.code, self.locked = code, dict[int, int]()

    def cudaHostRegister(self, pointer: int, num_bytes: int, flags: int) -> int:
        if not self.code:
            self.locked[pointer] = num_bytes
        return self.code

    def cudaHostUnregister(self, pointer: int) -> int:
        del self.locked[pointer]
        return 0


@pytest.mark.parametrize("page_locked", [True, False])
def test_all_experts_are_page_locked_until_they_go(monkeypatch: pytest.MonkeyPatch, page_locked: bool) -> None:
    runtime = Runtime(0)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(cudart=lambda: runtime))
    layer = {"w1": torch.ones(4, 2, 3)}
    host = share_experts(SHAPE, 2, 4, lambda number: layer, build_mesh(), page_locked=page_locked)
    assert runtime.locked == ({host.storage_ptr: 2 * 4 * SHAPE.num_bytes} if page_locked else {})
    assert host.expert(1, 3).tolist() == [1.0] * 6
    del host
    gc.collect()
    assert not runtime.locked


def test_a_refusal_says_how_much_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(cudart=lambda: Runtime(2)))
    with pytest.raises(OSError, match=r"page-lock the 0.00 GB of all experts \(error 2\): raise .* ulimit -l"):
        share_experts(SHAPE, 2, 4, lambda number: {"w1": torch.ones(4, 2, 3)}, build_mesh(), page_locked=True)
