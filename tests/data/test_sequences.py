"""What holds for the data of every task, checked on each family and on the shared code."""

import itertools
import math

import numpy as np
import pytest
import torch

from config.did_you_mean import one_of
from data.sequences import (
    IGNORE,
    SequenceDataModule,
    SequenceLoader,
    Sequences,
    hash_rows,
    lay_out,
    split_by_hash,
    split_strings,
)
from membership_data import MembershipDataModule
from membership_task import MembershipScores
from pattern_search_task import Scores, masked_loss
from scan_data import ScanDataModule
from scan_task import ScanScores
from state_tracking_data import StateTrackingDataModule
from state_tracking_task import StateTrackingScores
from text_data import TextDataModule
from text_task import TextScores
from transformer import DecoderOnlyTransformer

FAMILIES = {
    "parity": lambda: StateTrackingDataModule(),
    "S3": lambda: StateTrackingDataModule(group="S3", n_samples=1000),
    "S3_tag": lambda: StateTrackingDataModule(group="S3", n_samples=1000, format="tag"),
    "sets": lambda: MembershipDataModule(),
    "tomita4": lambda: MembershipDataModule(language="tomita4"),
    "aa": lambda: MembershipDataModule(language="aa"),
    "scan": lambda: ScanDataModule(),
    "scan_s": lambda: ScanDataModule(split="scan_s", batch_size=32),
    "text": lambda: TextDataModule(length=32),
}
built: dict[str, SequenceDataModule] = {}


@pytest.fixture(params=FAMILIES)
def datamodule(request):
    if request.param not in built:
        built[request.param] = FAMILIES[request.param]()
    return built[request.param]


def tiny_model(datamodule, seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=datamodule.vocab_size, n_classes=datamodule.n_classes, max_len=datamodule.max_len)
    return DecoderOnlyTransformer(**sizes, d_model=8, n_layers=1, n_heads=2, **options).eval()


def some_rows(sequences, n=64):
    """Rows spread over the split, so that all lengths are among them."""
    at = torch.linspace(0, len(sequences) - 1, min(n, len(sequences))).long()
    return sequences.x[at], sequences.y[at]


def prompts(sequences):
    """What the input gives, without the outputs that follow: one tuple a row."""
    first = sequences.scored.int().argmax(1).tolist()
    if not any(first):  # the tag format: inputs only
        return list(map(tuple, sequences.x.tolist()))
    return [tuple(row[: t + 1]) for row, t in zip(sequences.x.tolist(), first, strict=True)]


# --- every family ---


def test_the_vocabulary_is_contiguous_and_the_targets_are_classes(datamodule):
    seen = torch.cat([split.x.flatten() for split in datamodule.splits.values()]).unique()
    assert seen.tolist() == list(range(datamodule.vocab_size))
    targets = torch.cat([split.y[split.scored] for split in datamodule.splits.values()]).unique()
    assert targets.tolist() == list(range(datamodule.n_classes))
    assert datamodule.chance_loss == pytest.approx(math.log(len(targets)))


def test_no_parameter_row_is_dead(datamodule):
    """The training data reach every token and every position (fault: 102 tokens and 128 positions for 3 and 16)."""
    model = tiny_model(datamodule)
    x, y = datamodule.splits["train"].x, datamodule.splits["train"].y
    tables = (model.token_embedding.weight, model.position_embedding.weight, model.head.weight)
    for part in torch.arange(len(x)).split(500):
        masked_loss(model(x[part]), y[part]).backward()
        if all((table.grad.abs().sum(1) > 0).all() for table in tables):
            break
    else:
        pytest.fail("a row of an embedding or of the head never got a gradient")
    assert datamodule.max_len == datamodule.max_train_len == x.shape[1]


def test_splits_share_no_input(datamodule):
    """Fault: 54 % of the validation strings were in training."""
    sides = {name: set(prompts(split)) for name, split in datamodule.splits.items()}
    for a, b in itertools.combinations(sides, 2):
        assert not sides[a] & sides[b], (a, b)


def test_the_seed_makes_the_splits(datamodule):
    kind = type(datamodule)
    options = dict(split="scan_s", batch_size=8) if kind is ScanDataModule else {}
    first, again, other = (kind(**options, seed=seed).splits for seed in (3, 3, 4))
    assert all(torch.equal(first[name].x, again[name].x) for name in first)
    assert not torch.equal(first["train"].x, other["train"].x)


