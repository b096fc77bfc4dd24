"""What a run trains with."""

from dataclasses import dataclass

from megalina.mesh import Mesh
from megalina.parallel.trainable import Trainable
from megalina.train.bucket_optimizer import BucketOptimizer


@dataclass(slots=True)
class Built:
    """What a run trains with: everything that a repack replaces.

    One per run.  All that need one of the three hold this record, never a part of it, so they see a repack at once."""

    mesh: Mesh
    trainable: Trainable
    optimizer: BucketOptimizer

    def become(self, mesh: Mesh, trainable: Trainable, optimizer: BucketOptimizer) -> None:
        self.mesh, self.trainable, self.optimizer = mesh, trainable, optimizer
