"""SCAN: the grammar against a second one and the released digest, official counts, files, decoding."""

import functools
import hashlib
import re
from collections import Counter

import pytest
import torch

from data.decoding import decode_rows
from data.scan_grammar import ACTIONS, WORDS, corpus, sentences
from data.sequences import IGNORE
from pattern_search_task import masked_loss
from scan_data import RULE_SPLITS, ScanDataModule, read_file, split_by_rule
from scan_task import ScanScores
from transformer import DecoderOnlyTransformer

DIGEST = "6be4b39bc8bf3a20be810b6991250d0493e608560609db6765dd679e1ed1c98e"  # of the sorted lines of tasks.txt
COUNTS = {  # lines of the official files: train, test
    "length": (16990, 3920),
    "addprim_jump": (14670, 7706),
    "addprim_turn_left": (21890, 1208),
    "template_around_right": (15225, 4476),
    "template_opposite_right": (15225, 4476),
    "template_right": (15225, 4476),
    "template_jump_around_right": (18528, 1173),
    "filler_num0": (15225, 1173),
    "filler_num1": (16290, 1173),
    "filler_num2": (17391, 1173),
    "filler_num3": (18528, 1173),
}


def line(command):
    return f"IN: {command} OUT: {' '.join(corpus()[command])}"


@functools.cache
def module(**options):
    return ScanDataModule(**options)


# --- grammar ---


def test_the_corpus_is_the_released_one():
    text = "\n".join(sorted(map(line, corpus()))) + "\n"
    assert len(corpus()) == 20_910
    assert len(sentences()) == 102
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST


def rewrite(command):
    """The published interpretation rules, read as a recursion on the string."""
    if match := re.fullmatch("(.*) and (.*)", command):
        return rewrite(match[1]) + rewrite(match[2])
    if match := re.fullmatch("(.*) after (.*)", command):
        return rewrite(match[2]) + rewrite(match[1])
    if match := re.fullmatch("(.*) (twice|thrice)", command):
        return rewrite(match[1]) * {"twice": 2, "thrice": 3}[match[2]]
    if match := re.fullmatch(r"(\w+) (opposite |around )?(left|right)", command):
        turn = [f"I_TURN_{match[3].upper()}"]
        action = [] if match[1] == "turn" else [f"I_{match[1].upper()}"]
        return {None: turn + action, "opposite ": turn * 2 + action, "around ": (turn + action) * 4}[match[2]]
    return [f"I_{command.upper()}"]


def test_two_definitions_agree_on_every_command():
    assert all(rewrite(command) == actions for command, actions in corpus().items())


def test_lengths_of_commands_and_actions():
    lengths = [(len(command.split()), len(actions)) for command, actions in corpus().items()]
    assert {n for n, _ in lengths} == set(range(1, 10))
    assert (min(m for _, m in lengths), max(m for _, m in lengths)) == (1, 48)
    assert sum(m <= 8 for _, m in lengths) == 6268


# --- splits ---


@pytest.mark.parametrize("split", RULE_SPLITS)
def test_official_counts(split):
    train, test = split_by_rule(split)
    assert (len(train), len(test)) == COUNTS[split]
    assert not set(train) & set(test)
    assert len(set(test)) == len(test)


def bigrams(command, n=2):
    words = command.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_rules_in_words_not_in_substrings():
    """The same rules on lists of words, as the papers state them."""
    everything = set(corpus())
    train, test = split_by_rule("addprim_jump")
    assert set(test) == {c for c in everything if "jump" in c.split() and c != "jump"}
    assert Counter(train)["jump"] == 1467
    train, test = split_by_rule("addprim_turn_left")
    assert set(test) == {c for c in everything if ("turn", "left") in bigrams(c) and c != "turn left"}
    assert Counter(train)["turn left"] == 2189
    for template in ("around", "opposite"):
        train, test = split_by_rule(f"template_{template}_right")
        with_it = {c for c in everything if (template, "right") in bigrams(c)}
        assert set(train) == everything - with_it
        assert set(test) == {c for c in with_it if ("turn", template, "right") not in bigrams(c, 3)}
    train, test = split_by_rule("template_right")
    verbs = ("walk", "look", "run", "jump", "turn")
    with_it = {c for c in everything if any((v, "right") in bigrams(c) for v in verbs)}
    assert set(train) == everything - with_it
    assert set(test) == {c for c in with_it if ("turn", "right") not in bigrams(c)}
    train, test = split_by_rule("length")
    assert max(len(corpus()[c]) for c in train) == 22
    assert min(len(corpus()[c]) for c in test) == 24


