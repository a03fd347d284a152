"""Composing a config outside `hydra.main`, and saying why Hydra cannot compose one. Nothing here imports torch."""

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from config.did_you_mean import RENAMED, nearest, unknown
from config.refusal import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEFAULT_CONFIG = "pattern_search_train"


def compose_config(overrides: Sequence[str], config_name: str = DEFAULT_CONFIG) -> DictConfig:
    """The config of a run, with its `hydra` node, as `src/train.py` composes it.

    Raises:
        ConfigError: Hydra cannot compose it.
    """
    os.environ.setdefault("PATTERN_SEARCH_ROOT", str(CONFIGS.parent))
    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3", job_name="train"):
            return compose(config_name, list(overrides), return_hydra_config=True)
    except Exception as error:  # Hydra, OmegaConf, PyYAML and ANTLR each have exceptions of their own
        raise ConfigError([explain(error, [f"--config-name={config_name}", *overrides])]) from error


def job_config(config: DictConfig, run_dir: str | Path) -> DictConfig:
    """A composed config as its job gets it: without its `hydra` node, which `${hydra:...}` still finds.

    Args:
        config: with its `hydra` node.
        run_dir: where the job runs.

    Raises:
        ConfigError: it names a group that does not exist, which Hydra passes over if no option is chosen.
    """
    folders = [Path(source.path) for source in config.hydra.runtime.config_sources if source.schema == "file"]
    groups = sorted({path.name for folder in folders for path in folder.glob("*/")})
    for group in config.hydra.runtime.choices:
        if group.partition("/")[0] not in (*groups, "hydra"):
            raise ConfigError([unknown(f"group {group}", group, groups)])
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(Path(run_dir).absolute())
    HydraConfig.instance().set_config(config)  # as Hydra does when the job begins
    cfg = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    with suppress(OmegaConfBaseException, ValueError):  # the check tells what has no value
        cfg.output_dir = cfg.output_dir  # now: the next job of a sweep has others
        OmegaConf.resolve(cfg.choices)
    return cfg


def given(hydra: Any, of: str = "task") -> list[str]:
    """The overrides of a command: those of a job, or `of` "hydra" itself; `hydra` is the node of a config."""
    words: Any = OmegaConf.to_container(hydra.overrides[of])  # without resolving what they quote
    return list(words)


def explain(error: BaseException, arguments: Sequence[str]) -> str:
    """Why Hydra cannot compose a command: what it says itself, or the nearest known word.

    Args:
        error: what Hydra raised.
        arguments: of the command.
    """
    cause = error.__cause__
    text = str(error) or str(cause)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        known = (error.options or []) if group else sorted(path.stem for path in CONFIGS.glob("*.yaml"))
        file = re.match(r"In '(\w+/.+?)'", text)  # a file of a group names it
        said = unknown(f"{group or '--config-name'}={option}", option, known)
        return f"configs/{file[1]}.yaml: {said}" if file else said
    if text.startswith("Could not override") and isinstance(cause, OmegaConfBaseException):
        key = str(cause.full_key)
        keys = by_key(OmegaConf.to_container(cause.parent_node), key.rpartition(".")[0])
        if options := options_with(key):
            return (
                f"key {key} belongs to {' or '.join(options)}; or add it with ++{text.rpartition('use +')[2].strip()}"
            )
        if near := nearest(key, [*keys, *(folder.name for folder in CONFIGS.iterdir())]):
            return f"key {key} is not known; did you mean {near}?"
        text = text.replace("config use +", "config use ++")  # right for all jobs of a sweep
    if text.startswith("Ambiguous value"):
        key, _, values = text.split("'")[1].partition("=")
        as_list = "" if (CONFIGS / key).is_dir() else f"; if it is one value, a list, write {key}=[{values}]"
        return f"{key}={values} has several values: add -m for a sweep, a run with each{as_list}"
    if text.startswith("Config group override must be"):  # Hydra does not say which
        arguments = [word for word in arguments if (CONFIGS / key_of(word)).is_dir()]
    if "missing EQUAL" in text:
        _, word, *_ = text.split("'")
        return f"{word} is no option; write key=value"
    said = " ".join(text.partition("See https")[0].split())
    named = any(f"'{quoted}'" in said for word in arguments for quoted in (word, key_of(word)))
    return said if named else f"{' '.join(arguments) or DEFAULT_CONFIG}: {said}"


# --- keys of configs, and words of commands ---


def by_key(node: Any, path: str = "") -> dict[str, Any]:
    """A node at a path, and all that lies in it, by dotted key."""
    found = {path: node}
    for name, value in node.items() if isinstance(node, dict) else ():
        found |= by_key(value, f"{path}.{name}".lstrip("."))
    return found


def options_with(key: str) -> list[str]:
    """The options of a group that have a key: "optimizer=adam" for "optimizer.lr". A task chooses its data."""
    group, _, name = key.partition(".")
    files = sorted((CONFIGS / group).glob("*.yaml")) if name and name not in RENAMED else []
    having = [file.stem for file in files if re.search(rf"(?m)^{re.escape(name)}:", file.read_text())]
    return [f"{group.replace('datamodule', 'task')}={option}" for option in having]


def key_of(override: str) -> str:
    """The key that an override sets: "a.b" of "+a.b=3"."""
    return override.lstrip("+~").partition("=")[0]


def shown(value: Any) -> str:
    """A value as it is written on a command line."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command with the overrides behind the flags, where Hydra wants them."""
    return sorted(arguments, key=lambda word: word.startswith("~") or ("=" in word and not word.startswith("-")))
