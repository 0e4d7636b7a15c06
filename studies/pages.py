"""Writes the result pages of studies again from their records, without training anything.

Command: python -m studies.pages [--check]
A page is its text in studies/notes and the tables that its studies' records give. With --check
nothing is written: it fails where a page differs.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

import zflora_jax as zf
from studies.deployment import UNMERGED
from studies.plots import forest, scores_and_bytes
from studies.records import RECORDS, read_lines
from studies.statistics import Difference, seed_difference, verdict
from studies.study import BASE, Study, studies
from studies.tables import ENDS, MEAN, Choice, Table, headline, informative

RESULTS = Path(__file__).parent.parent / "results"
NOTES = Path(__file__).parent / "notes"
OVERVIEW = "accuracy"  # the page over all studies whose names begin so
COMPARED = "zflora-minimal"  # its method
SPLITS = ("validation", "test")
VALIDATION = "validation loss (learning rate)"
# Deployments that are no row of the picture
NOT_DRAWN = ("base's scales", "and minima", "8-bit", "minimal, unmerged", "through", "ffba")
SIMULATED = "paired_intervals"  # a page of plain rows, without a study
LEGEND = """Differences use the same rows and seeds. Their 95% intervals resample both, or with one
seed rows only (`studies/statistics.py`). base: the untrained model. °: seeds differ no more than
chance in the test rows explains, so the interval resamples rows only and may be too narrow.
Verdicts, by a margin fixed before the runs. As good: the whole interval lies above minus the
margin. Inferior: it lies below. Worse: it contains minus the margin and ends below 0. Undecided: it
contains both. Test loss: nats per target token on held-out rows of the training task; its
differences have the interval of Student's t over seeds. No figure is corrected for multiple
comparisons.{}"""


def table_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with the columns of the longest row first: others can have fewer seeds."""
    fullest = sorted(rows, key=len, reverse=True)
    columns = dict.fromkeys(key for row in fullest for key in row)
    return zf.markdown_table(rows, list(columns)) if rows else ""


def note(name: str) -> str:
    """The hand-written text of a page; the first table goes where it has {table}."""
    path = NOTES / f"{name}.md"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def joined(blocks: Iterable[str]) -> str:
    """A page of its blocks; empty ones are left out."""
    return "\n\n".join(filter(None, blocks)) + "\n"


# --- the page of studies --------------------------------------------------------------------------


def study_page(name: str, tables: Sequence[Table]) -> str:
    """The page of one study or of several."""
    (before, _, after), top, more = note(name).partition("{table}"), list[str](), list[str]()
    for table in tables:
        if table.study.deployments:
            blocks = deployment_blocks(table)
        else:
            losses = table_of([loss_row(table, label) for label in table.labels])
            blocks = [*difference_blocks(table), losses, *score_blocks(table)]
        first, *rest = filter(None, [*blocks, cut_answers(table), setting(table)])
        head = [f"{'###' if after else '##'} {table.study.title}"] if len(tables) > 1 else []
        top += [*head, first, *([] if after else rest)]
        more += [*head, *rest] if after else []
    if any(table.differences for table in tables):
        margins = {t.study.margin for t in tables if t.study.margin}
        more.append(LEGEND.format("".join(f" Margin: {margin:g} points." for margin in margins)))
    middle = [after.strip(), "## Details"] if after else []
    blocks = [before.strip() or f"# {name}", *top, *middle, *more, places(tables)]
    return joined([*blocks, "Command: `python -m studies.pages`."])


def loss_row(table: Table, label: str) -> dict[str, Any]:
    """A method's parameters, rate, validation and test losses, seconds."""
    choice, found = table.choices[label], table.results(label)
    losses = found["test_loss"]
    row = {"method": label, "trainable": trainable(table, label), VALIDATION: by_rate(choice)}
    if table.study.tasks:
        row |= {f"test, seed {seed}": value(loss, ".4f") for seed, loss in losses.items()}
    elif table.study.reference:
        gap = table.loss_difference(label)
        row |= {f"minus {table.study.reference}": gap.losses() if gap else None}
    if losses.count() > 1:
        row |= {"test mean": value(losses.mean(), ".4f"), "test std": value(losses.std(), ".4f")}
    return row | {"seconds, fastest at that rate": value(found["seconds"].min())}


def by_rate(choice: Choice) -> str:
    """The validation loss at each learning rate, the chosen one's in bold."""
    texts = {
        rate: f"{value(loss, '.4f') or '-'} ({rate:g})" for rate, loss in choice.losses.items()
    }
    return ", ".join(f"**{t}**" if rate == choice.rate else t for rate, t in texts.items())


