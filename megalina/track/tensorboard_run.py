"""A TensorBoard run: writes records as event files into RUN_DIR/tensorboard."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from megalina.track.expert_load import LoadHistory


class TensorBoardRun:
    def __init__(self, run_dir: Path, *, resumed_step: int) -> None:
        # purge_step: TensorBoard forgets what the cut run had written after the checkpoint
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resumed_step + 1 if resumed_step else None)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def images(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def expert_load(self, history: LoadHistory, layer_numbers: list[int], picture: np.ndarray) -> None:
        """The map of the whole run; TensorBoard has no tables."""
        self.images(history.steps[-1], {"expert_load": picture})

    def finish(self, *, failed: bool) -> None:
        """TensorBoard doesn't tell a failed run from another."""
        self._writer.close()
