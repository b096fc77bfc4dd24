"""A family: models of one architecture in Hugging Face's format, declared once.

It says how `config.json` maps to the settings of a model and back, and which numbers of which tensor of theirs are which of ours.
Import, export, their proof and their errors follow.  One file a family, and a row in `table.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from megalina.blocks.heads import attention_bias, head_dim
from megalina.config import ModelConfig, RouterConfig, is_moe_layer
from megalina.families.fields import Fields
from megalina.families.links import Link

# What changes no logit of a model that is there: names, initial values, what happens in training alone.
TRAINING_MODEL = ("name", "init_std", "dropout")
TRAINING_ROUTER = (
    *("group", "drop", "capacity_factor", "capacity_bound", "capacity_delta", "capacity_quantile", "capacity_ema"),
    *("capacity_min", "balance_loss", "z_loss", "locality_loss", "locality_nodes", "mutual_information_loss", "noise_std"),
    *("losses", "bias_update", "bias_centered"),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """A model: `model.vocab_size` and `model.max_positions` are never 0."""

    model: ModelConfig
    router: RouterConfig

    @property
    def moe(self) -> list[bool]:
        """Of each layer: MoE or dense."""
        return [is_moe_layer(self.model, layer) for layer in range(self.model.num_layers)]

    def is_moe(self, layer: int) -> bool:
        """Layers of multi-token prediction, behind the model's, are as its last one."""
        return self.moe[min(layer, len(self.moe) - 1)]

    @property
    def head_dim(self) -> int:
        return head_dim(self.model)

    @property
    def dense_d_ff(self) -> int:
        return self.model.dense_d_ff or self.router.top_k * self.model.d_ff

    def math(self) -> dict[str, Any]:
        """What logits follow from, by the names of settings, written in one way: equal where models are equal."""
        model, router = asdict(self.model), asdict(self.router)
        for name in TRAINING_MODEL:
            del model[name]
        for name in TRAINING_ROUTER:
            del router[name]
        model |= {"head_dim": self.head_dim, "dense_d_ff": self.dense_d_ff, "attention_bias": attention_bias(self.model)}
        del model["dense_layers_first"], model["moe_every"]
        model["moe_layers"] = [layer for layer, moe in enumerate(self.moe) if moe]
        if self.model.positions != "rope":
            del model["rope_theta"]
        if all(self.moe):
            del model["dense_d_ff"]
        if not any(self.moe):
            for name in ("num_experts", "d_ff", "shared_d_ff"):
                del model[name]
            router = {}
        else:
            router["bias_update_rate"] = router["bias_update_rate"] > 0  # whether there is a selection bias
            if router["kind"] == "noisy_topk":
                router["kind"] = "topk"
        return {f"model.{k}": v for k, v in model.items()} | {f"router.{k}": v for k, v in router.items()}


class Family(ABC):
    name: ClassVar[str]  # in megalina: of its file, and of `--family`
    model_types: ClassVar[tuple[str, ...]]  # in `config.json`; the first is written
    architecture: ClassVar[str]  # the class of transformers

    @abstractmethod
    def settings(self, fields: Fields) -> Settings:
        """What a config.json means.  ValueError for a field that says what we can't compute."""

    @abstractmethod
    def config(self, settings: Settings) -> dict[str, Any]:
        """A config.json of these settings that transformers 4 and 5 read: the fields that `settings` reads."""

    @abstractmethod
    def links(self, settings: Settings) -> Iterator[Link]:
        """Every number of every tensor, once."""

    def present(self, settings: Settings, keys: Collection[str]) -> Settings:
        """The settings of the tensors that a folder has, where its config.json may name parts that its files leave out."""
        return settings

    def copies(self, settings: Settings) -> Mapping[str, str]:
        """Tensors that files may have once more, under a second name: that name -> the tensor's.  They are compared, then left
        out."""
        return {"lm_head.weight": "model.embed_tokens.weight"} if settings.model.tie_embeddings else {}

    def is_ignored(self, key: str) -> bool:
        """Whether nothing in a tensor is learned."""
        return key.endswith("rotary_emb.inv_freq")

    def read(self, config: Mapping[str, Any]) -> Settings:
        """The settings of a config.json; ValueError, which names the field, for what isn't known or can't be computed."""
        fields = Fields(config, self.name)
        found = self.settings(fields)
        fields.finish()
        return found

    def written(self, settings: Settings) -> dict[str, Any]:
        """The config.json of these settings.  ValueError, which names settings, where no config.json of the family says them."""
        fields = {"architectures": [self.architecture], "model_type": self.model_types[0], **self.config(settings)}
        there, back = settings.math(), self.read(fields).math()
        different = [name for name in there | back if there.get(name) != back.get(name)]
        if different:
            shown = ", ".join(f"{name}={there.get(name)} (it would be {back.get(name)})" for name in different[:3])
            more = f" and {len(different) - 3} more" if len(different) > 3 else ""
            raise ValueError(f"a {self.name} model can't have {shown}{more}")
        return fields
