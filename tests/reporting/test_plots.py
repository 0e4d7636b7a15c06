import json

import pytest

from zflora_jax.core.fields import ConfigError
from zflora_jax.reporting import plots


def _write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def test_loss_curves_draw_each_step_once_after_a_resume(tmp_path):
    records = [{"step": s, "split": "train", "loss": 9.0} for s in range(1, 5)]
    records += [{"step": s, "split": "train", "loss": 1 / s} for s in range(3, 7)]  # 3, 4 again
    records += [
        {"step": s, "split": "eval", "loss": x} for s, x in ((1, 4.0), (2, None), (6, 0.25))
    ]
    _write(tmp_path / "metrics.jsonl", records)
    runs = {"mine": tmp_path / "metrics.jsonl"}
    figure = plots.loss_curves(runs, tmp_path / "new" / "c", "a run", untrained=5.0)
    assert (tmp_path / "new" / "c.png").read_bytes().startswith(b"\x89PNG\r\n")
    [axes] = figure.axes
    train, held_out, base = (line.get_xydata().tolist() for line in axes.lines)
    assert train == [[1, 9.0], [2, 9.0], *([s, 1 / s] for s in range(3, 7))]
    assert held_out == [[1, 4.0], [6, 0.25]] and {y for _, y in base} == {5.0}
    assert [text.get_text() for text in axes.texts] == ["   held-out 0.25", "untrained 5"]
    assert axes.get_yscale() == "log" and axes.get_title("left") == "a run"
    _write(tmp_path / "metrics.jsonl", [{"step": 1, "split": "train", "accuracy": 1.0}])
    with pytest.raises(ConfigError, match="no losses to draw"):
        plots.loss_curves(runs, tmp_path / "b", "t")
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("count", [2, 14])
def test_the_names_of_several_runs_are_below(tmp_path, count):
    runs = {f"run {i}": tmp_path / f"{i}.jsonl" for i in range(count)}
    for path in runs.values():
        _write(path, [{"step": s, "split": "train", "loss": s} for s in (1, 2)])
    figure = plots.loss_curves(runs, tmp_path / "c", "many")
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata())]
    assert len({str(line.get_color()) for line in lines}) == count
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    assert [x.get_color() for x in legend.legend_handles] == [x.get_color() for x in lines]
