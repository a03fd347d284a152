"""Text: splits by blocks, tokens, n-grams against a plain count, metrics, files that are refused, writing on."""

import functools
import hashlib
import json
import math
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch

from conftest import ROOT
from data.decoding import decode_rows, predict
from data.ngrams import ngram_losses
from evaluate import lines, main
from run.build import load_run
from show_data import align
from show_data import main as show
from text_data import BLOCK, OTHER, TextDataModule, cut, read_text, tokenise
from text_task import TextScores
from train import train
from transformer import DecoderOnlyTransformer

DOCUMENTED = "2a95af4ac93f5b719944030ce3769070ddf827d847cba42192afa8da989e5dc4"  # the text of docs/tasks.md
WORDS = ["the", "search", "polls", "a", "node", "and", "moves", "where", "losses", "fall.\n", "Then\tit", "rests."]


@functools.cache
def prose(characters=20_000, seed=0):
    """Words in random order, each character of which occurs often."""
    rng = random.Random(seed)
    return " ".join(rng.choices(WORDS, k=characters))[:characters]


@pytest.fixture
def module(tmp_path):
    """The data of a text, which is written to a file first."""

    def module(text=None, encoding="utf-8", **options):
        path = tmp_path / "text.txt"
        path.write_bytes((prose() if text is None else text).encode(encoding))
        made = TextDataModule(path=str(path), encoding=encoding, **{"length": 16, "batch_size": 8} | options)
        made.setup()
        return made

    return module


def windows_of(data):
    """The characters of the windows of each split, as strings."""
    return {
        split: ["".join(data.tokens[i] for i in (*x.tolist(), int(y[-1]))) for x, y in zip(of.x, of.y, strict=True)]
        for split, of in data.splits.items()
    }


# --- splits ---


def test_no_character_is_in_two_splits_and_neighbours_stay_together(module):
    """Every character is another one here, so that its place in the text can be told."""
    n, length = 17 * 401 + 3, 16
    data = module("".join(chr(0x4E00 + i) for i in range(n)), min_count=1, n_held_out=10**6, batch_size=1)
    places = {split: np.array([[ord(c) - 0x4E00 for c in w] for w in ws]) for split, ws in windows_of(data).items()}
    every = np.concatenate([rows.flatten() for rows in places.values()])
    assert sorted(every.tolist()) == list(range(n - 3))  # each once; the rest of the text fills no window
    for split, rows in places.items():
        assert (np.diff(rows) == 1).all()
        numbers = np.sort(rows[:, 0]) // (length + 1)
        blocks = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
        assert min(map(len, blocks)) >= BLOCK, split
    shares = {split: len(rows) / 401 for split, rows in places.items()}
    assert shares == pytest.approx({"train": 0.9, "val": 0.05, "test": 0.05}, abs=0.01)


def test_a_window_reads_all_its_characters_but_the_last_and_writes_all_but_the_first(module):
    data = module()
    for split in data.splits.values():
        assert torch.equal(split.x[:, 1:], split.y[:, :-1])
        assert split.scored.all()
    assert all(window in prose() for windows in windows_of(data).values() for window in windows)


def test_windows_that_read_the_same_are_there_once():
    ruler, word = [0] * 5, [1, 2, 1, 2, 1]
    ids = np.array([*ruler, *word, *ruler, *word[:4], 0, 1, 1])
    assert cut(ids, 4).tolist() == [ruler, word]
    assert cut(ids[:4], 4).tolist() == []


def test_sizes_are_as_asked_for(module):
    assert {split: len(of) for split, of in module(n_samples=100, n_held_out=7).splits.items()} == {
        "train": 100, "val": 7, "test": 7
    }  # fmt: skip
    data = module()
    assert data.n_samples == len(data.splits["train"]) > 900
    assert (data.max_len, data.max_train_len) == (16, 16)


