"""What happens before a command starts, as a Hydra callback (`hydra.callbacks` in configs/hydra/default.yaml).

Hydra calls it with the composed config before it makes a directory. Every config is checked (`config/check.py`), the
directory of a run that resumes another one is found, and what cannot run ends with exit code 2.
"""

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from config.check import check
from config.compose import explain, given, job_config
from config.refusal import ConfigError, refuse
from run.resume import plan


class Start(Callback):
    """Refuses a command that cannot run, and leads a run that resumes to its directory."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with final():
            cfgs = check([job_config(config, config.hydra.run.dir)])
            (run_dir,) = plan(cfgs, config.hydra, multirun=False)
            if cfgs[0].resume:
                with read_write(config.hydra):
                    config.hydra.run.dir = str(run_dir)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Check the jobs of Hydra's own sweeper. Others choose values on the way, and jobs check themselves."""
        with final():
            if chosen_before(config.hydra):
                plan(check(job_configs(config)), config.hydra, multirun=True)


def chosen_before(hydra: Any) -> bool:
    """Whether a sweep's jobs are known, and so checked, before it begins: those of Hydra's own sweeper are."""
    return hydra.sweeper._target_.endswith(".BasicSweeper")


def job_configs(config: DictConfig) -> Iterator[DictConfig]:
    """The configs of the jobs of a sweep, one after the other."""
    loader = GlobalHydra.instance().config_loader()
    sweep_dir = config.hydra.sweep.dir  # the time in it is that of the sweep, not of its jobs
    for number, overrides in enumerate(jobs(config)):
        job = loader.load_sweep_config(config, overrides)
        with open_dict(job.hydra.job):
            job.hydra.job.num = job.hydra.job.id = number
        yield job_config(job, os.path.join(sweep_dir, job.hydra.sweep.subdir))


def jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each job: all combinations of the values in the config and on the command line, which wins."""
    params = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
    parser, values = OverridesParser.create(GlobalHydra.instance().config_loader()), {}
    for override in parser.parse_overrides([*params, *given(config.hydra)]):
        key = override.get_key_element()
        swept = override.is_sweep_override()
        chosen = override.sweep_string_iterator() if swept else [override.get_value_element_as_str()]
        values[key] = [f"{key}={value}" for value in chosen]
    return [list(job) for job in itertools.product(*values.values())]


@contextmanager
def final() -> Iterator[None]:
    """Hydra makes a warning of an error in a callback; here it ends the program. Ctrl-C is the run's from then on."""
    try:
        try:
            yield
        except ConfigError as error:
            refuse(error.problems)
        except HydraException as error:
            refuse([explain(error, sys.argv[1:])])
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
