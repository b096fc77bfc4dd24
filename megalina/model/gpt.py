"""A GPT with mixture-of-experts layers, for one device: it knows no process group.

`GPT.forward` composes the very functions of which a program's instructions are made: it is used for generation and is the
oracle against which every layout is tested.

Shapes: B sequences, S tokens a sequence, T = B x S tokens, D width, V words, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalina.batch import Batch
from megalina.config import ModelConfig, RouterConfig
from megalina.model.balance import global_balance
from megalina.model.init import parameter
from megalina.model.layers import ALL, KeyValues, Layer, Norm, Rotary, head_dim, places
from megalina.model.linear import linear
from megalina.model.noise import dropout
from megalina.model.rope import rope_table
from megalina.model.vocabulary import cross_entropy, head_stat


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums over the tokens of a batch; the caller divides by the number of tokens."""

    loss: Tensor  # cross entropy in nats, over positions whose label counts
    balance: Tensor  # load balance, summed over layers
    z: Tensor  # router z-loss, summed over layers
    loads: list[Tensor]  # per MoE layer int64 [E + 1]: tokens that chose each expert, choices lost to capacity


class GPT(nn.Module):
    """Parameters are on the meta device until `megalina.model.init.initialise` (or a checkpoint) fills them."""

    layers: Sequence[Layer]  # an nn.ModuleList

    def __init__(
        self, config: ModelConfig, router: RouterConfig, *, vocab_size: int, max_positions: int, seed: int, padded_vocab: int = 0
    ):
        super().__init__()
        self.config, self.router, self.seed, self.vocab_size = config, router, seed, vocab_size
        self.padded_vocab = padded_vocab or vocab_size
        self.embedding = parameter(self.padded_vocab, config.d_model, std=config.init_std, rows=vocab_size, sharded={"tp": 0})
        self.head = None
        if not config.tie_embeddings:
            self.head = parameter(self.padded_vocab, config.d_model, std=config.init_std, rows=vocab_size, sharded={"tp": 0})
        learned = config.positions == "learned"
        self.positions = parameter(max_positions, config.d_model, std=config.init_std, decay=False) if learned else None
        rotary = None if learned else Rotary(*rope_table(max_positions, head_dim(config), config.rope_theta))
        self.rotary = rotary
        layers = (Layer(config, router, index=i, seed=seed, rotary=rotary) for i in range(config.num_layers))
        self.layers = nn.ModuleList(layers)  # type: ignore[assignment]
        self.final_norm = Norm(config.norm, config.d_model, config.norm_eps)

    @property
    def moe_layers(self) -> list[int]:
        return [i for i, layer in enumerate(self.layers) if layer.is_moe]

    # embedding
    def embed(self, batch: Batch, first_word: int = 0) -> Tensor:
        """[T, D]: the embeddings of those tokens whose words are here (from `first_word` on), zero for others."""
        word_T = batch.tokens_BS.flatten() - first_word
        if len(self.embedding) == self.padded_vocab:
            return F.embedding(word_T, self.embedding)
        here_T = (word_T >= 0) & (word_T < len(self.embedding))
        return F.embedding(word_T.where(here_T, 0), self.embedding) * here_T.unsqueeze(1)

    def place(self, x_TD: Tensor, batch: Batch, own: slice = ALL) -> Tensor:
        """With learned positions and dropout."""
        if self.positions is not None:
            x_TD = x_TD + F.embedding(batch.position_BS.flatten()[own], self.positions)
        if self.config.dropout and self.training:
            sample_T, position_T = places(batch, own)
            x_TD = dropout(x_TD, self.config.dropout, self.seed, -1, "embedding", sample_T, position_T)
        return x_TD

    # head
    def logits(self, n_TD: Tensor) -> Tensor:
        """[T, V] of the words that are here, padding included."""
        return linear(n_TD, self.embedding if self.head is None else self.head)

    def stat(self, n_TD: Tensor, batch: Batch, first_word: int = 0) -> Tensor:
        """[T, 2], see `head_stat`."""
        head_VD = self.embedding if self.head is None else self.head
        words = min(max(self.vocab_size - first_word, 0), len(head_VD))
        return head_stat(n_TD, head_VD, batch.labels_BS.flatten() - first_word, words)

    def loss(self, stat_RA2: Tensor, batch: Batch, own: slice = ALL) -> Tensor:
        """Scalar: the sum of the own tokens' cross entropies, from each rank's statistics of all tokens."""
        counts_T = batch.loss_mask_BS.flatten()[own]
        return cross_entropy(stat_RA2[:, own]).where(counts_T, 0.0).sum()

    # all of it
    def hidden(self, batch: Batch, past: Sequence[KeyValues] | None = None) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """The last layer's output after the final norm, [T, D], and per MoE layer (balance, z, load)."""
        x_TD = self.place(self.embed(batch), batch)
        routed = []
        for i, layer in enumerate(self.layers):
            h_TD = layer.attend(x_TD, batch, past[i] if past else None)
            if not layer.is_moe:
                x_TD = layer.feed(h_TD, batch)
                continue
            n_TD, logits_TE = layer.score(h_TD)
            rows_ND, weight_TK, balance, z, order, load = layer.select(n_TD, logits_TE, logits_TE.detach(), batch)
            back_ND = layer.experts(rows_ND, order.count_E.tolist())
            shared_TD = layer.share(n_TD) if layer.shared is not None else None
            x_TD = layer.mix(h_TD, back_ND, weight_TK, shared_TD, order, batch)
            routed.append((balance, z, load))
        return self.final_norm(x_TD), routed

    def forward(self, batch: Batch) -> Losses:
        """Losses of a batch, on one device."""
        n_TD, routed = self.hidden(batch)
        loss = self.loss(self.stat(n_TD, batch).unsqueeze(0), batch)
        zero = loss.new_zeros(())
        loads = [load for _, _, load in routed]
        if routed and self.router.group == "global":
            balance = self.balance_of_all([prob for prob, _, _ in routed], torch.stack(loads))
        else:
            balance = sum((b for b, _, _ in routed), zero)
        return Losses(loss, balance, sum((z for _, z, _ in routed), zero), loads)

    def balance_of_all(self, prob_LE: Sequence[Tensor], load_LE: Tensor) -> Tensor:
        """The balance loss over all ranks: own sums of probabilities, and everybody's loads (columns beyond E don't count)."""
        chosen_LE = load_LE[:, : self.config.num_experts]
        valid = chosen_LE[0].sum() // self.router.top_k
        return global_balance(torch.stack(list(prob_LE)), chosen_LE, valid, self.router.top_k)
