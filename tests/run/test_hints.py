"""Each hint appears where its sign is there, and not next to it; what gets on gets none."""

import pytest
import torch

from run.hints import PATIENCE, WINDOW, Recent, hints

FALLING = [0.6 - 0.4 * i / WINDOW for i in range(WINDOW)]


def recent_of(**settings):
    """Filled as the progress display fills it."""
    recent = Recent(chance_loss=0.693, evaluations=settings.pop("evaluations", 0))
    for name, values in settings.items():
        getattr(recent, name).extend(values)
    return recent


def names(**recent):
    settings = dict(train_losses=FALLING, accepted=[True] * WINDOW, val_losses=[0.6, 0.5])
    return [name for name, _ in hints(recent_of(**settings | recent))]


def share(of):
    return [i < of * WINDOW for i in range(WINDOW)]


@pytest.mark.parametrize(
    ("recent", "expected"),
    [
        ({}, []),
        ({"search_accepted": share(0.5)}, []),
        ({"search_accepted": share(0.1)}, ["search step"]),
        ({"search_accepted": share(0.1), "train_losses": [0.01] * WINDOW}, []),  # almost solved
        ({"search_accepted": share(0.1)[:50], "train_losses": FALLING[:50]}, []),  # too early to tell
        ({"accepted": share(0.02)}, ["poll"]),
        ({"accepted": share(0.1)}, []),
        ({"train_losses": [0.69] * WINDOW, "evaluations": PATIENCE}, ["chance"]),
        ({"train_losses": [0.69] * WINDOW, "evaluations": PATIENCE - 1}, []),
        ({"train_losses": FALLING, "evaluations": PATIENCE}, []),
        ({"train_losses": [0.1] * WINDOW, "val_losses": [0.7, 0.5, 0.7, 0.7, 0.7]}, ["overfitting"]),
        ({"train_losses": [0.1] * WINDOW, "val_losses": [0.7, 0.5, 0.7, 0.5, 0.7]}, []),  # not for long
        ({"train_losses": [0.4] * WINDOW, "val_losses": [0.7, 0.5, 0.7, 0.7, 0.7]}, []),  # training is as bad
    ],
)
def test_each_rule_applies_to_its_sign_only(recent, expected):
    assert names(**recent) == expected


def test_a_hint_names_what_to_change():
    (text,) = (text for _, text in hints(recent_of(train_losses=FALLING, search_accepted=share(0.1))))
    assert "10%" in text
    assert "optimizer.step_lengths" in text


def test_what_is_recent_survives_a_checkpoint(tmp_path):
    recent = recent_of(train_losses=FALLING, search_accepted=share(0.1), val_losses=[0.6, 0.5], evaluations=9)
    torch.save(recent.state_dict(), tmp_path / "state")
    restored = Recent(chance_loss=0.5)
    restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert restored == recent
    for each in (recent, restored):
        each.train_losses.append(0.1)
    assert restored == recent
    assert len(restored.train_losses) == WINDOW
