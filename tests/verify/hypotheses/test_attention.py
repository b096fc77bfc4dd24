"""Causes of wrong attention, each with a near miss that is not named."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megalina.batch import Batch
from megalina.model.gpt import Layer
from megalina.verify.recording import Layout
from megalina.verify.reference import model_of
from tests.verify.changed_recording import TP, Change, diagnosed, only, reference_of

WINDOWED, LATENT, LATENT_WINDOWED = "sinks, windows, normed together", "latent", "latent, sinks, windows"


def attended(name: str, layout: Layout, how: Callable[[Layer, Tensor, Batch], Tensor]) -> Change:
    """What the first layer's attention would give if it were computed so."""
    reference = reference_of(name, layout)
    gpt, batch = model_of(reference.config), reference.batches[0]
    with torch.no_grad():
        for parameter, p in gpt.named_parameters():
            p.copy_(reference.entry(-1, "weight", parameter).value.reshape(p.shape))
        before = reference.entry(0, "activation", "embedded").value
        out = how(gpt.layers[0], before.flatten(0, 1), batch)
    return only(0, "activation", "layers.0.attention", out.view_as(before))


@pytest.mark.parametrize("model", [WINDOWED, LATENT_WINDOWED])
@pytest.mark.parametrize(
    "window, cause", [(4, "window_too_wide"), (2, "window_too_narrow"), (0, "window_not_applied"), (1, "unknown"), (5, "unknown")]
)
def test_another_window_is_named_where_it_is_one_off_or_none(model: str, window: int, cause: str) -> None:
    def how(layer: Layer, x_TD: Tensor, batch: Batch) -> Tensor:
        layer.attention.window = window
        return layer.attend(x_TD, batch)

    assert diagnosed(model, TP, attended(model, TP, how)).named == cause


@pytest.mark.parametrize("model", [WINDOWED, LATENT_WINDOWED])
@pytest.mark.parametrize("share, cause", [(0.0, "sinks_left_out"), (0.5, "unknown")])
def test_sinks_that_nobody_adds_are_named(model: str, share: float, cause: str) -> None:
    def how(layer: Layer, x_TD: Tensor, batch: Batch) -> Tensor:
        layer.attention.sinks.copy_(layer.attention.sinks + torch.tensor(share, dtype=torch.float64).log())
        return layer.attend(x_TD, batch)

    assert diagnosed(model, TP, attended(model, TP, how)).named == cause


@pytest.mark.parametrize("ranks, cause", [(2, "norm_of_own_heads"), (4, "unknown")])
def test_the_norm_of_each_rank_s_heads_is_named(ranks: int, cause: str) -> None:
    def how(layer: Layer, x_TD: Tensor, batch: Batch) -> Tensor:
        heads = layer.attention
        q_TX, k_TY, v_TY = heads.projected(layer.attention_norm(x_TD))
        normed = []
        for x, norm in ((q_TX, heads.q_norm), (k_TY, heads.k_norm)):
            of_ranks = [part * (part.square().mean(1, keepdim=True) + norm.eps).rsqrt() for part in x.chunk(ranks, 1)]
            normed.append(torch.cat(of_ranks, 1) * norm.weight)
        return x_TD + heads.mixed(*normed, v_TY, batch, None) @ heads.proj.T

    assert diagnosed(WINDOWED, TP, attended(WINDOWED, TP, how)).named == cause


@pytest.mark.parametrize(
    "neighbours, cause", [(("query",), "rope_interleaved"), (("key",), "rope_interleaved"), (("query", "key"), "unknown")]
)
def test_pairs_of_neighbours_on_one_side_are_named(neighbours: tuple[str, ...], cause: str) -> None:
    def how(layer: Layer, x_TD: Tensor, batch: Batch) -> Tensor:
        heads, shape = layer.attention, batch.tokens_BS.shape
        rotary = heads.rotary[0]
        angle_BSi = torch.complex(rotary.cos_Pi[batch.position_BS], rotary.sin_Pi[batch.position_BS])

        def turned(x_BSHr: Tensor, side: str) -> Tensor:
            first, second = (x_BSHr[..., 0::2], x_BSHr[..., 1::2]) if side in neighbours else x_BSHr.chunk(2, -1)
            out = torch.complex(first, second) * angle_BSi.unsqueeze(2)
            return torch.view_as_real(out).flatten(-2) if side in neighbours else torch.cat([out.real, out.imag], -1)

        n_TD = layer.attention_norm(x_TD)
        still_BSHn, of_query = (
            (n_TD @ heads.q.T).view(*shape, -1, heads.still + heads.turned).split([heads.still, heads.turned], 3)
        )
        c_Tc, of_key = (n_TD @ heads.kv_down.T).split([heads.latent, heads.turned], 1)
        query = torch.cat([still_BSHn, turned(of_query, "query")], -1)
        key = turned(of_key.view(*shape, 1, -1), "key").squeeze(2)
        mixed = heads.attended(query, heads.kv_norm(c_Tc).view(*shape, -1), key, batch.document_BS, None)
        return x_TD + mixed.flatten(0, 1) @ heads.proj.T

    assert diagnosed(LATENT, TP, attended(LATENT, TP, how)).named == cause
