"""Online iterative alignment of language models in JAX.

`run` does what the command line does; `load_policy`, `sample`, `score`, `make_feedback`, `train`,
`evaluate` and `export` are the stages of a run, to be called by hand. See `halos_jax/api.py`.
`audit_workdir` reads all that a run has left, and lists what has changed; `read_rounds` returns the
metrics of a run's rounds; `write_report` and `compare_workdirs` write pages about runs.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Name -> the module that has it, imported at the first use of the name: importing jax takes a
# second, and somebody who only reads configs does not need it.
_EXPORTS = {
    **dict.fromkeys(
        (
            "LoadedPolicy",
            "Trained",
            "default_config",
            "evaluate",
            "export",
            "format_rounds",
            "load_policy",
            "load_preset",
            "load_prompts",
            "load_renderer",
            "make_feedback",
            "run",
            "sample",
            "score",
            "start_logging",
            "train",
        ),
        "api",
    ),
    **dict.fromkeys(
        (
            "CheckpointConfig",
            "Config",
            "DataConfig",
            "FeedbackConfig",
            "LoraConfig",
            "MeshConfig",
            "ModelConfig",
            "OptimizerConfig",
            "RewardConfig",
            "RoundsConfig",
            "SamplingConfig",
            "TrainConfig",
        ),
        "config",
    ),
    **dict.fromkeys(("Judgement", "Preference", "Prompt", "Sample", "Turn"), "types"),
    "audit_workdir": "rounds.audit",
    "read_rounds": "rounds.outcome.table",
    "compare_workdirs": "report.command",
    "write_report": "report.live",
    "Interrupted": "workdir.interrupt",
    "UserError": "errors",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` at its first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
