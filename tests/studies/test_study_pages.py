"""Pages from records: the committed ones, and what small tables of records show."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

import zflora_jax as zf
from studies import pages
from studies.records import RECORDS, new_record, read_lines, serves, write_lines
from studies.study import BASE, Run, Study, studies
from studies.tables import MEAN, Choice, Table

RIGHT = {"base": 0, "lora": 20, "ffa": 30, "ffba": 5}  # of 40 rows, the first ones


# --- the committed records ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> dict[str, Study]:
    return {study.name: study for study in studies()}


def test_committed_pages_are_those_of_their_records(capsys):
    assert pages.main(["--check"]) == 0, capsys.readouterr().err


def test_committed_records_are_of_the_studies_as_defined(known):
    """Of every chosen and every tried run; and their bytes are those that write_lines makes."""
    for name, study in known.items():
        table = Table.read(study)
        for label in study.methods:
            runs = [*study.rate_runs(label).values()]
            if label in table.choices:
                runs += study.seed_runs(label, table.choices[label].rate).values()
            there = [run for run in runs if run.name in table.runs]
            assert all(serves(table.runs[run.name], study, run) for run in there), label
        if BASE in table.runs:
            assert serves(table.runs[BASE], study, Run(BASE, BASE, study.base, bool(study.tasks)))
        assert table.runs or name.startswith("paper_"), name


def test_records_are_the_same_bytes_when_written_again(tmp_path):
    for path in RECORDS.glob("*.gz"):
        write_lines(tmp_path / path.name, read_lines(path))
        again = tmp_path / path.name
        assert gzip.decompress(again.read_bytes()) == gzip.decompress(path.read_bytes())
        assert again.read_bytes()[4:8] == path.read_bytes()[4:8] == bytes(4)  # no time
    write_lines(again, [{"a": 1}])
    first = again.read_bytes()
    write_lines(again, [{"a": 1}])
    assert again.read_bytes() == first and read_lines(tmp_path / "none") == []


# --- small tables of records ----------------------------------------------------------------------


def small(**fields: Any) -> Study:
    """Three methods, two seeds; boolq is scored and counts nowhere."""
    given = {
        "methods": {label: zf.AdapterConfig(label) for label in ("lora", "ffa", "ffba")},
        "learning_rates": (1e-3,),
        "seeds": (0, 1),
        "tasks": ("arc_easy", "openbookqa"),
        "transfer": ("boolq",),
        "scoring": zf.EvalConfig(),
        "reference": "lora",
        "margin": 2.0,
    }
    return Study("small_two", zf.RunConfig(), **(given | fields))


def scores(study: Study, label: str, seed: int) -> dict[str, Any]:
    """Of openbookqa and boolq everyone has ten rows right."""
    found = {}
    for task in (*study.tasks, *study.transfer):
        right = RIGHT[label] + seed if task == "arc_easy" else 10
        mean, text = right / 40, ("1" * right).ljust(40, "0")
        clean = {"accuracy": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}
        found[task] = {"clean_rows": 40, "scores": {"clean": clean}, "chance": 0.25}
        found[task] |= {"row scores": {"accuracy": text}, "row digest": "same"}
    return found


def records(study: Study, losses: dict[str, tuple[float, ...]] | None = None) -> list[Any]:
    """All records of a study with one rate: test losses by seed, one shared validation loss."""
    base = {"validation_loss": 3.0, "test_loss": 4.0, "scores": scores(study, BASE, 0)}
    found = [new_record(study, Run(BASE, BASE, study.base, True), base)]
    for label in study.methods:
        for seed, run in study.seed_runs(label, study.learning_rates[0]).items():
            test = (losses or {}).get(label, (1.0,) * 9)[seed]
            result = {"validation_loss": 1.0, "test_loss": test, "seconds": 9.0 - seed}
            result |= {
                "params_trainable": 7,
                "commit": "c0ffee",
                "scores": scores(study, label, seed),
            }
            found.append(new_record(study, run, result))
    return found


def cells(page: str, first: str) -> list[str]:
    """The cells of the first row that begins so."""
    row = next(line for line in page.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_differences_are_of_informative_tasks_and_shared_seeds():
    study = small(more_seeds={"lora": (2,), "ffba": (2, 3)}, contrasts=(("ffba", "ffa"),))
    table = Table(study, records(study))
    gaps = table.differences
    assert gaps["ffa"].keys() == {"arc_easy"}  # openbookqa tells nothing
    assert gaps[BASE].keys() == {"arc_easy", "openbookqa", MEAN}
    assert gaps[BASE]["arc_easy"].mean == gaps[BASE][MEAN].mean == -52.5
    assert gaps["ffa"]["arc_easy"].mean == 25.0
    seeds = {label: of["arc_easy"].seeds for label, of in gaps.items()}
    assert seeds == {BASE: 3, "ffa": 2, "ffba": 3}
    assert table.contrasts["ffba - ffa"]["arc_easy"].mean == -62.5
    page = pages.study_page("small", [table])
    assert cells(page, "ffa")[1].startswith("+25.0 [") and cells(page, "ffa")[6] == "as good"
    assert cells(page, "ffba")[6] == "inferior"
    assert "lora does not clearly beat the untrained model on openbookqa" in page
    head = next(line for line in page.splitlines() if "| trainable | arc_easy" in line)
    assert "| openbookqa (40) | mean | boolq (40) |" in head
    assert table.headline("lora") == (pytest.approx((52.5 + 25) / 2), pytest.approx(1.25))
    assert "Chance: arc_easy 25.0" in page and "Runs made at commit c0ffee (9)." in page


def test_losses_are_compared_over_seeds_and_shown():
    study = small(tasks=("arc_easy",), transfer=())
    table = Table(study, records(study, {"lora": (1.0, 1.2), "ffa": (1.1, 1.4)}))
    gap = table.loss_difference("ffa")
    reach = 12.706 * 0.05  # t of one degree of freedom times the standard error of 0.1 and 0.2
    assert (gap.mean, gap.high - gap.mean) == pytest.approx((0.15, reach), rel=1e-4)
    assert table.loss_difference("lora") is table.loss_difference(BASE) is None
    page = pages.study_page("small", [table])
    assert f"| as good | {gap.losses()} |" in page and "Untrained: validation 3.0000" in page
    [row] = [line for line in page.splitlines() if "| ffa | 7 | **1.0000 (0.001)**" in line]
    assert row.endswith("| 1.1000 | 1.4000 | 1.2500 | 0.2121 | 8 |")


def test_a_method_without_all_its_runs_waits():
    """It is named; a diverged seed, too, which leaves the method without a difference."""
    study = small(tasks=("arc_easy",), transfer=())
    found = records(study)
    for record in found:
        if record["run"] == "ffba-lr0.001-seed1":
            record["result"] = {"failed": "the loss is nan"}
    page = pages.study_page("small", [Table(study, found[:4] + found[5:])])
    assert "Not all runs are there: ffa." in page
    assert "Failed: ffba-lr0.001-seed1: the loss is nan." in page
    assert page.count("| ffba |") == 2 and "| ffa |" not in page  # losses and scores
    assert not Table(study, found[:1]).labels and Table(study, found[:1]).differences == {}


def test_a_study_of_losses_alone_compares_them_with_its_reference():
    study = small(tasks=(), transfer=(), scoring=None, margin=None, contrasts=())
    found = records(study, {"lora": (1.0, 1.2), "ffa": (1.1, 1.4), "ffba": (1.0, 1.2)})
    page = pages.study_page("small", [Table(study, found)])
    assert "| minus lora |" in page and "| +0.15 [-0.485, +0.785] |" in page


def test_records_of_other_rows_are_refused():
    study = small(tasks=("arc_easy",), transfer=())
    found = records(study)
    found[1]["result"]["scores"]["arc_easy"]["row digest"] = "other"
    with pytest.raises(zf.ConfigError, match="the records of arc_easy are of different rows"):
        _ = Table(study, found).differences


def test_a_rate_is_the_best_that_did_not_diverge():
    study = small(learning_rates=(1e-3, 1e-2, 1e-1))
    results = [{"validation_loss": 2.0}, {"validation_loss": 1.0}, {"failed": "the loss is nan"}]
    runs = study.rate_runs("lora").values()
    made = [new_record(study, run, r) for run, r in zip(runs, results, strict=True)]
    assert Table(study, made).choices == {"lora": Choice(1e-2, {1e-3: 2.0, 1e-2: 1.0, 1e-1: None})}
    made[1]["result"] = {"validation_loss": float("nan")}
    assert Table(study, made).choices["lora"].rate == 1e-3
    assert Table(study, made[2:]).choices == {}


@pytest.mark.parametrize(
    ("rate", "rates", "said"),
    [
        (1e-2, (1e-3, 1e-2, 1e-1), ""),
        (1e-2, (1e-2, 1e-1), "the lowest one tried, so a lower one may be better"),
        (1e-2, (1e-3, 1e-2), "the highest one tried, so a higher one may be better"),
        (1e-2, (1e-2,), "the only one tried, so it is not tuned"),
    ],
)
def test_a_rate_at_the_edge_is_said(rate, rates, said):
    assert Choice(rate, dict.fromkeys(rates, 1.0)).untuned == said


def test_the_overview_pools_losses_and_judges_scores_by_seeds_alone(tmp_path, monkeypatch):
    """A table without all runs of the method is left out."""
    monkeypatch.setattr(pages, "COMPARED", "ffa")
    study = small(tasks=("arc_easy",), transfer=())
    made = [records(study, {"lora": (1.0, 1.2), "ffa": (a, 1.4)}) for a in (1.1, 0.8)]
    tables = [Table(study, of) for of in (*made, made[0][:3])]
    page = pages.overview(tables, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    # Means of (0.1, 0.2) and (-0.2, 0.2) of 1.1.
    counts = "higher in 1 of 2 tables (p = 1) and 3 of 4 seeds (p = 0.62)"
    assert f"- test: +6.8%, {counts}" in page and "- validation: +0.0%" in page
    row = cells(page, "[two](small_two.md)")
    assert row[2:4] == ["51.2 ± 1.8", "76.2 ± 1.8"] and row[4].startswith("+25.0 [")
    # Both seeds differ by 25 points, so they alone say nothing of how seeds vary.
    assert row[5:7] == ["± inf, undecided", "+0.0 [+0.0, +0.0]%"] and page.count("[two]") == 2
    assert pages.overview(tables[2:], None) == ""


def test_a_page_that_differs_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pages, "studies", lambda: [])
    assert pages.main(["--out", str(tmp_path)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == [f"{pages.SIMULATED}.md"]
    assert pages.main(["--check", "--out", str(tmp_path)]) == 0
    (tmp_path / "paired_intervals.md").write_text("another")
    assert pages.main(["--check", "--out", str(tmp_path)]) == 1
    assert "pages differ from their records: paired_intervals" in capsys.readouterr().err


def test_a_record_serves_a_run_with_its_settings_alone():
    study = small()
    [run] = small(seeds=(0,)).seed_runs("lora", 1e-3).values()
    record = new_record(study, run, {"scores": {}})
    assert serves(json.loads(json.dumps(record)), study, run)
    moved = run._replace(settings=zf.override(run.settings, {"data.data_dir": "x", "mesh.fsdp": 2}))
    assert serves(record, study, moved)
    other = run._replace(settings=zf.override(run.settings, {"optim.weight_decay": 0.5}))
    with pytest.raises(
        zf.ConfigError, match=r"made with optim.weight_decay=0.0, .* has 0.5\. Give"
    ):
        serves(record, study, other)
    without = new_record(study, run._replace(scored=False), {})
    assert not serves(without, study, run) and serves(record, study, run._replace(scored=False))
    assert serves(without | {"result": {"failed": "nan"}}, study, run)
