"""The table of trackers, the check that those of a config can be used, and their opening."""

import importlib.util
import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from halos_jax.config import Config, ConfigError, to_dict
from halos_jax.storage import write_bytes_atomic
from halos_jax.trackers.follower import Follower
from halos_jax.trackers.points import Point, Samples, Session, Tracker
from halos_jax.trackers.samples import read_samples
from halos_jax.trackers.services import TensorBoard, Trackio, WeightsAndBiases, is_logged_in
from halos_jax.user_code import import_function

FOLDER = "trackers"  # in the workdir


class Service(NamedTuple):
    """A ready tracker: its class, and the package that it needs."""

    make: Callable[[Session], Tracker]
    package: str


# Name -> tracker. A new one is a class and a line here.
TRACKERS = {
    "tensorboard": Service(TensorBoard, "tensorboardX"),
    "wandb": Service(WeightsAndBiases, "wandb"),
    "trackio": Service(Trackio, "trackio"),
}


def find_problems(config: Config) -> list[str]:
    """Return an error line for each tracker of a config that cannot be used on this machine."""
    if config.mode not in ("run", "check"):
        return []
    names, lines = config.trackers.names, []
    labels = [_label(name) for name in names]
    if len(set(labels)) < len(labels):
        lines.append(f"trackers.names: got {names}, allowed: each tracker once")
    for name in names:
        service = TRACKERS.get(name)
        if service is None:
            lines += _check_own(name)
        elif importlib.util.find_spec(service.package) is None:
            lines.append(
                f"trackers.names: got {name!r}, but the package {service.package} is not "
                f"installed; run: pip install {service.package}"
            )
        elif name == "wandb" and not config.trackers.offline and not is_logged_in():
            lines.append(
                "trackers.names: got 'wandb', but no account is known here; run: wandb login; or "
                "set WANDB_API_KEY, or --config.trackers.offline=true"
            )
    return lines


def _check_own(name: str) -> list[str]:
    if ":" not in name:
        known = ", ".join(map(repr, TRACKERS))
        return [
            f"trackers.names: got {name!r}, allowed: {known}, or a class of your own as "
            "'package.module:Class'"
        ]
    try:
        import_function(name, "trackers.names")
    except ConfigError as error:
        return str(error).splitlines()
    return []


def open_trackers(config: Config, path: Path) -> list[Follower]:
    """Return a sink for each tracker of a config, which follows the metrics file at `path`.

    Call it on process 0 alone. Nothing is opened yet: see `Follower`.
    """
    return [_make_follower(config, path, name) for name in config.trackers.names]


def _make_follower(config: Config, path: Path, name: str) -> Follower:
    workdir, asked = path.parent, config.trackers
    state = workdir / FOLDER / f"{_label(name)}.json"

    def open_tracker() -> Tracker:
        # Another project is another run.
        known = json.loads(state.read_text()) if state.is_file() else {}
        if known.get("project") != asked.project:
            known = {"project": asked.project, "id": uuid.uuid4().hex[:8], "sent": 0}
            _write(state, known)
        session = Session(
            folder=workdir / FOLDER,
            project=asked.project,
            run=asked.run or workdir.absolute().name,
            id=known["id"],
            offline=asked.offline,
            config=to_dict(config),
            sent=known["sent"],
        )
        service = TRACKERS.get(name)
        make = service.make if service else import_function(name, "trackers.names")
        tracker: Tracker = make(session)
        return tracker

    def note_sent(count: int) -> None:
        _write(state, {**json.loads(state.read_text()), "sent": count})

    def find_samples(point: Point) -> Samples | None:
        return read_samples(workdir, point.values, asked.samples)

    return Follower(name, path, open_tracker, find_samples, note_sent)


def _label(name: str) -> str:
    """Return the short name of a tracker: its class's, for one of the user's own."""
    return name.rpartition(":")[2]


def _write(path: Path, state: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, json.dumps(state).encode())
