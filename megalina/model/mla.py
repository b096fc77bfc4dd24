"""Multi-head latent attention in torch (DeepSeek-V2, arXiv:2405.04434, section 2.1, appendix C).

Generation keeps, of an earlier token, the compressed vector c and the turned part of the key alone.  Then keys and values are not
made: what would make a key of c is put on the query, and what would make a value of c on what the head gives ("absorbed").

Shapes: B sequences, S tokens a sequence, T = B x S tokens, L tokens so far, D model width, H heads; of a head n numbers of query
and key without a position, r turned ones, e of a value; c numbers of a compressed token, z of a compressed query.
"""

from typing import Any

import torch
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.blocks.heads import query_size
from megalina.blocks.mla import COMPRESSED_EPS
from megalina.config import ModelConfig
from megalina.model.attend import attend, attention_mask
from megalina.model.attention import Attention, KeyValues
from megalina.model.block_functions import no_parameters
from megalina.model.largest_logits import largest_logits
from megalina.model.late_gradients import Later
from megalina.model.linear import linear, linears
from megalina.model.norm import Norm
from megalina.model.rope import Rotary, rotate, score_factor


class LatentHeads(nn.Module):
    """The number of heads follows from the weights, so that part of the heads works too."""

    q: Tensor | None  # [H*(n+r), D]: of queries that are not compressed
    q_down: Tensor | None  # [z, D]
    q_up: Tensor | None  # [H*(n+r), z]
    kv_down: Tensor  # [c+r, D]
    kv_up: Tensor  # [H*(n+e), c]
    proj: Tensor  # [D, H*e]
    sinks: Tensor | None  # [H]
    proj_bias: Tensor | None  # there is none: as other heads have it

    def __init__(self, model: ModelConfig, rotary: Rotary):
        super().__init__()
        self.still, self.turned, self.value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
        self.latent, self.window = model.kv_lora_rank, model.window
        self.scale = query_size(model) ** -0.5 * score_factor(model)
        self.rotary = [rotary]  # in a list: shared, not a part of each layer
        no_parameters(self, "q", "q_down", "q_up", "kv_down", "kv_up", "proj", "proj_bias", "sinks")
        self.q_norm = Norm(COMPRESSED_EPS) if model.q_lora_rank else None
        self.kv_norm = Norm(COMPRESSED_EPS)

    def forward(
        self,
        n_TD: Tensor,
        batch: Batch,
        past: KeyValues | None = None,
        *,
        later: Later | None = None,
        logits: list[Tensor] | None = None,
    ) -> Tensor:
        """What these heads add, [T, D].  `logits` gets the largest of each head, [H]."""
        q_BSHx, c_BSc, turned_BSr = self.read(n_TD, batch, later)
        if past is None or past.length == 0:
            if past is not None:
                past.extended(torch.cat([c_BSc, turned_BSr], -1))
            mixed_BSX = self.attended(q_BSHx, c_BSc, turned_BSr, batch.document_BS, later, logits)
        else:
            (kept_BLx,) = past.extended(torch.cat([c_BSc, turned_BSr], -1))
            document_BL = batch.document_BS
            if document_BL is not None:  # a window keeps the last tokens alone
                document_BL = document_BL[:, document_BL.shape[1] - kept_BLx.shape[1] :]
            mixed_BSX = self.absorbed(q_BSHx, kept_BLx, document_BL)
        return linear(mixed_BSX.reshape(n_TD.shape[0], -1), self.proj, later=later)

    def read(self, n_TD: Tensor, batch: Batch, later: Later | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, [B, S, H, n+r], compressed tokens, [B, S, c], and the key's turned part, [B, S, r]."""
        first = self.q if self.q_norm is None else self.q_down
        assert first is not None
        q_Tx, down_Tx = linears(n_TD, (first, self.kv_down), (None, None), later=later)
        return self.positioned_queries(q_Tx, batch, later), *self._positioned_keys(down_Tx, batch)

    def positioned_queries(self, q_Tx: Tensor, batch: Batch, later: Later | None) -> Tensor:
        """`q_Tx`: compressed, if they are."""
        if self.q_norm is not None and self.q_up is not None:
            q_Tx = linear(self.q_norm(q_Tx), self.q_up, later=later)
        cos_BSi, sin_BSi = batch.once(self.rotary[0].rows, q_Tx.dtype)
        return rotate(q_Tx.view(*batch.tokens_BS.shape, -1, self.still + self.turned), cos_BSi, sin_BSi, self.still)

    def _positioned_keys(self, down_Tx: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        shape = batch.tokens_BS.shape
        cos_BSi, sin_BSi = batch.once(self.rotary[0].rows, down_Tx.dtype)
        c_Tc, turned_Tr = down_Tx.split((self.latent, self.turned), dim=1)
        turned_BSr = rotate(turned_Tr.view(*shape, 1, -1), cos_BSi, sin_BSi).squeeze(2)
        return self.kv_norm(c_Tc).view(*shape, -1), turned_BSr

    def attended(
        self,
        q_BSHx: Tensor,
        c_BSc: Tensor,
        turned_BSr: Tensor,
        document_BS: Tensor | None,
        later: Later | None,
        logits: list[Tensor] | None = None,
    ) -> Tensor:
        """What the heads give, [B, S, H*e], with keys and values made."""
        key_BSHx, value_BSHe = self._made(c_BSc, turned_BSr, later)
        if logits is not None:
            logits.append(largest_logits(q_BSHx, key_BSHx, document_BS, scale=self.scale, window=self.window))
        how = {"scale": self.scale, "window": self.window, "sink_H": self.sinks}
        return attend(q_BSHx, key_BSHx, value_BSHe, document_BS, **how)

    def _made(self, c_BSc: Tensor, turned_BSr: Tensor, later: Later | None) -> tuple[Tensor, Tensor]:
        """Keys, [B, S, H, n+r], and values, [B, S, H, e]."""
        up_BSHy = linear(c_BSc, self.kv_up, later=later).view(*c_BSc.shape[:2], -1, self.still + self.value)
        key_BSHn, value_BSHe = up_BSHy.split((self.still, self.value), dim=-1)
        shared_BSHr = turned_BSr.unsqueeze(2).expand(-1, -1, key_BSHn.shape[2], -1)
        return torch.cat([key_BSHn, shared_BSHr], -1), value_BSHe

    # with context parallelism
    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Query heads and key heads here, numbers of a query and of a value."""
        heads = len(self.kv_up) // (self.still + self.value)
        return heads, heads, self.still + self.turned, self.value

    def queries(self, n_TD: Tensor, batch: Batch, later: Later | None) -> Tensor:
        first = self.q if self.q_norm is None else self.q_down
        assert first is not None
        return self.positioned_queries(linear(n_TD, first, later=later), batch, later)

    def compact_keys(self, n_TD: Tensor, batch: Batch, later: Later | None) -> Tensor:
        """The compressed token and the key's turned part."""
        return torch.cat(self._positioned_keys(linear(n_TD, self.kv_down, later=later), batch), dim=2)

    def keys_and_values(self, kv_BLy: Tensor, later: Later | None) -> tuple[Tensor, Tensor]:
        c_BLc, turned_BLr = kv_BLy.split((self.latent, self.turned), dim=2)
        return self._made(c_BLc, turned_BLr, later)

    def out(self, mixed_TX: Tensor, n_TD: Tensor | None, later: Later | None) -> Tensor:
        """What these heads add, from what they give."""
        return linear(mixed_TX, self.proj, later=later)

    def absorbed(self, q_BSHx: Tensor, kept_BLx: Tensor, document_BL: Tensor | None) -> Tensor:
        """What the heads give, [B, S, H*e], of the last S tokens' queries, with neither keys nor values: `kept_BLx` has c and the
        key's turned part of all tokens."""
        up_Hyc = self.kv_up.view(-1, self.still + self.value, self.latent)
        key_Hnc, value_Hec = up_Hyc.split((self.still, self.value), dim=1)
        still_BSHn, turned_BSHr = q_BSHx.split((self.still, self.turned), dim=-1)
        query_BHSx = torch.cat([torch.einsum("bshn,hnc->bhsc", still_BSHn, key_Hnc), turned_BSHr.transpose(1, 2)], -1)
        batch, heads, num_queries, _ = query_BHSx.shape
        score_BNL = (query_BHSx.flatten(1, 2) @ kept_BLx.transpose(1, 2)).mul_(self.scale)  # N = H x S
        score_BHSL = score_BNL.view(batch, heads, num_queries, -1)
        if num_queries > 1 or document_BL is not None or self.window:
            mask = attention_mask(num_queries, kept_BLx.shape[1], document_BL, q_BSHx.device, self.window)
            score_BHSL.masked_fill_(~mask, float("-inf"))
        wide = torch.promote_types(score_BHSL.dtype, torch.float32)
        if self.sinks is None:
            weight_BNL = score_BNL.softmax(-1, dtype=wide).to(kept_BLx.dtype)
        else:  # a sink is one more score, which has no value
            sink_BN1 = self.sinks.to(wide)[:, None].expand(batch, -1, num_queries).reshape(batch, -1, 1)
            weight_BNL = torch.cat([score_BNL.to(wide), sink_BN1], -1).softmax(-1)[..., :-1].to(kept_BLx.dtype)
        given_BHSc = (weight_BNL @ kept_BLx[..., : self.latent]).view(batch, heads, num_queries, -1)
        return torch.einsum("bhsc,hec->bshe", given_BHSc, value_Hec).flatten(2)


class LatentAttention(Attention):
    def heads(self, model: ModelConfig, layer: Any) -> LatentHeads:
        return LatentHeads(model, layer.rotary[0])