def test_causality(datamodule):
    """Changing anything right of a position changes no logits at or before it."""
    model, (x, _) = tiny_model(datamodule), some_rows(datamodule.splits["train"], 16)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = model(x)
        for t in range(0, x.shape[1] - 1, 3):
            changed = x.clone()
            changed[:, t + 1 :] = torch.randint(datamodule.vocab_size, changed[:, t + 1 :].shape, generator=rng)
            assert torch.equal(model(changed)[:, : t + 1], before[:, : t + 1])
            if not torch.equal(changed, x) and t == 0:
                assert not torch.equal(model(changed), before)


def test_filler_changes_nothing(datamodule):
    """Right of the last scored position stands filler: no other filler changes loss or metrics."""
    model, (x, y) = tiny_model(datamodule), some_rows(datamodule.splits["train"])
    position = torch.arange(x.shape[1])
    last = torch.where(y != IGNORE, position, -1).amax(1, keepdim=True)
    other = torch.where(position > last, (x + 1) % datamodule.vocab_size, x)
    wide_x, wide_y = torch.nn.functional.pad(x, (0, 3), value=1), torch.nn.functional.pad(y, (0, 3), value=IGNORE)
    wide_model = tiny_model(datamodule, positions="none")
    with torch.no_grad():
        torch.testing.assert_close(masked_loss(model(other), y), masked_loss(model(x), y), rtol=0, atol=0)
        wide_model.max_len += 3
        torch.testing.assert_close(masked_loss(wide_model(wide_x), wide_y), masked_loss(wide_model(x), y))


def test_no_label_leak(datamodule):
    """The input at a scored position is its target no more often than chance (fault: always, by a shift of one)."""
    x, y = datamodule.splits["train"].x, datamodule.splits["train"].y
    names = np.array([*datamodule.tokens]), np.array([*datamodule.classes])
    if len(datamodule.tokens) == datamodule.n_classes:  # the tag format, where the first state is the first element
        x, y = x[:, 1:], y[:, 1:]
    scored = y != IGNORE
    equal = (names[0][x[scored]] == names[1][y[scored]]).mean()
    majority = torch.bincount(y[scored]).max().item() / int(scored.sum())
    assert equal < max(majority, 1 / datamodule.n_classes) + 0.05


def test_the_last_position_is_scored(datamodule):
    """Fault: the last state was never scored. The longest row ends with a scored position."""
    assert (datamodule.splits["train"].y[:, -1] != IGNORE).any()


