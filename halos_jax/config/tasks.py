"""The tasks and the modes: one row each, read by all code that depends on the task or mode.

A new task is a row here and a module of its own. Functions are named as text, "module:function",
because they live on higher levels; `load` imports them.
"""

import dataclasses
import pkgutil
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Literal

Task = Literal[
    "online",
    "sft",
    "reward_model",
    "align",
    "sample",
    "label",
    "eval",
    "compare",
    "export",
    "toy_data",
    "bench",
    "pipeline",
]
Mode = Literal["run", "check", "show", "verify", "report"]


@dataclasses.dataclass(frozen=True)
class ModeSpec:
    """A mode: what to do with a config.

    Attributes:
      summary: one line for --help.
      run: called with the config instead of the task. It takes no lock, and writes nothing into
        the workdir except a report of its own. Empty: the task itself is run.
      on_devices: whether the devices must suit the config; if not, any machine will do.
    """

    summary: str
    run: str = ""
    on_devices: bool = True


MODES: Mapping[Mode, ModeSpec] = {
    "run": ModeSpec("run the task, or resume it"),
    "check": ModeSpec(
        "make the checks of a start, without reading weights or writing anything",
        run="halos_jax.tasks.preflight:run_check",
    ),
    "show": ModeSpec(
        "print the resolved config, the budget and where the run would start or go on",
        run="halos_jax.tasks.overview:run_show",
    ),
    "verify": ModeSpec(
        "check a finished or running workdir by its hashes and by making some of its results again",
        run="halos_jax.audit.run:run_verify",
    ),
    "report": ModeSpec(
        "write the page about the run in the workdir, or one that compares runs",
        run="halos_jax.report.command:run_report",
        on_devices=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """What a task does, what it needs and what it leaves behind.

    Attributes:
      summary: one line for --help.
      run: called with the config and the stop signal; returns the last metrics.
      policy: what it loads from `model.path`: nothing, the tokenizer alone, or a model, which for
        "language" must not be a classifier and for "classifier" is turned into one.
      trains: whether it trains the policy. If not, it may start from a checkpoint of a run.
      samples: whether it draws samples.
      scored_if: (path of a field, value): it needs rewards if the field has that value; True:
        always.
      makes_feedback: whether it turns rewards into feedback, according to `config.feedback`.
      has_reference: whether its loss is the config's, with the reference of `rounds.reference`.
      loss: the loss that it always uses; empty: the config's.
      needs: the fields that must not be empty.
      reads: the fields or sections that name its inputs; a resume compares their fingerprints.
      watches: the fields that give it held-out prompts, whose samples it scores; see
        `eval.scorers`.
      data: the field that names its records.
      keeps_prompts: whether its records are samples, whose prompts must not change.
      divides: the fields whose numbers the row shards of the mesh must divide.
      on_mesh: whether it uses the mesh, and may be checked before it begins.
      stages: the stages in its manifest, in order; empty: it has no manifest.
      first_stages: the stages of round 0, if it has rounds.
      remakes: folders in its workdir that it makes again if they are damaged.
      limits: yields error lines; called with path -> value of every field.
      check_data: reads and renders the data for mode=check; called with (config, decoder,
        renderer).
      modes: the modes that it supports.
    """

    summary: str
    run: str = ""
    policy: Literal["none", "tokenizer", "any", "language", "classifier"] = "none"
    trains: bool = False
    samples: bool = False
    scored_if: tuple[str, Any] | bool = False
    makes_feedback: bool = False
    has_reference: bool = False
    loss: str = ""
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    watches: tuple[str, ...] = ()
    data: str = "data.train"
    keeps_prompts: bool = False
    divides: tuple[str, ...] = ()
    on_mesh: bool = True
    stages: tuple[str, ...] = ()
    first_stages: tuple[str, ...] = ()
    remakes: tuple[str, ...] = ("final",)
    limits: str = ""
    check_data: str = ""
    modes: tuple[Mode, ...] = ("run", "check", "show", "verify", "report")

    @property
    def exports(self) -> bool:
        """Whether it leaves a model for others, as `config.export` says."""
        return self.trains or "export" in self.stages

    def is_scored(self, read: Callable[[str], Any]) -> bool:
        """Tell whether it needs rewards; `read` returns the value of a field from its path."""
        if isinstance(self.scored_if, bool):
            return self.scored_if
        path, value = self.scored_if
        return bool(read(path) == value)


_TRAINED = ("data.train", "data.eval", "model", "lora")

TASKS: Mapping[Task, TaskSpec] = {
    "online": TaskSpec(
        "rounds of sampling, scoring, feedback and training",
        run="halos_jax.tasks.online:run_online",
        policy="language",
        trains=True,
        samples=True,
        scored_if=True,
        makes_feedback=True,
        has_reference=True,
        needs=("model.path", "data.train"),
        reads=(*_TRAINED, "data.test"),
        watches=("data.eval", "data.holdout", "data.test"),
        divides=("train.batch_size", "sampling.slots"),
        stages=("sample", "score", "feedback", "train", "evaluate"),
        first_stages=("evaluate",),  # the SFT policy on the held-out prompts
        limits="halos_jax.config.limits:check_online",
        check_data="halos_jax.tasks.preflight:check_online_data",
    ),
    "sft": TaskSpec(
        "supervised fine-tuning on demonstrations",
        run="halos_jax.tasks.train:run_training",
        policy="language",
        trains=True,
        loss="sft",
        needs=("model.path", "data.train"),
        reads=_TRAINED,
        divides=("train.batch_size",),
        check_data="halos_jax.tasks.preflight:check_fixed_data",
    ),
    "reward_model": TaskSpec(
        "a reward model, trained on pairs",
        run="halos_jax.tasks.train:run_training",
        policy="classifier",
        trains=True,
        loss="bradley-terry",
        needs=("model.path", "data.train"),
        reads=_TRAINED,
        divides=("train.batch_size",),
        check_data="halos_jax.tasks.preflight:check_fixed_data",
    ),
    "align": TaskSpec(
        "offline alignment, on existing feedback",
        run="halos_jax.tasks.train:run_training",
        policy="language",
        trains=True,
        has_reference=True,
        needs=("model.path", "data.train"),
        reads=_TRAINED,
        divides=("train.batch_size",),
        check_data="halos_jax.tasks.preflight:check_fixed_data",
    ),
    "sample": TaskSpec(
        "samples of a policy for prompts",
        run="halos_jax.tasks.sample:run_sampling",
        policy="language",
        samples=True,
        scored_if=("sampling.best_of", True),
        needs=("model.path", "data.train"),
        reads=("data.train", "model"),
        divides=("sampling.slots",),
        stages=("sample", "score", "write"),
        limits="halos_jax.tasks.sample:check_sample",
        check_data="halos_jax.tasks.preflight:check_sampled_data",
    ),
    "label": TaskSpec(
        "rewards for existing samples, and the feedback made from them",
        run="halos_jax.tasks.label:run_labelling",
        policy="tokenizer",
        scored_if=True,
        makes_feedback=True,
        needs=("data.train",),
        reads=("data.train", "model"),
        keeps_prompts=True,
        stages=("score", "feedback"),
        check_data="halos_jax.tasks.preflight:check_labelled_data",
    ),
    "eval": TaskSpec(
        "the reward of a policy on held-out prompts, or its loss on feedback",
        run="halos_jax.tasks.eval:run_evaluation",
        policy="language",
        samples=True,
        scored_if=("eval.on", "samples"),
        needs=("model.path", "data.eval"),
        reads=("data.eval", "model", "eval.reference", "eval.against"),
        watches=("data.eval",),
        data="data.eval",
        divides=("train.batch_size", "sampling.slots"),
        stages=("evaluate",),
        limits="halos_jax.tasks.eval:check_eval",
        check_data="halos_jax.tasks.preflight:check_held_out_data",
    ),
    "compare": TaskSpec(
        "two files of samples against each other, by the reward and eval.scorers",
        run="halos_jax.tasks.versus.compare:run_comparison",
        policy="tokenizer",
        scored_if=True,
        needs=("data.eval", "eval.second_samples"),
        reads=("data.eval", "eval.second_samples", "model"),
        watches=("data.eval",),
        data="data.eval",
        keeps_prompts=True,
        stages=("compare",),
        limits="halos_jax.tasks.versus.compare:check_compare",
        check_data="halos_jax.tasks.versus.compare:check_data",
    ),
    "export": TaskSpec(
        "a policy as a model folder in Hugging Face format",
        run="halos_jax.tasks.export:run_export",
        policy="any",
        needs=("model.path",),
        reads=("model",),
        stages=("export",),
        remakes=(),
    ),
    "toy_data": TaskSpec(
        "data and an untrained model of the toy problem",
        run="halos_jax.data.toy:run_toy_data",
        on_mesh=False,
        limits="halos_jax.data.toy:check_toy",
    ),
    "bench": TaskSpec(
        "timings of training, scoring, sampling and rounds",
        run="halos_jax.bench.run:run_bench",
        on_mesh=False,
    ),
    "pipeline": TaskSpec("several tasks, one after the other"),
}

# The tasks that can stand in a pipeline.
PIPELINE_TASKS = tuple(name for name in TASKS if name != "pipeline")


def load(name: str) -> Callable[..., Any]:
    """Import the function that a table names as "module:function"."""
    function: Callable[..., Any] = pkgutil.resolve_name(name)
    return function


def is_scored(config: Any) -> bool:
    """Tell whether the task of a `Config` needs rewards."""
    return TASKS[config.task].is_scored(lambda path: attrgetter(path)(config))
