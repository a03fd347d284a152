"""SCAN: translate commands into actions (Lake and Baroni 2018, "Generalization without Systematicity").

The grammar is small enough to be the data, and every split that is a rule on the command is that rule here. x is the
command, SEP and the actions; scored are the actions and EOS, which ends each output and is never read, so it is a class
and no token. Show some data with `python src/show_data.py task=scan datamodule.split=length`.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from config.did_you_mean import one_of
from data.scan_grammar import ACTIONS, VERBS, WORDS, corpus, sentences
from data.sequences import SequenceDataModule, Sequences, lay_out

Example = tuple[str, list[str]]  # a command and its actions
OFFICIAL = "https://github.com/brendenlake/SCAN"
MAX_VAL = 1000  # validation holds a tenth of the training commands, and at most so many

# Splits that hold out a primitive: all commands with the phrase are the test, but the phrase alone is trained on,
# this many times in the official files.
PRIMITIVES = {"addprim_jump": ("jump", 1467), "addprim_turn_left": ("turn left", 2189)}
# Splits that hold out a template (Loula, Baroni and Lake 2018): no "<verb> <template>" of these verbs, nor of "turn",
# is trained on; the test has one of the last verbs, and "turn <template>" is on neither side.
TEMPLATES = {
    "template_around_right": ("around right", tuple(VERBS), tuple(VERBS)),
    "template_opposite_right": ("opposite right", tuple(VERBS), tuple(VERBS)),
    "template_right": ("right", tuple(VERBS), tuple(VERBS)),
    "template_jump_around_right": ("around right", ("jump",), ("jump",)),
    "filler_num0": ("around right", ("look", "walk", "run", "jump"), ("jump",)),
    "filler_num1": ("around right", ("walk", "run", "jump"), ("jump",)),
    "filler_num2": ("around right", ("run", "jump"), ("jump",)),
    "filler_num3": ("around right", ("jump",), ("jump",)),
}
RULE_SPLITS = ("length", *PRIMITIVES, *TEMPLATES)
LONGEST_TRAINED = 22  # actions, in the length split


def split_by_rule(split: str, oversample: bool = True) -> tuple[list[str], list[str]]:
    """Training and test commands of one of RULE_SPLITS, as many as in the official files.

    Without `oversample` the held-out primitive is once in training, like every other command.
    """
    if split == "length":
        train = [c for c, actions in corpus().items() if len(actions) <= LONGEST_TRAINED]
        return train, [c for c, actions in corpus().items() if len(actions) > LONGEST_TRAINED]
    if split in PRIMITIVES:
        phrase, copies = PRIMITIVES[split]
        test = [c for c in corpus() if phrase in c and c != phrase]
        others = [c for c in corpus() if phrase not in c]
        return others + [phrase] * (copies if oversample else 1), test
    template, held_out, tested = TEMPLATES[split]
    train = [c for c in corpus() if not any(f"{verb} {template}" in c for verb in (*held_out, "turn"))]
    test = [c for c in corpus() if any(f"{verb} {template}" in c for verb in tested) and f"turn {template}" not in c]
    return train, test


def read_file(path: Path) -> list[Example]:
    """The examples of an official file, one "IN: <command> OUT: <actions>" a line.

    Raises:
        ValueError: a line is not of this form, or has an unknown word; file, line and text are named.
    """
    examples = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        match = re.fullmatch(r"IN: (\S.*) OUT: (\S.*?)\s*", line)
        command, actions = (match[1].split(), match[2].split()) if match else ([], [])
        unknown = sorted({*command} - {*WORDS}) + sorted({*actions} - {*ACTIONS})
        if not match or unknown:
            why = f"unknown words: {', '.join(unknown)}" if match else 'expected "IN: <command> OUT: <actions>"'
            raise ValueError(f"{path}, line {number}: {line!r}: {why}; take the file as it is from {OFFICIAL}")
        examples.append((" ".join(command), actions))
    return examples


def read_split(data_dir: str, split: str) -> dict[str, list[Example]]:
    """Training and test examples from tasks_train_<split>.txt and tasks_test_<split>.txt, anywhere below data_dir.

    Raises:
        ValueError: a file is missing (the splits that are there are listed) or malformed.
    """
    found = {path.stem: path for path in sorted(Path(data_dir).rglob("tasks_*.txt"))}
    names = [name.removeprefix("tasks_train_") for name in found if name.startswith("tasks_train_")]
    known = [name for name in names if f"tasks_test_{name}" in found]
    if not known:
        raise ValueError(
            f"datamodule.data_dir={data_dir} holds no tasks_train_<split>.txt with its tasks_test_<split>.txt; clone "
            f"{OFFICIAL} there, or use datamodule.data_dir=null, which makes the same splits from the grammar"
        )
    one_of("datamodule.split", split, known)
    return {side: read_file(found[f"tasks_{side}_{split}"]) for side in ("train", "test")}


def split_corpus(split: str, oversample: bool, seed: int) -> dict[str, list[Example]]:
    """Training and test examples by a rule; or a seeded 80/20 cut, of all ("random") or of the 102 short ones."""
    one_of("datamodule.split", split, ("random", "scan_s", *RULE_SPLITS))
    if split in RULE_SPLITS:
        train, test = split_by_rule(split, oversample)
    else:
        commands = np.random.default_rng(seed).permutation([*(corpus() if split == "random" else sentences())]).tolist()
        test, train = commands[: len(commands) // 5], commands[len(commands) // 5 :]
    return {side: [(c, corpus()[c]) for c in commands] for side, commands in (("train", train), ("test", test))}


def carve_validation(sides: dict[str, list[Example]], rng: np.random.Generator) -> dict[str, list[Example]]:
    """Take a tenth of the training commands, 1,000 at most, for validation, and shuffle all sides."""
    train, test = (
        [examples[i] for i in rng.permutation(len(examples))] for examples in (sides["train"], sides["test"])
    )
    copies = Counter(command for command, _ in train)
    once = [command for command, n in copies.items() if n == 1]  # what training repeats, it needs
    chosen = set(once[: min(MAX_VAL, max(1, len(once) // 10))])
    val = [example for example in train if example[0] in chosen]
    return {"train": [example for example in train if example[0] not in chosen], "val": val, "test": test}


class ScanDataModule(SequenceDataModule):
    """Commands and their actions.

    Validation is a tenth of the distinct training commands, 1,000 at most; commands that training repeats stay there.
    The vocabulary holds the words that occur, and no other.

    Args:
        split: one of RULE_SPLITS, "random", "scan_s", or with `data_dir` any split that has files.
        max_actions: leave out commands with more actions, on all sides; None for no limit.
        oversample: repeat the primitive of the addprim splits as the official files do.
        data_dir: folder with the official files, e.g. a clone of github.com/brendenlake/SCAN.
        n_samples: training examples, a random subset with one of the longest in it, so that no position goes untrained;
            None for all.
        batch_size, seed: as in `SequenceDataModule`.

    Raises:
        ValueError: an unknown split, more examples than there are, an empty side, a malformed file.
    """

    def __init__(
        self,
        split: str = "random",
        max_actions: int | None = None,
        oversample: bool = True,
        data_dir: str | None = None,
        n_samples: int | None = None,
        batch_size: int = 64,
        seed: int = 0,
    ):
        sides = split_corpus(split, oversample, seed) if data_dir is None else read_split(data_dir, split)
        if max_actions is not None:
            sides = {side: [e for e in examples if len(e[1]) <= max_actions] for side, examples in sides.items()}
        self.examples = carve_validation(sides, np.random.default_rng((seed, 1)))
        available = len(self.examples["train"])
        if not all(self.examples.values()) or (n_samples or 1) > available:
            sizes = ", ".join(f"{len(examples):,} {side}" for side, examples in self.examples.items())
            raise ValueError(
                f"datamodule.split={split}, max_actions={max_actions} leaves {sizes} examples, too few for "
                f"n_samples={n_samples}; raise max_actions, lower n_samples, or take another split"
            )
        super().__init__(batch_size, available if n_samples is None else n_samples, seed)
        train, first = self.examples["train"], self.examples["train"][: self.n_samples]
        longest = max(train, key=lambda example: len(example[0].split()) + len(example[1]))
        self.examples["train"] = first if longest in first else [*first[:-1], longest]
        occurring = {word for examples in self.examples.values() for command, _ in examples for word in command.split()}
        self.tokens = (*(word for word in WORDS if word in occurring), *ACTIONS, "SEP")
        self.classes = (*ACTIONS, "EOS")
        self.unread = () if split in PRIMITIVES and data_dir is None else ("oversample",)
        self.output_tokens = [self.tokens.index(action) for action in ACTIONS]  # by class; EOS is never read

    def n_outputs(self, prompt_length: int) -> int:
        return max(1, self.max_len - prompt_length + 1)

    def make_splits(self) -> dict[str, Sequences]:
        classes = {name: c for c, name in enumerate(self.classes)}
        splits = {}
        for side, examples in self.examples.items():
            outputs = [[classes[action] for action in (*actions, "EOS")] for _, actions in examples]
            splits[side] = lay_out([self.prompt(command) for command, _ in examples], outputs, self.output_tokens)
        return splits
