"""Commands and YAML files with a random mistake each: every one must train a step, or be refused by name.

python tests/fuzz_config.py --cases 2000 --seed 0

A case takes a random command, and mutates a key, a value, a type, the option of a group, or a line of a YAML file in a
copy of configs/. It is right if the check of the command passes and a step of training with its test then runs, or if
the check refuses it with a message that names what was mutated. A traceback, a misspelt key that is accepted, and a
case that takes too long are wrong. W&B runs are checked but trained with `logger=none`, which saves seconds a case.
"""

import argparse
import contextlib
import inspect
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import lightning as L
from omegaconf import DictConfig, OmegaConf

from config import compose
from config.check import checked_config
from config.compose import by_key
from config.refusal import ConfigError
from train import train

SECONDS = 30  # of computing a case may take; ten times that on the clock, since the machine may be shared
MEMORY = 20 * 2**30  # bytes of address space
VALUES = ["-1", "0", "1", "2", "3", "7", "1.5", "1e-9", "1e9", "100000", "-0.5", "true", "false", "null", "abc", "''"]
VALUES += ["[]", "[1,2]", "[a]", "{}", "{a:1}", "${nothing}", "${seed}", "???", ".inf", ".nan", "'3'", "1,2", "min"]
SHORT = ["trainer.max_steps=1", "trainer.limit_val_batches=1"]
SHORT += ["trainer.limit_test_batches=1", "callbacks.progress.log_every_seconds=1000"]
TRAINER = sorted(set(inspect.signature(L.Trainer).parameters) - {"self"})
FILLED = [
    "model.vocab_size",
    "task.model",
    "trainer.logger",
    "optimizer.params",
    "datamodule.foo",
    "callbacks.x.y",
    "new",
]


@dataclass
class Case:
    overrides: list[str]
    file: str | None = None  # a YAML file that differs, below configs/
    text: str = ""  # what it holds instead
    names: tuple[str, ...] = ()  # a refusal must contain one of them
    key: str = ""  # the mutated key
    misspelt: bool = False  # must be refused


