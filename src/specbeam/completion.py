"""Shell completion: `eval "$(specbeam completion bash)"` in ~/.bashrc (zsh: ~/.zshrc). The script holds all words, so
that completing starts no Python."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specbeam.errors import InputError
from specbeam.experiment.launch import PACKAGES

CONF = Path(__file__).resolve().parent / "conf"
CONFIGS = {"compare": "config.yaml", "generate": "generate.yaml", "audit": "audit.yaml",
           "forecast": "forecast.yaml"}
SHELLS = ("bash", "zsh")
_FLAGS = {"compare": ("--multirun", "--cfg", "--help"), "generate": ("--cfg", "--help"), "audit": ("--cfg", "--help"),
          "forecast": ("--cfg", "--help"),
          "report": ("--figures", "--output", "--help")}

_BASH = """\
_specbeam() {{
    local line="${{COMP_LINE:0:COMP_POINT}}" words=""
    local cur="${{line##* }}"
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    [ "$COMP_CWORD" -eq 1 ] && words="{commands}"
    local IFS=$'\\n'
    COMPREPLY=($(compgen -W "${{words// /$'\\n'}}" -- "$cur"))
    if [[ "$cur" == *=* ]]; then  # bash takes what stands behind = for the word
        COMPREPLY=("${{COMPREPLY[@]#"${{cur%%=*}}="}}")
    fi
    if [[ ${{#COMPREPLY[@]}} -eq 1 && "${{COMPREPLY[0]}}" == *= ]]; then compopt -o nospace 2>/dev/null; fi
}}
complete -o default -F _specbeam specbeam
"""
_ZSH = """\
_specbeam() {{
    local -a found
    local words_of=""
    case "${{words[2]}}" in
{cases}
    esac
    if (( CURRENT == 2 )); then words_of="{commands}"; fi
    found=(${{(s: :)words_of}})
    compadd -S '' -- ${{(M)found:#*=}}
    compadd -- ${{found:#*=}}
    [[ "$PREFIX" == *=* || "${{words[2]}}" == report ]] && _files
}}
compdef _specbeam specbeam
"""


def completion(shell: str, commands: tuple[str, ...]) -> str:
    """The script for one shell. Raises InputError for a shell that it is not written for."""
    if shell not in SHELLS:
        raise InputError(f"there is no completion for {shell!r}: use specbeam completion {' or '.join(SHELLS)}.")
    name = "words_of" if shell == "zsh" else "words"
    cases = "\n".join(f'        {command}) {name}="{" ".join(words(command))}" ;;' for command in commands)
    return (_ZSH if shell == "zsh" else _BASH).format(cases=cases, commands=" ".join(commands))


def words(command: str) -> list[str]:
    """What may stand behind a command: flags, `key=` of its config, presets."""
    flags = list(_FLAGS.get(command, ("--help",)))
    if command == "completion":
        return [*SHELLS]
    if command not in CONFIGS:
        return flags
    import yaml

    tree = yaml.safe_load((CONF / CONFIGS[command]).read_text("utf-8"))
    groups = [group for entry in tree.pop("defaults") if isinstance(entry, Mapping) for group in entry]
    found = [f"{key}=" for key in _keys(tree)]
    for group in groups:
        presets = sorted((CONF / group).glob("*.yaml"))
        found += [f"{group}={preset.stem}" for preset in presets]
        inner = {key for preset in presets for key in _keys(_section(preset, group))}
        found += [f"{group}.{key}=" for key in sorted(inner)] if group != "experiment" else []
    if command == "compare":
        found += [f"hydra/launcher={name}" for name in PACKAGES]
    return sorted(dict.fromkeys(found)) + flags


def _section(preset: Path, group: str) -> dict[str, Any]:
    import yaml

    tree = yaml.safe_load(preset.read_text("utf-8")) or {}
    tree.pop("defaults", None)
    inner = tree.get(group, tree)
    return inner if isinstance(inner, dict) else {}


def _keys(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and key != "methods" and "kind" not in value
        found += _keys(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}"]
    return found
