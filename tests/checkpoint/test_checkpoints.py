"""Checkpoints: whole tensors as the oracle, cut for every layout by hand; real ranks write and read them."""

import functools
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megalina.checkpoint.checkpoints import Checkpoints
from megalina.checkpoint.checksums import SUMS, sum_of, write_sums
from megalina.checkpoint.files import SaveFailed, read_values
from megalina.checkpoint.stored import read_into, read_tensors
from megalina.comm.slice import Part, Slice, boxes, span, whole_shape
from megalina.layout import rows
from megalina.mesh import Axis, Mesh, build_mesh
from tests.parallel.ranks import run_on_ranks

WHOLE = {
    "model.experts": torch.arange(4 * 6 * 8, dtype=torch.float32).view(4, 6, 8),
    "model.norm": torch.linspace(-1, 1, 7, dtype=torch.float64),
    "model.vocabulary": torch.arange(10 * 3, dtype=torch.float32).view(10, 3) / 7,
    "optim.experts": torch.arange(4 * 6 * 8, dtype=torch.float32).view(4, 6, 8) * -0.5,
    "optim.norm": torch.linspace(3, 4, 7, dtype=torch.float64),
    "step": torch.tensor(11.5),
}
VALUES = {"consumed_samples": 160, "config": {"lr": 1e-3, "names": ["a", "b"]}}
PADDED = 12  # the vocabulary's 10 rows, padded so that tp cuts it evenly
LAYOUTS = {1: [(1, 1)], 2: [(1, 1), (2, 1), (1, 2)], 4: [(1, 1), (2, 1), (2, 2), (1, 4)]}  # world: (tp, ep)