def trainable(table: Table, label: str) -> int:
    """A method's number of trainable parameters."""
    return 0 if label == BASE else int(table.results(label)["params_trainable"].max())


def value(number: float, text: str = "") -> Any:
    """A number of a table, formatted if a format is given; None of one that is missing."""
    return None if pd.isna(number) else format(number, text) if text else float(number)


def difference_blocks(table: Table) -> list[str]:
    """The differences to the reference and the contrasts."""
    study, rows = table.study, []
    for label, gaps in table.differences.items():
        gap, loss = headline(gaps), table.loss_difference(label)
        tells = label != BASE
        row = {"method": label} | {task: str(one) for task, one in gaps.items()}
        row |= {"seeds": gap.seeds if tells else None, "p": gap.p if tells else None}
        row |= {"verdict": said(table, label, gap) or None} if study.margin else {}
        rows.append(row | {"test loss": loss.losses() if loss else None})
    contrasts = [
        {"methods": pair}
        | {task: str(one) for task, one in gaps.items()}
        | {"seeds": headline(gaps).seeds, "p": headline(gaps).p}
        for pair, gaps in table.contrasts.items()
    ]
    head = f"{study.measure} minus that of {study.reference}, points of 100:"
    return [head, table_of(rows), table_of(contrasts)] if rows else []


def said(table: Table, label: str, gap: Difference) -> str:
    """Verdict on a difference, by the margin; "" for the base."""
    return verdict(gap, table.study.margin) if table.study.margin and label != BASE else ""


def score_blocks(table: Table) -> list[str]:
    """A table per score, chance, and the answers that were cut."""
    frame, study, blocks, shown = table.scores, table.study, list[str](), list[Any]()
    for score in sorted(frame["score"].unique(), key=lambda score: score != study.measure):
        ours = frame[frame["score"] == score]
        means = ours.groupby(["method", "task"], sort=False)[[*ENDS, "rows"]].mean()
        if any(means.equals(earlier.reindex(means.index)) for earlier in shown):
            continue  # accuracy_legacy, where it is accuracy
        shown, rows = [*shown, means], []
        for label in ours["method"].unique():
            tasks = means.loc[label]
            cells = {
                task: f"{one['mean']:.1f} [{one['low']:.1f}, {one['high']:.1f}]"
                for task, one in tasks.iterrows()
            }
            counted = [task for task in study.tasks if task in cells]
            std = table.headline(label)[1] if score == study.measure else None
            cells[MEAN] = f"{tasks['mean'][counted].mean():.1f}{deviation(std)}"
            names = {task: f"{task} ({tasks['rows'][task]:.0f})" for task in tasks.index}
            order = [*counted, *[MEAN] * bool(counted), *(t for t in names if t not in counted)]
            row = {"method": label, "trainable": trainable(table, label)}
            rows.append(row | {names.get(key, key): cells[key] for key in order})
        blocks += [f"{score}, percent:", table_of(rows)]
    chance = frame.groupby("task", sort=False)["chance"].first().dropna()
    text = ", ".join(f"{t} {n:.1f}" for t, n in chance.items())
    return [*blocks, f"Chance: {text}." if text else ""]


def cut_answers(table: Table) -> str:
    """How many answers of each method were cut at the limit of new tokens; "" if none was."""
    cut = table.scores.groupby(["method", "task"], sort=False)["cut"].mean()
    methods = table.scores["method"].unique()
    texts = {m: [f"{t} {n:.4g}" for t, n in cut[m].items() if n] for m in methods}
    limit = "; ".join(f"{label}: {', '.join(of)}" for label, of in texts.items() if of)
    return f"Answers that reached the limit of new tokens, mean of seeds: {limit}." if limit else ""


def deployment_blocks(table: Table) -> list[str]:
    """A row per deployment, and one per method that was trained for them."""
    study, rows, trained = table.study, list[dict[str, Any]](), dict[str, dict[str, Any]]()
    before = table.results(BASE)["test_loss"].mean()
    for label in (BASE, *table.labels):
        found, gap = table.results(label).mean(), table.differences.get(label)
        mean, std = table.headline(label)
        row = {"deployment": label, "MB": f"{found['nbytes'] / 1e6:.1f}"}
        row[study.measure] = f"{mean:.1f}{deviation(std)}"
        row[f"minus {study.reference}"] = str(headline(gap)) if gap else None
        row["verdict"] = (said(table, label, headline(gap)) if gap else "") or None
        for at, of in (("before", "trained"), ("after", "test")):
            row[f"loss {at}"] = value(found[f"{of}_loss"], ".4f")
        kept = 100 * (before - found["test_loss"]) / (before - found["trained_loss"])
        row |= {"gain kept, %": value(kept, ".1f"), "KL": value(found["kl"], ".2g")}
        rows.append(row | {"update, steps": value(found["update_in_steps"], ".2g")})
        if label != BASE:
            name, losses = study.deployments[label][0], by_rate(table.choices[label])
            trained[name] = {"adapter": name, "trainable": trainable(table, label)}
            trained[name][VALIDATION] = losses
    return [table_of(rows), table_of(list(trained.values()))]


