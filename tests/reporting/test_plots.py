import json

import pytest

from zflora_jax.reporting import plots


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


@pytest.fixture
def figures(monkeypatch):
    """The figures saved in a test."""
    saved = []
    save = plots._save
    monkeypatch.setattr(
        plots, "_save", lambda figure, path: (saved.append(figure), save(figure, path))
    )
    return saved


def test_training_curves_draw_each_step_once_after_a_resume(tmp_path, figures):
    records = [
        {"step": s, "split": "train", "loss": 9.0, "grad_norm": 2.0, "learning_rate": 0.1 * s}
        for s in range(1, 5)
    ]
    records += [
        {"step": 0, "split": "eval", "loss": 4.0},
        {"step": 2, "split": "eval", "loss": None},
    ]
    # Steps 3 and 4 again.
    records += [
        {"step": s, "split": "train", "loss": 1 / s, "target_tokens_per_s": 10.0 * s}
        for s in range(3, 7)
    ]
    records += [{"step": 6, "split": "eval", "loss": 0.25}]
    _write(tmp_path / "metrics.jsonl", records)
    plots.training_curves({"mine": tmp_path / "metrics.jsonl"}, tmp_path / "new" / "c", "a run")
    assert _is_png(tmp_path / "new" / "c.png")
    drawn = (tmp_path / "new" / "c.svg").read_bytes()
    assert b"<svg" in drawn[:1000] and b">loss (nats per token)<" in drawn  # text stays text
    plots.training_curves({"mine": tmp_path / "metrics.jsonl"}, tmp_path / "again", "a run")
    assert (tmp_path / "again.svg").read_bytes() == drawn
    loss, rate, speed, norm = figures[0].axes
    lines = [(line.get_label(), line.get_xydata().tolist()) for line in loss.lines]
    assert lines[0] == (
        "mine (train, last 0.1667)",
        [[1, 9.0], [2, 9.0], [3, 1 / 3], [4, 1 / 4], [5, 1 / 5], [6, 1 / 6]],
    )
    assert lines[1] == ("mine (eval, last 0.25)", [[0, 4.0], [6, 0.25]])
    assert [len(axes.lines) for axes in (rate, speed, norm)] == [
        1,
        1,
        1,
    ] and norm.get_yscale() == "log"
    assert speed.lines[0].get_xydata().tolist() == [[s, 10.0 * s] for s in range(3, 7)]
    assert "nats per token" in loss.get_ylabel() and "tokens per second" in speed.get_ylabel()
    assert figures[0].get_suptitle() == "a run"


def test_training_curves_of_several_runs_have_a_colour_each(tmp_path, figures):
    for name in "ab":
        _write(
            tmp_path / f"{name}.jsonl",
            [{"step": 1, "split": split, "loss": 1.0} for split in ("train", "eval")],
        )
    plots.training_curves(
        {name: tmp_path / f"{name}.jsonl" for name in "ab"}, tmp_path / "c", "both"
    )
    colours = [line.get_color() for line in figures[0].axes[0].lines]
    assert colours == ["C0", "C0", "C1", "C1"]


def test_training_curves_of_nothing_are_refused(tmp_path):
    _write(tmp_path / "m.jsonl", [{"step": 1, "split": "train", "accuracy": 1.0}])
    with pytest.raises(ValueError, match="no numbers to draw"):
        plots.training_curves({"m": tmp_path / "m.jsonl"}, tmp_path / "a", "t")
    assert not (tmp_path / "a.png").exists()


def test_bars_draws_values_and_spread_in_order(tmp_path, drawn):
    plots.bars(
        {"base": 1.0, "lora": 1.13},
        tmp_path / "b",
        "TPOT",
        spread={"lora": 0.05},
        label="ratio to base",
    )
    assert _is_png(tmp_path / "b.png")
    axes = drawn[0]
    assert [p.get_width() for p in axes.patches] == [1.0, 1.13]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["base", "lora"]
    assert [t.get_text() for t in axes.texts] == ["1", "1.13 ± 0.05"]


def test_bars_refuses_a_spread_without_value(tmp_path):
    with pytest.raises(ValueError, match=r"\['lroa'\] have no value"):
        plots.bars({"lora": 1.0}, tmp_path / "b", "t", spread={"lroa": 0.1})
    with pytest.raises(ValueError, match="no values"):
        plots.bars({}, tmp_path / "b", "t")