def mesh_without_ranks(world: int, tp: int, ep: int, rank: int) -> Mesh:
    """What `build_mesh` gives on `rank`, without process groups: enough to cut."""
    tables = rows({"edp": world // (tp * ep), "ep": ep, "tp": tp})
    row = {name: next(r for r in table if rank in r) for name, table in tables.items()}
    return Mesh(**{name: Axis(name, tuple(r), r.index(rank)) for name, r in row.items()})


def cut(tensor: Tensor, mesh: Mesh, sharded: dict[str, int]) -> Tensor:
    for name, dim in sharded.items():
        axis = getattr(mesh, name)
        tensor = tensor.chunk(axis.size, dim)[axis.rank]
    return tensor.clone(memory_format=torch.contiguous_format)


def piece(tensor: Tensor, axis: Axis) -> tuple[Tensor, int]:
    """The axis's flat piece of a tensor, of uneven lengths; some ranks may have none."""
    size = -(-tensor.numel() // axis.size)
    start = min(axis.rank * size, tensor.numel())
    return tensor.flatten()[start : start + size].clone(), start


def slices(mesh: Mesh, *, zero: bool) -> dict[str, Slice]:
    """This rank's parts of WHOLE; with `zero`, what the optimizer holds is cut into flat pieces."""
    padded = torch.cat([WHOLE["model.vocabulary"], torch.full((PADDED - 10, 3), float(mesh.world.rank))])
    experts = {"ep": 0, "tp": 2}
    result = {
        "model.experts": Slice(cut(WHOLE["model.experts"], mesh, experts), experts),
        "model.norm": Slice(WHOLE["model.norm"].clone(), {}),
        "model.vocabulary": Slice(cut(padded, mesh, {"tp": 0}), {"tp": 0}, length={0: 10}),
        "step": Slice(WHOLE["step"].clone(), {}),
    }
    for name, sharded, axis in (("optim.experts", experts, mesh.edp), ("optim.norm", {}, mesh.dp)):
        local = cut(WHOLE[name], mesh, sharded)
        if zero:
            flat, start = piece(local, axis)
            result[name] = Slice(flat, sharded, shape=tuple(local.shape), start=start)
        else:
            result[name] = Slice(local, sharded)
    return result


def emptied(parts: dict[str, Slice]) -> dict[str, Slice]:
    return {n: Slice(torch.full_like(p.local, -7), p.sharded, p.shape, p.start, p.length) for n, p in parts.items()}


def assert_filled(loaded: dict[str, Slice], expected: dict[str, Slice], mesh: Mesh) -> None:
    for name, part in loaded.items():
        if name == "model.vocabulary":  # padding stays as it was
            first = mesh.tp.rank * part.local.shape[0]
            real = max(0, min(part.local.shape[0], 10 - first))
            assert torch.equal(part.local[:real], expected[name].local[:real])
            assert bool((part.local[real:] == -7).all())
        else:
            assert torch.equal(part.local, expected[name].local), name


def checkpoints(folder: Path, mesh: Mesh, **settings: Any) -> Checkpoints:
    return Checkpoints(folder, mesh, **{"keep_last": 2, "keep_every": 0, "asynchronous": False, **settings})


def save_all_layouts(root: Path, world: int) -> None:
    for tp, ep in LAYOUTS[world]:
        mesh = build_mesh(tp=tp, ep=ep)
        for zero in (False, True):
            checkpoints(root / f"{world}-{tp}-{ep}-{zero}", mesh).save(20, slices(mesh, zero=zero), VALUES)


def load_everything(root: Path, world: int) -> int:
    loads = 0
    for tp, ep in LAYOUTS[world]:
        mesh = build_mesh(tp=tp, ep=ep)
        folders = sorted(root.iterdir())
        there = checkpoints(folders[0], mesh)
        assert there.newest() == folders[0] / "step_00000020"
        for i, folder in enumerate(folders):
            path = folder / "step_00000020"
            expected = slices(mesh, zero=bool(i % 2))
            loaded = emptied(expected)
            assert there.load(path, loaded) == VALUES
            assert_filled(loaded, expected, mesh)
            loads += 1
    return loads


def work(root: Path, world: int) -> int:
    save_all_layouts(root, world)
    asynchronous_equals_synchronous(root.parent / f"async-{world}")
    failing_rank_fails_all(root.parent / f"failing-{world}")
    if world > 1:
        holes_are_refused(root.parent / f"holes-{world}")
    if dist.is_initialized():
        dist.barrier()
    return load_everything(root, world)


def asynchronous_equals_synchronous(root: Path) -> None:
    mesh = build_mesh(tp=1, ep=1)
    parts = slices(mesh, zero=True)
    checkpoints(root / "sync", mesh).save(1, parts, VALUES)
    background = checkpoints(root / "async", mesh, asynchronous=True)
    background.save(1, parts, VALUES)
    for part in parts.values():
        part.local.zero_()  # the next step's update must not reach the file
    total = torch.ones(1)
    for _ in range(20):  # the training's collectives meanwhile
        if dist.is_initialized():
            dist.all_reduce(total)
    background.save(2, parts, VALUES)
    background.wait()
    newest = background.newest()
    assert newest is not None and newest.name == "step_00000002"
    assert not any(bool(t.any()) for t in read_tensors(newest).values())
    for name, tensor in read_tensors(root / "sync" / "step_00000001").items():
        assert torch.equal(read_tensors(root / "async" / "step_00000001")[name], tensor)


def failing_rank_fails_all(root: Path) -> None:
    """The last rank's disk is full: every rank hears of it, and the older checkpoint stays the newest."""
    mesh = build_mesh(tp=1, ep=1)
    for asynchronous in (False, True):
        there = checkpoints(root, mesh, asynchronous=asynchronous)
        there.save(1, slices(mesh, zero=False), VALUES)
        there.wait()
        with pytest.MonkeyPatch.context() as patch:
            if mesh.world.rank == mesh.world.size - 1:
                patch.setattr(dcp.FileSystemWriter, "write_data", disk_full)
            with pytest.raises(SaveFailed, match=rf"step_00000002 .*rank {mesh.world.size - 1}: .*no space left") as caught:
                there.save(2, slices(mesh, zero=False), VALUES)
                there.wait()
        assert caught.value.rank == mesh.world.size - 1 and caught.value.path == root / "step_00000002"
        assert there.newest() == root / "step_00000001"
        assert names(root) == ["step_00000001"]  # what was written is gone: `newest` has come after it on rank 0


def holes_are_refused(root: Path) -> None:
    """All ranks give the first half: torch's planner misses the second."""
    there = checkpoints(root, build_mesh(tp=1, ep=1))
    with pytest.raises(RuntimeError, match="invalid fill"):
        there.save(1, {"w": Slice(torch.ones(2), {}, shape=(4,), start=0)}, {})
    assert there.newest() is None


def disk_full(*_: Any) -> None:
    raise OSError("no space left on the test's disk")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of 1, 2 and 4 ranks in all their layouts; later worlds have read what earlier ones wrote."""
    root = tmp_path_factory.mktemp("checkpoints") / "saved"
    assert work(root, 1) == 2
    assert run_on_ranks(4, work, root, 4) == [4 * 10] * 4
    assert run_on_ranks(2, work, root, 2) == [3 * 16] * 2
    return root


def test_ranks_of_any_layout_read_what_other_layouts_wrote(saved: Path) -> None:
    assert len(list(saved.iterdir())) == 16  # checked by the ranks themselves
    assert load_everything(saved, 1) == 16


def test_four_ranks_read_what_two_wrote(saved: Path) -> None:
    for tp, ep in LAYOUTS[4]:
        for rank in range(4):
            mesh = mesh_without_ranks(4, tp, ep, rank)
            for zero in (False, True):
                expected = slices(mesh, zero=zero)
                loaded = emptied(expected)
                parts = {n: Part(whole_shape(p, mesh), p.local.dtype, boxes(p, mesh)) for n, p in loaded.items()}
                read_into(saved / "2-2-1-True" / "step_00000020", parts)
                assert_filled(loaded, expected, mesh)


def test_one_process_reads_whole_tensors_and_values(saved: Path) -> None:
    path = saved / "4-2-2-True" / "step_00000020"
    assert read_values(path) == VALUES
    tensors = read_tensors(path)
    assert set(tensors) == set(WHOLE)
    for name, whole in WHOLE.items():
        assert tensors[name].dtype == whole.dtype
        assert torch.equal(tensors[name], whole)
    assert set(read_tensors(path, ["model.norm"])) == {"model.norm"}
    with pytest.raises(ValueError, match="no tensor model.nrm"):
        read_tensors(path, ["model.nrm"])


def test_values_json_lists_names_shapes_and_types(saved: Path) -> None:
    path = saved / "4-2-2-True" / "step_00000020"
    listing = json.loads((path / "values.json").read_text())["tensors"]
    assert listing["model.experts"] == {"shape": [4, 6, 8], "dtype": "float32"}
    assert listing["model.vocabulary"] == {"shape": [10, 3], "dtype": "float32"}
    assert listing["model.norm"] == {"shape": [7], "dtype": "float64"}


def test_each_element_is_stored_once(saved: Path) -> None:
    for layout in ("4-1-1-False", "4-2-1-True"):
        metadata = dcp.FileSystemReader(saved / layout / "step_00000020").read_metadata()
        elements = {n: sum(c.sizes.numel() for c in e.chunks) for n, e in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]
        assert elements == {n: t.numel() for n, t in WHOLE.items()}


ONE = mesh_without_ranks(1, 1, 1, 0)


def save_one(folder: Path, step: int, value: float = 0.0, **settings: Any) -> Checkpoints:
    there = checkpoints(folder, ONE, **settings)
    there.save(step, {"w": Slice(torch.full((3,), value), {})}, {"step": step})
    return there


def sign(path: Path) -> None:
    """Give a checkpoint the checksums of the files that it has now, as one who plants something would."""
    write_sums(path, {p.name: sum_of(p) for p in path.iterdir() if p.name != SUMS})


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_another_models_checkpoint_is_refused_before_anything_changes(tmp_path: Path) -> None:
    there = checkpoints(tmp_path, ONE)
    there.save(1, {"a": Slice(torch.ones(2, 3), {}), "b": Slice(torch.ones(4), {}), "x": Slice(torch.ones(1), {})}, {})
    mine = {"a": Slice(torch.zeros(2, 3), {}), "b": Slice(torch.zeros(5), {}), "c": Slice(torch.zeros(1), {})}
    problem = r"b: \[4\] in the checkpoint, \[5\] here; c: absent in the checkpoint, \[1\] here; x: \[1\] in .*, absent here"
    with pytest.raises(ValueError, match=problem):
        there.load(tmp_path / "step_00000001", mine)
    assert not any(bool(p.local.any()) for p in mine.values())


def test_weights_alone_are_read_by_their_prefix_and_converted(tmp_path: Path) -> None:
    there = checkpoints(tmp_path, ONE)
    there.save(1, {"model.w": Slice(torch.full((2,), 0.5), {}), "optim.w": Slice(torch.ones(2), {})}, {})
    mine = {"model.w": Slice(torch.zeros(2, dtype=torch.float64), {})}
    there.load(tmp_path / "step_00000001", mine, prefix="model.")
    assert mine["model.w"].local.tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="optim.w"):
        there.load(tmp_path / "step_00000001", mine)


def test_incomplete_and_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint .*nowhere"):
        read_values(tmp_path / "nowhere")
    save_one(tmp_path, 1)
    path = tmp_path / "step_00000001"
    mine = {"w": Slice(torch.full((3,), 9.0), {})}
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"step_00000001: __0_0.distcp: it has \d+ bytes, not \d+"):
        checkpoints(tmp_path, ONE).load(path, mine)
    (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"\.metadata: it has 50 bytes"):
        checkpoints(tmp_path, ONE).load(path, mine)
    with pytest.raises(ValueError, match=r"\.metadata is damaged: it has 50 bytes"):
        read_tensors(path)
    (path / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"\.metadata: there is no such file"):
        checkpoints(tmp_path, ONE).load(path, mine)
    with pytest.raises(ValueError, match="not a complete checkpoint: it has no .metadata"):
        read_tensors(path)
    assert checkpoints(tmp_path, ONE).newest() is None
    assert mine["w"].local.tolist() == [9.0] * 3


def test_metadata_that_would_run_code_is_refused(tmp_path: Path) -> None:
    save_one(tmp_path, 1)
    trap = tmp_path / "made by the pickle"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(trap),)

    (tmp_path / "step_00000001" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="metadata is damaged: it has"):
        read_tensors(tmp_path / "step_00000001")
    sign(tmp_path / "step_00000001")
    with pytest.raises(ValueError, match="mkdir has no place"):
        read_tensors(tmp_path / "step_00000001")
    assert not trap.exists()


def test_the_last_ones_and_every_nth_are_kept(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save_one(tmp_path, step, keep_last=2, keep_every=30)
    assert names(tmp_path) == [f"step_{s:08d}" for s in (30, 60, 70)]


def test_nothing_older_goes_before_the_newer_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_one(tmp_path, 1, keep_last=1)
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", disk_full)
    with pytest.raises(SaveFailed, match="no space left"):
        save_one(tmp_path, 2, keep_last=1)
    assert checkpoints(tmp_path, ONE).newest() == tmp_path / "step_00000001"
    assert names(tmp_path) == ["step_00000001"]
    monkeypatch.undo()
    save_one(tmp_path, 2, keep_last=1)
    assert names(tmp_path) == ["step_00000002"]


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save_one(tmp_path, 1, value=1.0)
    save_one(tmp_path, 1, value=2.0)
    assert names(tmp_path) == ["step_00000001"]
    assert read_tensors(tmp_path / "step_00000001")["w"].tolist() == [2.0] * 3


@pytest.mark.parametrize("moment", range(4))
def test_a_kill_between_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Saving step 2 again beside step 1 renames three times (.metadata inside, old away, new in), pruning a fourth."""
    save_one(tmp_path, 1, value=1.0)
    save_one(tmp_path, 2, value=2.0)
    calls = 0
    rename = Path.rename

    def killed(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == moment + 1:
            raise KeyboardInterrupt  # as a kill: nothing here catches it
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):  # torch makes the first into an error of its own
        save_one(tmp_path, 2, value=3.0, keep_last=1)
    assert calls == moment + 1
    monkeypatch.undo()
    newest = checkpoints(tmp_path, ONE).newest()
    assert newest == tmp_path / "step_00000002"
    assert read_tensors(newest)["w"].tolist() == [2.0 if moment < 3 else 3.0] * 3
    assert not [n for n in names(tmp_path) if n.startswith(".")]


def dies_while_saving(root: Path, asynchronous: bool) -> None:
    mesh = build_mesh(tp=1, ep=2)
    there = checkpoints(root, mesh, asynchronous=asynchronous)
    there.save(10, slices(mesh, zero=False), VALUES)
    there.wait()
    if mesh.world.rank == 1:
        dcp.FileSystemWriter.write_data = lambda *_: os.kill(os.getpid(), 9)  # type: ignore[method-assign, assignment, return-value]
    there.save(20, slices(mesh, zero=False), VALUES)
    there.wait()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_killed_while_saving_leaves_the_previous_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    with pytest.raises(Exception, match="SIGKILL|closed|reset"):  # what is noticed first: the death, or a broken connection
        run_on_ranks(2, dies_while_saving, tmp_path, asynchronous)
    assert ".step_00000020.partial" in names(tmp_path)
    there = checkpoints(tmp_path, ONE)
    path = there.newest()
    assert path == tmp_path / "step_00000010"
    assert names(tmp_path) == ["step_00000010"]
    expected = slices(ONE, zero=False)
    loaded = emptied(expected)
    there.load(path, loaded)
    assert_filled(loaded, expected, ONE)


@given(st.lists(st.integers(1, 4), min_size=0, max_size=4), st.integers(0, 300), st.integers(0, 300))
def test_a_span_is_cut_into_boxes_in_order(shape: list[int], a: int, b: int) -> None:
    whole = torch.arange(functools.reduce(int.__mul__, shape, 1)).view(shape)
    start, stop = min(a, b, whole.numel()), min(max(a, b), whole.numel())
    seen: list[int] = []
    for offsets, sizes in span(tuple(shape), start, stop):
        seen += whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes))].flatten().tolist()
    assert seen == list(range(start, stop))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
