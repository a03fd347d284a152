"""Train a transformer on a task with any optimizer, test it, and leave a summary.

python src/train.py                                  pattern search on parity, the default
python src/train.py --config-name=train              the same by gradients
python src/train.py task=scan model=tiny seed=1      anything in configs/ can be set
python src/train.py resume=auto                      go on with the run that was stopped
python src/train.py --help                           all options
"""

import os
import signal
import sys

if __name__ == "__main__":  # nothing has begun: Ctrl-C during the slow imports and the check of the command
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from config.compose import DEFAULT_CONFIG, explain, flags_first
from config.refusal import refuse
from run.directory import stop_printing

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("PATTERN_SEARCH_ROOT", str(ROOT))  # configs/hydra puts runs below it
os.environ.setdefault("WANDB_SILENT", "true")  # the summary says where the run lies and how to upload it


def train(cfg: DictConfig) -> dict:
    """One run, new or resumed, as `run.training.train`; returns the summary that is saved as summary.json."""
    from run.training import train

    return train(cfg)


@hydra.main(version_base="1.3", config_path="../configs", config_name=DEFAULT_CONFIG)
def main(cfg: DictConfig) -> float:
    from run.training import job  # torch and Lightning take seconds, and --help does without them

    return job(cfg)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.argv[1:] = flags_first(arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints what is wrong and exits with code 1
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:  # before or after training: nothing to save
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and "run.training" not in sys.modules:  # --help | head -1
            stop_printing()
        if HydraConfig.initialized():  # composed and begun: this is an error of the run
            raise
        refuse([explain(error, arguments)])
