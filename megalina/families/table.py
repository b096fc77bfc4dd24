"""The families that there are.  A new one is a file and a row here."""

from collections.abc import Mapping
from typing import Any

from megalina.families.deepseek_v2 import DeepseekV2
from megalina.families.deepseek_v3 import DeepseekV3
from megalina.families.dots1 import Dots1
from megalina.families.family import Family, Settings
from megalina.families.glm4_moe import Glm4Moe
from megalina.families.gpt_oss import GptOss
from megalina.families.llama import Llama
from megalina.families.mixtral import Mixtral
from megalina.families.olmoe import Olmoe
from megalina.families.qwen2_moe import Qwen2Moe
from megalina.families.qwen3 import Qwen3
from megalina.families.qwen3_moe import Qwen3Moe

# Dense ones first: a model without experts is one of theirs.
FAMILIES: tuple[Family, ...] = (
    *(Llama(), Qwen3(), Mixtral(), Qwen3Moe(), Olmoe(), Qwen2Moe(), DeepseekV2(), DeepseekV3(), Glm4Moe(), GptOss()),
    Dots1(),
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json.  ValueError where there is none: it names those that there are."""
    kind = config.get("model_type")
    for family in FAMILIES:
        if kind in family.model_types:
            return family
    there = ", ".join(kind for family in FAMILIES for kind in family.model_types)
    raise ValueError(f"model_type is {kind!r}: there is no such family here; there are {there}")


def family_named(name: str) -> Family:
    """ValueError where there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(f"there is no family {name!r}; there are {', '.join(family.name for family in FAMILIES)}")


def family_for(settings: Settings) -> Family:
    """The first family that can say a model.  ValueError where none can, with what each of them lacks."""
    reasons = []
    for family in FAMILIES:
        try:
            family.written(settings)
        except ValueError as error:
            reasons.append(str(error))
        else:
            return family
    raise ValueError("no family has this model: " + "; ".join(reasons))
