"""Every loss learns: a problem with a known answer, through the training loop.

A prompt is three letters, and what an answer is worth depends on the last of them alone: it is
right if it begins with that letter's partner. An answer is one letter, once or twice, and the end.
What was learned is measured on prompts that were not trained on, against the policy of the start,
which knows nothing.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from halos_jax import sharding
from halos_jax.config import Config, OptimizerConfig, TrainConfig
from halos_jax.losses import get_loss, list_losses
from halos_jax.models import decoder
from halos_jax.models.spec import DecoderConfig, init_params
from halos_jax.packing.batches import plan_batches, split_logps, split_scores
from halos_jax.training import loop, optim
from halos_jax.training import step as steps
from halos_jax.training.teacher import Teacher
from halos_jax.types import CHOSEN, MEMBER, MISMATCHED, REJECTED, TARGET, Item

LETTERS = 6  # 0 to 5 stand in prompts, 6 to 11 in answers
END, GOOD, BAD, VOCAB = range(2 * LETTERS, 2 * LETTERS + 4)
TINY = DecoderConfig(
    vocab_size=VOCAB,
    num_layers=1,
    d_model=16,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    d_mlp=16,
    init_std=0.1,
)
CONFIG = Config(
    progress=False,
    train=TrainConfig(batch_size=24, eval_every=0, row_multiple=64, tokens_per_device=512),
    optimizer=OptimizerConfig(learning_rate=0.02, warmup_fraction=0.0),
)
EPOCHS = 2


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a loss promises beyond the order of right and wrong answers.

    Attributes:
      right, wrong: signs of what becomes of their log-probabilities; 0 where nothing is promised.
      reward: the least probability that an answer sampled after training is right (1/15 before).
      settings: hyperparameters other than the defaults.
      rounds: passes of EPOCHS epochs; a policy that sampled is that of the round's start.
    """

    right: int = 0
    wrong: int = 0
    reward: float = 0.0
    settings: dict = dataclasses.field(default_factory=dict)
    rounds: int = 2


ORDER, LIKELIER = Expected(), Expected(right=1, reward=0.5)
REWARDED = Expected(right=1, wrong=-1, reward=0.3)
EXPECTED = {
    "apo_down": Expected(wrong=-1, settings={"beta": 0.5}, rounds=5),
    "apo_zero": Expected(right=1, wrong=-1),
    "bco": Expected(wrong=-1),
    "bradley-terry": ORDER,
    "cdpo": ORDER,
    "cispo": REWARDED,
    "csft": LIKELIER,
    "dapo": REWARDED,
    "dpo": ORDER,
    "dpo_norm": ORDER,
    "dr_grpo": REWARDED,
    "exo": ORDER,
    # Of a teacher that knows the right answers: see `make_trainer`.
    "gkd": LIKELIER,
    "grpo": dataclasses.replace(REWARDED, settings={"epsilon": 2.0}),
    "grpo_clip": REWARDED,
    "gspo": REWARDED,
    "hinge": ORDER,
    "ipo": ORDER,
    "kto": Expected(right=1, wrong=-1),
    "nca": Expected(right=1, wrong=-1),
    "nll": LIKELIER,
    "orpo": LIKELIER,
    # Nobody sampled the answers listed here, so that p - r does not estimate a divergence.
    "ppo": dataclasses.replace(REWARDED, settings={"KL_coef": 0.0}),
    "rloo": REWARDED,
    "robust": ORDER,
    "rpo": LIKELIER,
    "sapo": REWARDED,
    "sft": LIKELIER,
    "simpo": ORDER,
    "slic": LIKELIER,
    "sppo": Expected(right=1, wrong=-1),
}
LOSSES = {
    name: get_loss({"name": name} | (EXPECTED[name].settings if name in EXPECTED else {}))
    for name in list_losses()
}


