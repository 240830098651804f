"""What a log file has of a run that is stopped, goes on, and is started once more."""

import platform
import re
import signal
import textwrap

import jax
import pytest

OPTIONS = ("progress=true", "checkpoint.every=0", "train.log_every=1")
STOP = {"2 sample: after sample_shard 2": signal.SIGTERM}

SUMMARY = """\
this machine
  devices   1 x cpu
  versions  halos_jax VERSION, jax {jax}, Python {python}
task online: rounds of sampling, scoring, feedback and training
  model     INPUTS/policy (llama, 11,360 parameters in float32, computed in float32)
  template  the tokenizer's own (chat_template.jinja)
  loss      dpo; reference: sft
  reward    model INPUTS/reward
  data      INPUTS/prompts.jsonl
  held out  INPUTS/eval.jsonl
  training  batches of 2, 1 epoch of at most 16 tokens an example; adamw, rate 0.01 (constant)
  sampling  3 a prompt, at most 6 tokens, temperature 1, top-p 1
  rounds    6 prompts each
  guard     warns where the held-out reward falls
  final     the policy of the round with the highest held-out reward (rounds.keep_best=auto)
  mesh      data=1, fsdp=1, tensor=1
  workdir   WORKDIR (metrics.jsonl, rounds/, checkpoints/, final/)
  start     {start}"""

# Of the stages and the table, with # for every number.
ROUND = """\
round #: # pairs, # steps, packed fill # %
step #: held-out loss #, accuracy #, margin #
round #, train: # steps in # s; # steps/s
round #, evaluate: # samples in # s; # samples/s
round #, sample: # samples in # s; # samples/s; # tokens/s"""
TABLE = """\
round prompts pairs steps reward win kl margin ties cut length stale sec tok/s
# # # # # ±# - - - - - # - # -
# # # # # ±# # # # # # # # # #"""


@pytest.fixture(scope="module")
def said(program, tmp_path_factory):
    """Return stdout and stderr of a run that is stopped, of its resume, and of a third start."""
    workdir = tmp_path_factory.mktemp("console") / "run"
    found = [program.run(workdir, *OPTIONS, signals=signals) for signals in (STOP, {}, {})]
    assert [code for code, *_ in found] == [75, 0, 0]
    for _, out, err in found:
        assert "\r" not in out + err and "\x1b" not in out + err, "a bar or a colour"
    assert [err for *_, err in found[1:]] == ["", ""]
    return [out.replace(str(workdir), "WORKDIR") for _, out, _ in found]


def hide(text: str) -> list[str]:
    """Return the lines of a log without times, with # for numbers and with single spaces."""
    text = re.sub(r"(?m)^\d\d:\d\d:\d\d ", "", text)
    text = re.sub(r"; [^;\n]* of it compiling|; about [^;\n]* left of the run", "", text)
    text = re.sub(r"[-+]?\b\d[\d,]*(\.\d+)?(e[-+]\d+)?\b", "#", text)
    return [" ".join(line.split()) for line in text.splitlines()]


def count_tables(text: str) -> int:
    return len(re.findall(r"(?m)^round +prompts ", text))


@pytest.mark.parametrize(
    ("number", "start"),
    [
        (0, "new"),
        (1, "goes on in round 2, stage sample"),
        (2, "rounds 0 to 2 are done; complete, unless it was given more to do"),
    ],
)
def test_a_run_begins_with_a_summary(program, said, number, start):
    """The paths are as long as the machine likes: what was wrapped is joined again."""
    text = re.sub(r"(?m)^\d\d:\d\d:\d\d ", "", said[number]).replace(str(program.inputs), "INPUTS")
    text = re.sub(r"\n {12}(?=\S)", " ", text)
    text = re.sub(r"halos_jax [\w.() ]+, jax", "halos_jax VERSION, jax", text)
    versions = {"jax": jax.__version__, "python": platform.python_version()}
    expected = SUMMARY.format(start=start, **versions)
    assert text.splitlines()[: len(expected.splitlines())] == expected.splitlines()


def test_a_round_is_a_line_a_stage_and_the_table_so_far(said):
    lines = hide(said[0])
    for line in ROUND.splitlines():
        assert line in lines, textwrap.indent("\n".join(lines), "  ")
    first = lines.index("round # of # is done:", lines.index("round # of # is done:") + 1)
    assert lines[first + 1 : first + 4] == TABLE.splitlines()


def test_a_resume_shows_the_rounds_that_are_done_once(said):
    stopped, resumed, complete = said
    assert count_tables(stopped) == 2  # behind each of two rounds
    assert count_tables(resumed) == 2 and "done before:\n" in resumed
    assert "round 1 of 2 is done" not in resumed and "round 2 of 2 is done" in resumed
    assert count_tables(complete) == 1 and "is complete: nothing to do\nround " in complete
    tables = [
        text[text.rindex("\nround  prompts") :].splitlines()[1:5] for text in (resumed, complete)
    ]
    assert tables[0] == tables[1]
    assert [line.split()[0] for line in tables[0]] == ["round", "0", "1", "2"]


def test_steps_leave_no_long_lines(said):
    """Six steps, each with twenty metrics; budgets and advice are sentences."""
    for text in said:
        lines = text.splitlines()
        assert not [line for line in lines if line.count("|") or "logps_" in line]
        assert all(len(line) <= 109 for line in lines if re.search(r" (step|finished) ", line))
        assert max(len(line) for line in lines if line.startswith("round ")) <= 100
