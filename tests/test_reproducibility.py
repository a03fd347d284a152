"""The same command gives the same numbers, bit for bit, whatever surrounds it; and what a run must not touch."""

import re
import shlex
import shutil
import subprocess

import pandas as pd
import pytest

from commands import run, run_alone
from conftest import ROOT

KEY = "".join(f"{(7 * i) % 16:x}" for i in range(40))  # of the form of a W&B key
SHORT = ["model=tiny", "trainer.max_steps=15", "trainer.check_val_every_n_epoch=1"]


def train(home, *options, start=run, cwd=ROOT, **environment):
    """Run train.py with its runs below `home`; returns the finished process."""
    command = shlex.join(["python", str(ROOT / "src" / "train.py"), *SHORT, *options])
    return start(command, home, cwd, **environment)


def metrics(home, done):
    """The table of the one run below `home`, without what is measured by the clock."""
    assert done.returncode == 0, done.stderr
    (file,) = home.rglob("metrics.csv")
    table = pd.read_csv(file, dtype=str)  # as text: the same to the last digit
    return table[~table.metric.str.endswith("per_second")].drop(columns="seconds").reset_index(drop=True)


@pytest.fixture(scope="module", params=["pattern_search", "adam"])
def reference(request, tmp_path_factory):
    """An optimizer, and the table of its run in the usual surroundings."""
    home = tmp_path_factory.mktemp("reference")
    return request.param, metrics(home, train(home, f"optimizer={request.param}", "logger=none"))


@pytest.mark.slow
def test_surroundings_do_not_change_a_single_digit(reference, tmp_path):
    optimizer, expected = reference
    assert len(expected) > 40
    place = tmp_path / "a place with späces ünd ∂"
    place.mkdir()
    (tmp_path / "no_home").write_text("a file, so nothing can be written below it")
    locales = subprocess.run(["locale", "-a"], capture_output=True, text=True).stdout if shutil.which("locale") else ""
    locale = next((name for name in locales.split() if name.lower().startswith("tr_tr")), "C")
    done = train(
        place,
        f"optimizer={optimizer}",
        "logger=none",
        start=run_alone,  # Python reads some of these at its own start
        cwd=place,
        LC_ALL=locale,
        TZ="Pacific/Kiritimati",
        PYTHONHASHSEED="12345",
        HOME=str(tmp_path / "no_home"),
    )
    pd.testing.assert_frame_equal(metrics(place, done), expected)


@pytest.mark.slow
def test_another_seed_changes_the_numbers(reference, tmp_path):
    optimizer, expected = reference
    other = metrics(tmp_path, train(tmp_path, f"optimizer={optimizer}", "logger=none", "seed=1"))
    assert not other.equals(expected)


@pytest.mark.slow
def test_a_key_is_written_nowhere_and_the_network_is_left_alone(tmp_path):
    """Offline is the default, so it must work without a network: all addresses lead to a closed port here."""
    closed = "http://127.0.0.1:9"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), closed)
    (tmp_path / "home").mkdir()
    done = train(
        tmp_path / "runs_go_here",
        "optimizer=adam",
        start=run_alone,  # W&B looks at its environment when it is imported
        WANDB_API_KEY=KEY,
        WANDB_BASE_URL=closed,
        HOME=str(tmp_path / "home"),
        **proxies,
    )
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    assert "anonymous" not in done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.suffix == ".ckpt" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_online_without_a_network_is_refused_at_once_with_what_to_do(tmp_path):
    done = train(tmp_path, "logger.offline=False", WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 2, done.stderr
    assert "W&B cannot be reached at http://127.0.0.1:9" in done.stderr
    assert "logger.offline=true and upload later" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_lock_holds_what_the_requirements_ask_for():
    lock = (ROOT / "requirements.lock").read_text()
    pinned = dict(line.split("==") for line in lock.splitlines() if "==" in line)
    asked = re.findall(r"^([A-Za-z0-9-]+)[=<>]", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    assert len(asked) > 15
    assert [name for name in asked if name not in pinned] == []
    assert pinned["torch"] == "2.13.0"
