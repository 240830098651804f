"""The runs of the study, in the order of the questions that they answer."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

PRESET = "colabs/gsm8k_study/preset.py:{folder}"
GSM8K = "configs/gsm8k.py"
PROMPTS = 2048
# Name -> prompts of a round: one round is offline alignment.
SHAPES = {"offline": 2048, "4x512": 512, "16x128": 128, "64x32": 32}
# Seconds on an H100 of its own, once everything is compiled: for the order of the queue.
SECONDS = {"offline": 60, "4x512": 90, "16x128": 150, "64x32": 300}
OTHER_METHODS = ("kto", "dapo")
SLOWER = {"kto": 1.5, "dapo": 1.7, "guard": 1.5}
# End of the name of a step that evaluates the newest checkpoint of a run.
LAST = "-last"

Fields = Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Step:
    """One start of the program: a preset, and fields that differ from it.

    `{runs}` in a value is the folder of the workdirs, `{folder}` that of the model and the data,
    `{last}` the newest checkpoint of the run whose name stands before `LAST` in this one's.
    """

    name: str
    preset: str
    fields: Fields


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of the study: steps one after the other on one GPU, and about how long they take."""

    name: str
    batch: str
    seconds: int
    steps: tuple[Step, ...]
    is_alone: bool = False  # it gets a GPU for itself, if there is one that is not shared


def make_online(
    batch: str, shape: str, rate: str, *, seed: int = 0, kind: str = "dpo", **fields: str
) -> Run:
    """Return an online run of the study's preset, named KIND-SHAPE-RATE-sSEED.

    Args:
      kind: the method, or what is special about a run with DPO.
      fields: further fields, with "__" for the dot.
    """
    chosen = {
        "seed": str(seed),
        "optimizer.learning_rate": rate,
        "rounds.prompts_per_round": str(SHAPES[shape]),
    }
    chosen |= {name.replace("__", "."): value for name, value in fields.items()}
    name = f"{kind}-{shape}-{rate}-s{seed}"
    preset = f"{PRESET},{kind}" if kind in OTHER_METHODS else PRESET
    seconds = int(SLOWER.get(kind, 1) * SECONDS[shape])
    return Run(name, batch, seconds, (Step(name, preset, chosen),))


def list_rates() -> Iterable[Run]:
    """Yield batch A: three rates and three numbers of rounds, with one seed; one rate more."""
    for shape in ("16x128", "4x512", "offline"):
        for rate in ("1e-6", "2e-6", "5e-6"):
            yield make_online("A", shape, rate)
    yield make_online("A", "16x128", "3e-6")


def list_seeds() -> Iterable[Run]:
    """Yield batch B: three seeds of two rates, many rounds and offline; B2 has few rounds."""
    for rate, seeds in (("2e-6", (1, 2)), ("3e-6", (0, 1, 2))):
        for seed in seeds:
            if (rate, seed) != ("3e-6", 0):  # batch A has it
                yield make_online("B", "16x128", rate, seed=seed, rounds__eval_every="4")
            yield make_online("B", "offline", rate, seed=seed)
            yield make_online("B2", "4x512", rate, seed=seed)


def list_guarded() -> Iterable[Run]:
    """Yield batch C: the guard where the rate is too high; final/ has the best round."""
    guard = {
        "rounds__keep_best": "true",
        "guard__action": "retry",
        "guard__min_margin": "-0.1",
        "guard__max_kl": "12",
    }
    for shape in ("16x128", "4x512", "offline"):
        yield make_online("C", shape, "5e-6", kind="guard", **guard)


def list_auto() -> Iterable[Run]:
    """Yield batch H: rounds of a length that the run chooses itself."""
    yield make_online("H", "16x128", "2e-6", kind="auto", rounds__prompts_per_round="auto")


def list_methods() -> Iterable[Run]:
    """Yield batch D: online KTO, and DAPO with groups of 8, at equal prompts."""
    yield make_online("D", "16x128", "2e-6", kind="kto", rounds__eval_every="4")
    balanced = {"loss__desirable_weight": "5", "rounds__eval_every": "4"}
    yield make_online("D", "16x128", "5e-7", kind="kto", **balanced)
    dapo = make_online("D", "16x128", "2e-6", kind="dapo")
    yield dataclasses.replace(dapo, steps=(*dapo.steps, *list_evaluations(dapo.name)))


def list_many_rounds() -> Iterable[Run]:
    """Yield batch E: 64 rounds, evaluated every eighth."""
    yield make_online("E", "64x32", "2e-6", rounds__eval_every="8")


