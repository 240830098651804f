"""The guide's tables are true: fields, values and losses on our side exist, and aliases agree."""

import ast
import functools
import re

import pytest

from halos_jax import devices
from halos_jax.config import Config, FeedbackConfig, aliases, roles, schema
from halos_jax.losses import registry
from halos_jax.packing.batches import count_steps
from halos_jax.rewards.feedback import make_judgements, make_preferences
from halos_jax.rounds.budget import Budget, expect_examples
from tests.documents import ROOT
from tests.rewards.test_feedback import make_samples

MIGRATION = ("FROM_HALOS.md", "FROM_TRL.md", "FROM_TRL_CONFIGS.md")
LEAVES, FREE = schema.leaf_types(Config), schema.free_sections(Config)
SETTINGS = {name: {*registry._list_parameters(name)} for name in registry.list_losses()}


@functools.cache
def read_messages() -> tuple[str, ...]:
    """Return every text of the program, with "..." for what is put into it."""
    found = []
    for file in sorted((ROOT / "halos_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                found.append("".join(one if isinstance(one, str) else "..." for one in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%(?:\.\d+)?[a-z]", "...", node.value))
    return tuple(found)


def read_page(page: str) -> str:
    return (ROOT / "halos_jax" / "guide" / page).read_text(encoding="utf-8")


def read_rows(page: str) -> list[tuple[str, str, str]]:
    """Return the rows of a page's tables: theirs, ours, the remark."""
    lines = read_page(page).splitlines()
    rows = [line[1:-1].split(" | ") for line in lines if line.startswith("| ")]
    return [tuple(one.strip() for one in row) for row in rows if row[0].strip(" |-")]


def list_spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def find_fault(span: str) -> str:
    """Return what is wrong with a field, or a field=value, of ours; "" if nothing is."""
    path, equals, value = span.partition("=")
    if path.startswith("loss."):
        key = path.removeprefix("loss.")
        if key == "name":
            return "" if not equals or value in {*SETTINGS, "sum"} else "no such loss"
        key = key.removesuffix(".weight")
        known = set().union(*SETTINGS.values(), SETTINGS)
        return "" if key in known else "no such setting of a loss"
    if path in FREE:
        return "" if not equals else "a section has no value"
    if path not in LEAVES:
        return "no such field"
    if equals:
        try:
            schema.parse(value, LEAVES[path])
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("page", MIGRATION)
def test_what_stands_on_our_side_exists(page):
    rows = [row for row in read_rows(page) if row[1] != "here"]
    assert len(rows) > 20
    for theirs, ours, *_ in rows:
        spans = list_spans(ours)
        assert spans or ours in ("-", "none"), f"{page}: {theirs}: {ours}"
        faults = [f"{span}: {fault}" for span in spans if (fault := find_fault(span))]
        assert not faults, f"{page}: {theirs}: {faults}"


@pytest.mark.parametrize("page", MIGRATION)
def test_remarks_name_fields_that_exist(page):
    sections = {path.partition(".")[0] for path in LEAVES if "." in path} | {"loss"}
    for theirs, _, *rest in read_rows(page):
        for span in list_spans(" ".join(rest)):
            is_field = re.match(r"([a-z]+)\.[a-z_]+(=|$)", span)
            if is_field and is_field[1] in sections and not span.endswith((".html", ".jsonl")):
                assert not find_fault(span), f"{page}: {theirs}: {span}"


@pytest.mark.parametrize("page", MIGRATION)
def test_the_command_line_suggests_the_same_field(page):
    """A name that an error message would translate has the same translation in the table."""
    for theirs, ours, *_ in read_rows(page):
        fields = {span.partition("=")[0] for span in list_spans(ours)}
        for span in list_spans(theirs):
            alias = aliases.find_alias(span.partition("=")[0])
            if alias and fields:
                assert alias in fields, f"{page}: {span}: {alias}"