@pytest.mark.parametrize(
    ("k", "fillers"), [(0, set()), (1, {"look"}), (2, {"look", "walk"}), (3, {"look", "walk", "run"})]
)
def test_fillers(k, fillers):
    train, test = split_by_rule(f"filler_num{k}")
    around = {c: {w[0] for w in bigrams(c, 3) if w[1:] == ("around", "right")} for c in corpus()}
    assert set(train) == {c for c in corpus() if around[c] <= fillers}
    assert set(test) == {c for c in corpus() if "jump" in around[c] and "turn" not in around[c]}


def test_oversampling_is_a_flag():
    for split in ("addprim_jump", "addprim_turn_left"):
        train, test = split_by_rule(split, oversample=False)
        assert len(set(train)) == len(train) == 20_910 - len(test)


@pytest.mark.parametrize("split", ["random", "scan_s", *RULE_SPLITS])
def test_sides_share_no_command_and_validation_comes_from_training(split):
    examples = module(split=split, batch_size=8).examples
    sides = {side: {command for command, _ in rows} for side, rows in examples.items()}
    assert list(examples) == ["train", "val", "test"]
    assert not sides["train"] & sides["val"]
    assert not sides["train"] & sides["test"]
    assert not sides["val"] & sides["test"]
    if split in COUNTS:
        assert len(examples["train"]) + len(examples["val"]) == COUNTS[split][0]
        assert len(examples["test"]) == COUNTS[split][1]
        assert len(examples["val"]) == 1000
    assert all(corpus()[command] == actions for rows in examples.values() for command, actions in rows)


def test_sizes_of_the_random_splits():
    sizes = {s: [len(rows) for rows in module(split=s, batch_size=8).examples.values()] for s in ("random", "scan_s")}
    assert sizes == {"random": [15_728, 1000, 4182], "scan_s": [74, 8, 20]}
    assert all(
        "and" not in c.split() and "after" not in c.split()
        for c, _ in module(split="scan_s", batch_size=8).examples["train"]
    )


def test_the_held_out_primitive_stays_in_training():
    assert Counter(c for c, _ in module(split="addprim_jump", batch_size=8).examples["train"])["jump"] == 1467
    once = ScanDataModule(split="addprim_jump", oversample=False, n_samples=None)
    assert len(once.examples["train"]) + len(once.examples["val"]) == 20_910 - 7706


def test_max_actions():
    examples = module(max_actions=8).examples
    assert sum(map(len, examples.values())) == 6268
    assert max(len(actions) for rows in examples.values() for _, actions in rows) == 8


def test_n_samples_is_the_size_of_the_training_set_and_reaches_every_position():
    datamodule = module(n_samples=100)
    assert len(datamodule.splits["train"]) == 100
    assert datamodule.max_train_len == datamodule.max_len == 58


# --- layout ---


def test_layout_is_command_sep_actions_and_eos_is_no_token():
    datamodule = module()
    assert datamodule.tokens == (*WORDS, *ACTIONS, "SEP")
    assert datamodule.classes == (*ACTIONS, "EOS")
    for row in range(5):
        command, actions = datamodule.examples["test"][row]
        end = len(command.split()) + 1 + len(actions)
        x, y = datamodule.splits["test"].x[row], datamodule.splits["test"].y[row]
        assert [datamodule.tokens[i] for i in x[:end]] == [*command.split(), "SEP", *actions]
        scored = y != IGNORE
        assert [datamodule.classes[c] for c in y[scored]] == [*actions, "EOS"]
        assert scored.nonzero().flatten().tolist() == list(range(len(command.split()), end))


def test_the_vocabulary_is_no_larger_than_the_split():
    assert module(split="scan_s", batch_size=8).tokens == (*WORDS[:-2], *ACTIONS, "SEP")
    assert module(split="length", batch_size=8).max_train_len < module(split="length", batch_size=8).max_len == 58


# --- official files ---


def write_split(folder, name="simple"):
    folder.mkdir(parents=True)
    for side, commands in (("train", sentences()), ("test", ["run and look"])):
        (folder / f"tasks_{side}_{name}.txt").write_text("".join(line(c) + "\n" for c in commands))


