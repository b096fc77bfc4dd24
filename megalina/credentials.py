"""A credential: a key, token or password of this user, which no file of a run may hold.

The configuration is written to config.yaml, reports and trackers.  So a value that holds a credential, whether it was typed,
taken with ${oc.env:NAME} or read from a file, is refused before anything is written.
"""

import netrc
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

_NAME = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASS|PAT|CREDENTIALS?)S?($|_)", re.IGNORECASE)
_FILE = re.compile(r"_(FILE|PATH|DIR|URL|ID)$", re.IGNORECASE)  # names of what isn't secret itself
_SHORTEST = 12  # characters: a shorter value would be found in innocent words
_SHAPE = re.compile(r"\bhf_[A-Za-z0-9]{30,}|\bwandb_v1_\w{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{20,}|\bsk-[\w-]{30,}")


def find_credentials(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """Value of each credential in the environment and in the netrc file -> where it is from."""
    found: dict[str, str] = {}
    paths = (Path(environ["NETRC"]),) if environ.get("NETRC") else (home / ".netrc", home / "_netrc")
    for path in paths:
        try:
            hosts = netrc.netrc(path).hosts if path.is_file() else {}
        except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
            continue  # what can't be read can't be given away; `has_wandb_key` complains where the file is needed
        found |= {password: f"the password for {host} in {path}" for host, (_, _, password) in hosts.items() if password}
    for name, value in environ.items():
        if _NAME.search(name) and not _FILE.search(name) and not value.startswith("/"):
            found[value] = f"the value of {name}"
    return {value: origin for value, origin in found.items() if len(value) >= _SHORTEST}


def refuse_credentials(texts: Mapping[str, str], credentials: Mapping[str, str]) -> None:
    """ValueError if one of `texts` (what it is -> the text) holds a credential; the message doesn't."""
    for name, text in texts.items():
        origin = next((origin for value, origin in credentials.items() if value in text), "")
        if not origin and _SHAPE.search(text):
            origin = "what looks like an access token"
        if origin:
            raise ValueError(
                f"{masked(name, credentials)} holds {origin}, and would be written into the run folder: "
                "leave it out; programs read keys from the environment or .netrc themselves"
            )


def masked(text: str, credentials: Mapping[str, str]) -> str:
    """The text, each credential in it replaced by three stars."""
    for value in sorted(credentials, key=len, reverse=True):
        text = text.replace(value, "***")
    return _SHAPE.sub("***", text)


def text_values(config: Any) -> dict[str, str]:
    """Dotted key -> value of every text in nested dataclasses, lists included: "data.blend[1]"."""
    return dict(_texts(config, ""))


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _texts(item, f"{key}[{i}]")
    elif is_dataclass(value):
        for field in fields(value):
            yield from _texts(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))
