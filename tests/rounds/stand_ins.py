"""Stand-ins for what a round works with."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from halos_jax.config import Config, SamplingConfig, TrainConfig
from halos_jax.losses import get_loss
from halos_jax.packing.layout import LayoutMemory
from halos_jax.rounds.context import Rollouts, Run
from halos_jax.types import Prompt, Sample, Turn
from halos_jax.workdir.changes import History
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.ledger import no_ledger
from halos_jax.workdir.runs import RunInfo
from halos_jax.workdir.workspace import Workspace

CONFIG = Config(
    seed=3,
    progress=False,
    sampling=SamplingConfig(num_samples_per_prompt=2, shard_prompts=2),
    train=TrainConfig(max_length=20),
)
PROMPTS = [Prompt(f"p{i}", (Turn("user", f"question {i}"),)) for i in range(5)]


class Calls:
    """Notes the calls of any method."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments, **options: self.calls.append((name, *arguments))


def refuse_text(texts, *limits):
    """Stand for a renderer of what was sampled, and so came as tokens."""
    return [pytest.fail(f"{text!r} was rendered") for text in texts]


def make_workspace(workdir=".", *, config=CONFIG, stop=None, is_writer=True, ledger=None):
    """Return a workspace without a lock or devices."""
    ledger = ledger or no_ledger(workdir)
    info = RunInfo(Path(workdir), False, is_writer, History(config), ledger)
    return Workspace(config, info, None, stop or StopSignal())


def make_run(*, workdir=".", config=CONFIG, stop=None, is_writer=True, ledger=None, **parts) -> Run:
    workspace = make_workspace(
        workdir, config=config, stop=stop, is_writer=is_writer, ledger=ledger
    )
    rollouts = {
        "sampler": SimpleNamespace(
            unstack=lambda params: f"unstacked {params}",
            settings=CONFIG.sampling,
            decoder=SimpleNamespace(max_positions=0),
            renderer=None,
        ),
        "scorer": lambda samples: [float(len(sample.output)) for sample in samples],
        "scorers": {},
    }
    rollouts |= {name: parts.pop(name) for name in rollouts.keys() & parts.keys()}
    names = Run.__dataclass_fields__.keys() - {"layouts", "budget", "on_round", "compiled"}
    defaults = dict.fromkeys(names) | {
        "workspace": workspace,
        "rollouts": Rollouts(workspace, **rollouts),
        "trainer": SimpleNamespace(
            loss=get_loss({"name": "dpo"}),
            layouts=LayoutMemory(),
            decoder=SimpleNamespace(max_positions=0),
        ),
        "checkpoints": Calls(),
        "writer": Calls(),
        "policy": SimpleNamespace(
            renderer=SimpleNamespace(render_prompts=refuse_text, render_responses=refuse_text),
            reference=None,
        ),
        "held_out": PROMPTS[:2],
        "test": (),
    }
    return Run(**(defaults | parts))


def make_sample(prompt: Prompt, sample_id: int, length: int) -> Sample:
    return Sample(
        prompt=prompt,
        sample_id=sample_id,
        output="x" * length,
        prompt_ids=(1, 2),
        response_ids=(*range(10, 10 + length), 4),
        finish_reason="stop" if length < 4 else "length",
    )
