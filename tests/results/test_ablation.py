"""The table and the figure of an ablation, on runs that were never made: who solved, at what cost, who did not."""

import json

import pytest
from omegaconf import OmegaConf

import report
from results.ablation import ablation_table, draw_ablation, read_costs
from results.runs import RunError
from results.tables import read_summaries


def write_run(path, variant, seed, evaluations, stopped_by, optimizer="pattern_search", std=0.5):
    path.mkdir(parents=True)
    choices = {"task": "state_tracking", "model": "tiny", "optimizer": optimizer}
    choices |= {"experiment": "ablation_z5", "variant": variant}
    config = {"choices": choices, "datamodule": {}, "model": {"embedding_std": std}, "seed": seed}
    OmegaConf.save(config, path / "config.yaml")
    summary = {"evaluations": evaluations, "seconds": evaluations / 1000, "stopped_by": stopped_by}
    summary |= {"steps": 1, "test": {"test/exact_match": 1.0}}
    (path / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def sweep(tmp_path):
    for seed, evaluations in enumerate((1000, 3000, 2000)):
        write_run(tmp_path / f"f{seed}", "full", seed, evaluations, "solved")
    for seed, end in enumerate(((4000, "solved"), (9000, "max_evaluations"), (9000, "max_evaluations"))):
        write_run(tmp_path / f"c{seed}", "classic", seed, *end)
    write_run(tmp_path / "i", "classic", 3, 10, "interrupted")
    return tmp_path


def test_the_table_marks_medians_that_are_only_bounds(sweep):
    assert ablation_table(read_costs(sweep)).splitlines()[2:] == [
        "| z5 | full | 3 / 3 | 2,000 | 2.0 |",
        "| z5 | classic | 1 / 3 | > 9,000 | > 9.0 |",
    ]


def test_with_half_of_the_runs_censored_the_median_is_a_bound(tmp_path):
    write_run(tmp_path / "a", "full", 0, 1000, "solved")
    write_run(tmp_path / "b", "full", 1, 9000, "max_evaluations")
    assert ablation_table(read_costs(tmp_path)).endswith("| 1 / 2 | > 5,000 | > 5.0 |")


def test_the_figure_has_a_dot_a_seed_and_an_arrow_a_censored_run(sweep):
    panel = draw_ablation(read_costs(sweep)).axes[0]
    (dots,) = panel.collections
    assert sorted(x for x, _ in dots.get_offsets()) == [1000, 2000, 3000, 4000, 9000, 9000]
    assert len({path.vertices.tobytes() for path in dots.get_paths()}) == 2  # the marks
    assert [tick.get_text() for tick in panel.get_yticklabels()] == ["full", "classic"]
    assert panel.yaxis_inverted()  # the first at the top


def test_the_figure_lies_beside_the_runs(sweep, capsys):
    report.main(["ablation", str(sweep)])
    assert f"run(s): {sweep / 'ablation.png'}" in capsys.readouterr().out
    assert (sweep / "ablation.png").stat().st_size > 10_000


def test_kept_rows_are_compared_by_variant(sweep, capsys):
    rows = read_summaries(sweep)
    for variant, kept in rows.groupby("variant"):
        kept.to_csv(sweep / f"{variant}.csv", index=False)
    files = [sweep / "full.csv", sweep / "classic.csv"]
    of_runs = ablation_table(read_costs(sweep))
    assert ablation_table(read_costs(*files)) == of_runs
    report.main(["ablation", *map(str, files)])
    out = capsys.readouterr().out
    assert of_runs in out
    assert f"{sweep / 'ablation.png'}" in out
    with pytest.raises(RunError, match="variant only"):
        read_costs(*files, by="seed")
    rows.assign(variant="").to_csv(sweep / "none.csv", index=False)
    with pytest.raises(RunError, match="all need one"):
        read_costs(sweep / "none.csv")


def test_runs_are_compared_by_any_key_in_the_order_of_its_values(tmp_path):
    for i, (std, optimizer) in enumerate([(1.0, "adam"), (0.02, "pattern_search"), (0.25, "adam")]):
        write_run(tmp_path / str(i), None, 0, 100, "solved", optimizer, std)
    labels = list(read_costs(tmp_path, by="model.embedding_std").label)
    assert labels == ["0.02 · pattern_search", "0.25 · adam", "1.0 · adam"]
    with pytest.raises(RunError, match=r"no run has choices\.variant"):
        read_costs(tmp_path)  # none has a variant
    write_run(tmp_path / "null", None, 0, 100, "solved", "adam", None)
    assert "null · adam" in list(read_costs(tmp_path, by="model.embedding_std").label)
