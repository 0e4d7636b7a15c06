"""Records of sweeps: which run a record is of, by any age of its names; what is read of it."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.paths import ROOT

from zflora_jax.cli.inputs import load_config
from zflora_jax.cli.main import main
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.fields import override, to_dict
from zflora_jax.core.presets import preset
from zflora_jax.core.run_config import EvalConfig, RunConfig
from zflora_jax.experiments import compare, jobs
from zflora_jax.experiments.compare import compare_methods
from zflora_jax.experiments.overview import overview
from zflora_jax.experiments.run_report import finished_report, write_report
from zflora_jax.experiments.store import (
    EXTRA,
    Job,
    Scoring,
    model_digest,
    own_files,
    read_result,
    write_record,
)

RESULTS = ROOT / "results"
RUN = RunConfig(
    adapter=AdapterConfig("zflora-uniform", rank=4, extra_head_dim=4, extra_mlp_units=8)
)


def job(path: Path, run: RunConfig = RUN, scoring: Scoring | None = None) -> Job:
    return Job("a", run, path.parent / "a", path, scoring)


# --- records --------------------------------------------------------------------------------------


def test_a_record_serves_its_run_and_no_other(tmp_path):
    path = tmp_path / "r" / "a.json"
    assert read_result(job(path)) is None
    write_record(job(path), {"validation_loss": 1.5})
    assert read_result(job(path)) == {"validation_loss": 1.5}
    assert read_result(job(path, override(RUN, {"optim.learning_rate": 2e-3}))) is None
    scoring = Scoring(("arc_easy",), EvalConfig(limit=3))
    assert read_result(job(path, scoring=scoring)) is None
    write_record(job(path, scoring=scoring), {"scores": {}})
    # Scores that nobody asks for do no harm.
    assert read_result(job(path, scoring=scoring)) == read_result(job(path)) == {"scores": {}}
    for other in (Scoring(("boolq",), scoring.settings), Scoring(("arc_easy",), EvalConfig())):
        assert read_result(job(path, scoring=other)) is None


@pytest.fixture
def own(tmp_path):
    """A run on own rows, whose folder is tmp_path / "own"."""
    folder, row = tmp_path / "own", '{"prompt": "a", "completion": "b"}\n'
    folder.mkdir()
    for name, rows in (("train", 3), ("validation", 1), ("test", 1)):
        (folder / f"{name}.jsonl").write_text(row * rows)
    return override(RUN, {"data.task": "rows", "data.data_dir": str(folder)})


OWN = Scoring(("rows",), EvalConfig())


@pytest.mark.parametrize("scored", [False, True])
def test_a_record_serves_the_rows_that_own_files_had(own, scored, tmp_path):
    folder, path = tmp_path / "own", tmp_path / "a.json"
    made = job(path, override(own, {"data.task": "arithmetic"}), OWN) if scored else job(path, own)
    write_record(made, {"validation_loss": 1.5}, own_files(made))
    assert read_result(made)
    for name in ("train", "test"):
        before = (folder / f"{name}.jsonl").read_text()
        (folder / f"{name}.jsonl").write_text(before.replace("b", "other"))
        assert read_result(made) is None
        (folder / "notes.csv").write_text("x")  # of no split, so no files are found
        assert read_result(made) is None
        (folder / "notes.csv").unlink()
        (folder / f"{name}.jsonl").write_text(before)
        assert read_result(made)  # the same bytes, written later
    for place in (str(tmp_path / "elsewhere"), "hub:a/b", None):
        other = override(made.run, {"data.data_dir": place})
        assert read_result(dataclasses.replace(made, run=other)) is None
    folder.rename(tmp_path / "gone")
    assert read_result(made)
    (tmp_path / "gone").rename(folder)
    write_record(made, {"validation_loss": 1.5})
    assert read_result(made)  # a record from before such hashes


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_record_serves_the_base_that_it_was_made_with(kind, tmp_path):
    base = tmp_path / ("base" if kind == "directory" else "base.gguf")
    weights = base / "model.safetensors" if kind == "directory" else base
    weights.parent.mkdir(exist_ok=True)
    weights.write_bytes(b"weights")
    made = job(tmp_path / "a.json", override(RunConfig(), {"model": str(base)}))
    write_record(made, {"validation_loss": 1.5}, own_files(made))
    assert read_result(made)
    (weights.parent / "README.md").write_text("notes")
    assert read_result(made)
    weights.write_bytes(b"others!")
    assert read_result(made) is None
    weights.unlink()
    assert bool(read_result(made)) == (kind == "file")  # a directory is there still
    assert own_files(job(tmp_path / "b.json")) == {}  # a preset's files do not change


def test_a_base_in_memory_is_of_its_files_before_they_changed(tmp_path, monkeypatch):
    """A sweep loads it once: its later runs are not of what the files have become."""
    base = tmp_path / "base.gguf"
    base.write_bytes(b"weights")
    loaded = {str(base): model_digest(str(base))}
    made = job(tmp_path / "a.json", override(RUN, {"model": str(base)}))
    made.workdir.mkdir()
    trained = jobs.Trained(None, {}, {}, made.run)
    monkeypatch.setattr(jobs, "train", lambda *_, **__: trained)
    monkeypatch.setattr(jobs, "_measured", lambda *_: {"validation_loss": 1.0})
    base.write_bytes(b"others!")
    assert list(jobs.run_jobs([made], lambda *_: "in memory", loaded=loaded))
    assert made.record.is_file() and read_result(made) is None
    base.write_bytes(b"weights")
    assert read_result(made)


def test_rows_that_change_in_place_are_measured_anew(own, tmp_path, monkeypatch):
    """Validation rows after the run; and rows that change while it trains."""
    file, loss = tmp_path / "own" / "validation.jsonl", iter((1.0, 2.0, 3.0))
    identity = {"base_fingerprint": "x", "data_fingerprint": "y"}
    made, during = job(tmp_path / "a.json", override(own, {"eval.split": "validation"})), []

    def finished(run, workdir, **_):
        workdir.mkdir(exist_ok=True)
        rows = SimpleNamespace(fingerprint=file.read_text)
        setup = SimpleNamespace(run=run, fingerprints=identity, eval_set=rows)
        if not (workdir / "report.json").exists():
            origin = dict.fromkeys(jobs.ORIGIN, "") | {"dirty": False}
            stored = {"steps": run.train.steps, "config": to_dict(run), "environment": origin}
            write_report(workdir, stored | identity)
        report = finished_report(setup, workdir, 1.0, {}, lambda: {"loss": next(loss), "rows": 1})
        for text in during:
            file.write_text(text)
        return jobs.Trained(None, {}, report, run)

    monkeypatch.setattr(jobs, "train", finished)

    def run():
        [(_, result)] = jobs.run_jobs([made], lambda *_: None, console=False)
        return result["validation_loss"]

    assert (run(), run()) == (1.0, 1.0)
    file.write_text(file.read_text() * 2)
    assert read_result(made) is None
    assert (run(), run()) == (2.0, 2.0)
    made.record.unlink()
    during.append(file.read_text() * 2)
    assert run() == 2.0 and read_result(made) is None

    during.clear()
    report = made.workdir / "report.json"  # as an earlier version wrote it
    stored = json.loads(report.read_text())
    report.write_text(json.dumps({k: v for k, v in stored.items() if k != "eval_fingerprint"}))
    assert run() == 2.0


def test_a_record_without_the_numbers_that_are_asked_for_is_not_enough(tmp_path):
    path = tmp_path / "a.json"
    write_record(job(path), {"validation_loss": 1.5})
    asked = dataclasses.replace(job(path), extra=lambda run, trained: {"mine": 1})
    assert read_result(job(path)) and read_result(asked) is None
    write_record(job(path), {"validation_loss": 1.5, EXTRA: {"mine": 1}})
    assert read_result(asked) == {"validation_loss": 1.5, EXTRA: {"mine": 1}}


def test_a_failed_row_of_earlier_versions_is_a_failed_result(tmp_path):
    path = tmp_path / "row.json"
    row = {"status": "failed: the loss is nan"}
    path.write_text(json.dumps({"config": to_dict(RUN), "row": row}))
    assert read_result(job(path)) == {"failed": "the loss is nan"}
    more = override(RUN, {"train.matmul_precision": "highest"})  # may be the remedy
    assert read_result(job(path, more)) is None


def test_a_record_with_a_setting_that_is_gone_is_of_another_run(tmp_path):
    path = tmp_path / "row.json"
    path.write_text(json.dumps({"config": to_dict(RUN) | {"gone": 1}, "result": {}}))
    assert read_result(job(path)) is None


# --- the committed ones ---------------------------------------------------------------------------


@pytest.fixture
def nothing_runs(monkeypatch):
    """Nothing is trained, scored or loaded; the base's losses are the committed ones."""

    def use(name: str) -> dict[str, Any]:
        committed = json.loads((RESULTS / f"{name}.json").read_text())
        base = SimpleNamespace(config=preset("smollm2-135m"))
        monkeypatch.setattr(jobs, "train", lambda run, *_, **__: pytest.fail(f"trains {run}"))
        monkeypatch.setattr(compare, "score", lambda *_: pytest.fail("scores again"))
        monkeypatch.setattr(compare, "load_base", lambda *_: base)
        monkeypatch.setattr(
            compare, "split_loss", lambda run, split, _: {"loss": committed["base"][split]}
        )
        return committed

    return use