@pytest.mark.parametrize("count", [6, 14])
def test_the_names_of_many_runs_stand_below(tmp_path, figures, count):
    for i in range(count):
        _write(
            tmp_path / f"{i}.jsonl",
            [{"step": s, "split": "train", "loss": s + i, "grad_norm": 1.0} for s in (1, 2)],
        )
    plots.training_curves(
        {f"run {i}": tmp_path / f"{i}.jsonl" for i in range(count)}, tmp_path / "c", "many"
    )
    [legend] = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [f"run {i}" for i in range(count)]
    assert not any(axes.get_legend() for axes in figures[0].axes)
    drawn = [line.get_color() for line in figures[0].axes[0].lines]
    assert len({str(colour) for colour in drawn}) == count and drawn == [
        handle.get_color() for handle in legend.legend_handles
    ]


def test_a_forest_draws_each_difference_with_its_interval(tmp_path, figures):
    groups = {
        "one": {"a": (1.0, -0.5, 2.0), "b": (-2.0, -3.0, -1.0)},
        "two": {"a": (0.5, 0.0, 1.0)},
    }
    plots.forest(groups, tmp_path / "f", "differences", "points", {"one": 3.0}, {("one", "b")})
    assert _is_png(tmp_path / "f.png")
    [figure] = figures
    first, second = figure.axes
    assert [t.get_text() for t in first.get_yticklabels()] == ["a", "b"]
    assert [first.get_title(loc="left"), second.get_title(loc="left")] == ["one", "two"]
    low, high = zip(*(c.get_segments()[0][:, 0] for c in first.collections), strict=True)
    assert (low, high) == ((-0.5, -3.0), (2.0, -1.0))
    greys = [container.lines[0].get_color() for container in first.containers]
    assert greys == ["C0", "0.6"]
    assert figure.get_supxlabel() == "points\n(shaded: the margin)"
    for empty in ({}, {"one": {}}):
        with pytest.raises(ValueError, match="no values to draw"):
            plots.forest(empty, tmp_path / "g", "nothing", "points")
    rounded = (83.33333333333333, 83.33333333333334, 83.33333333333334)  # of five 100 and a 0
    plots.forest({"one": {"a": rounded}}, tmp_path / "h", "differences", "points")
    long = {"one": {"zflora-minimal-plus, 1 of 3 seeds": (1.0, 0.0, 2.0)}}
    label = "points of 100 of each table's measure (grey: not all seeds yet)"
    plots.forest(long, tmp_path / "l", "differences", label, {"one": 3.0})
    drawn, whole = figures[-1]._supxlabel.get_window_extent(), figures[-1].bbox
    assert whole.x0 < drawn.x0 and drawn.x1 < whole.x1 and whole.y0 < drawn.y0


def test_dots_share_their_rows_between_panels(tmp_path, figures):
    panels = {"score": {"a": (2.0, 1.0, 4.0), "b": (2.0,)}, "cost": {"b": (5.0,), "c": (6.0,)}}
    plots.dots(panels, tmp_path / "s", "quality and cost", {"score": 0.0})
    assert _is_png(tmp_path / "s.png")
    left, right = figures[0].axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["a", "b", "c"]
    assert [line.get_xydata().tolist() for line in left.lines] == [
        [[2.0, 0.0]],
        [[2.0, 1.0]],
        [[0.0, 0.0], [0.0, 1.0]],  # the mark, from the bottom of the panel to its top
    ]
    assert [line.get_xydata().tolist() for line in right.lines] == [[[5.0, 1.0]], [[6.0, 2.0]]]
    assert (left.get_xlabel(), right.get_xlabel()) == ("score", "cost")
    assert left.get_ylim() == right.get_ylim() == (2.5, -0.5)  # the first on top
    [interval] = left.collections
    assert interval.get_segments()[0].tolist() == [[1.0, 0.0], [4.0, 0.0]]
    assert not right.collections
    for empty in ({}, {"cost": {}}):
        with pytest.raises(ValueError, match="no values to draw"):
            plots.dots(empty, tmp_path / "t", "nothing")
