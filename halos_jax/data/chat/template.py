"""A chat template as text: what it writes before an answer, for the answer, and after it.

Templates are other people's programs, so all of this is found by rendering them. An answer after a
prompt is compared with the template's own rendering of the whole conversation. A difference (a
thought that only the prompt opens, thoughts that are left out of past answers) is reported once.
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
from halos_jax.data.chat.tokenizer import Tokenizer
from halos_jax.data.records.fields import RecordError, shorten
from halos_jax.data.records.turns import REASONING, drop_keys, make_messages, pack, unpack
from halos_jax.types import Turn

logger = logging.getLogger(__name__)

# The format of HALOs, for tokenizers without a template.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '\\n<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n<|im_start|>assistant\\n' }}{% endif %}"
)

# Llama 3 templates print today's date unless given one; a run resumed tomorrow must not change.
_DATE = "26 Jul 2024"
PROBE = Turn("user", "x")
SENTINEL, _REASON = "HALOSSENTINEL", "HALOSREASON"
# Rendering is slow: a template that writes these unchanged is taken to write every answer so.
_PROBES = (
    *("x", " x ", "\n\tx\n\n", ""),
    *("<think>x</think>\n\ny", "<think>\nx\n</think>\n\ny", "x\n</think>\n\ny"),
)


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer puts a BOS before what it encodes, without a template."""
    first = tokenizer("x", verbose=False)["input_ids"][:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def choose_template(tokenizer: Tokenizer, name: str = "") -> str:
    """Return a tokenizer's chat template: the one called `name`, or its default; "" if it has none.

    Raises:
      ConfigError: if there are several, and `name` is none of them and none is the default.
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


def make_default_template(tokenizer: Tokenizer) -> str:
    """Return the template for a tokenizer without one; it writes a BOS if the tokenizer adds one.

    So whoever renders with the template gets the same tokens; no BOS is added to rendered text.
    """
    return "{{ bos_token }}" + DEFAULT_TEMPLATE if adds_bos(tokenizer) else DEFAULT_TEMPLATE


class Template:
    """The chat template of a tokenizer; a guard keeps contents from spelling its markers.

    Attributes:
      text: the Jinja text.
      is_default: whether it is the default of this module.
      header: the text before the answer to `PROBE`, including the prompt.
      lead: the text that it writes after the header of every answer, such as a channel's name.
      end_marker: the text that ends an assistant's turn, such as "<|im_end|>".
      closing: the text that it writes after the end marker of a conversation's last turn, such as a
        line break; None if the end marker is not its own but the tokenizer's eos token.
    """

    def __init__(self, tokenizer: Tokenizer, guard: Guard):
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
        """Return turns as text, followed by the header of an answer if `generate`.

        Raises:
          RecordError: if the template refuses them.
        """
        try:
            try:
                return self._apply(turns, generate)
            except TemplateFault as error:
                called = any("tool_calls" in turn.further for turn in turns)
                if not called or not isinstance(error.__cause__, TypeError):
                    raise
                # Some templates take the arguments of a call to be text, and print them as such.
                return self._apply(turns, generate, spell_calls=True)
        except TemplateError as error:
            roles = ", ".join(turn.role for turn in turns)
            raise RecordError(
                f"the chat template refuses turns of the roles {roles}: {error}"
            ) from error

    def write_answer(self, answer: str | Turn) -> str:
        """Return the text of an answer between header and end marker.

        It is what the template itself writes there, if that has the header and the whole answer.
        Otherwise it is the answer's own text, without the beginning of a thought that the header
        has already.

        Raises:
          RecordError: if the template does not write an answer with further keys between header and
            end marker, or does not show one of the keys.
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
            "the chat template leaves out or changes a part of some answers (%s, for one), as it "
            "does with thoughts; they are learned whole, as a model would generate them",
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
        """Return the text before and after an answer in a conversation that has ended."""
        before, found, tail = self._render_answer(Turn("assistant", SENTINEL)).rpartition(SENTINEL)
        if not found:
            raise ConfigError(
                "model.chat_template: got a template that leaves out the assistant's turns; "
                "allowed: one that shows every turn"
            )
        return before, tail

    def _find_thought(self, before: str) -> thoughts.Thought:
        """Return the thought that the prompt begins, or writes empty.

        It is text that a prompt ends with and past answers do not have; or it is a thought, if the
        template has the tag that ends it.
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
        """Return the text that the template writes between reasoning and content; "" if it shows
        no reasoning."""
        keys: Mapping[str, str] = dict.fromkeys(REASONING, _REASON)
        try:
            whole = self._render_answer(Turn("assistant", SENTINEL, further=pack(keys)))
        except RecordError:
            return ""
        _, found, rest = whole.rpartition(_REASON)
        return rest.partition(SENTINEL)[0] if found and SENTINEL in rest else ""

    def _take_body(self, whole: str) -> str | None:
        """Return the text between header and tail; None if the text does not have both."""
        if not (whole.startswith(self.header) and whole.endswith(self._tail)):
            return None
        return whole[len(self.header) : len(whole) - len(self._tail)]

    def _continue_header(self, text: str) -> str:
        """Return an answer's text if the whole conversation does not begin with the prompt."""
        thought = self._thought
        if thought.is_closed and thoughts.has_thought(text, thought):
            self._say(
                "an answer has a thought (%s), but the chat template's prompt has ended it: %r; "
                "set --config.model.chat_template_options.enable_thinking=true, or take the "
                "thoughts out",
                shorten(text),
                thought.opening,
            )
        else:
            self._say(
                "the chat template's prompt ends with %r, which its past answers do not have; "
                "answers are learned after that text%s",
                thought.opening or self.header[-40:],
                f", one without a thought after {thought.end!r} too" if thought.end else "",
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
