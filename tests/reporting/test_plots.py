import json

import pytest

from zflora_jax.core.fields import ConfigError
from zflora_jax.reporting import plots


def _write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_training_curves_draw_each_step_once_after_a_resume(tmp_path):
    first = {"split": "train", "loss": 9.0, "grad_norm": 2.0, "learning_rate": 0.1}
    records = [{"step": s, **first} for s in range(1, 5)]
    records += [{"step": s, "split": "train", "loss": 1 / s} for s in range(3, 7)]  # 3, 4 again
    losses = ((0, 4.0), (2, None), (6, 0.25))
    records += [{"step": s, "split": "eval", "loss": loss} for s, loss in losses]
    _write(tmp_path / "metrics.jsonl", records)
    runs = {"mine": tmp_path / "metrics.jsonl"}
    figure = plots.training_curves(runs, tmp_path / "new" / "c", "a run")
    assert (tmp_path / "new" / "c.png").read_bytes().startswith(b"\x89PNG\r\n")
    drawn = (tmp_path / "new" / "c.svg").read_bytes()
    assert b"<svg" in drawn[:1000] and b">loss (nats per token)<" in drawn  # text stays text
    plots.training_curves(runs, tmp_path / "again", "a run")
    assert (tmp_path / "again.svg").read_bytes() == drawn
    loss, rate, speed, norm = figure.axes
    lines = [(line.get_label(), line.get_xydata().tolist()) for line in loss.lines]
    drawn = [[1, 9.0], [2, 9.0], *([s, 1 / s] for s in range(3, 7))]
    assert lines[0] == ("mine (train, last 0.1667)", drawn)
    assert lines[1] == ("mine (eval, last 0.25)", [[0, 4.0], [6, 0.25]])
    assert [len(axes.lines) for axes in (rate, speed, norm)] == [1, 0, 1]
    assert norm.get_yscale() == "log" and figure.get_suptitle() == "a run"
    _write(tmp_path / "metrics.jsonl", [{"step": 1, "split": "train", "accuracy": 1.0}])
    with pytest.raises(ConfigError, match="no numbers to draw"):
        plots.training_curves(runs, tmp_path / "b", "t")
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("count", [2, 6, 14])
def test_the_names_of_several_runs_and_of_many_below(tmp_path, count):
    runs = {f"run {i}": tmp_path / f"{i}.jsonl" for i in range(count)}
    for path in runs.values():
        _write(path, [{"step": s, "split": "train", "loss": s} for s in (1, 2)])
    figure = plots.training_curves(runs, tmp_path / "c", "many")
    drawn = [line.get_color() for line in figure.axes[0].lines]
    assert len({str(colour) for colour in drawn}) == count
    [legend], labels = figure.legends, [f"run {i} (train, last 2)" for i in range(count)]
    assert [text.get_text() for text in legend.get_texts()] == labels
    assert not any(axes.get_legend() for axes in figure.axes)
    assert drawn == [handle.get_color() for handle in legend.legend_handles]
