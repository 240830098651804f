"""The quickstart's task: sort the letters of a prompt, "dbca" -> "abcd".

The task has a verifiable rule (`score_by_rule`), is small enough to be learned on a CPU, and
leaves something to be found by online alignment: a share of the demonstrations is wrong on
purpose, so that a model trained on them knows how to sort and yet often answers wrongly.
"""

import json
import math
import random
import shutil
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from halos_jax import sharding, storage
from halos_jax.config import Config, ToyConfig
from halos_jax.data.records.formats import (
    make_prompt_id,
    preference_to_record,
    write_records,
)
from halos_jax.types import Completion, Preference, Prompt, Turn

PAD, UNKNOWN, BOS, ANSWER, END = "<|pad|>", "<|unk|>", "<|bos|>", "<|answer|>", "<|im_end|>"

# One token each before the question, before the answer and after it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    f"{{{{ '{ANSWER}' + message['content'] + '{END}' }}}}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{ANSWER}' }}}}{{% endif %}}"
)

# The architecture of both the policy and the reward model.
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "initializer_range": 0.05,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}

DEMONSTRATION_MISTAKES = ("swap", "drop", "repeat", "unsorted")
ALL_MISTAKES = (*DEMONSTRATION_MISTAKES, "substitute")


def score_by_rule(prompt: Sequence[Mapping[str, str]], response: str) -> float:
    """Return 1.0 if `response` is exactly the sorted letters of the last turn, else 0.0.

    Usable as `reward.function="halos_jax.data.toy:score_by_rule"`.
    """
    return float(response == sort_letters(prompt[-1]["content"]))


def sort_letters(letters: str) -> str:
    """Return the right answer to a prompt."""
    return "".join(sorted(letters))


def make_mistake(rng: random.Random, letters: str, kinds: Sequence[str], alphabet: str) -> str:
    """Return a wrong answer to the prompt `letters` (two or more, unsorted, none twice).

    Kinds: "swap" exchanges two letters, "drop" leaves one out, "repeat" writes one twice,
    "unsorted" is the prompt itself, "substitute" puts a wrong letter in the place of one.
    """
    answer = sort_letters(letters)
    kind, place = rng.choice(kinds), rng.randrange(len(answer))
    before, letter, after = answer[:place], answer[place], answer[place + 1 :]
    if kind == "drop":
        return before + after
    if kind == "repeat":
        return before + letter * 2 + after
    if kind == "unsorted":
        return letters
    if kind == "substitute":
        return before + rng.choice([other for other in alphabet if other != letter]) + after
    if kind == "swap":
        swapped, other = list(answer), rng.choice([i for i in range(len(answer)) if i != place])
        swapped[place], swapped[other] = swapped[other], swapped[place]
        return "".join(swapped)
    raise ValueError(f"kinds: got {kind!r}, allowed: {', '.join(ALL_MISTAKES)}")


def run_toy_data(config: Config, stop: object = None) -> dict[str, float]:
    """Run the task "toy_data": one process of the job writes the data into `config.workdir`.

    `stop`, the signal that other tasks watch, is not: this takes a second, and can be repeated.
    """
    if jax.process_index() == 0:
        make_toy_data(Path(config.workdir), config.toy, config.seed)
    sharding.wait_for_all("toy data")
    return {}


def make_toy_data(folder: Path, toy: ToyConfig, seed: int) -> None:
    """Write tokenizer, model config and data sets of the task into `folder`.

    The same arguments give the same bytes. Every file appears whole or not at all, and writing
    again after an interruption is safe.

      base/            tokenizer and config.json of a small Llama, without weights
      sft.jsonl        prompt and completion, a share of `toy.mistakes` of them wrong
      pairs.jsonl      pairwise feedback: the right answer against a mistake
      prompts.jsonl    prompts to sample from
      eval.jsonl       held-out prompts, with the right completion
      eval_pairs.jsonl pairwise feedback on the held-out prompts

    No prompt is in two of sft, pairs, prompts and eval.

    Raises:
      ValueError: if the alphabet does not give that many prompts.
      OSError: if the folder cannot be written.
    """
    counts = (toy.num_sft, toy.num_pairs, toy.num_prompts, toy.num_eval)
    prompts = _draw_prompts(random.Random(f"prompts {seed}"), toy, sum(counts))
    sft, pairs, train, held_out = ([next(prompts) for _ in range(count)] for count in counts)

    folder = Path(folder)
    _write_base(folder / "base", toy.alphabet)
    rng = random.Random(f"answers {seed}")
    write_records(folder / "sft.jsonl", (_demonstrate(rng, letters, toy) for letters in sft))
    write_records(folder / "pairs.jsonl", (_prefer(rng, letters, toy, seed) for letters in pairs))
    write_records(folder / "prompts.jsonl", ({"prompt": _ask(letters)} for letters in train))
    write_records(
        folder / "eval.jsonl",
        ({"prompt": _ask(letters), "completion": sort_letters(letters)} for letters in held_out),
    )
    write_records(
        folder / "eval_pairs.jsonl", (_prefer(rng, letters, toy, seed) for letters in held_out)
    )