SCORES = {
    "Scores": Scores,
    "states": StateTrackingScores,
    "membership": MembershipScores,
    "scan": ScanScores,
    "text": TextScores,
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_metrics_do_not_depend_on_the_batch_size(scores):
    """Batches of 1, of 7 (with a rest) and the whole set agree: sums over the set, not means of means."""
    source = {StateTrackingScores: "S3", ScanScores: "scan_s", TextScores: "text"}.get(scores, "tomita4")
    datamodule = built.setdefault(source, FAMILIES[source]())
    x, y = some_rows(datamodule.splits["train"], 60)
    model, results = tiny_model(datamodule), []
    for batch_size in (1, 7, 60):
        metric = scores()
        with torch.no_grad():
            for rows in torch.arange(60).split(batch_size):
                metric.update(model(x[rows]), y[rows])
        results.append(metric.compute())
    assert 0 < results[0]["token_accuracy"] < 1
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, value in other.items():
            torch.testing.assert_close(value, results[0][name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# --- layout ---


def test_lay_out():
    """full = prompt + output, x = full[:-1], y = full[1:], scored from the last token of the prompt on."""
    sequences = lay_out([[5, 6, 9], [7, 9]], [[1, 0], [0, 1, 2]], output_tokens=[10, 11])
    assert sequences.x.tolist() == [[5, 6, 9, 11], [7, 9, 10, 11]]
    assert sequences.y.tolist() == [[IGNORE, IGNORE, 1, 0], [IGNORE, 0, 1, 2]]
    assert sequences.scored.sum(1).tolist() == [2, 3]


def test_lay_out_pads_with_an_existing_token():
    sequences = lay_out([[3], [1, 2, 3]], [[0], [1]], output_tokens=())
    assert sequences.x.tolist() == [[3, 0, 0], [1, 2, 3]]
    assert sequences.y.tolist() == [[0, IGNORE, IGNORE], [IGNORE, IGNORE, 1]]


# --- splits ---


def test_split_strings_cuts_small_spaces_without_repetition():
    splits = split_strings(2, 8, {"train": 200, "val": -1, "test": -1}, seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 200, "val": 28, "test": 28}
    assert len({tuple(row) for rows in splits.values() for row in rows.tolist()}) == 256


def test_split_strings_splits_large_spaces_by_hash():
    splits = split_strings(60, 8, {"train": 500, "val": -1, "test": -1}, seed=0)
    assert [len(rows) for rows in splits.values()] == [500, 1000, 1000]
    assert not set(map(tuple, splits["train"].tolist())) & set(map(tuple, splits["test"].tolist()))


def test_split_strings_names_the_size_of_the_space():
    with pytest.raises(ValueError, match=r"n_samples=255 is too large: there are only 256 strings .* n_samples=192"):
        split_strings(2, 8, {"train": 255, "val": -1, "test": -1}, seed=0)


def test_split_by_hash_keeps_a_row_in_one_split_however_often_it_is_drawn():
    splits = split_by_hash(lambda rng, n: rng.integers(50, size=(n, 1)), {"train": 900, "test": 300}, seed=1)
    assert [len(rows) for rows in splits.values()] == [900, 300]
    assert not set(splits["train"].flatten()) & set(splits["test"].flatten())


def test_split_by_hash_says_what_stays_short():
    with pytest.raises(ValueError, match=r"could not fill the splits \((train|test) has 0 of 5\)"):
        split_by_hash(lambda rng, n: np.zeros((n, 3), dtype=np.int64), {"train": 5, "test": 5}, seed=0)


def test_hash_rows_is_the_same_everywhere_and_depends_on_every_cell():
    rows = np.array([[1, 2, 3], [1, 2, 4], [2, 1, 3], [1, 2, 3]])
    hashes = hash_rows(rows, seed=0)
    assert hashes[0] == hashes[3]
    assert len(set(hashes.tolist())) == 3
    assert not set(hashes.tolist()) & set(hash_rows(rows, seed=1).tolist())
    assert hashes[0] == 5246500226706903259  # measured once: splits must not move between machines or releases


def test_one_of_names_the_nearest_and_all_that_is_known():
    one_of("key", "b", ("a", "b"))
    message = r"^key=tomita33 is not known; did you mean tomita3\? Known: dyck1, aa, tomita3$"
    with pytest.raises(ValueError, match=message):
        one_of("key", "tomita33", ("dyck1", "aa", "tomita3"))


# --- loader and data module ---


def sequences_of(n):
    return Sequences(torch.arange(n)[:, None], torch.zeros(n, 1, dtype=torch.long))


def rows_of(batches):
    return [batch["x"].flatten().tolist() for batch in batches]


def test_loader_covers_an_epoch_and_shuffles_anew():
    loader = SequenceLoader(sequences_of(10), batch_size=3, shuffle_seed=5)
    first, second = rows_of(loader), rows_of(loader)
    assert len(loader) == 3
    assert [len(rows) for rows in first] == [3, 3, 3]  # the incomplete batch is left out
    assert len(set(itertools.chain(*first))) == 9
    assert first != second
    assert rows_of(SequenceLoader(sequences_of(10), 3, shuffle_seed=5)) == first


def test_loader_without_shuffling_keeps_order_and_every_row():
    assert rows_of(SequenceLoader(sequences_of(5), batch_size=2)) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 4, 7])
def test_loader_resumes_within_an_epoch(stop):
    def stream(loader):
        while True:
            yield from rows_of_lazily(loader)

    def rows_of_lazily(loader):
        for batch in loader:
            yield batch["x"].flatten().tolist()

    whole = SequenceLoader(sequences_of(10), 3, shuffle_seed=5)
    batches = stream(whole)
    _ = list(itertools.islice(batches, stop))
    state = whole.state_dict()
    resumed = SequenceLoader(sequences_of(10), 3, shuffle_seed=5)
    if stop:
        resumed.load_state_dict(state)
    assert list(itertools.islice(stream(resumed), 6)) == list(itertools.islice(batches, 6))


class TwoRows(SequenceDataModule):
    tokens, classes = ("a",), ("no", "yes")

    def make_splits(self):
        return {"train": sequences_of(2), "val": sequences_of(1), "test": sequences_of(1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0, n_samples=2, seed=0), r"datamodule.batch_size=0 must be at least 1"),
        (dict(batch_size=1, n_samples=0, seed=0), r"datamodule.n_samples=0 must be at least 1"),
        (dict(batch_size=3, n_samples=2, seed=0), r"batch_size=3 is larger than the training set of 2; try .*=2"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TwoRows(**options).setup()


def test_test_sets_keep_their_names_and_order():
    datamodule = StateTrackingDataModule(length=4, n_samples=8, batch_size=4, test_lengths=[6, 8])
    assert datamodule.test_names == ["test", "test/length_6", "test/length_8"]
    assert len(datamodule.test_dataloader()) == 3
    assert (datamodule.max_train_len, datamodule.max_len) == (8, 16)
