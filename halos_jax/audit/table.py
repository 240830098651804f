"""The checks of a verification, in their order: a new one is a function and a row here.

Functions are named as text, "module:function", and imported when they are called: a verification
of hashes alone loads no model code.
"""

import dataclasses
from typing import Literal

from halos_jax.config.tasks import Task


@dataclasses.dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
      name: as it stands in the table that is printed.
      run: called with (Opened) or, if it is made for every manifest, (Opened, Manifest); yields or
        returns findings. A UserError that it raises counts as a difference, but a ConfigError or a
        ModelError (an input is not there) as not checked.
      per: whether it is made once a workdir or once a manifest (of a round, or of a single task).
      derives: whether it computes results again; then `verify.round` says for which rounds.
      tasks: the tasks that it is made for; empty: all.
    """

    name: str
    run: str
    per: Literal["workdir", "manifest"] = "workdir"
    derives: bool = False
    tasks: tuple[Task, ...] = ()


CHECKS: tuple[Check, ...] = (
    Check("records", "halos_jax.audit.files:check_records"),
    Check("ledger", "halos_jax.audit.files:check_ledger"),
    Check("files", "halos_jax.audit.files:check_files", per="manifest"),
    Check("checkpoints", "halos_jax.audit.files:check_checkpoints"),
    Check("checkpoints", "halos_jax.audit.arrays:check_arrays"),
    Check("chain", "halos_jax.audit.links:check_chain"),
    Check("config", "halos_jax.audit.links:check_given"),
    Check("inputs", "halos_jax.audit.inputs:check_inputs"),
    Check("inputs", "halos_jax.audit.branch:check_branch", tasks=("online", "align")),
    Check(
        "rederive",
        "halos_jax.audit.rederive.rounds:check_round",
        per="manifest",
        derives=True,
        tasks=("online",),
    ),
    Check(
        "final",
        "halos_jax.audit.rederive.single.exports:check_final",
        derives=True,
        tasks=("online",),
    ),
    Check(
        "rederive",
        "halos_jax.audit.rederive.single.jobs:check_job",
        per="manifest",
        derives=True,
        tasks=("sample", "label", "eval", "compare"),
    ),
    Check(
        "rederive",
        "halos_jax.audit.rederive.single.courses:check_course",
        derives=True,
        tasks=("sft", "reward_model", "align"),
    ),
    Check("programs", "halos_jax.audit.rederive.same:check_programs"),
)
