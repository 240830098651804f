"""The tasks and the modes: one row each, which everything else that depends on them reads.

A new task is a row here and a module of its own. Functions are named as text, "module:function",
since they stand on higher levels; `load` imports them.
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
    "export",
    "toy_data",
    "bench",
    "pipeline",
]
Mode = Literal["run", "check"]


@dataclasses.dataclass(frozen=True)
class ModeSpec:
    """What is done with a config.

    Attributes:
      summary: one line for people.
      run: called with the config in place of the task. It takes no lock, and writes nothing into
        the workdir but a report of its own. Empty: the task itself is run.
    """

    summary: str
    run: str = ""


MODES: Mapping[Mode, ModeSpec] = {
    "run": ModeSpec("run the task, or carry it on"),
    "check": ModeSpec(
        "look for what is wrong as a start does, without reading weights or writing anything",
        run="halos_jax.tasks.preflight:run_check",
    ),
}


@dataclasses.dataclass(frozen=True)
class TaskSpec:
    """What a task does, needs and leaves.

    Attributes:
      summary: one line for people.
      run: called with the config and the stop signal; returns the last metrics.
      policy: what of `model.path` it uses: nothing, the tokenizer alone, or a model, which for
        "language" must not be a classifier and for "classifier" is made one.
      trains: whether it trains the policy. Otherwise it may start from a run's checkpoint.
      samples: whether it samples completions of prompts.
      scored_if: (path of a field, the value) with which it asks for rewards; True: always.
      makes_feedback: whether it turns rewards into feedback, as `config.feedback` says.
      has_reference: whether its loss is the config's, with the reference of `rounds.reference`.
      loss: the loss that it always has; empty: that of the config.
      needs: the fields that must not be empty.
      reads: the fields, or sections, that name what it reads, whose fingerprints a resume compares.
      data: the field whose records it works on.
      keeps_prompts: whether its prompts are those that samples were drawn from already.
      divides: the fields whose numbers are divided by the devices.
      on_mesh: whether it uses the mesh, and may be checked before it begins.
      stages: of its manifest, in order; none: it has no manifest.
      first_stages: of round 0, where it has rounds.
      remakes: the folders of its workdir that it makes again where they are damaged.
      limits: yields error lines, called with path -> value of every field.
      check_data: called with (config, decoder, renderer) by mode=check: reads and renders the data.
      modes: what can be done with it.
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
    data: str = "data.train"
    keeps_prompts: bool = False
    divides: tuple[str, ...] = ()
    on_mesh: bool = True
    stages: tuple[str, ...] = ()
    first_stages: tuple[str, ...] = ()
    remakes: tuple[str, ...] = ("final",)
    limits: str = ""
    check_data: str = ""
    modes: tuple[Mode, ...] = ("run", "check")

    def is_scored(self, read: Callable[[str], Any]) -> bool:
        """Tell whether it asks for rewards, where `read` gives the value of a field by its path."""
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
        reads=_TRAINED,
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
        "a reward model of pairs",
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
        "alignment on feedback that exists already",
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
        "completions of prompts by a policy",
        run="halos_jax.tasks.sample:run_sampling",
        policy="language",
        samples=True,
        scored_if=("sampling.best_of", True),
        needs=("model.path", "data.train"),
        reads=("data.train", "model"),
        divides=("sampling.slots",),
        stages=("sample", "score", "write"),
        limits="halos_jax.config.limits:check_sample",
        check_data="halos_jax.tasks.preflight:check_sampled_data",
    ),
    "label": TaskSpec(
        "rewards, and the feedback that they make, for samples that exist already",
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
        reads=("data.eval", "model", "eval.reference"),
        data="data.eval",
        divides=("train.batch_size", "sampling.slots"),
        stages=("evaluate",),
        check_data="halos_jax.tasks.preflight:check_held_out_data",
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
        limits="halos_jax.config.limits:check_toy",
    ),
    "bench": TaskSpec(
        "timings of training, scoring, sampling and rounds",
        run="halos_jax.bench.run:run_bench",
        on_mesh=False,
    ),
    "pipeline": TaskSpec("several tasks, one after the other"),
}

# What a stage of a pipeline may be.
STAGES = tuple(name for name in TASKS if name != "pipeline")


def load(name: str) -> Callable[..., Any]:
    """Return the function that a table names as "module:function"."""
    function: Callable[..., Any] = pkgutil.resolve_name(name)
    return function


def is_scored(config: Any) -> bool:
    """Tell whether the task of a `Config` asks for rewards."""
    return TASKS[config.task].is_scored(lambda path: attrgetter(path)(config))
