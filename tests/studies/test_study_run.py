"""Studies run on a tiny model: rates chosen, runs recorded and not repeated, failures, locks."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest
from support.fake_train import FakeTrain

import zflora_jax as zf
from studies import run as runner
from studies.run import main, run_study, wanted
from studies.study import BASE, Study
from studies.tables import Table

LORA = {"lora": zf.AdapterConfig("lora", rank=2)}
SCORING = zf.EvalConfig(limit=None, batch_size=4, loss=False, generate=False)


@pytest.fixture
def fake(monkeypatch):
    """Runs are not trained, and the base is not loaded; losses are `fake.loss` of the settings."""
    fake = FakeTrain()
    monkeypatch.setattr(zf, "train", fake)
    monkeypatch.setattr(runner, "base_of", lambda run: None)
    monkeypatch.setattr(
        zf, "split_loss", lambda run, *_: {"loss": fake.loss(run), "rows": 4.0, "tokens": 40.0}
    )
    return fake


def names(fake: FakeTrain) -> list[tuple[str, float, int, int]]:
    """Method, rate, steps and seed of the runs in the order in which they were made."""
    return [
        (r.adapter.method, r.optim.learning_rate, r.train.steps, r.train.seed) for r in fake.runs
    ]


@pytest.mark.soak  # seven runs; test_deployment trains one
def test_a_study_is_trained_scored_and_not_repeated(two_steps, tmp_path, monkeypatch):
    """End to end: real runs, records, the page; the second call makes nothing."""
    base = zf.override(two_steps, {"train.steps": 4, "data.packing": True})
    methods = LORA | {"minimal": zf.AdapterConfig("zflora-minimal", rank=2)}
    study = Study(
        "tiny_one",
        base,
        methods,
        (1e-3, 1e-2),
        (0, 1),
        tasks=("arc_easy",),
        scoring=SCORING,
        measure="likelihood_sum",
        reference="lora",
        margin=50.0,
    )
    monkeypatch.setattr(runner, "studies", lambda name: [study])
    where = ["--workdir", str(tmp_path / "w"), "--records", str(tmp_path / "r")]
    main(["tiny", *where, "--out", str(tmp_path / "out")])
    table = Table.read(study, tmp_path / "r")
    assert table.labels == ["lora", "minimal"] and len(table.runs) == 1 + 2 * (2 + 1)
    for label, choice in table.choices.items():
        losses = {r: of["result"]["validation_loss"] for r, of in table.tried[label].items()}
        assert choice.rate == min(losses, key=losses.__getitem__) and choice.losses == losses
        result = table.chosen[label][1]["result"]
        assert result["test_rows"] == 2 and result["test_loss"] > 0 and result["cpu"]
        kept = result["scores"]["arc_easy"]
        assert len(kept["row scores"]["likelihood_sum"]) == kept["clean_rows"] == 9
    assert table.differences[BASE]["arc_easy"].seeds == 2
    page = (tmp_path / "out" / "tiny_one.md").read_text()
    assert "likelihood_sum, percent:" in page and "| minimal |" in page

    for name in ("train", "evaluate_tasks", "load_base"):
        monkeypatch.setattr(zf, name, lambda *_, **__: pytest.fail("made again"))
    elsewhere = zf.override(
        base, {"data.data_dir": f"{base.data.data_dir}/.", "train.log_every": 3}
    )
    again = run_study(
        dataclasses.replace(study, base=elsewhere), tmp_path / "w" / "tiny_one", tmp_path
    )
    assert again.runs == table.runs  # of the workdir alone
    with pytest.raises(
        SystemExit, match=r"made with train.seed|optim.warmup_steps=1, and the study"
    ):
        main(["tiny", *where, "--out", str(tmp_path), "--set", "optim.warmup_steps=0"])


def test_rates_come_first_then_seeds_method_by_method(two_steps, tmp_path, fake):
    base = zf.override(two_steps, {"train.steps": 4})
    methods = LORA | {"ffa": zf.AdapterConfig("ffa", rank=2)}
    fake.loss = lambda run: run.optim.learning_rate  # the lower rate is better
    own = {"ffa": (1e-3,)}
    study = Study("order", base, methods, (1e-2, 1e-3), (0, 1), pick_steps=2, rates=own)
    run_study(study, tmp_path / "w", tmp_path / "r", console=False)
    runs = [(1e-2, 2, 0), (1e-3, 2, 0), (1e-3, 4, 0), (1e-3, 4, 1)]
    assert names(fake) == [("lora", *run) for run in runs] + [("ffa", *run) for run in runs[1:]]
    # A whole run that chose the rate is one of the chosen ones.
    fake.runs.clear()
    whole = dataclasses.replace(study, name="whole", methods=LORA, pick_steps=None, rates={})
    run_study(whole, tmp_path / "v", tmp_path / "r", console=False)
    assert names(fake) == [("lora", 1e-2, 4, 0), ("lora", 1e-3, 4, 0), ("lora", 1e-3, 4, 1)]


def test_failures_leave_the_other_runs(two_steps, tmp_path, fake):
    """Too little memory is tried again; a loss that is not finite is a record, and at every rate
    the method has none.
    """
    methods = {m: zf.AdapterConfig(m, rank=2) for m in ("lora", "ffa")}
    methods["large"] = zf.AdapterConfig("lora", rank=8)
    study, tries = Study("some", two_steps, methods, (1e-3,), (0,)), []

    def loss(run):
        if run.adapter.method == "ffa":
            raise zf.NonFiniteError("the loss of step 1 is nan")
        if run.adapter.rank == 8 and not tries:
            tries.append(1)
            raise MemoryError("no room")
        return 1.0

    fake.loss = loss
    messages = "some: large-lr0.001-seed0: no room\nsome: ffa: diverged at every learning rate"
    with pytest.raises(zf.ConfigError, match=messages):
        run_study(study, tmp_path / "w", tmp_path / "r", console=False)
    record = json.loads((tmp_path / "w" / "ffa-lr0.001-seed0" / "record.json").read_text())
    assert record["result"] == {"failed": "the loss of step 1 is nan"}
    made = len(fake.runs)
    with pytest.raises(zf.ConfigError, match=r"^some: ffa: diverged"):
        run_study(study, tmp_path / "w", tmp_path / "r", console=False)
    assert [run.adapter.rank for run in fake.runs[made:]] == [8]
    assert Table.read(study, tmp_path / "r", tmp_path / "w").labels == ["lora", "large"]


def test_a_run_of_another_process_is_left_to_it(two_steps, tmp_path, fake, monkeypatch):
    study = Study("shared", two_steps, LORA, (1e-3, 1e-2), (0,))
    fake.loss = lambda run: run.optim.learning_rate
    other = tmp_path / "w" / "lora-lr0.001-seed0"
    (other / "study").mkdir(parents=True)
    held = zf.locked(other / "study")
    held.__enter__()

    def ends(seconds):
        assert names(fake) == [("lora", 1e-2, 2, 0)], "waits where there is work"
        held.__exit__(None, None, None)

    monkeypatch.setattr(runner, "time", SimpleNamespace(sleep=ends))
    table = run_study(study, tmp_path / "w", tmp_path / "r", console=False)
    assert table.choices["lora"].rate == 1e-3 and not list(wanted(table))
