"""Makes the runs of studies: trains, measures and records what has no record yet.

Command: python -m studies.run NAME --workdir DIR [--only STUDY] [--set KEY=VALUE ...]
NAME is a file of studies/configs. A stopped study goes on where it was. Several processes that see
the same directories share the runs. At the end the records are written to --records and the pages
to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

import zflora_jax as zf
from studies import deployment, pages
from studies.records import RECORDS, new_record, serves, write_lines
from studies.study import BASE, Run, Study, studies
from studies.tables import Table

FAILURES = (zf.ConfigError, zf.CheckpointError, jax.errors.JaxRuntimeError, MemoryError)
REPORTED = ("params_trainable", "validation_loss", "steps", "seconds", "first_step_seconds")
REPORTED += ("data_wait_share", "train_rows", "train_rows_dropped", "train_documents_cut")
ORIGIN = ("commit", "dirty", "date", "device", "cpu_count", "cpu", "jax")


def run_study(study: Study, workdir: Path, records: Path = RECORDS, console: bool = True) -> Table:
    """Makes the runs of a study that have no record, each in <workdir>/<run>.

    A diverged run is recorded as failed. A run that cannot be made (memory, say) leaves the others;
    the next call tries it again. A run that another process makes is waited for.

    Args:
      study: The study.
      workdir: Directory of the runs and of their record.json.
      records: Folder of the study's record file.
      console: Whether runs show their progress.

    Raises:
      ConfigError: a run could not be made, a method diverged at every rate, or a record was made
        with other settings.
      Preempted: a signal came; the run that was training is saved.
    """
    failed: dict[str, str] = {}
    while True:
        table = Table.read(study, records, workdir)
        left = [run for run in wanted(table) if run.name not in failed]
        if not left:
            break
        for run in left:
            try:
                make(study, run, workdir / run.name, console)
            except zf.BusyError:
                continue
            except FAILURES as error:
                if run.method == BASE:  # no run can be measured either
                    raise
                failed[run.name] = str(error) or type(error).__name__
            print(f"{study.name}: {run.name} {failed.get(run.name, 'is done')}", flush=True)
            break  # a chosen rate opens further runs
        else:
            time.sleep(5.0)  # other processes make the rest
    for label, tried in table.tried.items():
        if len(tried) == len(study.rates_of(label)) and label not in table.choices:
            failed[label] = "diverged at every learning rate; give lower ones"
    if failed:
        text = "\n".join(f"{study.name}: {name}: {why}" for name, why in failed.items())
        raise zf.ConfigError(text)
    return table


def wanted(table: Table) -> Iterator[Run]:
    """The runs without a record that can be made now, the most wanted first."""
    study = table.study
    runs = [Run(BASE, BASE, study.base, bool(study.tasks))]
    for label in study.methods:
        runs += study.rate_runs(label).values()
        if label in table.choices and len(table.tried[label]) == len(study.rates_of(label)):
            runs += study.seed_runs(label, table.choices[label].rate).values()
        for name, deployed in table.deployed.items():
            runs += deployed.values() if study.deployments[name][0] == label else ()
    for run in runs:
        if run.name not in table.runs or not serves(table.runs[run.name], study, run):
            yield run


def make(study: Study, run: Run, folder: Path, console: bool) -> None:
    """Trains a run, or goes on with it, measures it and writes its record.json.

    Raises:
      BusyError: another process is making it.
    """
    (folder / "study").mkdir(parents=True, exist_ok=True)
    with zf.locked(folder / "study"):
        try:
            result = _measured(study, run, folder, console)
        except zf.NonFiniteError as error:
            result = {"failed": str(error)}
        record = new_record(study, run, result)
        zf.atomic_write(folder / "record.json", json.dumps(record).encode())


@functools.lru_cache(maxsize=2)
def base_of(run: zf.RunConfig) -> zf.Model:
    """The base model that the runs of a study share."""
    return zf.load_base(run, zf.make_mesh(run.mesh) if run.mesh.devices > 1 else None)


def _measured(study: Study, run: Run, folder: Path, console: bool) -> dict[str, Any]:
    """Trains a run and returns the results that its record keeps."""
    if study.deployments and run.scored:
        return _deployed(study, run, folder, console)
    model, settings, env = base_of(study.base), run.settings, zf.environment()
    if run.method == BASE:
        losses = {s: zf.split_loss(settings, model, s)["loss"] for s in ("validation", "test")}
        result = {f"{split}_loss": loss for split, loss in losses.items()}
    else:
        trained = zf.train(settings, folder, model=model, console=console)
        if trained.signalled:
            raise zf.Preempted(f"stopped by a signal; {folder} is saved, and goes on from there.")
        model, settings, env = trained.model, trained.run, trained.report["environment"]
        result = {key: trained.report[key] for key in REPORTED if key in trained.report}
        if settings.train.steps == study.base.train.steps:
            test = zf.split_loss(settings, model, "test", trained.adapters)
            result |= {"test_loss": test["loss"]}
            result |= {f"test_{key}": int(test[key]) for key in ("rows", "tokens")}
        if run.scored:
            model = zf.fuse_trained(model, settings.adapter, trained.adapters, donate=False)
    if run.scored:
        result["scores"] = _scores(study, settings, model, folder / "eval", console)
    return result | {key: env.get(key) for key in ORIGIN}


def _deployed(study: Study, run: Run, folder: Path, console: bool) -> dict[str, Any]:
    """The results of a deployment, or of the untrained model, in float32."""
    exactly = {"train.dtype": "float32"}
    settings, result = zf.override(run.settings, exactly), dict[str, Any]()
    base = base_of(zf.override(study.base, exactly))
    if run.method == BASE:
        model, result["nbytes"] = deployment.floats(base), deployment.nbytes(base.params)
        result["validation_loss"] = zf.split_loss(settings, model, "validation")["loss"]
    else:
        _, _, adapters, _ = zf.load_run(folder.parent / run.of)
        trained = deployment.Trained(settings, base, adapters)
        _, deploy = study.deployments[run.method]
        model, result["nbytes"] = deploy(trained)
        exact = deployment.exact(trained)
        result["kl"] = deployment.divergence(exact, model, settings)
        result["trained_loss"] = zf.split_loss(settings, exact, "test")["loss"]
        result["update_in_steps"] = deployment.update_in_steps(base, exact)
        result["params_trainable"] = zf.count_params(base.config, settings.adapter)
        del exact
    test = zf.split_loss(settings, model, "test")
    result |= {"test_loss": test["loss"]} | {f"test_{x}": int(test[x]) for x in ("rows", "tokens")}
    result["scores"] = _scores(study, settings, model, folder / "eval", console)
    env = zf.environment()
    return result | {key: env.get(key) for key in ORIGIN}


def _scores(
    study: Study, run: zf.RunConfig, model: zf.Model, out: Path, console: bool
) -> dict[str, Any]:
    """Task -> the scores of a model, with those of each clean row."""
    run, tasks = dataclasses.replace(run, eval=study.scoring), [*study.tasks, *study.transfer]
    for old in out.glob("summary-*"):  # of other settings
        old.unlink()
    seen = [zf.TrainedOn(run.data)]
    summary = zf.evaluate_tasks(run, model, tasks, out, "chosen", trained_on=seen, console=console)
    scores = {of["task"]: of for of in summary["tasks"]}
    lacking = [t for t in study.tasks if study.measure not in scores[t]["scores"]["clean"]]
    if lacking:
        raise zf.ConfigError(
            f"study {study.name!r}: {', '.join(lacking)} has no {study.measure} on clean rows, only"
            f" {', '.join(scores[lacking[0]]['scores']['clean'])}. Choose another measure."
        )
    return scores


def argument_parser() -> argparse.ArgumentParser:
    """The options of `python -m studies.run`."""
    parser = argparse.ArgumentParser(prog="python -m studies.run", description=__doc__)
    parser.add_argument("name", metavar="NAME", help="a file of studies/configs")
    parser.add_argument("--workdir", required=True, type=Path, help="where the runs live")
    parser.add_argument("--only", metavar="STUDY", help="make the runs of one study")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="base settings")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--out", type=Path, default=pages.RESULTS, help="folder of the pages")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the runs of a file's studies, then writes their records and pages."""
    args = argument_parser().parse_args(argv)
    try:
        changes = dict(text.split("=", 1) for text in args.set)
        named = studies(args.name)
        every = [dataclasses.replace(s, base=zf.override(s.base, changes)) for s in named]
        names = [study.name for study in every]
        if args.only not in (None, *names):
            raise zf.ConfigError(f"--only {args.only}: choose one of {', '.join(names)}.")
        for study in every:
            if args.only in (None, study.name):
                table = run_study(study, args.workdir / study.name, args.records)
                write_lines(args.records / f"{study.name}.jsonl.gz", table.runs.values())
        pages.write(pages.pages(every, args.records, args.out), args.out)
    except (zf.ConfigError, zf.Preempted) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
