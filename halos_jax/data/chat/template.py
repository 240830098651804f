"""A chat template as text: what it writes before an answer, for it, and behind it.

A template is text of somebody else's making. Everything here is found by rendering it. What follows
a prompt is held against the template's own rendering of the whole conversation; where these differ
(a thought that only the prompt opens, thoughts that are left out of past answers) it is said once.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from halos_jax.config import ConfigError
from halos_jax.data.chat import thoughts
from halos_jax.data.chat.bounded import TemplateFault, apply_template
from halos_jax.data.chat.guard import Guard
from halos_jax.data.chat.template_options import list_options
from halos_jax.data.records.fields import RecordError, shorten
from halos_jax.data.records.turns import REASONING, drop_keys, make_messages, pack, unpack
from halos_jax.types import Turn

logger = logging.getLogger(__name__)

# The format of HALOs for tokenizers that come without a template.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '\\n<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)

# Llama 3 templates print the day's date unless given one; a run resumed tomorrow must not change.
_DATE = "26 Jul 2024"
PROBE = Turn("user", "x")
SENTINEL, _REASON = "HALOSSENTINEL", "HALOSREASON"
# Rendering is slow; a template that leaves these as they are leaves every answer so.
_PROBES = (
    *("x", " x ", "\n\tx\n\n", ""),
    *("<think>x</think>\n\ny", "<think>\nx\n</think>\n\ny", "x\n</think>\n\ny"),
)


def adds_bos(tokenizer: Any) -> bool:
    """Tell whether a tokenizer begins what it encodes with a BOS by itself."""
    first = tokenizer("x", verbose=False)["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def choose_template(tokenizer: Any, name: str = "") -> str:
    """Return a tokenizer's chat template: the one called `name`, else its default, else "".

    Raises:
      ConfigError: where there are several and none of them is the default.
    """
    found: str | dict[str, str] = tokenizer.chat_template or ""
    if isinstance(found, str):
        return found
    if (name or "default") in found:
        return found[name or "default"]
    raise ConfigError(
        f"model.chat_template: got {name!r}, and the tokenizer has several templates without a "
        f"default: {', '.join(map(repr, found))}; allowed: one of these, or a Jinja file; set "
        f"--config.model.chat_template={next(iter(found))}"
    )


def make_default_template(tokenizer: Any) -> str:
    """Return the template of a tokenizer without one, with a BOS where the tokenizer adds one.

    Who renders by the template has the same tokens then: no tokenizer adds a BOS behind it.
    """
    return "{{ bos_token }}" + DEFAULT_TEMPLATE if adds_bos(tokenizer) else DEFAULT_TEMPLATE


class Template:
    """The chat template of a tokenizer; contents go through a guard, so that they stay contents.

    Attributes:
      text: the Jinja text.
      is_default: whether it is that of this module.
      header: what stands before the answer to `PROBE`, the prompt included.
      lead: what it writes behind the header of every answer: the name of a channel, say.
      end_marker: what ends an assistant's turn, e.g. "<|im_end|>".
      closing: what it writes behind the end marker of a conversation's last turn: a line break,
        say; None where the end marker is not its own but the tokenizer's eos token.
    """

    def __init__(self, tokenizer: Any, guard: Guard):
        self._tokenizer, self._guard = tokenizer, guard
        own = choose_template(tokenizer)
        self.text, self.is_default = own or make_default_template(tokenizer), not own
        self._fixed = {} if "date_string" in list_options(self.text) else {"date_string": _DATE}
        if "strftime_now" in self.text and "date_string" not in self.text:
            logger.warning(
                "the chat template prints the current date: prompts change from day to day"
            )
        self.header = self.render((PROBE,), generate=True)
        before, self._tail = self._split()
        self.end_marker: str = self._tail.rstrip() or tokenizer.eos_token or ""
        if not self.end_marker:
            raise ConfigError(
                "model.chat_template: got a template without a marker after the assistant's turn, "
                "and the tokenizer has no eos token; allowed: at least one of them, or no response "
                "would ever end"
            )
        marked = self._tail.startswith(self.end_marker)
        self.closing: str | None = self._tail[len(self.end_marker) :] if marked else None
        self.lead = before.removeprefix(self.header) if before.startswith(self.header) else ""
        self._thought = self._find_thought(before)
        guard.allow(self._thought.tags)
        self._said: set[str] = set()
        self.is_verbatim = all(
            self._render_answer(Turn("assistant", probe)) == self.header + probe + self._tail
            for probe in _PROBES
        )

    def render(self, turns: Sequence[Turn], *, generate: bool) -> str:
        """Return turns, and the header of an answer if one is to be generated, as text.

        Raises:
          RecordError: where the template refuses them.
        """
        try:
            try:
                return self._apply(turns, generate)
            except TemplateFault as error:
                called = any("tool_calls" in turn.further for turn in turns)
                if not called or not isinstance(error.__cause__, TypeError):
                    raise
                # Some templates print the arguments of a call as the text that they take them for.
                return self._apply(turns, generate, spell_calls=True)
        except TemplateError as error:
            roles = ", ".join(turn.role for turn in turns)
            raise RecordError(
                f"the chat template refuses turns of the roles {roles}: {error}"
            ) from error

    def write_answer(self, answer: str | Turn) -> str:
        """Return an answer as it stands between header and end marker.

        That is what the template itself writes there, if it writes the header and all of the text.
        Else it is the text: what of it the header has begun, a thought, stands once.

        Raises:
          RecordError: where the template shows a turn with further keys in no place behind a
            header, or does not show one of them.
        """
        turn = answer if isinstance(answer, Turn) else Turn("assistant", answer)
        if turn.further:
            return self._write_turn(turn)
        hidden = self._guard.hide_answer(turn.content)
        if self.is_verbatim:
            return hidden
        body = self._take_body(self._render_answer(turn))
        if body is None:
            return self._guard.hide_answer(self._continue_header(turn.content))
        if "".join(hidden.split()) in "".join((self.header + body).split()):
            return body
        self._say(
            "the chat template leaves out or changes a part of some answers (%s, say), as it does "
            "with thoughts; they are learned whole, as a model would generate them",
            shorten(turn.content),
        )
        return hidden

    def _apply(self, turns: Sequence[Turn], generate: bool, *, spell_calls: bool = False) -> str:
        guard = self._guard
        messages, context = make_messages(
            turns,
            guard.hide,
            guard.hide_answer,
            template=self.text,
            spell_calls=spell_calls,
        )
        return apply_template(
            self._tokenizer,
            messages,
            chat_template=self.text,
            add_generation_prompt=generate,
            **self._fixed,
            **context,
        )

    def _render_answer(self, answer: Turn) -> str:
        return self.render((PROBE, answer), generate=False)

    def _split(self) -> tuple[str, str]:
        """Return what stands before and behind an answer in a conversation that has ended."""
        before, found, tail = self._render_answer(Turn("assistant", SENTINEL)).rpartition(SENTINEL)
        if not found:
            raise ConfigError(
                "model.chat_template: got a template that leaves out what the assistant says; "
                "allowed: one that shows every turn"
            )
        return before, tail

    def _find_thought(self, before: str) -> thoughts.Thought:
        """Return the thought that the prompt begins, or has with no words in it.

        That is what the prompt has and no past answer, or a thought whose end the template has,
        too.
        """
        written = self._write_reasoning()
        if self.header.startswith(before) and self.header != before:
            return thoughts.find_thought(self.header.removeprefix(before), written)
        pairs = zip(self.render((PROBE,), generate=False), self.header, strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        prompt = self.header[shared:]
        found = thoughts.find_thought(prompt, written)
        if not found.begin_tag or found.end_tag not in self.text:
            return thoughts.Thought()
        return thoughts.find_thought(prompt[prompt.index(found.begin_tag) :], written)

    def _write_reasoning(self) -> str:
        """Return what the template writes between a turn's reasoning and its content; "" if it
        shows none."""
        keys: Mapping[str, str] = dict.fromkeys(REASONING, _REASON)
        try:
            whole = self._render_answer(Turn("assistant", SENTINEL, further=pack(keys)))
        except RecordError:
            return ""
        _, found, rest = whole.rpartition(_REASON)
        return rest.partition(SENTINEL)[0] if found and SENTINEL in rest else ""

    def _take_body(self, whole: str) -> str | None:
        """Return what stands between header and tail; None where they do not stand there."""
        if not (whole.startswith(self.header) and whole.endswith(self._tail)):
            return None
        return whole[len(self.header) : len(whole) - len(self._tail)]

    def _continue_header(self, text: str) -> str:
        """Return an answer's text behind a header that is not the beginning of the whole."""
        thought = self._thought
        if thought.is_closed and thoughts.has_thought(text, thought):
            self._say(
                "an answer holds a thought (%s), but the chat template's prompt has ended it: %r; "
                "set --config.model.chat_template_options.enable_thinking=true, or take the "
                "thoughts out",
                shorten(text),
                thought.opening,
            )
        else:
            self._say(
                "the chat template writes the past otherwise than it prompts: its prompt ends with "
                "%r, which its answers of the past have not; answers are learned behind that%s",
                thought.opening or self.header[-40:],
                f", one without a thought as {thought.end!r} and the answer" if thought.end else "",
            )
        return thoughts.continue_thought(text, thought)

    def _write_turn(self, answer: Turn) -> str:
        """Return an answer with further keys, all of which the template must show."""
        whole = self._render_answer(answer)
        for name, less in drop_keys(answer):
            if self._render_answer(less) == whole:
                raise RecordError(
                    f"the chat template does not show {name!r} of an answer, which would be "
                    "learned without it; allowed: a template that does (model.chat_template), or "
                    f"records without {name!r}"
                )
        body = self._take_body(whole)
        if body is None:
            raise RecordError(
                f"the chat template writes an answer with {', '.join(unpack(answer))} as "
                f"{shorten(whole)}, allowed: {self.header!r} before it, {self._tail!r} at its end"
            )
        return body

    def _say(self, message: str, *values: Any) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, *values)
