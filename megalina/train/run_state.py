"""The state of a run: all that a checkpoint holds, and the way back from one.

Tensors are saved whole, whatever the layout: weights, optimizer moments, master weights, router biases.  Everything
random is a function of the seed and of how many sequences were consumed, so these two numbers are the state of the data
and of all random numbers.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from megalina.comm.exchange import start_gather
from megalina.config import PretrainConfig
from megalina.mesh import Mesh
from megalina.model.init import Spec, spec_of
from megalina.parallel.reshard import in_spec_shape
from megalina.parallel.trainable import Trainable
from megalina.train.bucket_optimizer import BucketOptimizer
from megalina.train.checkpoint import Checkpoints, Slice
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
            "consumed_samples": self.step * self.config.train.global_batch_size,
            "tokens": self.tokens,
            "optimizer_steps": self.optimizer.step_count,
            "skipped_steps": self.skipped_steps,
            "val_loss": self.val_loss,
            "last_step_of_experts": self.watch.state(),
            "vocab_size": self.trainable.gpt.vocab_size,
            "tokenizer_path": self.tokenizer_path,
            "config": asdict(self.config),
        }
        self.checkpoints.save(self.step, self._slices(self._tensors()), values)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint, of any layout of the same model."""
        tensors = self._tensors()
        slices = self._slices(tensors)
        values = self.checkpoints.load(path, slices)
        self._from_slices(tensors, slices)
        self._fill_model(tensors)
        self.optimizer.load(tensors, values["optimizer_steps"])
        self.step, self.tokens, self.skipped_steps = values["step"], values["tokens"], values["skipped_steps"]
        self.val_loss = values["val_loss"]
        self.watch.load(values["last_step_of_experts"])

    def load_weights(self, path: Path) -> None:
        """Only the weights and router biases; step and optimizer stay as they are."""
        tensors = self._tensors(weights_only=True)
        slices = self._slices(tensors)
        self.checkpoints.load(path, slices, prefix=MODEL)
        self._from_slices(tensors, slices)
        self._fill_model(tensors)
        self.optimizer.masters_from_parameters()

    # this rank's tensors by name, in the dimensions that layouts cut
    def _parameters(self) -> dict[str, Tensor]:
        return dict(self.trainable.gpt.named_parameters())

    def _biases(self) -> dict[str, Tensor]:
        layers = ((i, layer) for i, layer in enumerate(self.trainable.gpt.layers) if layer.is_moe)
        return {f"{MODEL}layers.{i}.router.bias_E": layer.router.bias_E for i, layer in layers if layer.router.bias_E is not None}

    def _tensors(self, *, weights_only: bool = False) -> dict[str, Tensor]:
        out = {f"{MODEL}{name}": in_spec_shape(p.detach().flatten(), p) for name, p in self._parameters().items()}
        out |= self._biases()
        return out if weights_only else out | self.optimizer.state()

    def _spec(self, name: str) -> Spec | None:
        parameter = self._parameters().get(name.rpartition("/")[2])
        return None if parameter is None else spec_of(parameter)

    def _slices(self, tensors: Mapping[str, Tensor]) -> dict[str, Slice]:
        out = {}
        for name, local in tensors.items():
            spec = self._spec(name)
            if spec is None:
                out[name] = Slice(local, {})
            elif spec.rows:  # the vocabulary's padding depends on tp, so it is not saved
                out[name] = Slice(start_gather(local, self.mesh.tp).wait()[: spec.rows].clone(), {})
            else:
                out[name] = Slice(local, spec.sharded)
        return out

    def _from_slices(self, tensors: dict[str, Tensor], slices: Mapping[str, Slice]) -> None:
        """The rows of the vocabulary that are here, out of the whole of it."""
        for name, local in tensors.items():
            spec = self._spec(name)
            if spec is not None and spec.rows:
                first = self.mesh.tp.rank * len(local)
                mine = slices[name].local[first : first + len(local)]
                local.zero_()
                local[: len(mine)] = mine

    def _fill_model(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self._parameters().items():
                p.copy_(tensors[f"{MODEL}{name}"].view(p.shape))