# --------------------------------------------------------------------------- the problem


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt with a right answer and three wrong ones."""

    prompt: np.ndarray
    right: np.ndarray
    wrong: tuple[np.ndarray, ...]


@functools.cache
def draw_questions(*, separable: bool = False) -> tuple[list[Question], list[Question]]:
    """Return the questions (to train on, held out); no prompt stands twice.

    Where they are separable, an answer is right by its letter, whatever the prompt.
    """
    rng = np.random.default_rng(0)
    partner = LETTERS + rng.permutation(LETTERS)

    def answer(letter, length) -> np.ndarray:
        return np.array([letter] * length + [END], np.int32)

    questions = []
    for number in rng.permutation(LETTERS**3):
        prompt = np.array(np.unravel_index(number, (LETTERS,) * 3), np.int32)
        right = partner[rng.integers(3) if separable else prompt[-1]]
        others = rng.permutation(partner[3:] if separable else partner[partner != right])[:3]
        first, *rest = map(answer, (right, *others), 1 + rng.permutation(4) % 2)
        questions.append(Question(prompt, first, tuple(rest)))
    return questions[:168], questions[168:]


def make_items(kind: str, questions: list[Question]) -> list[Item]:
    """Return what a loss of this kind trains on."""
    items = []
    for number, one in enumerate(questions):
        pair = (one.right, one.wrong[0])
        other = questions[(number + 1) % len(questions)]
        if kind == "pair":
            items.append(Item(one.prompt, pair, (CHOSEN, REJECTED)))
        elif kind == "target":
            items.append(Item(one.prompt, pair[:1], (TARGET,)))
        elif kind == "output":  # nothing says which of them is right
            items += [Item(one.prompt, (response,), (TARGET,)) for response in pair]
        elif kind == "controlled":
            for token, response in zip((GOOD, BAD), pair, strict=True):
                items.append(Item(np.append(one.prompt, token), (response,), (TARGET,)))
        elif kind == "unpaired":
            for response, mismatched in ((one.right, other.wrong[0]), (one.wrong[0], other.right)):
                items.append(
                    Item(
                        one.prompt,
                        (response, mismatched),
                        (TARGET, MISMATCHED),
                        desirable=response is one.right,
                    )
                )
        elif kind in ("group", "answer"):
            responses, rewards = (one.right, *one.wrong), (1.0, 0.0, 0.0, 0.0)
            items.append(Item(one.prompt, responses, (MEMBER,) * 4, rewards))
        else:
            raise ValueError(f"items of kind {kind!r}: say here how to make them")
    return items


# --------------------------------------------------------------------------- one program for all


def family(loss) -> tuple:
    """Return what losses have in common that one program can serve."""
    return loss.needs, loss.value, loss.divergence is not None


@functools.cache
def fit_layout():
    """Return array shapes into which the batches of all kinds fit."""
    layouts = [
        plan_batches(
            make_items(loss.items, draw_questions()[0]),
            batch_size=CONFIG.train.batch_size,
            num_rows=1,
            tokens_per_row=CONFIG.train.tokens_per_device,
            row_multiple=CONFIG.train.row_multiple,
        ).layout
        for loss in LOSSES.values()
    ]
    (length,) = {length for layout in layouts for _, length in layout.buckets}
    return dataclasses.replace(
        layouts[0],
        tokens=max(layout.tokens for layout in layouts),
        positions=max(layout.positions for layout in layouts),
        copies=max(layout.copies for layout in layouts),
        buckets=((max(layout.num_sequences for layout in layouts), length),),
    )


@pytest.fixture(scope="module")
def mesh():
    """Yield a mesh of one device, which is the current one."""
    made = jax.make_mesh(
        (1, 1, 1), sharding.MESH_AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    with jax.set_mesh(made):
        yield made


@pytest.fixture(scope="module")
def make_trainer(mesh, choose):
    """Return the function from a loss's name to its trainer, whose program is shared.

    The teacher of a loss that has one is a policy trained by SFT.
    """
    schedule = optim.make_schedule(CONFIG.optimizer, 1)
    optimizer = optim.make_optimizer(CONFIG.optimizer, schedule)

    @functools.cache
    def make_teacher():
        params = init_params(jax.random.key(4), TINY)
        return Teacher(train(make("sft"), "sft", params), TINY, words=VOCAB)

    def plain(loss):
        config = dataclasses.replace(TINY, num_labels=int(loss.needs == "scores"))
        teacher = None if loss.divergence is None else make_teacher()
        return loop.make_trainer(CONFIG, config, loss, mesh, total_steps=1, teacher=teacher)

    logps = plain(LOSSES["dpo"]).logps

    @functools.cache
    def compile_family(name):
        mine = [other for other in LOSSES if family(LOSSES[other]) == name]
        config, teacher = plain(LOSSES[mine[0]]).decoder, plain(LOSSES[mine[0]]).teacher

        def run(index, state, frozen, batch, teacher):
            return steps.train_step(
                state,
                frozen,
                batch,
                loss=choose([LOSSES[other] for other in mine], index),
                optimizer=optimizer,
                schedule=schedule,
                config=config,
                teacher=teacher,
            )

        return mine, functools.partial(jax.jit(run), teacher=teacher)

    def make(name):
        mine, run = compile_family(family(LOSSES[name]))
        return dataclasses.replace(
            plain(LOSSES[name]),
            train_step=functools.partial(run, mine.index(name)),
            logps=logps,
        )

    return make


def plan(trainer, items, **options) -> loop.Dataset:
    dataset = loop.make_dataset(trainer, items, **options)
    return dataclasses.replace(dataset, plan=dataclasses.replace(dataset.plan, layout=fit_layout()))


class Recorder:
    """Stands in for the metric writer and keeps the last step's."""

    step = 0

    def write(self, step, metrics):
        self.step, self.last = step, jax.device_get(metrics)


