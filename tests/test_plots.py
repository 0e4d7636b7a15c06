import json

import pytest

from zflora_jax import plots


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the figures drawn in a test."""
    seen = []
    make = plots._figure

    def keep(*args, **kwargs):
        figure, axes = make(*args, **kwargs)
        seen.append(axes)
        return figure, axes

    monkeypatch.setattr(plots, "_figure", keep)
    return seen


def _write(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def _is_png(path):
    data = path.read_bytes()
    return data.startswith(b"\x89PNG\r\n") and len(data) > 5000


def test_loss_curve_draws_each_step_once_after_a_resume(tmp_path, drawn):
    records = [{"step": s, "split": "train", "loss": 9.0} for s in range(1, 5)]
    records += [{"step": 0, "split": "eval", "loss": 4.0}, {"step": 2, "split": "eval", "loss": None}]
    records += [{"step": s, "split": "train", "loss": 1 / s} for s in range(3, 7)]  # steps 3 and 4 again
    records += [{"step": 6, "split": "eval", "loss": 0.25}, {"step": 6, "split": "speed", "tokens_per_s": 3.0}]
    _write(tmp_path / "metrics.jsonl", records)
    plots.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "new" / "loss.png", "a run")
    assert _is_png(tmp_path / "new" / "loss.png")
    lines = {line.get_label().split(" ")[0]: line.get_xydata().tolist() for line in drawn[0].lines}
    assert lines["train"] == [[1, 9.0], [2, 9.0], [3, 1 / 3], [4, 1 / 4], [5, 1 / 5], [6, 1 / 6]]
    assert lines["eval"] == [[0, 4.0], [6, 0.25]]
    assert set(lines) == {"train", "eval"}
    assert drawn[0].get_title() == "a run"


def test_loss_curve_without_a_loss_is_refused(tmp_path):
    _write(tmp_path / "m.jsonl", [{"step": 1, "split": "train", "accuracy": 1.0}])
    with pytest.raises(ValueError, match="holds no loss"):
        plots.loss_curve(tmp_path / "m.jsonl", tmp_path / "a.png", "t")
    assert not (tmp_path / "a.png").exists()


def test_bars_draws_values_and_spread_in_order(tmp_path, drawn):
    plots.bars({"base": 1.0, "lora": 1.13}, tmp_path / "b.png", "TPOT", spread={"lora": 0.05}, label="ratio to base")
    assert _is_png(tmp_path / "b.png")
    axes = drawn[0]
    assert [p.get_width() for p in axes.patches] == [1.0, 1.13]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["base", "lora"]
    assert [t.get_text() for t in axes.texts] == ["1", "1.13 ± 0.05"]


def test_bars_refuses_a_spread_without_value(tmp_path):
    with pytest.raises(ValueError, match=r"\['lroa'\] have no value"):
        plots.bars({"lora": 1.0}, tmp_path / "b.png", "t", spread={"lroa": 0.1})
    with pytest.raises(ValueError, match="no values"):
        plots.bars({}, tmp_path / "b.png", "t")
