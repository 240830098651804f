"""Our names for the fields of records, and the config fields in which users name fields.

`data.fields` maps our names to those in the user's records, `data.prompt_template` builds a prompt
from fields, and `data.ignore_fields` names fields to leave unread on purpose.
"""

import string

# Lists of turns; `data/records/turns.py` knows what turns may hold besides text.
CHATS = ("messages", "conversations", "conversation")
# Names that a prompt may have; the first one in a record counts.
PROMPTS = ("prompt", *CHATS, "instruction", "question", "problem", "query", "input")
ANSWERS = ("completion", "output", "response", "answer", "solution")
PAIR = ("chosen", "rejected")
SYSTEMS = ("system", "system_prompt")
# (of the chosen answer, of the rejected one)
SCORES = tuple(
    pair
    for kind in ("score", "rating", "reward")
    for joint in ("_", "-")
    for pair in (
        (f"{kind}{joint}chosen", f"{kind}{joint}rejected"),
        (f"chosen{joint}{kind}", f"rejected{joint}{kind}"),
    )
)
# Fields of the records that this package and HALOs write, by the record's `type`.
_PROMPT = ("prompt", "prompt_id", "prompt_ids", "prompt_pass", "instruction", "replayed_round")
_ALWAYS = {"type", *_PROMPT, "extra", "dataset", "split"}
_OUTPUT = ("output", "reward", "generator", "finish_reason", "sample_id")
_DRAWN = ("logps", "sum_logps", "mean_entropy", "drawn")
_SAMPLE = frozenset({*_ALWAYS, *_OUTPUT, "response_ids", *_DRAWN})
_PAIR = {f"{name}_{letter}" for name in (*_OUTPUT, "ids", "logps") for letter in "AB"}
FORMAT = {
    "sample": _SAMPLE,
    "scalar_feedback": _SAMPLE,
    "binary_feedback": frozenset({*_ALWAYS, *_OUTPUT, "response_ids", "label"}),
    "pairwise_feedback": frozenset({*_ALWAYS, *_PAIR, "label", "reward_difference", "weight"}),
}
SAMPLE_TYPES = ("sample", "scalar_feedback")
KNOWN = tuple(
    dict.fromkeys(
        (
            *(*PROMPTS, *ANSWERS, *PAIR, *SYSTEMS, *sum(SCORES, ()), "history", "context"),
            *("text", "tools", "documents", "label", "margin", "reward"),
            *("prompt_id", "sample_id", "split"),
        )
    )
)


def split_names(text: str) -> list[str]:
    """Split a text at its commas into names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_names(text: str) -> dict[str, str]:
    """Parse "prompt=problem,completion=solution" into {our name: the records' name}.

    Raises:
      ValueError: for text of another form, an unknown name of ours, or one that is given twice.
    """
    names: dict[str, str] = {}
    for part in split_names(text):
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not (equals and ours and theirs):
            raise ValueError(f"got {part!r}, allowed: OUR_NAME=FIELD, with commas between")
        if ours not in KNOWN:
            raise ValueError(
                f"got {ours!r} before '=', allowed: one of {', '.join(KNOWN)}; the records' own "
                "name stands behind '='"
            )
        if ours in names:
            raise ValueError(f"got {ours!r} twice, allowed: one field for it")
        names[ours] = theirs
    return names


def parse_template(text: str) -> list[tuple[str, str]]:
    """Split a template such as "Solve: {question}" into pairs (text, field after it or "").

    Raises:
      ValueError: for braces that name no field, and for a text without any field.
    """
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error}; write {{{{ and }}}} for braces that name no field") from error
    found = []
    for literal, name, form, conversion in parts:
        if name is not None and (not name or not name.strip() or form or conversion):
            shown = (
                "{" + name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            )
            raise ValueError(
                f"got {shown + '}'!r}, allowed: {{FIELD}}, the name of a field alone; write "
                "{{ and }} for braces that name no field"
            )
        found.append((literal, name or ""))
    if text and not any(name for _, name in found):
        raise ValueError(f"got {text!r}, allowed: a text with a {{FIELD}} of the records")
    return found


def list_format(kind: object) -> frozenset[str]:
    """Return the fields of the record format `kind`; none if it is not a format of ours."""
    return FORMAT.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