def train(trainer, name: str, params):
    """Train in rounds; the policy at the start of each is the one that sampled."""
    loss, state, writer = trainer.loss, loop.start_state(trainer, params), Recorder()
    questions, _ = draw_questions(separable=loss.needs == "scores")
    items = make_items(loss.items, questions)
    dataset = plan(trainer, items, seed=0, epochs=EPOCHS)
    for number in range(EXPECTED[name].rounds):
        if loss.needs == "logps" and (number == 0 or (loss.old and not loss.value)):
            logps = measure_logps(trainer, items, state.params)
            if loss.reference and loss.old and not loss.value:  # two policies
                sampled = [
                    dataclasses.replace(item, old_logps=parts)
                    for item, parts in zip(items, logps, strict=True)
                ]
                dataset = dataclasses.replace(dataset, items=sampled)
            if number == 0 or not loss.reference:
                dataset = dataclasses.replace(dataset, reference_logps=logps)
        if loss.value:
            dataset = loop.add_collected(trainer, dataset, state.params, seed=number, label="")
        state = loop.run_steps(
            trainer, state, dataset, held_out=None, writer=writer, first_step=writer.step
        )
    assert np.isfinite(writer.last["loss/train"])
    return state.params


def measure_logps(trainer, items, params) -> list[tuple[np.ndarray, ...]]:
    """Return the token log-probs of all items."""
    dataset = plan(trainer, items, seed=None)
    params = {key: part for key, part in params.items() if key != "value"}
    found = {}
    for number, batch in enumerate(loop.stream_batches(trainer.mesh, dataset)):
        logps = np.asarray(trainer.logps(params, None, batch))
        found.update(split_logps(dataset.plan, number, items, logps))
    return [found[index] for index in range(len(items))]


# --------------------------------------------------------------------------- what is learned


def start_params(trainer):
    return init_params(jax.random.key(0), trainer.decoder)


def test_every_loss_has_its_expectation():
    assert set(list_losses()) - set(EXPECTED) == set(), "say in EXPECTED what it promises"


POLICIES = [name for name, loss in LOSSES.items() if loss.needs == "logps"]


@pytest.mark.parametrize("name", POLICIES)
def test_right_answers_are_told_from_wrong_ones(make_trainer, name):
    expected, trainer = EXPECTED[name], make_trainer(name)
    questions = draw_questions()[1]
    if trainer.loss.items == "controlled":
        questions = [
            dataclasses.replace(one, prompt=np.append(one.prompt, GOOD)) for one in questions
        ]
    held_out = make_items("pair", questions)
    before = measure_logps(trainer, held_out, start_params(trainer))
    after = measure_logps(trainer, held_out, train(trainer, name, start_params(trainer)))
    sums = [np.array([[part.sum() for part in parts] for parts in x]) for x in (before, after)]
    moved = sums[1] - sums[0]
    rewards = [np.mean([np.exp(right[0]) for right, _ in x]) for x in (before, after)]
    accuracy = np.mean(moved[:, 0] > moved[:, 1])
    report = f"accuracy {accuracy:.2f}, moved {moved.mean(axis=0)}, rewards {rewards}"
    print(name, report)
    assert accuracy > 0.9, report
    assert rewards[0] < 0.15, report
    assert rewards[1] > expected.reward, report
    for sign, change in zip((expected.right, expected.wrong), moved.mean(axis=0), strict=True):
        assert not sign or sign * change > 0.5, report


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.needs == "scores"])
def test_a_reward_model_orders_held_out_answers(make_trainer, name):
    trainer = make_trainer(name)
    held_out = make_items("pair", draw_questions(separable=True)[1])
    dataset = plan(trainer, held_out, seed=None)
    run = jax.jit(
        lambda params, batch: jax.lax.map(
            lambda one: decoder.compute_scores(params, one, trainer.decoder), batch
        )
    )
    accuracies = []
    for params in (start_params(trainer), train(trainer, name, start_params(trainer))):
        found = {}
        for number, batch in enumerate(loop.stream_batches(trainer.mesh, dataset)):
            scores = np.asarray(run(params, batch))
            found.update(split_scores(dataset.plan, number, held_out, scores))
        accuracies.append(np.mean([right > wrong for right, wrong in found.values()]))
    assert accuracies[0] < 0.75 and accuracies[1] > 0.9, accuracies
