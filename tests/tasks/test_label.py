"""`task=label`: rewards and feedback for files of samples, ours and other people's."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from halos_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    FeedbackConfig,
    ModelConfig,
    RewardConfig,
    SamplingConfig,
)
from halos_jax.data import datasets
from halos_jax.data.chat.loading import load_renderer
from halos_jax.data.records import formats as records
from halos_jax.data.records.fields import RecordError
from halos_jax.models import spec
from halos_jax.models.files import export, hf
from halos_jax.rewards.labels import RewardError
from halos_jax.rounds import stages
from halos_jax.tasks import label as label_task
from halos_jax.tasks import scoring
from halos_jax.tasks.label import run_labelling
from halos_jax.types import Prompt, Sample, Turn
from halos_jax.workdir.interrupt import StopSignal
from tests.reward_parts import with_parts


def score_letters(prompt, response: str) -> float:
    """Give the length of the response."""
    return float(len(response))


def score_some(prompt, response: str) -> float | None:
    """Give the length of the response, but to one prompt say nothing."""
    return None if prompt[0]["content"] == "bca" else float(len(response))


@pytest.fixture
def samples(toy):
    """Return 3 samples of each of 4 prompts, as the policy would write them."""
    renderer = load_renderer(str(toy / "policy"))
    made = []
    for prompt in ("bca", "dab", "ecd", "fba"):
        turns = (Turn("user", prompt),)
        for number, text in enumerate((prompt[:1], prompt[:2], prompt[:2])):
            ids = renderer.render_prompt(turns, 16), renderer.render_response(text)
            made.append(Sample(Prompt(prompt, turns), number, text, *map(tuple, ids), "stop"))
    return made


def make_config(workdir, source, **changes) -> Config:
    config = Config(
        task="label",
        workdir=str(workdir),
        progress=False,
        reward=RewardConfig(kind="function", function="tests.tasks.test_label:score_letters"),
        data=DataConfig(train=str(source)),
        sampling=SamplingConfig(shard_prompts=2),
    )
    return dataclasses.replace(config, **changes)


def write(path, samples) -> Path:
    records.write_records(path, map(records.sample_to_record, samples))
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_each_kind_of_feedback_comes_with_the_scored_samples(samples, tmp_path):
    source = write(tmp_path / "samples.jsonl", samples)
    for kind, count in (("pairwise", 4), ("binary", 12), ("scalar", 12)):
        workdir = tmp_path / kind
        config = make_config(workdir, source, feedback=FeedbackConfig(type=kind))
        metrics = run_labelling(config, StopSignal())
        assert metrics["reward_label"] == pytest.approx(5 / 3)
        assert metrics["unlabelled_label"] == metrics["feedback_unlabelled"] == 0
        scored = datasets.load_scored(str(workdir / "scored.jsonl"))
        assert scored == [dataclasses.replace(s, reward=float(len(s.output))) for s in samples]
        feedback = read(workdir / "feedback.jsonl")
        assert len(feedback) == count and {f["type"] for f in feedback} == {f"{kind}_feedback"}
    for pair in datasets.load_preferences(str(tmp_path / "pairwise" / "feedback.jsonl")):
        assert (pair.chosen.sample_id, pair.rejected.sample_id) == (1, 0)
        original = next(s for s in samples if s.prompt == pair.prompt and s.sample_id == 1)
        assert pair.chosen.ids == original.response_ids  # what was sampled goes to training


def test_lengths_that_are_not_known_are_said_before_anything_is_scored(samples, tmp_path):
    texts = [dataclasses.replace(one, prompt_ids=(), response_ids=()) for one in samples]
    source = write(tmp_path / "samples.jsonl", texts)
    config = make_config(tmp_path / "run", source, feedback=FeedbackConfig(max_length_gap=0.5))
    with pytest.raises(RecordError, match=r"samples\.jsonl: feedback\.max_length_gap: got 0\.5"):
        run_labelling(config, StopSignal())
    assert not (tmp_path / "run" / scoring.SCORES).exists()
    for gap, count in ((0.25, 0), (0.5, 4)):  # answers of 2 and 3 tokens, the end among them
        config = make_config(
            tmp_path / f"{gap}",
            write(tmp_path / "tokens.jsonl", samples),
            feedback=FeedbackConfig(max_length_gap=gap),
        )
        assert run_labelling(config, StopSignal())["feedback_pairs"] == count


def test_a_split_is_labelled_as_its_round_and_can_be_stopped(samples, tmp_path, monkeypatch):
    seen, stop = {}, StopSignal()

    def spy(module, name):
        original = getattr(module, name)

        def call(*given):
            seen[name] = given
            return original(*given)

        monkeypatch.setattr(module, name, call)

    spy(label_task, "make_scorer")
    spy(stages, "make_feedback")
    rows = [
        records.sample_to_record(one) | {"split": "b" if one.prompt.prompt_id == "dab" else "a"}
        for one in samples
    ]
    records.write_records(tmp_path / "samples.jsonl", rows)
    config = make_config(tmp_path / "run", tmp_path / "samples.jsonl")
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train_split="a"),
        sampling=dataclasses.replace(config.sampling, round=5),
    )
    assert run_labelling(config, stop)["feedback_prompts"] == 3
    assert seen["make_scorer"][3] == stop.check
    _, scored, round = seen["make_feedback"]
    assert round == 5 and {one.prompt.prompt_id for one in scored} == {"bca", "ecd", "fba"}


def test_tokens_are_kept_where_their_tokenizer_is_known(toy, samples, tmp_path):
    renderer = load_renderer(str(toy / "policy"))
    foreign = dataclasses.replace(samples[0], prompt_ids=(1, 2), response_ids=(3,))
    for model, expected in ((ModelConfig(path="x"), foreign), (ModelConfig(), samples[0])):
        config = make_config(tmp_path, "", model=model)
        assert label_task.render_samples([foreign], renderer, config) == [expected]


def score_right(prompt, response: str, record) -> float:
    """Give 1 for the answer of the record, else 0."""
    return float(response == record["answer"])


def test_wrong_answers_that_tie_at_the_median_are_not_desirable(tmp_path, caplog):
    turns = [(Turn("user", f"what is {n} plus 1?"),) for n in range(2)]
    prompts = [Prompt(f"p{n}", one, {"answer": str(n + 1)}) for n, one in enumerate(turns)]
    made = [
        Sample(prompt, number, prompt.extra["answer"] if number == 2 else "no idea", (), (), "stop")
        for prompt in prompts
        for number in range(4)
    ]
    source = write(tmp_path / "samples.jsonl", made)
    function = "tests.tasks.test_label:score_right"
    reward = RewardConfig(kind="function", function=function)
    feedback = FeedbackConfig(type="binary")
    config = make_config(tmp_path / "run", source, reward=reward, feedback=feedback)
    metrics = run_labelling(config, StopSignal())
    assert (metrics["feedback_examples"], metrics["feedback_desirable"]) == (8, 2)
    rows = read(tmp_path / "run" / "feedback.jsonl")
    assert [row["label"] for row in rows] == [0, 0, 1, 0] * 2
    assert "too few" not in caplog.text
    config = dataclasses.replace(
        config,
        workdir=str(tmp_path / "other"),
        feedback=dataclasses.replace(feedback, threshold=0.0),
    )
    assert run_labelling(config, StopSignal())["feedback_desirable"] == 8
    assert "samples.jsonl: 0 of 8 answers (0.0%) are undesirable, too few" in caplog.text


def test_prompts_that_are_cut_for_the_reward_are_counted(toy, samples, tmp_path, caplog):
    bare = [dataclasses.replace(one, prompt_ids=(), response_ids=()) for one in samples]
    sampling = SamplingConfig(shard_prompts=2, max_prompt_length=4)
    model = ModelConfig(path=str(toy / "policy"))
    for name, given in (("own", samples), ("bare", bare)):
        source = write(tmp_path / f"{name}.jsonl", given)
        config = make_config(tmp_path / name, source, model=model, sampling=sampling)
        run_labelling(config, StopSignal())
    (said,) = [one.message for one in caplog.records if "max_prompt_length" in one.message]
    assert "bare.jsonl: 4 of 4 prompts (100 %, the longest has 5 tokens) are longer" in said


def test_a_field_that_the_reward_needs_is_missed_before_the_job_begins(samples, tmp_path):
    reward = RewardConfig(kind="function", function="halos_jax.rewards.functions:exact_answer")
    source = write(tmp_path / "samples.jsonl", samples)
    config = make_config(tmp_path / "run", source, reward=reward)
    with pytest.raises(RewardError, match=r"prompt bca .* field 'answer': got nothing"):
        run_labelling(config, StopSignal())
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_unlabelled_samples_are_left_out_and_counted(samples, tmp_path):
    source = write(tmp_path / "samples.jsonl", samples)
    config = make_config(tmp_path / "run", source)
    function = "tests.tasks.test_label:score_some"
    reward = dataclasses.replace(config.reward, function=function, max_unlabelled=0.3)
    metrics = run_labelling(dataclasses.replace(config, reward=reward), StopSignal())
    assert metrics["unlabelled_label"] == metrics["feedback_unlabelled"] == 3
    assert (metrics["feedback_pairs"], metrics["feedback_single"]) == (3, 1)
    assert "bca" not in {line["prompt_id"] for line in read(tmp_path / "run" / "feedback.jsonl")}
    scored = read(tmp_path / "run" / "scored.jsonl")
    assert [line.get("reward") for line in scored] == [None] * 3 + [1.0, 2.0, 2.0] * 3


def test_a_reward_model_scores_the_tokens_of_the_policy_or_the_text(toy, samples, tmp_path):
    """Files without tokens, and several at once, get the same scores."""
    decoder = dataclasses.replace(hf.load_decoder_config(str(toy / "base")), num_labels=1)
    params = spec.init_params(jax.random.key(2), decoder)
    export.save_model(params, decoder, tmp_path / "reward", source=toy / "policy")
    reward = RewardConfig(path=str(tmp_path / "reward"), compute_dtype="float32", max_length=40)
    bare = [dataclasses.replace(one, prompt_ids=(), response_ids=()) for one in samples]
    write(tmp_path / "a.jsonl", bare[:6])
    write(tmp_path / "b.jsonl", bare[6:])
    several = f"{tmp_path / 'a.jsonl'}, {tmp_path / 'b.jsonl'}"
    found = []
    for number, (path, source) in enumerate(
        (
            (str(toy / "policy"), write(tmp_path / "samples.jsonl", samples)),
            ("", tmp_path / "samples.jsonl"),
            ("", several),
        )
    ):
        workdir = tmp_path / str(number)
        model = ModelConfig(path=path)
        run_labelling(make_config(workdir, source, model=model, reward=reward), StopSignal())
        found.append([line["reward"] for line in read(workdir / "scores.jsonl")])
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-6)
    assert found[0][1] == found[0][2] != found[0][0]  # equal samples are a tie
    assert read(tmp_path / "2" / "scored.jsonl")[0]["prompt_ids"] == []


def test_what_needs_a_tokenizer_says_so(samples, tmp_path):
    source = write(tmp_path / "samples.jsonl", samples)
    config = make_config(tmp_path / "run", source)
    for changes, reason in (
        ({"cut_at_sentence": True}, r"reward\.cut_at_sentence"),
        ({"parts": {"a": {"path": "m"}, "b": {"kind": "function"}}}, r"a model in reward\.parts"),
    ):
        if "parts" in changes:
            reward = with_parts(dataclasses.replace(config.reward, kind="model"), changes["parts"])
        else:
            reward = dataclasses.replace(config.reward, kind="judge", **changes)
        with pytest.raises(ConfigError, match=rf"model\.path: got '', but {reason} needs the tok"):
            run_labelling(dataclasses.replace(config, reward=reward), StopSignal())


def test_a_reward_that_cannot_be_may_be_mended_in_the_same_workdir(samples, tmp_path):
    source = write(tmp_path / "samples.jsonl", samples)
    config = make_config(tmp_path / "run", source)
    wrong = dataclasses.replace(config.reward, function="tests.tasks.test_label:score_leters")
    with pytest.raises(ConfigError, match=r"reward\.function: got .*score_leters"):
        run_labelling(dataclasses.replace(config, reward=wrong), StopSignal())
    assert run_labelling(config, StopSignal())["feedback_pairs"] == 4


def test_one_id_for_two_samples_is_an_error_that_names_it(samples, tmp_path):
    source = write(tmp_path / "samples.jsonl", [*samples, samples[4]])
    with pytest.raises(RecordError, match=r"got sample 1 of prompt dab twice"):
        run_labelling(make_config(tmp_path / "run", source), StopSignal())


def test_one_id_for_two_prompts_is_an_error_that_names_it(samples, tmp_path):
    other = dataclasses.replace(samples[-1].prompt, prompt_id="dab")
    changed = dataclasses.replace(samples[-1], prompt=other, sample_id=9)
    source = write(tmp_path / "samples.jsonl", [*samples[:-1], changed])
    with pytest.raises(RecordError, match=r"got prompt_id 'dab' for two conversations"):
        run_labelling(make_config(tmp_path / "run", source), StopSignal())


def test_bad_samples_are_left_out_on_demand_in_every_stage(
    samples, tmp_path, caplog, toy, monkeypatch
):
    def stop(job, samples):
        raise KeyboardInterrupt

    beyond = dataclasses.replace(samples[0], sample_id=7, response_ids=(1, 10**6))
    other = dataclasses.replace(samples[-1].prompt, prompt_id="dab")
    changed = dataclasses.replace(samples[-1], prompt=other, sample_id=9)
    source = write(tmp_path / "samples.jsonl", [*samples, samples[4], changed, beyond])
    data = DataConfig(train=str(source), skip_bad=True)
    model = ModelConfig(path=str(toy / "policy"))
    config = make_config(tmp_path / "run", source, data=data, model=model)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(label_task, "_write_feedback", stop)
        run_labelling(config, StopSignal())
    assert "2 bad records are left out (data.skip_bad), 13 are left; the first: " in caplog.text
    assert "1 bad records are left out (data.skip_bad), 12 are left; the first: " in caplog.text
    # Behind the scores the same samples are left out, else these would be another job's.
    assert run_labelling(config, StopSignal())["feedback_pairs"] == 4
    assert len((tmp_path / "run" / "scored.jsonl").read_text().splitlines()) == 12
