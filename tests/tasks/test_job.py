"""A task that stands alone knows what it was started on."""

import dataclasses

import pytest

from halos_jax.config import Config, ConfigError, DataConfig, ModelConfig, TrackersConfig
from halos_jax.policies.source import Source
from halos_jax.rounds.context import StageResult
from halos_jax.storage import WorkdirError
from halos_jax.tasks.job import open_job, read_by_others
from halos_jax.workdir import execution
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.manifests import ManifestError


@pytest.fixture
def policy(tmp_path) -> Source:
    """Return checkpoint 3 of a run."""
    source = Source("run", ModelConfig(), workdir=tmp_path / "run", checkpoint=3)
    source.record.parent.mkdir(parents=True)
    source.record.write_text("{}")
    return source


def begin(config, inputs="inputs", **options):
    with open_job(config, StopSignal()) as job:
        job.begin(inputs=inputs, **options)
        return job


def test_a_job_knows_its_policy(tmp_path, policy):
    config = Config(task="export", workdir=str(tmp_path / "job"))
    assert begin(config, policy=policy).manifest.policy == "checkpoint 3"
    assert begin(config, policy=policy).manifest.policy == "checkpoint 3"
    policy.record.write_text('{"another": "run"}')
    with pytest.raises(
        ConfigError, match=r"model\.path: .*00000003/round/metadata holds something"
    ):
        begin(config, policy=policy)


def test_a_job_without_metrics_says_that_trackers_get_nothing(tmp_path, caplog):
    trackers = TrackersConfig(names=("tensorboard",))
    begin(Config(task="label", workdir=str(tmp_path / "job"), trackers=trackers))
    assert "task=label writes no metrics.jsonl, so trackers get nothing" in caplog.text


def test_a_job_is_carried_on_with_what_it_was_started_on(tmp_path, caplog):
    caplog.set_level("INFO")
    config = Config(task="label", workdir=str(tmp_path / "job"), seed=4)
    assert begin(config).manifest.next_stage == "score"
    assert begin(config).manifest.policy == ""
    with pytest.raises(ConfigError, match=r"data\.train: its records are not those that the job"):
        begin(config, inputs="other")
    with pytest.raises(ConfigError, match=r"data\.eval: its records"):
        begin(dataclasses.replace(config, task="eval", workdir=str(tmp_path / "eval")))
        begin(dataclasses.replace(config, task="eval", workdir=str(tmp_path / "eval")), "other")
    with open_job(config, StopSignal()) as job:
        assert not job.is_complete
        job.workspace.begin_execution()
        (job.workdir / "scores.jsonl").write_text("{}\n")
        job.commit("score", StageResult({"scores.jsonl": 1}, {"reward": 0.5}))
        job.commit("feedback")
    with open_job(config, StopSignal()) as job:
        assert job.is_complete and job.metrics == {"reward": 0.5}
        assert job.manifest.seed == 4 and "nothing to do" in caplog.text
        for stage in ("score", "feedback"):
            (found,) = execution.find_executions(job.manifest, stage)
            assert found == execution.describe_execution(config, job.mesh)
    (tmp_path / "job" / "scores.jsonl").write_text("changed\n")
    with pytest.raises(ManifestError, match=r"scores\.jsonl has sha256"):
        begin(config)


def test_fields_that_a_job_does_not_read_are_said(tmp_path, caplog):
    data = DataConfig(holdout=4, test="t.jsonl")
    with open_job(Config(task="label", workdir=str(tmp_path), data=data), StopSignal()):
        assert "data.holdout=4: task=label does not read it" in caplog.text
        assert "data.test=t.jsonl: task=label does not read it" in caplog.text
    caplog.clear()
    with open_job(Config(task="label", workdir=str(tmp_path / "other")), StopSignal()):
        assert not caplog.text


@pytest.mark.parametrize(
    ("tasks", "count"),
    [(("label", "online"), 0), (("label", "sft"), 1), (("sample", "label"), 3), ((), 3)],
)
def test_fields_that_another_task_of_the_pipeline_reads_are_not_said(
    tmp_path, caplog, tasks, count
):
    data, trackers = DataConfig(holdout=4, test="t.jsonl"), TrackersConfig(names=("tensorboard",))
    config = Config(task="label", workdir=str(tmp_path), data=data, trackers=trackers)
    with read_by_others(tasks), open_job(config, StopSignal()):
        assert len(caplog.messages) == count  # data.test is online's alone
    caplog.clear()
    with open_job(config, StopSignal()):
        assert len(caplog.messages) == 3


def test_an_output_must_be_new_when_the_job_begins(tmp_path):
    config = Config(task="sample", workdir=str(tmp_path / "job"))
    output = tmp_path / "mine.jsonl"
    output.write_text("mine")
    with pytest.raises(ConfigError, match=r"sampling\.output: .*mine\.jsonl exists already"):
        begin(config, output=output, field="sampling.output")
    output.unlink()
    begin(config, output=output, field="sampling.output")
    output.write_text("half")  # the job's own, from before it was killed
    begin(config, output=output, field="sampling.output")


def test_another_task_or_seed_is_another_job(tmp_path):
    config = Config(task="sample", workdir=str(tmp_path / "job"))
    begin(config)
    with pytest.raises(WorkdirError, match="task: 'sample' -> 'label'"):
        begin(dataclasses.replace(config, task="label"))
