"""Replayed samples: sequences with the experts that their tokens are to go to, as a file of routing says it.

Shapes: B sequences, S tokens a sequence, L layers of the model, K experts a token.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from megalina.batch import Batch
from megalina.config import PretrainConfig, is_moe_layer
from megalina.data.source import Samples, TokenData
from megalina.placement.router_replay import RouterReplay, read_replay


@dataclass(frozen=True, slots=True)
class ReplayedSamples:
    """ValueError for a batch with a sequence that the replay doesn't know.  Several threads may ask."""

    samples: Samples
    replay: RouterReplay
    num_layers: int  # of the model, with and without experts
    setting: str  # where the file was named
    until: int | None = None  # sequences from this number on are padding: their tokens count nowhere and have no choices

    @property
    def num_sequences(self) -> int:
        return self.samples.num_sequences

    def batch(self, first: int, count: int, stride: int = 1) -> Batch:
        try:
            batch = self.samples.batch(first, count, stride)
            asked = batch
            if self.until is not None:
                asked = replace(batch, valid_BS=batch.valid_BS & (batch.sample_B < self.until)[:, None])
            return replace(batch, replay_BSLK=with_choices(asked, self.replay, self.num_layers).replay_BSLK)
        except ValueError as error:
            raise ValueError(f"{self.setting}: {error}") from error


def with_choices(batch: Batch, replay: RouterReplay, num_layers: int) -> Batch:
    """The batch with the experts of its tokens, none where it has padding.  ValueError for a sequence that isn't there."""
    trace = replay.trace
    sequences, length = batch.tokens_BS.shape
    choices = np.full((sequences, length, num_layers, trace.top_k), -1, np.int16 if trace.num_experts < 1 << 15 else np.int32)
    for b in range(sequences):
        valid_S = batch.valid_BS[b].numpy()
        if not valid_S.any():
            continue
        ids_nLK = replay.choices(batch.tokens_BS[b].numpy()[valid_S], f"sequence {int(batch.sample_B[b])}")
        places = np.flatnonzero(valid_S)[: len(ids_nLK)]
        choices[b, places[:, None], list(trace.layers)] = ids_nLK
    return replace(batch, replay_BSLK=torch.from_numpy(choices))


def read_replays(config: PretrainConfig) -> dict[str, RouterReplay]:
    """Those of the configuration, by the setting that names them.  ValueError for a file that doesn't fit the model."""
    model, router = config.model, config.router
    layers = [layer for layer in range(model.num_layers) if is_moe_layer(model, layer)]
    named = {"router.replay": router.replay, "router.replay_validation": router.replay_validation}
    return {
        setting: read_replay(Path(path), setting, num_experts=model.num_experts, top_k=router.top_k, layers=layers)
        for setting, path in named.items()
        if path
    }


def replayed(data: TokenData, config: PretrainConfig) -> TokenData:
    """The data whose sequences go where the files of `router.replay` and `router.replay_validation` say."""
    if not (found := read_replays(config)):
        return data

    train, valid = data.train, data.valid
    if (replay := found.get("router.replay")) is not None:
        train = ReplayedSamples(train, replay, config.model.num_layers, "router.replay")
    if valid is not None and (replay := found.get("router.replay_validation")) is not None:
        until = min(config.train.eval_sequences, valid.num_sequences)
        valid = ReplayedSamples(valid, replay, config.model.num_layers, "router.replay_validation", until)
    return replace(data, train=train, valid=valid)
