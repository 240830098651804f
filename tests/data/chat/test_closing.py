"""Items of a reward model end where their template does."""

import numpy as np
import pytest

from halos_jax.data.chat.closing import close_items
from halos_jax.data.chat.renderer import make_renderer
from halos_jax.types import CHOSEN, REJECTED, Item, Turn
from tests.data.chat.test_template import TEMPLATES, make_tokenizer


@pytest.mark.parametrize("name", ["chatml", "qwen 3", "llama 3", "phi 3", "mistral"])
def test_an_answer_that_has_ended_is_closed_as_the_template_closes_it(name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    renderer = make_renderer(tokenizer)
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "four"}]
    whole = tokenizer.apply_chat_template(chat, return_dict=False)
    prompt = np.array(renderer.render_prompt((Turn("user", "q"),), 99), np.int32)
    ended, cut = (
        np.array(renderer.render_response("four", finished=finished), np.int32)
        for finished in (True, False)
    )
    item = Item(prompt, (ended, cut), (CHOSEN, REJECTED), rewards=(1.0, 0.0))
    (closed,) = close_items([item], renderer, 999)
    assert [*prompt, *closed.responses[0]] == list(whole)
    assert closed.responses[1] is cut and closed.rewards == item.rewards
    assert closed.responses[0].dtype == np.int32
    # Where there is no room for it the answer stays as it is.
    (full,) = close_items([item], renderer, len(prompt) + len(ended))
    assert full.responses[0] is ended
