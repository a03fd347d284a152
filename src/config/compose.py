"""Composing a config outside `hydra.main`, and saying why Hydra cannot compose one. Nothing here imports torch."""

import argparse
import copy
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from config.did_you_mean import RENAMED, moved, nearest, unknown
from config.refusal import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEFAULT_CONFIG = "pattern_search_train"
VALUED_FLAGS = ("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd")


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
    """
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(Path(run_dir).absolute())
    HydraConfig.instance().set_config(config)  # as Hydra does when the job begins
    cfg = copy.deepcopy(config)
    with (
        read_write(cfg),
        open_dict(cfg),
        suppress(OmegaConfBaseException, ValueError),
    ):  # the check tells what has no value
        del cfg["hydra"]
        cfg.output_dir = cfg.output_dir  # now: the next job of a sweep has others
        OmegaConf.resolve(cfg.choices)
    return cfg


def given(hydra: HydraConf) -> list[str]:
    """The overrides of a command, but those of Hydra's own config; `hydra` is the node of a config."""
    words: Any = OmegaConf.to_container(hydra.overrides.task)  # without resolving what they quote
    return list(words)


def explain(error: BaseException, arguments: Sequence[str]) -> str:
    """Why Hydra cannot compose a command, with the nearest known word.

    Args:
        error: what Hydra raised.
        arguments: of the command.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-name", "-cn", default=DEFAULT_CONFIG)
    parser.add_argument("--config-path", "-cp")
    flags, words = parser.parse_known_args(arguments)
    name, configs = flags.config_name, CONFIGS
    if flags.config_path:
        configs = CONFIGS.parent / "src" / flags.config_path
    overrides, options = [word for word in words if not word.startswith("-")], groups(configs)
    text = "\n".join(str(e) for e in (error, error.__cause__) if str(e or "")) or type(error).__name__
    message = " ".join(re.sub(r"\n(See https|    full_key:|Config search path)(.|\n)*", "", text).split())

    if match := re.match(r"(?:In '([^']+)': )?Could not find '([^']+)/([^'/]*)'", text):
        file, group, option = match.groups()
        listed = text.partition("Available options")[2].partition("Config search path")[0].partition(":")[2].split()
        said = unknown(f"{group}={option}", option, listed)
        return f"configs/{file}.yaml: {said}" if file != name and (configs / f"{file}.yaml").exists() else said
    if "Cannot find primary config" in text:
        return unknown(f"--config-name={name}", name, sorted(path.stem for path in configs.glob("*.yaml")))
    if "Config group override must be" in text:  # Hydra does not say which
        chosen = {key_of(o): o.partition("=")[2] for o in overrides if key_of(o) in options}
        group = next(group for group, option in chosen.items() if option not in options[group])
        why = "a group cannot be left out; " if chosen[group] == "null" else ""
        return f"{group}={chosen[group]}: {why}choose one of {', '.join(options[group])}"
    if match := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.+)'", text):
        return f"{match[1]}: several values are a sweep, which needs -m; a list is written in brackets"
    if match := re.match(r"Error locating target '([^']+)'", text):
        near = moved(match[1])
        return f"_target_={match[1]} cannot be imported" + (f"; did you mean {near}?" if near else "")
    if broken := broken_files(configs):
        return "; ".join(broken)
    if override := getattr(error, "override", ""):  # of an OverrideParseException
        example = next((f", such as {g}={options[g][0]}" for g in difflib.get_close_matches(override, options)), "")
        return f"{text.splitlines()[0]}: give key=value{example}"
    if match := re.match(r"Could not append to config. An item is already at '([^']+)'", text):
        return f"+{match[1]} is in the config already; leave out the +"
    if match := re.match(r"Could not (?:override|delete from config\.) '([^']+)'", text):
        return unknown_key(match[1], name, configs, overrides)
    named = [override for override in overrides if key_of(override) in message]
    return f"{' '.join(named or [f'configs/{name}.yaml', *overrides])}: {message}"


def unknown_key(key: str, config_name: str, configs: Path, overrides: Sequence[str]) -> str:
    """What to write instead of a key that the config does not have; an argument that a class takes needs a +."""
    path, _, name = key.rpartition(".")
    chosen = [override for override in overrides if key_of(override) in groups(configs)]
    if swept := next((choice for choice in chosen if key_of(choice) == path and "," in choice), None):
        return f"key {key} is not in the config of a sweep over {swept}; write ++{key}=... for all its jobs"
    GlobalHydra.instance().clear()  # nothing goes on after a refusal
    with initialize_config_dir(str(configs.resolve()), version_base="1.3"):
        try:
            cfg = compose(config_name, chosen, return_hydra_config=True)
        except Exception:  # a choice is wrong too, or lies elsewhere
            cfg = compose(config_name, return_hydra_config=True)
    raw = OmegaConf.to_container(cfg)
    node, value = dig(raw, path), next((o.partition("=")[2] for o in overrides if key_of(o) == key), "...")
    target = node.get("_target_") if isinstance(node, dict) and path else None
    if target and name not in RENAMED and not nearest(key, [f"{path}.{k}" for k in node]):
        return f"key {key} is not in the config; write +{key}={value} if {target} takes it"
    known = [k for k in leaves(raw) if not k.startswith("hydra.") or key.startswith("hydra.")]
    return unknown(f"key {key}", key, [*known, *groups(configs)], list_known=False)


def groups(configs: Path) -> dict[str, list[str]]:
    """The options of each group of a folder of configs."""
    folders = sorted(path for path in configs.glob("*") if path.is_dir() and path.name != "hydra")
    return {folder.name: sorted(path.stem for path in folder.glob("*.yaml")) for folder in folders}


def broken_files(configs: Path) -> list[str]:
    """The YAML files that cannot be read, with the reason."""
    broken = []
    for path in sorted(configs.rglob("*.yaml")):
        try:
            OmegaConf.load(path)
        except Exception as error:  # of PyYAML or OmegaConf
            broken.append(f"configs/{path.relative_to(configs)}: {' '.join(str(error).split())}")
    return broken


# --- keys of configs, and words of commands ---


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """The paths of all keys of a nested dict."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield f"{path}{key}"
            yield from leaves(value, f"{path}{key}.")


def dig(node: Any, path: str) -> Any:
    """The value at a dotted path of nested dicts; None if there is none."""
    for name in path.split(".") if path else ():
        node = node.get(name) if isinstance(node, dict) else None
    return node


def key_of(override: str) -> str:
    """The key that an override sets: "a.b" of "+a.b=3"."""
    return override.lstrip("+~").partition("=")[0]


def shown(value: Any) -> str:
    """A value as it is written on a command line."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command with the overrides behind the flags, where Hydra wants them."""
    flags: list[str] = []
    overrides: list[str] = []
    for word in arguments:
        override = word.startswith("~") or ("=" in word and not word.startswith("-"))
        (overrides if override and flags[-1:] not in [[f] for f in VALUED_FLAGS] else flags).append(word)
    return [*flags, *overrides]