def deviation(std: float | None) -> str:
    """A standard deviation of seeds as a table shows it."""
    return "" if std is None else f" ± {std:.1f}"


def deployed_points(table: Table) -> dict[str, tuple[float, float, float | None, bool]]:
    """Deployment -> a point of `scores_and_bytes`, of those that are drawn."""
    points = {}
    for label in (x for x in (BASE, *table.labels) if not any(part in x for part in NOT_DRAWN)):
        size = table.results(label)["nbytes"].mean() / 1e6
        apart = label != BASE and table.study.deployments[label][1] in UNMERGED
        points[label] = size, *table.headline(label), apart
    return points


def setting(table: Table) -> str:
    """How a study was run, and what is missing."""
    study, run, scoring = table.study, table.study.base, table.study.scoring
    some = next((r["result"] for r in table.runs.values() if "train_rows" in r["result"]), {})
    rows = f"{run.data.batch_size} {'packed ' if run.data.packing else ''}rows"
    lines = [
        f"{run.model}, {run.train.dtype}; trained on `{run.data.task}`, {run.train.steps} steps of"
        f" {rows}, examples up to {run.data.bucket_lengths[-1]} tokens ({some.get('train_rows')}"
        f" train examples, {some.get('train_rows_dropped')} longer ones left out,"
        f" {some.get('train_documents_cut')} cut to fit)."
    ]
    if BASE in table.runs:
        base = table.runs[BASE]["result"]
        lines.append(
            f"Untrained: validation {base['validation_loss']:.4f}, test {base['test_loss']:.4f}"
            f" ({some.get('test_rows')} rows, {some.get('test_tokens')} target tokens)."
        )
    if scoring:
        limit = f"the first {scoring.limit}" if scoring.limit else "all"
        number = "" if study.deployments else " (number in brackets)"
        tokens = f", at most {scoring.max_new_tokens} new tokens" if scoring.generate else ""
        lines.append(
            f"Scores: means over seeds on {limit} clean rows of each test set{number},"
            f" 95% intervals over rows, ± the standard deviation of seeds{tokens}."
        )
    length = f"runs of {study.pick_steps} steps" if study.pick_steps else "whole runs"
    lines.append(f"Learning rates: chosen on validation with seed {study.seeds[0]}, by {length}.")
    known = study.deployments or study.methods
    of = {label: study.deployments.get(label, [label])[0] for label in table.labels}
    edges = {of[label]: table.choices[label] for label in table.labels}
    lines += [f"{m}: the rate {c.rate:g} is {c.untuned}." for m, c in edges.items() if c.untuned]
    told = informative(study.tasks, table.differences.get(BASE))
    if weak := ", ".join(task for task in study.tasks if task not in told):
        beaten = f"{study.reference} does not clearly beat the untrained model on {weak}"
        lines.append(f"{beaten}: left out of the differences.")
    missing = "; ".join(m for m in known if m not in table.labels)
    lines += [f"Not all runs are there: {missing}."] if missing else []
    failed = {n: why for n, r in table.runs.items() if (why := r["result"].get("failed"))}
    return "\n".join([*lines, *(f"Failed: {name}: {why}." for name, why in failed.items())])


def places(tables: Sequence[Table]) -> str:
    """Where the runs behind tables were made."""
    runs = {
        (table.study.name, record["run"]): record["result"]
        for table in tables
        for label in table.labels
        for record in (*table.tried[label].values(), *table.chosen[label].values())
    }
    made = Counter[str]()
    for of in runs.values():
        commit = f"{of.get('commit')}{' with local changes' if of.get('dirty') else ''}"
        known = [f"{key} {of[key]}" for key in ("device", "cpu", "jax") if of.get(key)]
        made[", ".join([f"commit {commit}", *known])] += 1
    return f"Runs made at {'; '.join(f'{text} ({n})' for text, n in made.items())}."


# --- the page over several studies ----------------------------------------------------------------


