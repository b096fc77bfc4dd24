"""The fields of a `config.json`, read one by one: what nobody has read may change the math, and is refused by name."""

from collections.abc import Mapping
from typing import Any

LARGEST = 1e30  # of a number that may stand in a file
HARMLESS = frozenset(  # tokens' names, types in memory, what is returned: nothing of them is in a logit
    (
        *("architectures", "model_type", "transformers_version", "auto_map", "_name_or_path", "tokenizer_class", "prefix"),
        *("dtype", "torch_dtype", "torchscript", "use_cache", "pretraining_tp", "chunk_size_feed_forward"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "max_length"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "use_return_dict"),
        *("is_decoder", "is_encoder_decoder", "id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params"),
        *("_attn_implementation", "_attn_implementation_autoset", "_experts_implementation", "unsloth_version", "unsloth_fixed"),
    )
)


class Fields:
    """ValueError, which names the field, where one is missing that must be there, or is of another type.

    null counts as absent.  A field that is absent has the value that the class of transformers gives it; the family knows it."""

    def __init__(self, values: Mapping[str, Any], family: str) -> None:
        self._values, self.family = values, family
        self._read: set[str] = set()

    def whole(self, name: str, default: int | None = None, *, least: int = 0, also: str = "") -> int:
        """A whole number; `also`: another name of the same field."""
        value = self._number(name, default, also)
        if value != int(value) or value < least:
            raise ValueError(f"{name} is {value}: a whole number from {least} on is needed")
        return int(value)

    def whole_or_null(self, name: str, default: int) -> int:
        """A whole number, or 0 where the field is there and null."""
        return 0 if name in self._values and self._values[name] is None else self.whole(name, default)

    def defaults(self, name: str, value: Any, *, unless: str) -> None:
        """The field's value where it is absent, and so is `unless`."""
        if self._values.get(name) is None and self._values.get(unless) is None:
            self._values = {**self._values, name: value}

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._number(name, default, ""))

    def flag(self, name: str, default: bool) -> bool:
        value = self.any(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}: true or false is needed")
        return value

    def numbers(self, name: str) -> list[int]:
        """A list of whole numbers; absent: empty."""
        value = self.any(name, [])
        if not isinstance(value, list) or not all(isinstance(n, int) and not isinstance(n, bool) for n in value):
            raise ValueError(f"{name} is {value!r}: a list of whole numbers is needed")
        return value

    def words(self, name: str) -> list[str]:
        """A list of words; absent: empty."""
        value = self.any(name, [])
        if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
            raise ValueError(f"{name} is {value!r}: a list of words is needed")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """Fields of a field; absent: none."""
        value = self.any(name, {})
        if not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r}: an object is needed")
        return {key: one for key, one in value.items() if one is not None}

    def any(self, name: str, default: Any, *, also: str = "") -> Any:
        """Whatever it is."""
        self._read |= {name, also}
        for one in (name, also):
            if self._values.get(one) is not None:
                return self._values[one]
        return default

    def needs(self, name: str, *values: Any, why: str) -> None:
        """ValueError where the field is there and is none of `values`."""
        found = self.any(name, None)
        if found is not None and found not in values:
            expected = " or ".join(map(str, values or ["null"]))
            raise ValueError(f"{name} is {found!r}, and {why}: only {expected} can be taken")

    def passes(self, *names: str) -> None:
        """These do nothing here, whatever they are."""
        self._read |= {*names}

    def finish(self) -> None:
        """ValueError for fields that nobody has read, unless they are known to be harmless."""
        unread = sorted(name for name, v in self._values.items() if name not in self._read | HARMLESS and v is not None)
        if unread:
            shown = ", ".join(f"{name}={self._values[name]!r}"[:80] for name in unread[:5])
            more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
            raise ValueError(
                f"{self.family} knows no field {shown}{more}: it may change the math. If not, take it out of config.json; "
                f"if so, megalina/families/{self.family}.py must learn it"
            )

    def _number(self, name: str, default: float | None, also: str) -> float:
        value = self.any(name, default, also=also)
        if value is None:
            raise ValueError(f"there is no {name}: a {self.family} model has one")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
            raise ValueError(f"{name} is {value!r}: a number is needed")
        return value
