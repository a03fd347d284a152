"""Greedy decoding ends where the task says, and inputs of one's own are read like those of the data."""

import pytest
import torch

from data.decoding import decode, decode_rows, in_columns, predict, wrong_rows
from data.sequences import SequenceDataModule, lay_out
from membership_data import MembershipDataModule
from scan_data import ScanDataModule
from state_tracking_data import StateTrackingDataModule
from text_data import TextDataModule


class Copying(SequenceDataModule):
    """A task of one's own, as docs/extending.md has it: nothing but tokens, classes and splits."""

    tokens, classes = ("a", "b", "SEP"), ("a", "b")

    def __init__(self, n_read=3, n_written=3):
        super().__init__(batch_size=2, n_samples=4, seed=0)
        self.n_read, self.n_written = n_read, n_written

    def make_splits(self):
        rows = [[i % 2, *[0] * (self.n_read - 1)] for i in range(4)]
        split = lay_out([[*row, 2] for row in rows], [row[: self.n_written] for row in rows], (0, 1))
        return {"train": split, "val": split, "test": split}


class Constant(torch.nn.Module):
    """Always the same class."""

    def __init__(self, c, n_classes):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.eye(n_classes)[c])

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)


class Oracle(torch.nn.Module):
    """The right class behind every prefix of a split, and class 0 behind any other."""

    def __init__(self, data, split):
        super().__init__()
        self.n_classes = data.n_classes
        self.weight = torch.nn.Parameter(torch.zeros(1))
        sequences, self.known = data.splits[split], {}
        for x, y in zip(sequences.x.tolist(), sequences.y.tolist(), strict=True):
            self.known |= {tuple(x[: t + 1]): c for t, c in enumerate(y) if c >= 0}

    def forward(self, tokens):
        classes = [[self.known.get(tuple(row[: t + 1]), 0) for t in range(len(row))] for row in tokens.tolist()]
        return torch.nn.functional.one_hot(torch.tensor(classes), self.n_classes).float()


DATA = {
    "seq": lambda: StateTrackingDataModule(group="S3", length=3, n_samples=50, test_lengths=[5]),
    "tag": lambda: StateTrackingDataModule(group="Z3", length=4, n_samples=50, format="tag", test_lengths=[2]),
    "sets": lambda: MembershipDataModule(universe=6, set_size=2, n_samples=20, batch_size=8, test_set_sizes=[3]),
    "strings": lambda: MembershipDataModule(language="dyck1", length=8, n_samples=50, test_lengths=[12]),
    "scan": lambda: ScanDataModule(split="scan_s", batch_size=8),
    "text": lambda: TextDataModule(length=8, n_held_out=20),
    "own": Copying,
}


@pytest.fixture(params=DATA)
def data(request):
    made = DATA[request.param]()
    made.setup()
    return made


def test_the_right_outputs_are_decoded_from_prompts_alone(data):
    for split in data.test_names:
        rows = range(min(30, len(data.splits[split])))
        model = Oracle(data, split)
        predictions = [*decode_rows(model, data, split, rows)]
        assert all(prediction["output"] == prediction["truth"] for prediction in predictions)
        assert wrong_rows(model, data, split) == []
        texts, truths = (
            [data.separator.join(prediction[what]) for prediction in predictions] for what in ("input", "truth")
        )
        assert predict(model, data, texts) == truths


def test_an_output_is_as_long_as_the_task_says(data):
    """Whatever the model writes; where a class ends the output, as long as there is room."""
    for split in data.test_names:
        predictions = [*decode_rows(Constant(0, data.n_classes), data, split, range(len(data.splits[split])))]
        wrong = [row for row, prediction in enumerate(predictions) if prediction["output"] != prediction["truth"]]
        assert wrong == wrong_rows(Constant(0, data.n_classes), data, split)
        for prediction in predictions:
            if "EOS" in data.classes:
                assert len(prediction["input"]) + len(prediction["output"]) - 1 == data.max_len
            else:
                assert len(prediction["output"]) == len(prediction["truth"])


def test_a_class_that_is_never_read_ends_an_output():
    data = DATA["scan"]()
    prompt = data.prompt("walk")
    assert decode(Constant(0, 7), data, prompt) == [0] * (data.max_len - 1)
    assert decode(Constant(6, 7), data, prompt) == [6]


def test_a_parity_of_five_digits_has_five_states():
    parity = StateTrackingDataModule()
    parity.setup()
    for text in ("0 1 1 0 1", "0 1 1 0 1 SEP"):
        assert predict(Constant(1, 2), parity, [text]) == ["1 1 1 1 1"]


def test_the_separator_at_the_end_may_be_left_out():
    data = DATA["strings"]()
    assert data.prompt("( )") == data.prompt("( ) SEP")
    assert len(DATA["sets"]().prompt("3 5 SEP 5")) == 4
    assert len(DATA["tag"]().prompt("0 1 2")) == 3


def test_inputs_that_cannot_be_read_are_refused():
    parity = StateTrackingDataModule()
    with pytest.raises(ValueError, match=r"token=2 is not known\. Known: 0, 1, SEP"):
        predict(Constant(1, 2), parity, ["0 2"])
    with pytest.raises(ValueError, match="token=and is not known"):
        DATA["scan"]().prompt("walk and run")


def test_a_task_that_says_nothing_writes_as_much_as_in_its_data():
    assert len(decode(Constant(1, 2), Copying(), [0, 1, 0, 2])) == 3


def test_words_stand_in_columns_that_are_as_wide_as_they_may_be():
    rows = {"x": ["a", "bcd", "e", "f"], "of": ["", "b", "efg"]}
    assert list(in_columns(rows, 12)) == ["x  a bcd e", "of   b   efg", "x  f", "of"]
    assert list(in_columns({"x": ["long", "b"]}, 1)) == ["x long", "x b"]
