"""The state of a run: all that a checkpoint holds, and the way back from one.

Tensors are saved whole, whatever the layout: weights, optimizer moments, master weights, router biases.  Everything
random is a function of the seed and of how many sequences were consumed, so these two numbers are the state of the data
and of all random numbers.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megalina.checkpoint.checkpoints import Checkpoints
from megalina.checkpoint.slice import Slice
from megalina.config import PretrainConfig
from megalina.mesh import Mesh
from megalina.model.init import local_shape, spec_of
from megalina.parallel.trainable import Trainable
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.train.load_watch import LoadWatch

MODEL = "model/"  # before the names of weights and router biases; optimizer state has "exp_avg/", "master/" ...


class RunState:
    """Knows the step and writes or reads everything else where it lives."""

    def __init__(
        self,
        config: PretrainConfig,
        mesh: Mesh,
        trainable: Trainable,
        optimizer: BucketOptimizer,
        watch: LoadWatch,
        *,
        tokenizer_path: str,
    ):
        self.tokenizer_path = tokenizer_path
        self.config, self.mesh, self.trainable, self.optimizer, self.watch = config, mesh, trainable, optimizer, watch
        self.step = 0
        self.consumed_samples = 0  # sequences: where the data goes on
        self.tokens = 0  # positions with a loss, so far
        self.skipped_steps = 0
        self.val_loss: float | None = None
        options = config.checkpoint
        self.checkpoints = Checkpoints(
            Path(config.run.dir) / "checkpoints",
            mesh,
            keep_last=options.keep_last,
            keep_every=options.keep_every,
            asynchronous=options.async_save,
        )

    def save(self) -> None:
        """Write a checkpoint of this step; all ranks together."""
        values = {
            "step": self.step,
            "consumed_samples": self.consumed_samples,
            "tokens": self.tokens,
            "optimizer_steps": self.optimizer.step_count,
            "skipped_steps": self.skipped_steps,
            "val_loss": self.val_loss,
            "last_step_of_experts": self.watch.state(),
            "vocab_size": self.trainable.gpt.vocab_size,
            "tokenizer_path": self.tokenizer_path,
            "config": asdict(self.config),
        }
        self.checkpoints.save(self.step, self._model() | self.optimizer.slices(), values)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, of any layout of the same model."""
        values = self.checkpoints.load(path, self._model() | self.optimizer.slices())
        self.optimizer.step_count = values["optimizer_steps"]
        self.step, self.consumed_samples = values["step"], values["consumed_samples"]
        self.tokens, self.skipped_steps = values["tokens"], values["skipped_steps"]
        self.val_loss = values["val_loss"]
        self.watch.load(values["last_step_of_experts"])

    def load_weights(self, path: Path) -> None:
        """Only the weights and router biases; step and optimizer stay as they are."""
        self.checkpoints.load(path, self._model(), prefix=MODEL)
        self.optimizer.masters_from_parameters()

    def _model(self) -> dict[str, Sequence[Slice]]:
        """This rank's part of the model's state, as views."""
        gpt = self.trainable.gpt
        out: dict[str, Sequence[Slice]] = {}
        for name, p in gpt.named_parameters():
            spec = spec_of(p)
            length = {0: spec.rows} if spec.rows else {}  # the vocabulary's padding depends on tp
            out[MODEL + name] = [Slice(p.detach().view(local_shape(p)), spec.sharded, length=length)]
        for i in gpt.moe_layers:
            bias_E = gpt.layers[i].router.bias_E
            if bias_E is not None:
                out[f"{MODEL}layers.{i}.router.bias_E"] = [Slice(bias_E, {})]
        return out
