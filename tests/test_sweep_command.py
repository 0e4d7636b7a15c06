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

TWO = """
from zflora_jax.config import AdapterConfig
from zflora_jax.experiments.comparison import Comparison
from support.runs import small_run

def get_sweep():
    lora = {{"lora": AdapterConfig("lora", rank=2)}}
    return [Comparison(name, small_run({model!r}), lora, (1e-3,), (0,)) for name in {names!r}]
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
        (("two_a", "two_a"), [], "two sweeps are called ['two_a']"),
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
    methods = {"large": AdapterConfig("lora", rank=8)} | LORA
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
    plan = Comparison("some", two_steps, LORA, (1e-3,), (0,))

    def elsewhere(run, workdir, **rest):
        job = Job("lora-lr0.001-seed0", run, workdir, tmp_path / "out/some/lora-lr0.001-seed0.json")
        store.write_record(job, {"validation_loss": 1.0, "steps": 2, "seconds": 1.0})
        raise MemoryError("no room")

    jobs.train = elsewhere  # `fake_train` puts the real one back
    (row,) = compare_methods(plan, tmp_path / "w", tmp_path / "out", console=False)["rows"]
    assert row["method"] == "lora"


def test_workers_that_could_not_make_a_run_leave_the_tables(
    base_dir, tmp_path, fake_train, monkeypatch
):
    command = [*sweep_of(tmp_path, base_dir, "two_first", "two_second"), "--workers", "2"]
    monkeypatch.setattr(workers, "run_pinned", lambda *_: [2, 0])
    assert main(command) == 0 and (tmp_path / "out" / "two.md").is_file()
    monkeypatch.setattr(workers, "run_pinned", lambda *_: [2, 75])
    with pytest.raises(SystemExit, match="75"):
        main(command)