class Fuzz:
    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.files = {str(p.relative_to(compose.CONFIGS)): p.read_text() for p in compose.CONFIGS.rglob("*.yaml")}
        folders = [path for path in compose.CONFIGS.iterdir() if path.is_dir() and path.name != "hydra"]
        self.groups = {path.name: sorted(option.stem for option in path.glob("*.yaml")) for path in sorted(folders)}

    def case(self) -> Case:
        rng = self.rng
        command = ["model=tiny", f"logger={rng.choice(['none'] * 3 + ['csv', 'tensorboard', 'wandb'])}"]
        command.append(f"optimizer={rng.choice(self.groups['optimizer'])}")
        command.append(
            rng.choice(["task=state_tracking", "task=membership", "task=text", "experiment=z5", "experiment=scan_8"])
        )
        command.append(f"callbacks={rng.choice(['default'] * 3 + ['none'])}")
        kinds = [self.misspell_key, self.set_value, self.set_value, self.misspell_option, self.drop, self.add]
        kinds += [self.misspell_line, self.change_line, self.change_line]
        return rng.choice(kinds)(command)

    def keys(self, command: list[str]) -> list[str]:
        raw = OmegaConf.to_container(composed(command))
        keys = [k for k in by_key(raw) if k not in ("", "output_dir") and not k.startswith("choices")]
        return [key for key in keys if not key.endswith("_target_")]

    def misspell(self, word: str) -> str:
        i = self.rng.randrange(len(word))
        swapped = word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :]
        return self.rng.choice([word[:i] + word[i + 1 :], word[:i] + word[i] + word[i:], swapped, word + "x"])

    def misspell_key(self, command: list[str]) -> Case:
        keys = self.keys(command)
        path, _, name = self.rng.choice(keys).rpartition(".")
        wrong = f"{path}.{self.misspell(name)}".lstrip(".")
        sign, value = self.rng.choice(["", "+"]), self.rng.choice(VALUES)
        return Case([*command, f"{sign}{wrong}={value}"], names=(wrong,), key=wrong, misspelt=wrong not in keys)

    def set_value(self, command: list[str]) -> Case:
        key, value = self.rng.choice(self.keys(command)), self.rng.choice(VALUES)
        return Case([*command, f"{key}={value}"], names=(key, key.rpartition(".")[2] + "="), key=key)

    def misspell_option(self, command: list[str]) -> Case:
        group = self.rng.choice(list(self.groups))
        option = self.misspell(self.rng.choice(self.groups[group]))
        rest = [o for o in command if not o.startswith(f"{group}=")]
        known = option in self.groups[group]
        names = (f"{group}={option}", "") if known else (f"{group}={option}",)  # a known one may not fit: any reason
        return Case([*rest, f"{group}={option}"], names=names, key=group, misspelt=not known)

    def drop(self, command: list[str]) -> Case:
        key = self.rng.choice([*self.keys(command), *self.groups])
        return Case([*command, f"~{key}"], names=(key, key.rpartition(".")[2]), key=key)

    def add(self, command: list[str]) -> Case:
        key = self.rng.choice([*(f"trainer.{name}" for name in TRAINER), *FILLED])
        return Case([*command, f"++{key}={self.rng.choice(VALUES)}"], names=(key,), key=key)

    def lines(self, command: list[str]) -> tuple[str, list[str], int]:
        raw = OmegaConf.to_container(composed(command))
        chosen = dict(o.split("=") for o in command) | {"task": raw["choices"]["task"]}
        chosen["datamodule"] = chosen["task"]
        used = [f"{group}/{option}.yaml" for group, option in chosen.items()] + ["pattern_search_train.yaml"]
        used.append("trainer/default.yaml")
        file = self.rng.choice([f for f in used if f != "logger/none.yaml"])
        lines = self.files[file].splitlines()
        with_key = [i for i, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
        return file, lines, self.rng.choice([i for i in with_key if "choices" not in lines[i]])

    def misspell_line(self, command: list[str]) -> Case:
        file, lines, i = self.lines(command)
        before, _, after = lines[i].partition(":")
        start = len(before) - len(before.lstrip(" -"))
        word = before[start:]
        right = word.rpartition("/")[2]
        wrong = self.misspell(right)
        lines[i] = f"{before[:start]}{word.removesuffix(right)}{wrong}:{after}"
        name = word.strip().rpartition("/")[2].rpartition(" ")[2]
        free = file.startswith("callbacks") and not start  # the name of a callback can be any
        return Case(command, file, "\n".join(lines), (wrong.strip(), name), wrong, misspelt=wrong != right and not free)

    def change_line(self, command: list[str]) -> Case:
        file, lines, i = self.lines(command)
        before, _, after = lines[i].partition(":")
        values = [value for value in VALUES if value != "???"]  # where files merge, it leaves the other value
        value = self.rng.choice([*values, "{", "- a", "${", "&x", "*y"])
        lines[i] = f"{before}: {value}" + ("" if after.strip() else " # a node was here")
        place = file.partition(".")[0]
        names = (before.strip(" -").rpartition("/")[2], place, place.replace("/", "="), value)
        return Case(command, file, "\n".join(lines), names, before.strip())


def composed(overrides: list[str], out: Path | str = "out") -> DictConfig:
    return compose.job_config(compose.compose_config(overrides), out)


def refused(overrides: list[str]) -> list[str]:
    """Why a command cannot run."""
    try:
        checked_config(overrides)
    except ConfigError as error:
        return error.problems
    return []


def judge(case: Case, configs: Path, out: Path) -> tuple[str, str]:
    """("ran" | "refused" | "traceback" | "wrong", what was said)."""
    if case.file:
        (configs / case.file).write_text(case.text)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(10 * SECONDS)
    try:
        if problems := refused(case.overrides):
            named = any(name in problem for problem in problems for name in case.names)
            return "refused" if named else "wrong", "; ".join(problems)
        if case.misspelt:
            return "wrong", "a misspelt name was accepted"
        short = [o for o in SHORT if o.split("=")[0] != case.key and case.key != "trainer"]
        short += ["optimizer.max_evaluations=300"] * ("optimizer=pattern_search" in " ".join(case.overrides))
        without = {"callbacks=none", "~callbacks.progress"} & set(case.overrides) or str(case.file).startswith(
            "callbacks"
        )
        short = [o for o in short if not (o.startswith("callbacks") and without)]
        logger = ["logger=none"] if "logger=wandb" in case.overrides and not case.key.startswith("logger.") else []
        rest = [o for o in case.overrides if not (logger and o == "logger=wandb")]
        if "logger=wandb" in rest or case.key.startswith("wandb"):
            return "ran", "checked only"
        cfg = composed([*rest, *logger, *short], out)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            summary = train(cfg)
        json.dumps(summary)
        return "ran", f"{summary['steps']} steps"
    except (Exception, SystemExit):
        return "traceback", traceback.format_exc()
    except TooLong:
        return "wrong", f"took more than {SECONDS} seconds"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        if case.file:
            shutil.copy(ORIGINAL / case.file, configs / case.file)
        shutil.rmtree(out, ignore_errors=True)


class TooLong(BaseException):
    """Not an Exception, so that nothing under test catches it."""


def too_long(*_):
    raise TooLong


ORIGINAL = compose.CONFIGS


def main() -> None:
    """Run the cases that the command line asks for; exits with code 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="skip the cases before this one")
    parser.add_argument("--show", action="store_true", help="print every case")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ["COLUMNS"] = "200"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    counts = run(range(args.first, args.cases), args.seed, args.show)
    print(
        f"{sum(counts.values())} cases: {counts['refused']} refused, {counts['ran']} ran, "
        f"{counts['traceback']} tracebacks, {counts['wrong']} wrong"
    )
    sys.exit(1 if counts["traceback"] + counts["wrong"] else 0)


def run(numbers: range, seed: int, show: bool = False) -> Counter:
    """Run some cases of a seed, print those that are wrong (or all), and count the verdicts."""
    for timer in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(timer, too_long)
    fuzz, counts = Fuzz(seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        configs = Path(folder) / "configs"
        shutil.copytree(ORIGINAL, configs)
        compose.CONFIGS, here = configs, os.getcwd()
        os.chdir(folder)  # relative paths among the values go there
        for number in range(numbers.stop):
            case = fuzz.case()
            if number < numbers.start:
                continue
            verdict, said = judge(case, configs, Path(folder) / "out")
            counts[verdict] += 1
            if show or verdict in ("traceback", "wrong"):
                what = " ".join(case.overrides) + (f" with {case.file}" if case.file else "")
                print(f"[{number}] {verdict}: {what}\n    mutated: {case.names}\n    {said}", flush=True)
                if case.file and verdict in ("traceback", "wrong"):
                    old, new = fuzz.files[case.file].splitlines(), case.text.splitlines()
                    print(*(f"    line: {b!r}" for a, b in zip(old, new, strict=True) if a != b), sep="\n", flush=True)
        os.chdir(here)
    compose.CONFIGS = ORIGINAL
    return counts


if __name__ == "__main__":
    main()