@pytest.mark.parametrize(
    "span, fault",
    [
        ("loss.betta", "no such setting of a loss"),
        ("loss.name=dppo", "no such loss"),
        ("optimizer.lr", "no such field"),
        ("rounds.reference=base", "'base' is not"),
        ("train.epochs=2", ""),
        ("loss.nll.weight", ""),
    ],
)
def test_a_fault_in_a_table_is_found(span, fault):
    assert find_fault(span).startswith(fault) and bool(find_fault(span)) == bool(fault)


def test_the_rounds_of_the_concepts_are_those_of_the_budget():
    budget = Budget(total_prompts=2048, prompts_per_round=512, num_skip=256)
    plans = [budget.plan_round(number, 9999) for number in (1, 2, 3, 4)]
    edges = [plans[0].start, *(plan.stop for plan in plans)]
    assert edges == [256, 768, 1280, 1792, 2304]
    drawn = re.search(r"^    0 +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$", read_page("CONCEPTS.md"), re.M)
    assert [int(edge) for edge in drawn.groups()] == edges
    counts = {
        (type, items): expect_examples(512, 4, FeedbackConfig(type=type), items)
        for type, items in (("pairwise", "pair"), ("binary", "unpaired"), ("scalar", "group"))
    }
    assert list(counts.values()) == [512, 2048, 512]
    steps = [count_steps(count, batch_size=32, epochs=1) for count in counts.values()]
    assert steps == [16, 64, 16]


def test_the_feedback_of_the_concepts_is_what_the_code_makes():
    samples = make_samples([0.9, 0.4, 0.3, 0.0])
    text = read_page("CONCEPTS.md")
    for mode in ("max", "min", "all"):
        made = make_preferences(samples, mode=mode, threshold=0.0, seed=0, round=1).preferences
        pairs = sorted((one.chosen.sample_id, one.rejected.sample_id) for one in made)
        words = ", ".join(f"{better} before {worse}" for better, worse in pairs)
        assert f"| `pairwise`, `{mode}` | {words} |" in text
    made = make_preferences(samples, mode="random", threshold=0.0, seed=0, round=1).preferences
    assert len(made) == 2
    judged, _ = make_judgements(samples, threshold="median")
    assert [one.desirable for one in judged] == [True, True, False, False]
    assert "0 and 1 desirable, 2 and 3 not" in text


def test_the_picture_names_fields_that_exist():
    named = re.findall(r'class="field"[^>]*>([^<]+)<', read_page("round.svg"))
    fields = [name for name in named if re.match(r"[a-z]+\.[a-z]", name)]
    assert len(fields) == 4 and not [name for name in fields if find_fault(name)]
    assert "rounds.total_prompts" in read_page("round.svg") and "](round.svg)" in read_page(
        "CONCEPTS.md"
    )


def test_memory_advice_has_all_that_an_error_suggests():
    """What an out-of-memory error names stands in the table, and the defaults are those."""
    named = {span.partition("=")[0] for span in list_spans(read_page("MEMORY.md"))}
    suggested = {path for settings in devices._LESS.values() for path in settings}
    assert suggested <= named
    for path in suggested:
        assert path in LEAVES
    config = Config()
    assert (config.model.params_dtype, config.optimizer.moments_dtype) == ("float32", "float32")
    assert (config.reward.compute_dtype, config.sampling.slots) == ("bfloat16", 256)


def test_what_memory_advice_changes_on_a_resume_may_change():
    text = read_page("MEMORY.md")
    part = text[text.index("What the same run may change") : text.index("The rest decides")]
    for path in list_spans(part):
        if path in LEAVES:
            assert roles.find_mark(Config, path).role_in("online") != "result", path


def is_said(message: str) -> bool:
    """Tell whether the program has a text in which the parts of a message follow each other."""
    pattern = ".*?".join(re.escape(part.strip()) for part in message.split("...") if part.strip())
    return any(re.search(pattern, text) for text in read_messages())


MESSAGES = [span for row in read_rows("MESSAGES.md") for span in list_spans(row[0])]


@pytest.mark.parametrize("message", MESSAGES)
def test_the_program_says_what_the_page_explains(message):
    assert is_said(message), message


def test_a_message_that_nobody_says_is_found():
    assert len(MESSAGES) > 40
    assert not is_said("the moon is full") and not is_said("unknown field; ... the moon")
