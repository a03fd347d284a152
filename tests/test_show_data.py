"""The command that shows data to a person."""

import pytest

from show_data import align, main
from state_tracking_data import StateTrackingDataModule


def test_tokens_stand_above_targets():
    datamodule = StateTrackingDataModule(length=2, n_samples=1, batch_size=1)
    above, below = align(datamodule, "train", 0, width=80)
    (a, b), state = datamodule.splits["train"].x[0, :2].tolist(), datamodule.splits["train"].y[0, 2:].tolist()
    assert above == f"x  {a} {b} SEP {state[0]}"
    assert below == f"y      {state[0]}   {state[1]}"


def test_long_examples_are_wrapped():
    datamodule = StateTrackingDataModule(length=12, n_samples=50)
    lines = list(align(datamodule, "train", 0, width=20))
    assert len(lines) == 6
    assert max(map(len, lines)) <= 20


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        ([], ["train", "val", "test", "200", "loss 0.6931 nats, accuracy 0.5000"]),
        (["task=membership", "datamodule.language=dyck1"], ["( )", "no yes", "4,000", "accuracy 0.5000"]),
        (["task=scan", "datamodule.split=length"], ["EOS", "3,920", "loss 1.9459 nats, accuracy 0.1429"]),
    ],
)
def test_shows_examples_sizes_and_chance(overrides, shown, capsys):
    main(overrides)
    output = capsys.readouterr().out
    for text in shown:
        assert text in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=scan", "datamodule.split=lenght"], "datamodule.split=lenght is not known; did you mean length"),
        (["task=membership", "datamodule.language=tomita9"], "datamodule.language=tomita9 is not known"),
        (["datamodule.lenght=3"], "datamodule.lenght is not known; did you mean datamodule.length"),
        (["datamodule.length=long"], "datamodule.length=long"),
        (["task=scam"], "task=scam is not known; did you mean scan?"),
    ],
)
def test_unknown_values_are_one_message_and_exit_code_2(overrides, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(overrides)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err
