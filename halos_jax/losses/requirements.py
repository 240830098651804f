"""What a loss requires of the rest of the config: feedback, a reference, a teacher, and so on."""

import dataclasses

from halos_jax.config import Config, ConfigError, SamplingConfig
from halos_jax.config.kinds import ITEM_KINDS
from halos_jax.config.tasks import TASKS, Task
from halos_jax.losses.registry import Loss, Settings, check_loss, get_loss, list_losses


def check_feedback(
    settings: Settings, feedback: str, *, keep_logps: bool = True, weights: bool = False
) -> list[str]:
    """Return error lines where an online run's feedback is not what the loss trains on.

    Args:
      settings: `config.loss`.
      feedback: `config.feedback.type`.
      keep_logps: whether samples have what the policy that sampled made of them: with
        `config.sampling.keep_logps` or exact ratios.
      weights: whether pairs get weights, `config.feedback.margin_weights`.
    """
    if check_loss(settings):
        return []
    loss = get_loss(settings)
    allowed = ITEM_KINDS[loss.items].feedback
    if loss.needs == "scores" or not allowed:
        losses = [get_loss({"name": name}) for name in list_losses()]
        able = [one for one in losses if ITEM_KINDS[one.items].feedback and one.needs == "logps"]
        return [
            f"loss.name: got {loss.name!r}, which does not train a policy on feedback; allowed: "
            f"{', '.join(one.name for one in able)}"
        ]
    if feedback in allowed:
        if weights and loss.items != "pair":
            return [
                f"feedback.margin_weights: allowed with loss {loss.name!r}: 0; it trains on "
                f"{ITEM_KINDS[loss.items].words}, and weights are those of pairs"
            ]
        if loss.sampled and loss.old and feedback != "scalar":
            one = next(part for part in (loss, *loss.parts) if part.correction.is_truncated)
            return [
                f"feedback.type: got {feedback!r}, but loss.correction={one.correction.mode!r} of "
                f"loss {one.name!r} reads the samplers' log-probabilities, which only the records "
                "of 'scalar' have; set --config.feedback.type=scalar, or loss.correction=none"
            ]
        if loss.sampled and not keep_logps:
            return [
                f"sampling.keep_logps: got False, but loss {loss.name!r} with a correction of "
                "ratios reads the log-probabilities of the policy that sampled; set "
                "--config.sampling.keep_logps=true"
            ]
    lines = []
    if feedback not in allowed:
        lines.append(
            f"feedback.type: got {feedback!r}, but loss {loss.name!r} trains on "
            f"{ITEM_KINDS[loss.items].words}; allowed: {', '.join(map(repr, allowed))}; set "
            f"--config.feedback.type={allowed[0]}, or another loss"
        )
    # A loss with a value head finds out itself, where that is not known, what it would sample.
    if loss.old and not loss.value and not keep_logps:
        lines.append(
            f"sampling.keep_logps: got False, but loss {loss.name!r} compares the policy with "
            "itself as it sampled; set --config.sampling.keep_logps=true"
        )
    return lines


def check_exact(settings: Settings, feedback: str) -> list[str]:
    """Return error lines where nothing reads what an online run's tokens are drawn from.

    Args:
      settings: `config.loss`, of a run with `config.sampling.exact_ratios=true`.
      feedback: `config.feedback.type`.
    """
    if check_loss(settings):
        return []
    loss = get_loss(settings)
    if not loss.old:
        able = [name for name in list_losses() if get_loss({"name": name}).old]
        return [
            f"sampling.exact_ratios: got True, but loss {loss.name!r} compares the policy with "
            f"none that sampled; allowed: False, or a loss that does: {', '.join(able)}"
        ]
    if feedback != "scalar":
        return [
            f"sampling.exact_ratios: got True, allowed with feedback.type={feedback!r}: False, "
            "since its records do not say what tokens were drawn from; set "
            "--config.feedback.type=scalar"
        ]
    return check_mixture(settings)


def check_mixture(settings: Settings) -> list[str]:
    """Return the error line for a sum of losses of which some alone read what tokens are drawn
    from: one batch has either those log-probabilities or the policy's own."""
    if check_loss(settings) or not (parts := find_mixture(get_loss(settings))):
        return []
    with_ratio, without = parts
    return [
        f"loss: 'sum' got {with_ratio}, which compares what is drawn with exact ratios, and "
        f"{without}, which is of the policy at temperature 1 over all tokens; allowed: losses of "
        "one of the two sorts; or set --config.sampling.exact_ratios=false, or have "
        "sampling.temperature=1, top_p=1 and top_k=0"
    ]


def reads_drawn(loss: Loss) -> bool:
    """Tell whether a loss reads what tokens were drawn from, where the data say so.

    Raises:
      ConfigError: for a sum of which some losses do and others do not.
    """
    if mixture := find_mixture(loss):
        raise ConfigError(
            "data.train: its records say what tokens were drawn from ('drawn'), which of the sum "
            f"{mixture[0]} reads and {mixture[1]} does not; allowed: losses of one of the two "
            "sorts, or records without it (--config.data.ignore_fields=drawn)"
        )
    return loss.old