def test_the_default_is_the_text_that_python_ships():
    data = TextDataModule()
    text = read_text(None, "utf-8")
    assert data.facts()["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert data.facts()["characters"] == len(text) > 300_000
    assert data.unread == ("encoding",)
    assert len(data.splits["val"]) == len(data.splits["test"]) == 256
    assert {*"etaoin shrdlu\n"} <= {*data.tokens}


def test_its_losses_are_those_of_the_documents():
    data = TextDataModule()
    if data.sha256 != DOCUMENTED:
        pytest.skip("this version of Python ships another text")
    losses = [f"{loss:.2f}" for loss in data.baselines().values()]
    text = " ".join((ROOT / "docs/tasks.md").read_text().split())
    assert f"With seed 0 they are {losses[0]}, {losses[1]} and {losses[2]} nats" in text


# --- tokens ---


def test_rare_characters_are_one_token():
    text = "aaabbbbcd\N{REPLACEMENT CHARACTER}" * 2
    tokens, ids = tokenise(text, 6)
    assert tokens == ("a", "b", OTHER)
    assert "".join(tokens[i] for i in ids) == ("aaabbbb" + 3 * OTHER) * 2
    assert tokenise("abab", 2)[0] == ("a", "b")  # no token for what does not occur
    assert tokenise(f"aa{OTHER * 9}", 1)[0] == ("a", OTHER)


def test_a_prompt_is_read_by_characters_and_unknown_ones_are_named(module):
    data = module(prose() + "é", min_count=20)
    assert [data.tokens[i] for i in data.prompt("the  search\n")] == [*"the  search\n"]
    with pytest.raises(ValueError, match="the text has too few of these characters, or none: 'é' '€'"):
        data.prompt("the é€é")
    with pytest.raises(ValueError, match="an input needs a character at least"):
        data.prompt("")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "latin-1"])
