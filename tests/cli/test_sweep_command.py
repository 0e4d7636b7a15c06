"""`zflora sweep` of several comparisons."""

import pytest

from zflora_jax.cli.main import main
from zflora_jax.core.adapter_config import AdapterConfig
from zflora_jax.core.errors import NonFiniteError
from zflora_jax.core.fields import ConfigError
from zflora_jax.experiments import jobs, store
from zflora_jax.experiments.compare import compare_methods
from zflora_jax.experiments.comparison import Comparison
from zflora_jax.experiments.store import Job
from zflora_jax.parallel import workers

LORA = {"lora": AdapterConfig("lora", rank=2)}
LARGE = AdapterConfig("lora", rank=8)

TWO = """
from zflora_jax.config import AdapterConfig
from zflora_jax.experiments.comparison import Comparison
from support.runs import small_run

def get_sweep():
    lora = {{"lora": AdapterConfig("lora", rank=2)}}
    return [Comparison(name, small_run({model!r}), lora, (1e-3,), (0,)) for name in {names!r}]
"""


GRIDS = """
from zflora_jax.experiments.grid import Grid
from support.runs import small_run

def get_sweep():
"""


def sweep_of(tmp_path, base_dir, *names):
    (tmp_path / "two.py").write_text(TWO.format(model=base_dir, names=names))
    where = ["--workdir", str(tmp_path / "w"), "--out", str(tmp_path / "out")]
    return ["sweep", "--config", str(tmp_path / "two.py"), *where]


def test_a_comparison_that_fails_leaves_the_others(base_dir, tmp_path, fake_train, capsys):
    def diverges_once(run, workdir, **rest):
        if "two_first" in str(workdir):
            raise NonFiniteError("loss is nan at step 2")
        return fake_train(run, workdir, **rest)

    jobs.train = diverges_once  # `fake_train` puts the real one back
    assert main(sweep_of(tmp_path, base_dir, "two_first", "two_second")) == 2
    assert "diverged at every learning rate" in capsys.readouterr().err
    assert (tmp_path / "out" / "two_second.md").is_file()
    assert "two_second.md" in (tmp_path / "out" / "two.md").read_text()


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (("math", "chat"), [], "its page would be the overview's, math.md"),
        (("two_a", "two_a"), [], "two sweeps are called 'two_a'"),
        (("two_a", "two_b"), ["adapter.rank=8"], "--set adapter.rank: two_a gives it to each"),
        (("two_a",), ["optim.learning_rate=1"], "--set optim.learning_rate: two_a gives it"),
        (("two_a",), ["eval.split=test"], "--set eval.split: two_a gives it to each of its runs"),
    ],
)
def test_what_a_sweep_cannot_use_is_said_before_its_runs(
    names, settings, message, base_dir, tmp_path, fake_train, capsys
):
    command = sweep_of(tmp_path, base_dir, *names)
    assert main([*command, *(["--set", *settings] if settings else [])]) == 2
    assert message in capsys.readouterr().err and not fake_train.runs


def test_a_run_that_cannot_be_made_leaves_the_others(two_steps, tmp_path, fake_train):
    """Out of memory, for one; the next call tries it again."""
    methods = {"large": LARGE} | LORA
    plan = Comparison("some", two_steps, methods, (1e-3,), (0, 1))
    tried = []

    def runs_out(run, workdir, **rest):
        if run.adapter.rank == 8 and len(tried) < 2:
            tried.append(run.train.seed)
            raise MemoryError("no room")
        return fake_train(run, workdir, **rest)

    jobs.train = runs_out  # `fake_train` puts the real one back
    with pytest.raises(ConfigError, match=r"^some: large-lr0.001-seed0: no room$"):
        compare_methods(plan, tmp_path / "w", tmp_path / "out", console=False)
    page = (tmp_path / "out" / "some.md").read_text()
    assert "| lora |" in page and "Not run yet: large" in page and tried == [0]
    tried.append(-1)
    found = compare_methods(plan, tmp_path / "w", tmp_path / "out", console=False)
    assert [row["method"] for row in found["rows"]] == ["large", "lora"]


def test_a_run_that_another_process_makes_is_made(two_steps, tmp_path, fake_train):
    """It has no room here; the other one is done with it while this one makes the next."""
    plan = Comparison("some", two_steps, {"large": LARGE} | LORA, (1e-3,), (0,))
    large = []

    def elsewhere(run, workdir, **rest):
        if run.adapter.rank == LARGE.rank:
            name = "large-lr0.001-seed0"
            large.append(Job(name, run, workdir, tmp_path / "out" / "some" / f"{name}.json"))
            raise MemoryError("no room")
        store.write_record(large[0], {"validation_loss": 1.0, "steps": 2, "seconds": 1.0})
        return fake_train(run, workdir, **rest)

    jobs.train = elsewhere  # `fake_train` puts the real one back
    rows = compare_methods(plan, tmp_path / "w", tmp_path / "out", console=False)["rows"]
    assert [row["method"] for row in rows] == ["large", "lora"]


def test_workers_that_could_not_make_a_run_leave_the_tables(
    base_dir, tmp_path, fake_train, monkeypatch
):
    command = [*sweep_of(tmp_path, base_dir, "two_first", "two_second"), "--workers", "2"]
    monkeypatch.setattr(workers, "run_pinned", lambda *_: [2, 0])
    assert main(command) == 0 and (tmp_path / "out" / "two.md").is_file()
    monkeypatch.setattr(workers, "run_pinned", lambda *_: [2, 75])
    with pytest.raises(SystemExit, match="75"):
        main(command)


def test_an_overview_does_not_replace_the_page_of_a_grid(base_dir, tmp_path, fake_train, capsys):
    command = sweep_of(tmp_path, base_dir, "two_a", "two_b")
    path = tmp_path / "two.py"
    grid = f'Grid("two", small_run({base_dir!r}), {{"train.seed": [0]}})'
    text = path.read_text().replace("    return [", f"    return [{grid}] + [")
    path.write_text("from zflora_jax.experiments.grid import Grid\n" + text)
    assert main(command) == 2 and not fake_train.runs
    assert "sweep 'two': its page would be the overview's, two.md" in capsys.readouterr().err
    path.write_text(f"{GRIDS}    return {grid}\n")
    assert main([*command, "--set", "train.seed=3"]) == 2 and not fake_train.runs
    assert "--set train.seed: two gives it to each of its runs" in capsys.readouterr().err
    path.write_text("def get_sweep():\n    return []\n")
    assert main(command) == 2
    assert "two.py returns no sweep" in capsys.readouterr().err
