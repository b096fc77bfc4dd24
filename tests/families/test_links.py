"""What links can say, on formats that are known: each number goes to its place, and comes back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalina.checkpoint.hugging_face.linked import Linked, our_shapes
from megalina.checkpoint.hugging_face.views import ours_from, theirs_from, viewed
from megalina.families.decoder import experts_links, mlp_links
from megalina.families.links import Link, View, same, uncovered
from megalina.families.table import family_of
from tests.checkpoint.hugging_face.plain import CONFIGS, config_of, state_of


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def brought(links: list[Link], theirs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Ours, after it was held that theirs come back."""
    assert uncovered(link.theirs for link in links) == uncovered(link.ours for link in links) == {}
    ours = ours_from(links, torch.float64, theirs.__getitem__)
    for key, whole in theirs.items():
        back = theirs_from([link for link in links if link.theirs.name == key], torch.float64, lambda _: ours)
        assert torch.equal(back, whole), key
    return ours


def test_stacked_experts_with_gate_and_up_one_behind_the_other() -> None:
    links = [link for link in experts_links("e.", "experts", 3, 2, 4) if link.ours.name == "experts.w1"]
    theirs = {
        f"e.{e}.{name}_proj.weight": numbered(4, 2) + 100 * e + 10 * up
        for e in range(3)
        for up, name in enumerate(("gate", "up"))
    }
    ours = brought(links, theirs)
    assert ours.shape == (3, 8, 2)
    for e in range(3):
        assert torch.equal(ours[e], torch.cat([theirs[f"e.{e}.gate_proj.weight"], theirs[f"e.{e}.up_proj.weight"]]))
    some = ours_from([link for link in links if link.ours.first in (1, 2)], torch.float64, theirs.__getitem__, range(1, 3))
    assert torch.equal(some, ours[1:])


def test_interleaved_columns_of_transposed_experts() -> None:
    """gpt-oss: `gate_up_proj` [E, D, 2F], whose columns are gate, up, gate, up, ...; ours [E, 2F, D], gate rows first."""
    experts, width, d_ff = 2, 3, 4
    link = Link(
        View("gate_up_proj", (experts, width, 2 * d_ff), split=(experts, width, d_ff, 2), order=(0, 3, 2, 1)),
        View("experts.w1", (experts, 2 * d_ff, width), split=(experts, 2, d_ff, width)),
    )
    whole = numbered(experts, width, 2 * d_ff)
    ours = brought([link], {"gate_up_proj": whole})
    assert torch.equal(ours[:, :d_ff], whole[:, :, ::2].transpose(1, 2)) and torch.equal(
        ours[:, d_ff:], whole[:, :, 1::2].transpose(1, 2)
    )


def test_rope_pairs_that_lie_together_become_halves() -> None:
    """DeepSeek: of each head's rows [nope + rope], the last are turned in pairs (2i, 2i + 1); ours are (i, i + half)."""
    heads, nope, rope, width = 2, 3, 4, 2
    size = nope + rope
    whole = numbered(heads * size, width)
    # the turned rows are not a dim of their own in any reshaping of all rows, so each of the two halves is a link
    links = [
        *(
            Link(
                View("q_proj", (heads * size, width), split=(heads, size, width), at=(slice(None), slice(nope + odd, None, 2))),
                View("q", (heads * size, width), split=(heads, size, width), at=(slice(None), half)),
            )
            for odd, half in ((0, slice(nope, nope + rope // 2)), (1, slice(nope + rope // 2, None)))
        ),
        Link(
            View("q_proj", (heads * size, width), split=(heads, size, width), at=(slice(None), slice(0, nope))),
            View("q", (heads * size, width), split=(heads, size, width), at=(slice(None), slice(0, nope))),
        ),
    ]
    ours = brought(links, {"q_proj": whole}).view(heads, size, width)
    order = [0, 1, 2, 3, 5, 4, 6]
    assert torch.equal(ours, whole.view(heads, size, width)[:, order])


def test_one_tensor_of_theirs_is_two_of_ours() -> None:
    """kv_a_proj_with_mqa [rank + rope, D]: latent rows, then the shared key's."""
    links = [
        Link(View("kv_a", (5, 2), at=(slice(0, 3),)), View("latent", (3, 2))),
        Link(View("kv_a", (5, 2), at=(slice(3, 5),)), View("key", (2, 2))),
    ]
    whole = numbered(5, 2)
    parts = {name: ours_from([link], torch.float64, lambda _: whole) for name, link in zip(("latent", "key"), links)}
    assert torch.equal(parts["latent"], whole[:3]) and torch.equal(parts["key"], whole[3:])
    assert torch.equal(theirs_from(links, torch.float64, parts.__getitem__), whole)


def test_links_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a \[2, 3\] is linked to b \[3, 2\], of another shape"):
        Link(View("a", (2, 3)), View("b", (3, 2)))
    with pytest.raises(ValueError, match=r"a \[2, 3\] can't be viewed as \[5\]"):
        View("a", (2, 3), split=(5,))
    with pytest.raises(ValueError, match="is no order of 2 dims"):
        View("a", (2, 3), order=(0, 0))
    halves = list(mlp_links("m.", "mlp", 2, 4))
    assert uncovered(link.ours for link in halves[:1]) == {"mlp.w1": 8}
    assert uncovered(link.theirs for link in [*halves, halves[0]]) == {"m.gate_proj.weight": -8}


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_the_size_of_a_view_is_that_of_the_tensor_it_shows(shape: list[int], data: st.DataObject) -> None:
    indices = st.one_of(st.integers(0, 3), st.builds(slice, st.integers(0, 2), st.integers(1, 4), st.integers(1, 2)))
    at = tuple(data.draw(indices) for _ in range(data.draw(st.integers(0, len(shape)))))
    at = tuple(min(i, n - 1) if isinstance(i, int) else i for i, n in zip(at, shape))
    kept = len(shape) - sum(isinstance(i, int) for i in at)
    order = tuple(data.draw(st.permutations(range(kept)))) if kept else ()
    view = View("x", tuple(shape), at=at, order=order)
    assert viewed(torch.zeros(shape), view).shape == view.sizes


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_links_are_the_tensors_of_the_files_and_of_the_model(kind: str) -> None:
    config = config_of(kind)
    family = family_of(config)
    settings = family.read(config)
    linked = Linked(family, settings)
    assert linked.key_shapes() == {key: tuple(tensor.shape) for key, tensor in state_of(config).items()}
    assert {name: links[0].ours.shape for name, links in linked.ours.items()} == our_shapes(settings)
    assert family.read(family.written(settings)).math() == settings.math()


def test_a_family_that_forgets_a_tensor_is_found_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in CONFIGS:
        config = config_of(kind)
        family = family_of(config)
        links = list(family.links(family.read(config)))
        for planted in (links[:-1], [*links, links[0]], [*links[:-1], same("extra", "unknown", 3)]):
            with monkeypatch.context() as patch:
                patch.setattr(type(family), "links", lambda *_, planted=planted: iter(planted))
                with pytest.raises(AssertionError, match=family.name):
                    Linked(family, family.read(config))