def overview(tables: Sequence[Table], picture: Path | None) -> str:
    """The page over several studies: `COMPARED` and the reference in each, in its note's places for
    a table and for the pooled losses; "" where no study has both.

    Args:
      tables: The studies' tables.
      picture: The PNG file of the picture; None draws nothing.
    """
    if not (tables := [table for table in tables if COMPARED in table.differences]):
        return ""
    rows, points = list[dict[str, Any]](), dict[str, list[Difference]]()
    for table in tables:
        study, gap = table.study, headline(table.differences[COMPARED])
        points[study.title] = [gap, *(seed_difference(*losses(table, on)) for on in SPLITS)]
        row = {"table": f"[{study.title}]({study.page or study.name}.md)"}
        for label in (BASE, study.reference, COMPARED):
            mean, std = table.headline(label)
            row[label] = f"{mean:.1f}{deviation(std)}"
        row["difference"] = f"{gap}, {said(table, COMPARED, gap)}"
        alone = scores_of_seeds(table)
        row["by seeds alone"] = f"± {alone.high - alone.mean:.1f}, {said(table, COMPARED, alone)}"
        found = zip(SPLITS, points[study.title][1:], strict=True)
        rows.append(row | {f"{on} loss": f"{one}%" for on, one in found})
    if picture:
        forest(points, picture, [table.study.margin or 0.0 for table in tables])
    return joined([note(OVERVIEW).format(table=table_of(rows), losses=pooled(tables))])


def losses(table: Table, split: str) -> np.ndarray:
    """Losses of `COMPARED` and of the reference, [2, seeds], in percent of the reference's mean."""
    pair = [table.chosen[label] for label in (COMPARED, table.study.reference)]
    seeds = sorted(pair[0].keys() & pair[1].keys())
    found = np.array([[of[seed]["result"][f"{split}_loss"] for seed in seeds] for of in pair])
    return 100 * found / found[1].mean()


def scores_of_seeds(table: Table) -> Difference:
    """The difference in score by Student's t over the means of seeds, without their rows."""
    frame, study, tasks = table.scores, table.study, table.differences[COMPARED]
    frame = frame[(frame["score"] == study.measure) & frame["task"].isin(tasks)]
    means = frame.groupby(["method", "seed"])["mean"].mean().unstack("method")
    return seed_difference(*means[[COMPARED, study.reference]].dropna().to_numpy().T)


def pooled(tables: Sequence[Table]) -> str:
    """How losses differ over all tables: the mean, and sign tests over tables and over seeds."""
    texts = []
    for split in SPLITS:
        gaps = [np.subtract(*losses(table, split)) for table in tables]
        means = np.array([gap.mean() for gap in gaps])
        counts = []
        for unit, of in (("tables", means), ("seeds", np.concatenate(gaps))):
            p = binomtest(int((of > 0).sum()), len(of)).pvalue
            counts.append(f"{(of > 0).sum()} of {len(of)} {unit} (p = {p:.2g})")
        texts.append(f"- {split}: {means.mean():+.1f}%, higher in {' and '.join(counts)}")
    return "\n".join(texts)


# --- all pages ------------------------------------------------------------------------------------


def pages(chosen: Iterable[Study], records: Path, picture: Path | None) -> dict[str, str]:
    """Page -> its text, of the studies that have records.

    Args:
      chosen: The studies.
      records: Folder of their records.
      picture: Folder of pictures; None draws nothing.
    """
    tables = [table for study in chosen if (table := Table.read(study, records)).labels]
    tables = [t for t in tables if not t.study.deployments or t.study.reference in t.labels]
    by_page = dict[str, list[Table]]()
    for table in tables:
        by_page.setdefault(table.study.page or table.study.name, []).append(table)
    found = {name: study_page(name, of) for name, of in by_page.items()}
    for name, of in by_page.items():
        if picture and (on := [t for t in of if t.study.deployments]):
            scores_and_bytes(deployed_points(on[0]), picture / f"{name}.png", on[0].study.measure)
    over = [table for table in tables if table.study.name.startswith(f"{OVERVIEW}_")]
    if text := overview(over, picture and picture / f"{OVERVIEW}.png"):
        found[OVERVIEW] = text
    return found


def write(found: Mapping[str, str], out: Path) -> None:
    """Writes pages to a folder."""
    for name, text in found.items():
        zf.atomic_write(out / f"{name}.md", text.encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Writes or checks every page; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m studies.pages", description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where a page differs")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of the records")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the pages")
    args = parser.parse_args(argv)
    found = pages(studies(), args.records, None if args.check else args.out)
    rows = read_lines(args.records / f"{SIMULATED}.jsonl.gz")
    found[SIMULATED] = joined([note(SIMULATED), table_of(rows)])
    if not args.check:
        write(found, args.out)
        return 0
    there = {name: args.out / f"{name}.md" for name in found}
    differ = [n for n, p in there.items() if not p.is_file() or p.read_text("utf-8") != found[n]]
    if differ:
        print(f"pages differ from their records: {', '.join(differ)}", file=sys.stderr)
    return int(bool(differ))


if __name__ == "__main__":
    raise SystemExit(main())
