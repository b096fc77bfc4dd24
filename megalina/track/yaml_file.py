"""A YAML file that a run has written, read back."""

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path) -> Any:
    """ValueError that names the file where it is damaged."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error
