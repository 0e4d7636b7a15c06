"""Records of finished runs: one compressed JSONL file per study, one line per run.

A line has the run's name, method, settings ("config", and "tasks" and "scoring" where it was
scored) and "result". The result of a diverged run is {"failed": why}.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import zflora_jax as zf
from studies.study import BASE, Run, Study

RECORDS = Path(__file__).parent / "records"
Record = dict[str, Any]
# The settings that a result depends on, beyond rounding.
_MODEL = ("model", "data.task", "data.prompt_style", "train.dtype", "quantize.")
_TRAINING = ("adapter.", "optim.", "train.steps", "train.seed", "data.seed", "data.batch_size")
_TRAINING += ("data.bucket_lengths", "data.packing", "data.train_")


def read_lines(path: Path) -> list[Record]:
    """The lines of a compressed JSONL file; none without the file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes a compressed JSONL file whole; equal lines give equal bytes."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(text.encode())
    zf.atomic_write(path, buffer.getvalue())


def read_study(study: Study, records: Path = RECORDS, workdir: Path | None = None) -> list[Record]:
    """The records of a study, the untrained model's first: those of its file in `records`, and
    those of the runs in `workdir`, which replace them.
    """
    lines = read_lines(records / f"{study.name}.jsonl.gz")
    if workdir is not None:
        lines += [json.loads(p.read_text()) for p in sorted(workdir.glob("*/record.json"))]
    found = {line["run"]: line for line in lines}
    return sorted(found.values(), key=lambda line: (line["method"] != BASE, line["run"]))


def new_record(study: Study, run: Run, result: Mapping[str, Any]) -> Record:
    """The record of a finished run, as JSON holds it."""
    record: Record = {"run": run.name, "method": run.method}
    record["config"] = dataclasses.asdict(run.settings)
    if run.scored and study.scoring:
        tasks = [*study.tasks, *study.transfer]
        record |= {"tasks": tasks, "scoring": dataclasses.asdict(study.scoring)}
    return json.loads(json.dumps(record | {"result": result}))


def serves(record: Record, study: Study, run: Run) -> bool:
    """Whether a record is enough for `run`: not if scores are asked for that it does not have.

    Raises:
      ConfigError: the record was made with other settings.
    """
    wanted = new_record(study, run, {})
    there, now = (_flat(given["config"]) for given in (record, wanted))
    decide = _MODEL if run.method == BASE else (*_MODEL, *_TRAINING)
    for key in sorted(there.keys() & now.keys()):
        if key.startswith(decide) and there[key] != now[key]:
            raise zf.ConfigError(
                f"the record of {study.name}/{run.name} was made with {key}={there[key]!r}, and the"
                f" study has {now[key]!r}. Give another --records and --workdir."
            )
    scored = all(record.get(key) == wanted.get(key) for key in ("tasks", "scoring"))
    return not run.scored or "failed" in record["result"] or scored


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted name -> value of every setting."""
    groups = {key: of if isinstance(of, Mapping) else {"": of} for key, of in config.items()}
    return {f"{g}.{key}".rstrip("."): v for g, of in groups.items() for key, v in of.items()}
