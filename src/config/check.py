"""Everything that can be wrong with a config is found before anything starts.

Every key is compared with the signature it will be passed to, and every value with its type (`config/nodes.py`). Then
the data, the model, the optimizer and the trainer are built: constructors refuse what is out of range, and what is left
are parts that do not fit together. `run/start.py` calls this where Hydra has composed a config and made no directory.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from config.compose import DEFAULT_CONFIG, by_key, compose_config, given, job_config, key_of
from config.nodes import text_problems
from config.refusal import ConfigError, reason
from run import wandb_account


def check(jobs: Iterable[DictConfig]) -> list[DictConfig]:
    """The configs of the jobs of a command, if all of them can run.

    Of jobs that differ in their seeds only, the first alone is built. What the command sets must have an effect in one
    job at least.

    Args:
        jobs: as `job_config` gives them. Each is looked at before the next one is made, which sets HydraConfig anew.

    Raises:
        ConfigError: some cannot.
    """
    cfgs, problems, unread = [], list[str](), dict[str, dict[str, str]]()
    for cfg in jobs:
        cfgs.append(cfg)
        text: Any = OmegaConf.to_container(cfg)
        name = json.dumps(text | {"seed": None, "output_dir": None}, default=str)
        if wrong := text_problems(cfg):
            problems += wrong
        elif name not in unread:
            unread[name] = {}
            problems += build_problems(cfg, unread[name])
    first = next(iter(unread.values()), {})
    problems += [first[key] for key in first if all(key in job for job in unread.values())]
    if problems:
        raise ConfigError(problems)
    return cfgs


def checked_config(overrides: Sequence[str], config_name: str = DEFAULT_CONFIG) -> DictConfig:
    """The config of a run, for programs that are started without Hydra.

    Raises:
        ConfigError: it cannot be composed, or cannot run.
    """
    config = compose_config(overrides, config_name)
    return check([job_config(config, config.hydra.run.dir)])[0]


def build_problems(cfg: DictConfig, unread: dict[str, str]) -> list[str]:
    """What is wrong with a config whose text is right; first of all, what it asks of the machine and cannot get.

    The data, the model, the task with its optimizer, the logger, and the trainer with its callbacks are built for it.
    `unread` is filled with the keys that the command sets in vain, each with a line that says why.
    """
    from lightning.pytorch.callbacks import ProgressBar  # only here, as torch and Lightning take seconds

    from run.build import data_of, weightless_model
    from run.conflicts import metrics_of, of_callbacks, of_machine, of_trainer, without_effect
    from run.quiet import silence_libraries

    silence_libraries()
    if problems := list(of_machine(cfg)):
        return problems
    build = partial(built, problems, cfg)
    data = build("datamodule", lambda: data_of(cfg))
    model = build("model", lambda: weightless_model(cfg, data)) if data else None
    make_optimizer = build("optimizer", lambda: instantiate(cfg.optimizer))
    task = build("task", lambda: instantiate(cfg.task, model=model, optimizer=make_optimizer)) if model else None
    optimizer = build("optimizer", task.configure_optimizers) if task else None
    with wandb_account.same_mode():
        build("logger", lambda: instantiate(cfg.logger))
    callbacks = {name: build(f"callbacks.{name}", partial(instantiate, node)) for name, node in cfg.callbacks.items()}
    callbacks = {name: callback for name, callback in callbacks.items() if callback}
    quiet = [callback for callback in callbacks.values() if not isinstance(callback, ProgressBar)]
    trainer = build("trainer", lambda: instantiate(cfg.trainer, logger=False, callbacks=quiet))
    if task and optimizer and trainer:
        command = {key_of(word) for word in given(HydraConfig.get())}
        unread |= {key: line for key, line in without_effect(cfg, data, task, optimizer) if key in command}
        problems += of_trainer(cfg, data, task, trainer)
        problems += of_callbacks(cfg, callbacks, task, metrics_of(data, task, optimizer))
    return problems


def built(problems: list[str], cfg: DictConfig, node: str, make: Callable[[], Any]) -> Any:
    """What `make` builds from a node; None if a constructor refuses it, and a problem more."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Lightning says about a trainer is said once it is used
            return make()
    except Exception as error:  # whatever a constructor refuses, the user gets the reason and not a traceback
        problems.append(attributed(cfg, node, reason(error)))
        return None


def attributed(cfg: DictConfig, node: str, message: str) -> str:
    """What the constructor of a node says, behind the option that it begins with, as this is written in the config.

    If it begins with none, and names no key, it stands behind all that the command sets in the node, or its choice.
    """
    option = f"{node}.{message.partition('=')[0]}"
    if (value := by_key(OmegaConf.to_container(cfg)).get(option)) is not None:
        written, named = f"{option}={value}", f"{node}.{message}"
        return named if named.startswith(written) else f"{written}: {message}"
    hydra = HydraConfig.get()
    words = [word for word in given(hydra) if key_of(word).startswith(f"{node}.")]
    if any(key_of(word) in message for word in words) or (not words and re.search(rf"\b{node}\.\w", message)):
        return message
    where = words or [f"{node}={hydra.runtime.choices.get(node, '...')}"]
    return f"{' '.join(where)}: {message}"
