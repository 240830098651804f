"""A run opened for reading: the parts that a resume of it would make, in a folder of its own.

    scratch/rounds/0003/samples.jsonl, manifest.json, ...    links to what the run wrote
    scratch/made/...                                         what is made again

Nothing is written into the workdir. All that a stage needs comes from the links, so that the code
of the stages runs as it did in the run.
"""

import contextlib
import dataclasses
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from halos_jax.audit.rederive import settings
from halos_jax.audit.rederive.judges import answer_from_cache
from halos_jax.audit.rederive.settings import Place
from halos_jax.checkpoints.position import Position
from halos_jax.checkpoints.store import Checkpoints, read_checkpoints
from halos_jax.config import Config
from halos_jax.losses import get_loss
from halos_jax.metrics import MetricWriter
from halos_jax.packing.layout import LayoutMemory
from halos_jax.policies import source
from halos_jax.policies.host_copy import HostCopy
from halos_jax.policies.policy import load_frozen, load_start, start_policy
from halos_jax.policies.reference import attach_reference, load_sft
from halos_jax.policies.teacher import load_teacher
from halos_jax.rounds import setup
from halos_jax.rounds.context import Run
from halos_jax.rounds.order import Order, load_order, spread_passes
from halos_jax.rounds.outcome.decisions import find_start, lower_rate
from halos_jax.rounds.outlook import lay_out, make_budget
from halos_jax.rounds.prompts import load_prompts
from halos_jax.training import loop as training
from halos_jax.training.followers import take_policy
from halos_jax.training.state import set_step
from halos_jax.types import Params, TrainState
from halos_jax.workdir import changes, manifests
from halos_jax.workdir.changes import History
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.ledger import no_ledger
from halos_jax.workdir.manifests import Manifest, round_folder
from halos_jax.workdir.runs import RunInfo
from halos_jax.workdir.workspace import Workspace

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Replica:
    """An online run that is read and made again in parts; made by `open_replica`.

    Attributes:
      config: that of the run's last start, on the mesh of this job.
      workdir: the run's folder, which is only read.
      scratch: the folder for what is made again.
      segments: the recorded changes of the config, oldest first.
    """

    config: Config
    workdir: Path
    scratch: Path
    segments: Sequence[settings.Segment]
    mesh: Mesh
    stop: StopSignal
    checkpoints: Checkpoints
    manifests: Mapping[int, Manifest]
    order: Order
    sft: HostCopy = dataclasses.field(default_factory=HostCopy)
    _runs: list[tuple[Config, int, float, Run]] = dataclasses.field(default_factory=list)

    @property
    def rounds(self) -> list[int]:
        """The rounds that have begun, 0 included, in order."""
        return sorted(self.manifests)

    def folder(self, round: int) -> Path:
        """Return the folder with links to what the run wrote in `round`."""
        return round_folder(self.scratch, round)

    def make_folder(self, name: str) -> Path:
        """Return an empty folder for something that is made again."""
        folder = self.find_folder(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def find_folder(self, name: str) -> Path:
        """Return the folder that `make_folder` has made."""
        return self.scratch / "made" / name

    def count_steps(self, round: int) -> int:
        """Return how many optimizer steps the run had taken at the end of `round`."""
        known = self.manifests.get(round)
        return int(known.metrics.get("steps_done", 0)) if known is not None and round > 0 else 0

    def locate(self, round: int) -> Place:
        """Return the place in the run at which `round` began."""
        return max(round, 1), self.count_steps(round - 1)

    def find_break(self, round: int) -> int | None:
        """Return the step at which the settings changed while `round` was trained, if they did."""
        return settings.find_break(self.segments, self.locate(round))

    def at(self, round: int) -> Run:
        """Return the parts of the run as they were when `round` began.

        Its writer keeps nothing. The reward model's layouts are those at the round's beginning.
        """
        place = self.locate(round)
        config = settings.undo_changes(self.config, self.segments, place)
        count = settings.count_prompts(self.order.groups, self.segments, place)
        rate = lower_rate(config, self.scratch, place[0]).optimizer.learning_rate
        for known in self._runs:
            if known[:3] == (config, count, rate):
                run = known[3]
                break
        else:
            run = self._make(config, count, place)
            self._runs.append((config, count, rate, run))
        before = self.manifests.get(round - 1)
        run.layouts.load(before.layouts if before is not None else {})
        return run

    def _make(self, config: Config, count: int, place: Place) -> Run:
        order = _cut(self.order, count)
        config = answer_from_cache(source.use_final(config), self.workdir)
        policy = attach_reference(start_policy(config), config)
        budget = make_budget(config, self.scratch)
        prompts = load_prompts(config, policy.renderer, budget.limit, order)
        history = History(config, (), settings.list_before(self.segments, place))
        began = dataclasses.replace(budget, opened=budget.opened[: place[0] - 1])
        laid_out, steps = lay_out(config, history, began, len(prompts.train), order)
        spread = spread_passes(prompts.train, config, budget.limit)
        laid_out = lower_rate(laid_out, self.scratch, place[0])
        info = RunInfo(self.scratch, True, True, history, no_ledger(self.scratch))
        workspace = Workspace(laid_out, info, self.mesh, self.stop)
        frozen = load_frozen(policy, self.mesh)
        teacher = load_teacher(laid_out, get_loss(laid_out.loss), policy, self.mesh)
        layouts = LayoutMemory()
        return Run(
            workspace=workspace,
            rollouts=setup.make_rollouts(workspace, policy, layouts),
            policy=policy,
            trainer=setup.make_run_trainer(workspace, policy, frozen, teacher, steps),
            checkpoints=self.checkpoints,
            writer=MetricWriter(None),
            prompts=spread,
            held_out=prompts.held_out,
            test=prompts.test,
            layouts=layouts,
            sft=self.sft,
            budget=budget,
        )

    # ------------------------------------------------------------------- policies

    def load_sft(self, run: Run) -> Params:
        """Return the params of the reference "sft"."""
        return self.sft.load(lambda: load_sft(run.policy, self.mesh, run.trainer.frozen))

    def load_start(self, run: Run) -> Params:
        """Return the params that the run started from."""
        save_id = self.find_checkpoint(0)
        if save_id is not None:
            abstract = take_policy(run.trainer.abstract_state.params)
            params: Params = self.checkpoints.restore_policy(abstract, save_id)
            return params
        if run.policy.reference is None:
            return self.load_sft(run)
        return load_start(run.policy, self.mesh, run.trainer.frozen)

    def find_checkpoint(self, round: int) -> int | None:
        """Return the checkpoint at the end of `round`; None if retention has deleted it.

        That of round 0 is what a branch has started from; another run has none.
        """
        return self.checkpoints.find_round_end(round)

    def has_start(self, round: int) -> bool:
        """Tell whether the state that `round` began with may still be had."""
        start = find_start(self.scratch, round)
        return not start or self.find_checkpoint(start) is not None

    def load_end(self, run: Run, round: int) -> TrainState | None:
        """Return the train state at the end of `round` from its checkpoint; None if it is gone.

        The trainer's memory of shapes is then that of the checkpoint.
        """
        save_id = self.find_checkpoint(round)
        if save_id is None:
            return None
        state, record = self.checkpoints.restore(run.trainer.abstract_state, save_id)
        run.trainer.layouts.load(Position.from_dict(record).layouts)
        found: TrainState = state
        return found

    def load_params(self, run: Run, save_id: int) -> Params:
        """Return the trained params in a checkpoint."""
        abstract = run.trainer.abstract_state.params
        params: Params = self.checkpoints.restore_params(abstract, save_id)
        return params

    def load_begin(self, run: Run, round: int) -> TrainState | None:
        """Return the train state that `round` began with; None if it is gone.

        The trainer's memory of shapes is that of the run at that time, as far as it is known.
        """
        start = find_start(self.scratch, round)
        if start or self.find_checkpoint(0) is not None:
            state = self.load_end(run, start)
        else:
            run.trainer.layouts.load({})
            state = training.start_state(run.trainer, self.load_start(run))
        if state is None or start == round - 1:
            return state
        last = self.find_checkpoint(round - 1)
        if last is not None:
            position = Position.from_dict(self.checkpoints.read_round_state(last))
            run.trainer.layouts.load(position.layouts)
        return set_step(state, self.count_steps(round - 1))


@contextlib.contextmanager
def open_replica(config: Config, workdir: Path, scratch: Path, mesh: Mesh) -> Iterator[Replica]:
    """Open the online run in `workdir`, which may be under way, for reading.

    Args:
      config: that of the run's last start, on the mesh of this job.
      scratch: an empty folder.

    Raises:
      ConfigError, ModelError, WorkdirError: if the run's data or models are gone.
    """
    plain = changes.read_plain(workdir / changes.FILE)
    checkpoints = read_checkpoints(workdir / "checkpoints")
    try:
        yield Replica(
            config=dataclasses.replace(config, progress=False),
            workdir=workdir,
            scratch=scratch,
            segments=tuple(plain.get("segments", ())),
            mesh=mesh,
            stop=StopSignal(),
            checkpoints=checkpoints,
            manifests=_link_rounds(workdir, scratch),
            order=load_order(config, workdir),
        )
    finally:
        checkpoints.close()


def _link_rounds(workdir: Path, scratch: Path) -> dict[int, Manifest]:
    """Link the files of all rounds that have begun into `scratch`; return their manifests."""
    found = {}
    for folder in sorted((workdir / "rounds").glob("[0-9]" * 4)):
        manifest = manifests.load_manifest(folder)
        if manifest is None:
            continue
        found[manifest.round] = manifest
        copy = round_folder(scratch, manifest.round)
        copy.mkdir(parents=True)
        for name in ("manifest.json", *manifest.files):
            if (folder / name).exists():
                (copy / name).symlink_to((folder / name).absolute())
    return found


def _cut(order: Order, count: int) -> Order:
    """Return the order as it was when it had `count` prompts."""
    groups, left = list[int](), count
    for size in order.groups:
        if left <= 0:
            break
        groups.append(min(size, left))
        left -= size
    return dataclasses.replace(
        order, prompts=order.prompts[:count], groups=tuple(groups), is_new=False
    )
