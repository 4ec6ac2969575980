"""The Hydra tree and the command line's overrides become one plain dict; every error is one sentence.

Hydra's compose API is used, not `hydra.main`: no change of directory, no folder or log of Hydra's own, and
its many-line errors become `InputError`.
"""

from __future__ import annotations

import difflib
import itertools
import re
import warnings
from pathlib import Path
from typing import Any

from specbeam.errors import InputError

CONF = Path(__file__).resolve().parent.parent / "conf"

# Below these keys anything may be added without Hydra's `+`; plan.py checks what is there.
OPEN_KEYS = ("methods",)


def compose(name: str, overrides: list[str], *, open_top: bool = False) -> dict[str, Any]:
    """The config `name` of the tree with the overrides applied, interpolations resolved, as plain containers.

    `open_top`: keys that the config lacks are added at the top, as if written with `++`.
    Raises InputError for a syntax error, an unknown key (with the nearest real one), an unknown option of a
    group, and a sweep.
    """
    from hydra import compose as hydra_compose
    from hydra.errors import MissingConfigException
    from omegaconf import OmegaConf

    known = _known_keys(name) if overrides else []
    parsed = [line for override in overrides for line in _opened(override, known, open_top)]
    try:
        with _hydra_tree():
            config = OmegaConf.to_container(hydra_compose(name, overrides=parsed), resolve=True)
    except MissingConfigException as error:
        raise InputError(_unknown_option(error)) from None
    except Exception as error:  # Hydra's own, and the ValueErrors and assertions that slip through it
        raise InputError(_one_sentence(error, overrides, known)) from None
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def expand_sweeps(overrides: list[str]) -> list[list[str]]:
    """One list of overrides a job, for `--multirun`: every combination of the values that commas separate."""
    choices: list[list[str]] = []
    for text in overrides:
        override = _parse(text)
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    return [list(job) for job in itertools.product(*choices)]


def nearest(name: str, known: list[str]) -> str:
    """' (did you mean X?)' for the nearest known name, '' when none is near."""
    last = name.rsplit(".", 1)[-1]
    ends: dict[str, str] = {}
    for key in known:
        ends.setdefault(key.rsplit(".", 1)[-1], key)
    if last in ends and name not in known:
        found = [ends[last]]  # the right name in the wrong place
    else:
        longer = [key for key in known if len(name) > 2 and key.startswith(name)]  # its beginning was written
        found = longer[:1] or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not found:
        found = [ends[end] for end in difflib.get_close_matches(last, list(ends), n=1, cutoff=0.8)]
    return f" (did you mean {found[0]}?)" if found else ""


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → leaf value; lists and empty dicts are leaves."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _hydra_tree() -> Any:
    from hydra import initialize_config_dir

    with warnings.catch_warnings():
        # Hydra 1.3 warns without version_base, 1.4 with it.
        warnings.simplefilter("ignore")
        return initialize_config_dir(str(CONF), version_base="1.3")


def _known_keys(name: str) -> list[str]:
    from hydra import compose as hydra_compose
    from omegaconf import OmegaConf

    with _hydra_tree():
        tree = OmegaConf.to_container(hydra_compose(name), resolve=False)
    assert isinstance(tree, dict)
    leaves = flatten({str(key): value for key, value in tree.items()})
    inner = {key.rsplit(".", depth)[0] for key in leaves for depth in range(1, key.count(".") + 1)}
    groups = [folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "__pycache__"]
    return sorted({*leaves, *inner, *groups})


def _parse(text: str) -> Any:
    """Hydra's Override; a value that its grammar refuses (non-ASCII paths, `=`) is taken as it is written."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    if text.startswith("="):
        raise InputError(f"{text!r} is no override: write key=value, for example max_new_tokens=32.")
    try:
        return parser.parse_override(text)
    except HydraException as error:
        key, equals, value = text.partition("=")
        if equals and value and value[0] not in "[{'\"" and not re.match(r"\w+\(", value):
            quoted = value.replace("\\", "\\\\").replace("'", "\\'")
            try:
                return parser.parse_override(f"{key}='{quoted}'")
            except HydraException:
                pass
        if not equals and not text.startswith("~"):
            raise InputError(f"{text!r} is no override: write key=value, for example max_new_tokens=32.") from None
        detail = " ".join(str(error).split())
        detail = re.sub(r"^Error parsing override '.*?' ", "", detail).split(" See https")[0]
        raise InputError(
            f"The override {text!r} cannot be read ({detail}): quote its value for the shell and for "
            "Hydra, for example 'prompts=[\"Hello, you\"]'."
        ) from None


def _opened(text: str, known: list[str], open_top: bool) -> list[str]:
    """The override as Hydra takes it: `++` where a new key is welcome, and `methods={…}` as exactly those methods."""
    override = _parse(text)
    line = str(override.input_line)
    if override.is_sweep_override():
        raise InputError(f"{text!r} gives several values: use --multirun to run them all, or quote the value.")
    key = str(override.key_or_group)
    if key in OPEN_KEYS and key in known and not override.is_delete():
        value = override.value()
        if value and not isinstance(value, dict):
            labels = ",".join(map(str, value)) if isinstance(value, list) else value
            raise InputError(f"{text!r} gives no settings: 'only=[{labels}]' runs some of the {key} there are, "
                             f"'{key}.mine={{kind: greedy}}' adds one.")
        if not value:
            raise InputError(f"{key} is empty: name at least one, for example 'methods.greedy={{kind: greedy}}'.")
        if line[0] != "+":
            return [f"~{key}", f"+{line}"]
    if line[0] in "+~" or override.package is not None or key in known:
        return [line]
    below_open = key.split(".")[0] in OPEN_KEYS and key.split(".")[0] in known and "." in key
    top_open = open_top and re.fullmatch(r"\w+", key) is not None
    return [f"++{line}" if below_open or top_open else line]


def _unknown_option(error: Any) -> str:
    wanted = str(error.missing_cfg_file or "")
    group, _, option = wanted.partition("/")  # the option may be a hub id, or a folder
    options = sorted(str(name) for name in error.options or [])
    if not options:
        return f"There is no config {wanted!r}."
    close = difflib.get_close_matches(option, options, n=1, cutoff=0.5)
    hint = f"did you mean {group}={close[0]}? " if close else ""
    paths = {"target": "folder or hub id", "draft": "folder or hub id", "prompt_set": "file"}
    if group in paths and "/" in option:
        return f"{group}={option} names no preset: a {paths[group]} is given with {group}.path={option}."
    own = f"; a {paths[group]} is given with {group}.path=…" if group in paths else ""
    return f"There is no {group} named {option!r}: {hint}There are {', '.join(options)}{own}."


def _one_sentence(error: Exception, overrides: list[str], known: list[str]) -> str:
    text = " ".join(str(error.__cause__ or error).split())
    outer = " ".join(str(error).split())
    for pattern in (
        r"Could not override '([^']+)'",
        r"Could not append to config\. .*?'([^']+)'",
        r"Could not delete from config\. '([^']+)'",
        r"Key '([^']+)' is not in struct",
    ):
        if found := re.search(pattern, outer):
            key = found[1]
            if key in known:
                return f"{key} cannot be set as in {' '.join(overrides)!r}: {text}"
            return f"There is no config key {key!r}{nearest(key, known)}: specbeam compare --help lists them all."
    return f"The config cannot be composed: {outer}"
