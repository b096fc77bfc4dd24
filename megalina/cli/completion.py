"""Completion for bash and zsh: commands, settings and what they may be.

eval "$(python tools/completion.py)"                                    in this shell
python tools/completion.py > ~/.local/share/bash-completion/completions/megalina     in every bash from now on
echo 'eval "$(python tools/completion.py)"' >> ~/.zshrc                  in every zsh
"""

import argparse
from collections.abc import Mapping, Sequence

from megalina.arguments import Parser
from megalina.compose import CONF
from megalina.config import PretrainConfig
from megalina.setting import settings

OVERRIDDEN = ("train", "eval", "plan", "simulate", "compare", "verify")  # commands that take overrides
SCRIPT = """# bash and zsh; made by: megalina completion
if [ -n "$ZSH_VERSION" ]; then autoload -Uz bashcompinit && bashcompinit; fi
_megalina() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" key="" choices=""
    if [ "$word" = "=" ]; then key="$before" word=""            # bash takes = for a word of its own
    elif [ "$before" = "=" ]; then key="${{COMP_WORDS[COMP_CWORD-2]}}"
    elif [[ "$word" == *=* ]]; then key="${{word%%=*}}"; fi
    COMPREPLY=()
    if [ -n "$key" ]; then
        case "$key" in
{choices}
        esac
        if [[ "$word" == *=* ]]; then choices=$(printf "$key=%s " $choices); fi
        COMPREPLY=($(compgen -W "$choices" -- "$word"))
    elif [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    else
        case "${{COMP_WORDS[1]}}" in
            {overridden})
                COMPREPLY=($(compgen -S = -W "{keys}" -- "$word"))
                [ -n "${{COMPREPLY[*]}}" ] && compopt -o nospace 2> /dev/null ;;
        esac
    fi
}}
complete -o default -F _megalina megalina
"""


def main(argv: Sequence[str] | None = None) -> int:
    from megalina.cli.main import COMMANDS

    Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    print(script(list(COMMANDS)), end="")
    return 0


def script(commands: Sequence[str]) -> str:
    """For a shell to read."""
    choices = values()
    lines = [f"            {key}) choices={' '.join(of)!r} ;;" for key, of in choices.items()]
    keys = [*(key for key in choices if "." not in key), *(key for key, _, _ in settings(PretrainConfig()))]
    return SCRIPT.format(
        choices="\n".join(lines), commands=" ".join(commands), overridden="|".join(OVERRIDDEN), keys=" ".join(keys)
    )


def values() -> Mapping[str, Sequence[str]]:
    """Of each group its files, and of each setting that has choices those."""
    groups = {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in sorted(CONF.iterdir())}
    found = {key: list(may_be["choices"]) for key, _, may_be in settings(PretrainConfig(), "choices")}
    found |= {key: ["true", "false"] for key, value, _ in settings(PretrainConfig()) if isinstance(value, bool)}
    return {name: files for name, files in groups.items() if files} | found
