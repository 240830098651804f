"""The names that fields of records have here, and how the config speaks of fields.

`data.fields` maps our names to those of somebody else's records, `data.prompt_template` makes a
prompt of fields, `data.ignore_fields` names those that are left unread on purpose.
"""

import string

# Lists of turns; what may stand in them besides text is known to `data/records/turns.py`.
CHATS = ("messages", "conversations", "conversation")
# What a prompt may be called, the first that is there counts.
PROMPTS = ("prompt", *CHATS, "instruction", "question", "problem", "query", "input")
TARGETS = ("completion", "output", "response", "answer", "solution")
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
# What a record that this package or HALOs has written says besides its texts, by its `type`.
_ALWAYS = {"type", "prompt", "prompt_id", "prompt_ids", "instruction", "extra", "dataset", "split"}
_OUTPUT = ("output", "reward", "generator", "finish_reason", "sample_id")
_SAMPLE = frozenset({*_ALWAYS, *_OUTPUT, "response_ids", "logps"})
_PAIR = {f"{name}_{letter}" for name in (*_OUTPUT, "ids") for letter in "AB"}
FORMAT = {
    "sample": _SAMPLE,
    "scalar_feedback": _SAMPLE,
    "binary_feedback": frozenset({*_ALWAYS, *_OUTPUT, "response_ids", "label"}),
    "pairwise_feedback": frozenset({*_ALWAYS, *_PAIR, "label", "reward_difference"}),
}
SAMPLE_TYPES = ("sample", "scalar_feedback")
KNOWN = tuple(
    dict.fromkeys(
        (
            *(*PROMPTS, *TARGETS, *PAIR, *SYSTEMS, *sum(SCORES, ()), "history", "context"),
            *("text", "tools", "documents", "label", "margin", "reward"),
            *("prompt_id", "sample_id", "split"),
        )
    )
)


def split_names(text: str) -> list[str]:
    """Return names that are separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def parse_names(text: str) -> dict[str, str]:
    """Return our name -> the records' name, of "prompt=problem,completion=solution".

    Raises:
      ValueError: for what is no such list, a name of ours that means nothing, or one given twice.
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
    """Return (text, field behind it or "") for each part of "Solve: {question}".

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
    """Return the names that a record of some `type` has by its format; none, where it is no own."""
    return FORMAT.get(kind, frozenset()) if isinstance(kind, str) else frozenset()