def list_preset() -> Iterable[Run]:
    """Yield batch F: the preset for mathematics, one pass over the training questions.

    Its last round and its best round are evaluated by the study's protocol. Each run has a GPU of
    its own, and lengths and batches that fill it.
    """
    for seed in range(3):
        name = f"preset-s{seed}"
        steps = (make_preset(name, seed), *list_evaluations(name))
        yield Run(name, "F", 600, steps, is_alone=True)


def list_ten_minutes() -> Iterable[Run]:
    """Yield batch T: as much of batch F as ten minutes of a GPU allow, from start to `final/`.

    The study's held-out questions are the test, so that the model before the first round and
    `final/` are evaluated by the study's protocol within the run; rounds are watched on others.
    """
    fields = {
        "data.train": "{folder}/rest.jsonl",
        "rounds.total_prompts": "2816",
        "data.test": "{folder}/held_out.jsonl",
        "eval.test_temperature": "0.8",
        "eval.test_samples": "4",
    }
    for seed in range(3):
        name = f"ten-minutes-s{seed}"
        yield Run(name, "T", 500, (make_preset(name, seed, **fields),), is_alone=True)


def make_preset(name: str, seed: int, **changed: str) -> Step:
    """Return a start of the preset for mathematics that fills a GPU."""
    fields = {
        "seed": str(seed),
        "progress": "false",
        "train.log_every": "1000",
        "model.path": "{folder}/model",
        "data.train": "{folder}/train.jsonl",
        "data.eval": "",
        "data.max_eval": "0",
        "data.holdout": "400",
        "data.test": "{folder}/test.jsonl",
        "eval.test_temperature": "0",
        "rounds.eval_every": "4",
        "sampling.slots": "1024",
        "sampling.shard_prompts": "256",
        "train.tokens_per_device": "32768",
    }
    return Step(name, GSM8K, fields | changed)


def list_evaluations(name: str) -> Iterable[Step]:
    """Yield evaluations of a run's `final/` and of its last round, by the protocol."""
    path = {"model.path": "{runs}/" + name}
    yield make_evaluation(f"{name}-final", path)
    yield make_evaluation(f"{name}{LAST}", path | {"model.checkpoint": "{last}"})


def make_evaluation(name: str, fields: Fields) -> Step:
    """Return an evaluation of samples on the held-out questions, by the protocol."""
    held_out = {
        "task": "eval",
        "data.eval": "{folder}/held_out.jsonl",
        "data.holdout": "0",
        "data.train": "",
        "data.test": "",
    }
    return Step(name, PRESET, held_out | dict(fields))


def list_ceilings() -> Iterable[Run]:
    """Yield batch G: what the untrained model can do with more samples or more tokens."""
    longer = {"sampling.max_tokens": "512", "train.max_length": "768"}
    greedy = {
        "data.eval": "{folder}/test.jsonl",
        "sampling.temperature": "0",
        "sampling.num_samples_per_prompt": "1",
    }
    steps = (
        make_evaluation("base-320-n16", {"sampling.num_samples_per_prompt": "16"}),
        make_evaluation("base-512-n4", longer),
        make_evaluation("base-512-greedy", longer | greedy),
    )
    yield Run("ceilings", "G", 120, steps)


def list_runs() -> list[Run]:
    """Return all runs, in the order of the batches.

    Raises:
      ValueError: if two steps have the same name.
    """
    batches = (
        list_rates(),
        list_seeds(),
        list_guarded(),
        list_methods(),
        list_many_rounds(),
        list_preset(),
        list_ten_minutes(),
        list_ceilings(),
        list_auto(),
    )
    runs = [run for batch in batches for run in batch]
    names = [step.name for run in runs for step in run.steps]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"got two steps named {', '.join(twice)}")
    return runs


def choose_runs(names: Sequence[str]) -> list[Run]:
    """Return the runs of some batches, or with some names: in their order, the longest first.

    Raises:
      ValueError: if a name is neither that of a batch nor that of a run.
    """
    runs = list_runs()
    known = sorted({run.batch for run in runs})
    unknown = [name for name in names if name not in {*known, *(run.name for run in runs)}]
    if unknown:
        allowed = f"a batch ({', '.join(known)}) or the name of a run"
        raise ValueError(f"got {', '.join(unknown)}; allowed: {allowed}")
    chosen = {}
    for name in names:
        found = [run for run in runs if name in (run.batch, run.name)]
        chosen |= {run.name: run for run in sorted(found, key=lambda run: -run.seconds)}
    return list(chosen.values())