def tables(page: Path) -> list[str]:
    """The lines of its tables."""
    return [line for line in page.read_text().splitlines() if line.startswith("| ")]


def same_rows(rows: list[dict[str, Any]], committed: list[dict[str, Any]]) -> None:
    """But for what was counted otherwise when the oldest page was written: parameters with blocks
    that do nothing, the range of seeds, the mean of seconds.
    """
    former = ("trainable", "test spread", "seconds")
    for row, there in zip(rows, committed, strict=True):
        wanted = {key: value for key, value in there.items() if key not in former}
        assert {key: row[key] for key in wanted} == wanted


ACCURACY = [path.stem for path in sorted(RESULTS.glob("accuracy_*.json"))]
CONFIGS = dict.fromkeys(ACCURACY, "accuracy") | {
    "letter_form": "letter_form",
    "minimal_cloze": "minimal",
    "minimal_cloze_plus": "minimal",
    "minimal_cloze_rate": "minimal",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_committed_records_give_the_committed_page(name, nothing_runs, tmp_path, capsys):
    committed = nothing_runs(name)
    shutil.copytree(RESULTS / name, tmp_path / name)
    config = str(ROOT / "configs" / f"{CONFIGS[name]}.py")
    command = ["sweep", "--config", config, "--only", name, "--workdir", str(tmp_path / "w")]
    assert main([*command, "--tables", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["missing"] == committed["missing"]
    page = (tmp_path / f"{name}.md").read_text()
    assert all(label in page.split("Not run yet: ")[1] for label in found["missing"])
    same_rows(found["rows"], committed["rows"])
    assert tables(tmp_path / f"{name}.md") == tables(RESULTS / f"{name}.md")


def test_the_committed_overview_is_that_of_the_committed_pages(tmp_path):
    for name in ACCURACY:
        for suffix in (".json", ".md"):
            shutil.copy(RESULTS / f"{name}{suffix}", tmp_path)
    plans = load_config(str(ROOT / "configs" / "accuracy.py"), "get_sweep")
    assert tables(overview(plans, tmp_path)) == tables(RESULTS / "accuracy.md")


def test_committed_records_of_the_budget_give_the_committed_numbers(nothing_runs, tmp_path):
    """Of the methods whose runs are all there. The page may call LoRA's former start "lora"."""
    committed = {row["method"]: row for row in nothing_runs("gsm8k_budget")["rows"]}
    shutil.copytree(RESULTS / "gsm8k_budget", tmp_path / "gsm8k_budget")
    plan = load_config(str(ROOT / "configs" / "gsm8k_budget.py"), "get_sweep")
    whole = {label: adapter for label, adapter in plan.methods.items() if label != "lora"}
    found = compare_methods(
        dataclasses.replace(plan, methods=whole), tmp_path / "w", tmp_path, console=False
    )
    wanted = [
        (committed.get(label) or committed["lora"]) | {"method": label}
        for label in plan.methods
        if label in whole
    ]
    same_rows(found["rows"], wanted)
    page = (tmp_path / "gsm8k_budget.md").read_text()
    assert all(f"{row['test, seed 1']:.4f}" in page for row in wanted)