def test_encodings_and_line_ends_make_no_difference(module, encoding):
    text = prose().replace("a", "ä")
    data = module(text.replace("\n", "\r\n"), encoding)
    assert data.facts()["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert "ä" in data.tokens
    assert "\r" not in data.tokens


# --- n-grams ---


def plain_loss(train, test, n_tokens, order):
    """The same by counting substrings, one token after the other."""
    grams = Counter(w[i : i + n] for w in train for n in range(1, order + 1) for i in range(len(w) - n + 1))

    def probability(context, token):
        after = {gram: n for gram, n in grams.items() if gram[:-1] == context}
        shorter = probability(context[1:], token) if context else 1 / n_tokens
        return (after.get((*context, token), 0) + len(after) * shorter) / (sum(after.values()) + len(after))

    def seen(context):
        while context and not any(gram[:-1] == context for gram in grams):
            context = context[1:]
        return context

    p = [probability(seen(w[max(0, t - order + 1) : t]), w[t]) for w in test for t in range(1, len(w))]
    return -sum(map(math.log, p)) / len(p)


@pytest.mark.parametrize("seed", range(3))
def test_n_grams_are_those_of_a_plain_count(seed):
    rng = np.random.default_rng(seed)
    train, test = rng.integers(4, size=(6, 7)), rng.integers(5, size=(4, 6))  # of 6 tokens, some never seen
    expected = [plain_loss([*map(tuple, train)], [*map(tuple, test)], 6, order) for order in (1, 2, 3)]
    assert ngram_losses(train, test, 6, 3) == pytest.approx(expected)


def test_longer_n_grams_know_more_of_a_text(module):
    losses = module().baselines()
    assert [*losses] == ["unigram", "bigram", "trigram"]
    assert math.log(20) > losses["unigram"] > losses["bigram"] + 0.5 > losses["trigram"] + 0.5


def test_a_unigram_is_the_entropy_of_a_large_text(module):
    counts = np.array([*Counter(prose()).values()]) / len(prose())
    assert module().baselines("train")["unigram"] == pytest.approx(-(counts * np.log(counts)).sum(), rel=0.01)


# --- metrics ---


def test_bits_are_those_of_the_loss():
    scores, y = TextScores(), torch.tensor([[0, 1], [2, 3]])
    scores.update(torch.zeros(2, 2, 4), y)
    assert scores.compute()["bits_per_character"] == pytest.approx(2)
    assert scores.compute()["loss"] == pytest.approx(2 * math.log(2))


# --- refusals ---


def file(tmp_path, content):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    return {"path": str(path)}


REFUSED = {
    "missing": (lambda tmp: {"path": "no/such.txt"}, "datamodule.path=no/such.txt cannot be read: No such file"),
    "long name": (lambda tmp: {"path": "a" * 999}, "cannot be read: File name too long"),
    "directory": (lambda tmp: {"path": str(tmp)}, "is not a file; give one text file"),
    "device": (lambda tmp: {"path": "/dev/zero"}, "datamodule.path=/dev/zero is not a file; give one text file"),
    "binary": (lambda tmp: file(tmp, bytes(range(256)) * 99), "is not text in datamodule.encoding=utf-8: "),
    "zeros": (lambda tmp: file(tmp, bytes(9999)), "encoding=utf-8: it holds the character NUL"),
    "wrong encoding": (lambda tmp: file(tmp, "é".encode("latin-1") * 9999), "is not text in datamodule.encoding=utf-8"),
    "no encoding": (
        lambda tmp: file(tmp, b"a b" * 9999) | {"encoding": "utf-9"},
        "datamodule.encoding=utf-9 is not known; try utf-8",
    ),
    "not an encoding of text": (
        lambda tmp: file(tmp, b"a b" * 9999) | {"encoding": "hex"},
        "datamodule.encoding=hex is not known; try utf-8",
    ),
    "empty": (lambda tmp: file(tmp, b""), "a.txt is empty"),
    "short": (
        lambda tmp: file(tmp, prose(1000).encode()),
        "needs a text of 1,950 characters at least, and this one has 1,000",
    ),
    "monotonous": (lambda tmp: file(tmp, b"ab" * 9999), "leaves 2 windows that differ, and three splits need 30"),
    "one character": (lambda tmp: file(tmp, b"a" * 9999), "leaves 1 of the 1 characters of the text"),
    "rare": (lambda tmp: {"min_count": 10**6}, "datamodule.min_count=1000000 leaves 0 of the "),
    "many": (lambda tmp: {"n_samples": 10**6}, "datamodule.n_samples=1000000 is more than the 6,"),
    "length": (lambda tmp: {"length": 0}, "datamodule.length=0 must lie between 1 and 4,096"),
    "min_count": (lambda tmp: {"min_count": 0}, "datamodule.min_count=0 must be at least 1"),
    "n_held_out": (lambda tmp: {"n_held_out": 0}, "datamodule.n_held_out=0 must be at least 1"),
    "batch": (lambda tmp: {"n_samples": 9}, "datamodule.batch_size=32 is larger than the training set of 9"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_a_way_out(tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refusal:
        TextDataModule(**options(tmp_path)).setup()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["datamodule.path=no/such.txt"], "datamodule.path=no/such.txt cannot be read"),
        (["datamodule.encoding=latin-1"], "datamodule.encoding=latin-1 has no effect"),
        (["model.max_len=32"], "model.max_len=32 is shorter than the longest input of the task, 64 tokens"),
        (["datamodule.lenght=3"], "did you mean datamodule.length?"),
    ],
)
def test_wrong_commands_are_refused_before_anything_starts(overrides, message):
    from config.check import checked_config
    from config.refusal import ConfigError

    with pytest.raises(ConfigError) as refusal:
        checked_config(["task=text", *overrides])
    (problem,) = refusal.value.problems
    assert message in problem


# --- as people read it ---


def test_a_text_is_shown_without_gaps(module):
    data = module()
    above, below = align(data, "train", 0, width=80)
    window = windows_of(data)["train"][0].replace("\n", "⏎").replace("\t", "⇥")
    assert (above, below) == (f"x  {window[:-1]}".rstrip(), f"y  {window[1:]}".rstrip())


def test_the_losses_of_n_grams_are_shown(capsys):
    show(["task=text"])
    printed = capsys.readouterr().out
    assert re.search(r"bigram +loss 2\.\d{4} nats", printed)
    assert re.search(r"sha256 +[0-9a-f]{64}\n", printed)
    assert "e f g" in printed


class Copying(torch.nn.Module):
    """Writes the token that stands `period` places before, so what it writes has this period."""

    def __init__(self, n_tokens, period):
        super().__init__()
        self.n_tokens, self.period, self.weight = n_tokens, period, torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        return torch.nn.functional.one_hot(tokens.roll(self.period - 1, 1), self.n_tokens).float()


def test_half_of_a_window_is_written_on_to_its_end(module):
    data = module()
    (row,) = decode_rows(Copying(data.n_classes, 4), data, "test", [3])
    window = windows_of(data)["test"][3]
    assert "".join(row["input"]) == window[:8]
    assert data.splits["test"].inputs()[3] == (*data.prompt(window[:-1]),)  # what counts as trained on is all of it
    assert "".join(row["output"]) == (window[4:8] * 3)[:9]
    assert "".join(row["truth"]) == window[8:]
    assert predict(Copying(data.n_classes, 4), data, ["the "]) == [("the " * 4)[: 17 - 4]]
    shown = list(lines(row, 80, data.separator))
    assert shown[0].startswith("wrong  input  ")
    assert [line[:14] for line in shown[1:]] == ["       output ", "       truth  "]


def test_a_prompt_that_is_longer_than_the_positions_is_refused(module):
    data = module()
    model = DecoderOnlyTransformer(data.vocab_size, data.n_classes, data.max_len, 8, 1, 2).eval()
    assert len(predict(model, data, ["the node polls a"])[0]) == 1
    with pytest.raises(ValueError, match=r"an input of 17 tokens is longer than model\.max_len=16"):
        predict(model, data, ["the node polls a "])


# --- a run ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on a text file, and its summary."""
    from config.compose import compose_config, job_config

    home = tmp_path_factory.mktemp("text")
    (home / "text.txt").write_text(prose())
    words = ["task=text", f"datamodule.path={home}/text.txt", "datamodule.length=16", "model=tiny", "logger=none"]
    steps = ["optimizer=adam", "optimizer.lr=0.01", "trainer.max_steps=150"]
    summary = train(job_config(compose_config([*words, *steps]), home / "run"))
    return home / "run", summary


@pytest.mark.slow
def test_a_run_keeps_which_text_it_read_and_the_losses_of_n_grams(trained):
    run_dir, summary = trained
    kept = json.loads((run_dir / "summary.json").read_text())
    assert kept["data"] == summary["data"]
    assert kept["data"]["characters"] == 20_000
    assert kept["data"]["sha256"] == hashlib.sha256(prose().encode()).hexdigest()
    assert kept["test"]["test/loss"] < kept["data"]["unigram_loss"] < summary["chance_loss"]
    assert kept["test"]["test/bits_per_character"] == pytest.approx(kept["test"]["test/loss"] / math.log(2))


@pytest.mark.slow
def test_evaluate_writes_on_from_windows_and_from_a_prompt(trained, capsys):
    run_dir, _ = trained
    main([f"run={run_dir}", "--show", "2"])
    printed = capsys.readouterr().out
    assert "test/bits_per_character" in printed
    assert len(re.findall(r"(right|wrong)  input  .{1,8}\n {7}output .{1,9}\n {7}truth  .{1,9}\n", printed)) == 2
    main([f"run={run_dir}", "--prompt", "the se"])
    (written,) = [capsys.readouterr().out[:-1]]
    task, data, _ = load_run(run_dir)
    assert [written] == predict(task.model, data, ["the se"])
    assert len(written) == 11
    with pytest.raises(SystemExit) as end:
        main([f"run={run_dir}", "--prompt", "é"])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "evaluate: --prompt 'é': the text has too few of these characters, or none: 'é'\n"
    )


def test_windows_too_short_for_a_trigram_have_the_shorter_ngrams():
    assert set(TextDataModule(length=1).baselines()) == {"unigram", "bigram"}