def test_official_files_are_found_below_the_folder(tmp_path):
    write_split(tmp_path / "simple_split")
    datamodule = ScanDataModule(split="simple", data_dir=str(tmp_path), batch_size=8)
    assert {side: len(rows) for side, rows in datamodule.examples.items()} == {"train": 92, "val": 10, "test": 1}
    assert datamodule.examples["test"] == [("run and look", ["I_RUN", "I_LOOK"])]
    assert datamodule.vocab_size == len(WORDS) - 1 + 6 + 1  # "after" does not occur


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("IN: walk OUT:", 'expected "IN: <command> OUT: <actions>"'),
        ("walk I_WALK", 'expected "IN: <command> OUT: <actions>"'),
        ("IN: wlak OUT: I_WALK", "unknown words: wlak"),
        ("IN: walk OUT: I_WALK I_FLY", "unknown words: I_FLY"),
        ("", 'expected "IN: <command> OUT: <actions>"'),
    ],
)
def test_a_malformed_line_is_named(tmp_path, text, problem):
    path = tmp_path / "tasks_train_simple.txt"
    path.write_text(f"IN: run OUT: I_RUN\n{text}\nIN: run OUT: I_RUN\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: {text!r}: {problem}")):
        read_file(path)


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tasks_train_<split>.txt"):
        ScanDataModule(split="simple", data_dir=str(tmp_path))
    write_split(tmp_path / "a", name="simple")
    with pytest.raises(ValueError, match=r"datamodule.split=simpel is not known; did you mean simple\? Known: simple$"):
        ScanDataModule(split="simpel", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(split="lenght"), r"datamodule.split=lenght is not known; did you mean length"),
        (dict(split="simple"), r"datamodule.split=simple is not known"),
        (dict(split="length", max_actions=22), r"split=length, max_actions=22 leaves 15,990 train, 1,000 val, 0 test"),
        (dict(max_actions=0), r"leaves 0 train, 0 val, 0 test examples"),
        (dict(split="scan_s", n_samples=75), r"leaves 74 train, .* too few for n_samples=75; .* lower n_samples"),
        (dict(split="scan_s", n_samples=0), r"n_samples=0 must be at least 1"),
        (dict(split="scan_s", batch_size=75), r"batch_size=75 is larger than the training set of 74"),
    ],
)
def test_bad_input_is_refused_with_a_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        ScanDataModule(**options).setup()


# --- decoding and metrics ---


@functools.cache
def trained_model(steps):
    """A small model after some steps of Adam on the 74 commands of scan_s: from no right output to almost all."""
    datamodule = module(split="scan_s", batch_size=8)
    torch.manual_seed(0)
    sizes = dict(vocab_size=datamodule.vocab_size, n_classes=datamodule.n_classes, max_len=datamodule.max_len)
    model = DecoderOnlyTransformer(**sizes, d_model=32, n_layers=1, n_heads=4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    train = datamodule.splits["train"]
    for _ in range(steps):
        optimizer.zero_grad()
        masked_loss(model(train.x), train.y).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "expected"), [(0, (0, 0)), (60, (0.02, 0.98)), (250, (0.8, 1))])
def test_teacher_forced_exact_match_is_that_of_greedy_decoding(steps, expected):
    datamodule, model = module(split="scan_s", batch_size=8), trained_model(steps)
    for side in ("train", "val", "test"):
        x, y = datamodule.splits[side].x, datamodule.splits[side].y
        with torch.no_grad():
            logits = model(x)
        forced = ((logits.argmax(-1) == y) | (y == IGNORE)).all(1)
        predictions = decode_rows(model, datamodule, side, range(len(y)))
        greedy = [prediction["output"] == prediction["truth"] for prediction in predictions]
        assert forced.tolist() == greedy
        scores = ScanScores()
        scores.update(logits, y)
        assert scores.compute()["exact_match"] == pytest.approx(sum(greedy) / len(greedy))
        if side == "train":
            assert expected[0] <= sum(greedy) / len(greedy) <= expected[1]


def test_metrics():
    """5 of 7 outputs right, one of two sequences; the first goes wrong after 1 of 4, and is right again later."""
    y = torch.tensor([[IGNORE, 0, 1, 2, 6], [0, 1, 6, IGNORE, IGNORE]])
    answers = torch.tensor([[0, 0, 0, 2, 0], [0, 1, 6, 0, 0]])
    logits = torch.nn.functional.one_hot(answers, 7).float()
    scores = ScanScores()
    scores.update(logits, y)
    result = scores.compute()
    assert (result["exact_match"], result["prefix_accuracy"], result["last_accuracy"]) == (0.5, (1 / 4 + 1) / 2, 0.5)
    assert result["token_accuracy"] == pytest.approx(5 / 7)