def find_mixture(loss: Loss) -> tuple[str, str] | None:
    """Return a loss of a sum with a ratio to the policy that sampled, and one without; else None.

    Alone, only the first one reads what the tokens were drawn from.
    """
    names = {part.old: part.name for part in loss.parts}
    return (names[True], names[False]) if len(names) == 2 else None


def needs_exact(config: Config) -> bool:
    """Tell whether ratios to the policy that sampled are wrong without `sampling.exact_ratios`.

    So they are where the loss has such ratios, the task's samples are trained on as they are, and
    tokens are drawn from something else than the policy at temperature 1 over all tokens.
    """
    task, sampling = TASKS[config.task], config.sampling
    # A sample of task=sample is that of an online run with the same config, bit for bit.
    is_trained_on = task.samples and task.data == "data.train"
    if not is_trained_on or config.feedback.type != "scalar" or check_loss(config.loss):
        return False
    is_policy = sampling.temperature == 1 and sampling.top_p == 1 and sampling.top_k == 0
    is_greedy = sampling.temperature == 0
    return not (is_policy or is_greedy) and get_loss(config.loss).old


def settle_sampling(config: Config) -> SamplingConfig:
    """Return `config.sampling` with what `exact_ratios="auto"` stands for.

    Where that is True, sets have room for all tokens of top-k.
    """
    sampling = config.sampling
    if sampling.exact_ratios != "auto":
        return sampling
    is_exact = needs_exact(config)
    most = max(sampling.max_kept, sampling.top_k) if is_exact else sampling.max_kept
    return dataclasses.replace(sampling, exact_ratios=is_exact, max_kept=most)


def check_reference(settings: Settings, reference: str, *, task: str) -> list[str]:
    """Return error lines where a moving reference has no meaning.

    Args:
      settings: `config.loss`.
      reference: `config.rounds.reference`.
      task: "online" or "align".
    """
    if reference == "sft" or check_loss(settings):
        return []
    if task == "align" and reference == "round_start":
        return [
            "rounds.reference: got 'round_start', but task='align' has no rounds; allowed: 'sft', "
            "'previous_step'"
        ]
    loss = get_loss(settings)
    if not loss.reference:
        return [
            f"rounds.reference: got {reference!r}, but loss {loss.name!r}{_name_off(loss)} has no "
            "reference; allowed: 'sft'; or take a loss that compares the policy with one"
        ]
    return []


def check_given_reference(config: Config, *, task: Task) -> list[str]:
    """Return error lines for a model that is given as the reference where nothing reads it.

    Args:
      task: the one that the config is read for.
    """
    given, reference = config.model.reference, config.rounds.reference
    if not given:
        return []
    if not TASKS[task].has_reference:
        return [
            f"model.reference: got {given!r}, allowed with task={task!r}: ''; in a pipeline set it "
            "for the task that trains with it (pipeline.overrides.align.model.reference); "
            "task=eval has eval.reference"
        ]
    if reference != "sft":
        return [
            f"model.reference: got {given!r}, allowed with rounds.reference={reference!r}: '', "
            "since that reference moves with the policy; set --config.rounds.reference=sft"
        ]
    if check_loss(config.loss) or get_loss(config.loss).reference:
        return []
    loss = get_loss(config.loss)
    return [
        f"model.reference: got {given!r}, but loss {loss.name!r}{_name_off(loss)} has no "
        "reference; allowed: ''; or take a loss that compares the policy with one"
    ]


def _name_off(loss: Loss) -> str:
    """Say of a loss that could have a reference why it has none."""
    return f" with {loss.penalty}=0" if loss.penalty else ""


def check_evaluation(settings: Settings) -> list[str]:
    """Return error lines where a loss cannot be measured of a model alone."""
    if check_loss(settings) or not get_loss(settings).value:
        return []
    return [
        f"loss.name: got {settings['name']!r}, which is measured with its value head, and that is "
        "no part of a model; allowed for eval.on='feedback': a loss without one"
    ]


def check_teacher(settings: Settings, teacher: str, *, task: str, has_loss: bool) -> list[str]:
    """Return error lines for a loss without its teacher, or a teacher that no loss reads.

    Args:
      settings: `config.loss`.
      teacher: `config.model.teacher`.
      has_loss: whether the task computes the loss of the config.
    """
    if not has_loss:
        return [
            f"model.teacher: got {teacher!r}, allowed with task={task!r}: ''; in a pipeline set it "
            "for the task that trains on it (pipeline.overrides.online.model.teacher)"
        ] * bool(teacher)
    if check_loss(settings):
        return []
    needs = get_loss(settings).divergence is not None
    if needs and not teacher:
        return [
            f"model.teacher: got '', but loss {settings['name']!r} compares the policy with a "
            "teacher; set --config.model.teacher=DIR, a model with the same tokenizer"
        ]
    if teacher and not needs:
        return [
            f"model.teacher: got {teacher!r}, but loss {settings['name']!r} has no teacher; "
            "allowed: ''; or set --config.loss.name=gkd"
        ]
    return []