def make_tokenizer(alphabet: str) -> Any:
    """Make the tokenizer: one token a character, the special ones aside."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast  # Seconds to import; the rule needs neither.

    characters = sorted({*string.ascii_lowercase, " ", *alphabet})
    vocabulary = {token: i for i, token in enumerate([PAD, UNKNOWN, BOS, ANSWER, END, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    make: Callable[..., Any] = PreTrainedTokenizerFast  # the library has no types for it
    return make(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[ANSWER],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=ARCHITECTURE["max_position_embeddings"],
    )


def _write_base(folder: Path, alphabet: str) -> None:
    tokenizer = make_tokenizer(alphabet)
    config = ARCHITECTURE | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save_pretrained(partial)
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    folder.mkdir(exist_ok=True)
    for file in sorted(partial.iterdir()):
        storage.sync_file(file)
        file.replace(folder / file.name)
    partial.rmdir()


def _draw_prompts(rng: random.Random, toy: ToyConfig, count: int) -> Iterator[str]:
    """Yield `count` distinct prompts: letters of the alphabet, none twice, not sorted yet."""
    seen: set[str] = set()
    for _ in range(100 * count):
        if len(seen) == count:
            return
        length = rng.randint(max(toy.min_letters, 2), toy.max_letters)
        letters = "".join(rng.sample(toy.alphabet, length))
        if letters not in seen and letters != sort_letters(letters):
            seen.add(letters)
            yield letters
    raise ValueError(
        f"toy: got {count} prompts to draw, but found only {len(seen)}; lower toy.num_sft, "
        "num_pairs, num_prompts or num_eval, or set a larger toy.alphabet or max_letters"
    )


def _ask(letters: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": letters}]


def _demonstrate(rng: random.Random, letters: str, toy: ToyConfig) -> dict[str, Any]:
    wrong = rng.random() < toy.mistakes
    mistake = make_mistake(rng, letters, DEMONSTRATION_MISTAKES, toy.alphabet)
    return {"prompt": _ask(letters), "completion": mistake if wrong else sort_letters(letters)}


def _prefer(rng: random.Random, letters: str, toy: ToyConfig, seed: int) -> dict[str, Any]:
    turns = (Turn("user", letters),)
    chosen, rejected = (
        Completion((Turn("assistant", text),))
        for text in (sort_letters(letters), make_mistake(rng, letters, ALL_MISTAKES, toy.alphabet))
    )
    prompt = Prompt(make_prompt_id(turns), turns)
    return preference_to_record(Preference(prompt, chosen, rejected), seed=seed)


def check_toy(values: Mapping[str, Any]) -> Iterable[str]:
    """Yield an error line for each bad setting of the toy problem."""
    alphabet = values["toy.alphabet"]
    shortest, longest = max(values["toy.min_letters"], 2), values["toy.max_letters"]
    if not alphabet.isalpha() or len(set(alphabet)) < max(len(alphabet), 2):
        yield f"toy.alphabet: got {alphabet!r}, allowed: two letters or more, each of them once"
        return
    if not shortest <= longest <= len(alphabet):
        yield (
            f"toy.max_letters: got {longest}, allowed: {shortest} (see toy.min_letters) to "
            f"{len(alphabet)} (the letters of toy.alphabet)"
        )
        return
    # A prompt is a sequence of distinct letters that is not sorted.
    lengths = range(shortest, longest + 1)
    exist = sum(math.perm(len(alphabet), n) - math.comb(len(alphabet), n) for n in lengths)
    names = ("num_sft", "num_pairs", "num_prompts", "num_eval")
    wanted = sum(values[f"toy.{name}"] for name in names)
    if wanted > exist // 2:
        yield (
            f"toy: got {wanted} prompts in all ({' + '.join(names)}), allowed: {exist // 2}, half "
            "of those that exist; lower the numbers, or set a larger toy.alphabet or max_letters"
        )
