"""The profile that an evaluation serves with: the one beside the checkpoint, or one that is recorded before."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from megalina.checkpoint.profile import PROFILE, find_profile
from megalina.config import InferConfig
from megalina.evaluate.request_text import ServedText
from megalina.mesh import all_gather_object
from megalina.placement.routing_trace import RoutingTrace, traced
from megalina.serve.load_engine import Opened

MOST_TOKENS = 16384
BATCH_TOKENS = 1024  # of a rank


def find_or_record(
    checkpoint: Path, opened: Opened, text: ServedText, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[RoutingTrace, str]:
    """The profile, the same on every rank, and in words where it is from; all ranks call it together.

    ValueError as `find_profile`."""
    found = find_profile(checkpoint)
    if found is not None:
        half = text.num_profiled * text.length
        seen = ", some of it perhaps of the text that is timed" if found.num_tokens > half else ""
        return found, f"{PROFILE} of the checkpoint, {found.num_tokens} tokens{seen}"
    profile = recorded(opened, text, progress=progress)
    return profile, f"recorded before, {profile.num_tokens} tokens of the first half of the text"


def recorded(
    opened: Opened,
    text: ServedText,
    *,
    most_tokens: int = MOST_TOKENS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> RoutingTrace:
    """What tokens of the first half of a text choose, the same on every rank; all call it together."""
    config, world = InferConfig(), opened.mesh.world.size
    engine = opened.to_profile.engine(config, opened.policy(config, None))
    wanted = max(1, min(text.num_profiled, most_tokens // text.length))  # sequences
    at_once = max(1, min(wanted // world, BATCH_TOKENS // text.length))
    found: list[tuple[np.ndarray, list[int]]] = []
    try:
        for number in range(total := max(1, wanted // (world * at_once))):
            batch = text.profiled(number, at_once)
            ids_TLK = np.stack(engine.run(batch).chosen, axis=1).astype(np.int32)
            found += all_gather_object(opened.mesh, (ids_TLK, [n for n in batch.valid_BS.sum(1).tolist() if n]))
            progress(number + 1, total)
    finally:
        engine.close()
    return traced(
        np.concatenate([ids_TLK for ids_TLK, _ in found]),
        opened.served.num_experts,
        sample_lengths_S=np.array([length for _, lengths in found for length in lengths]),
        layers=opened.loaded.gpt.moe_layers,
        name="recorded",
    )
