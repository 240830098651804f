"""The one entry point: `python -m halos_jax.main --config=configs/NAME.py --config.field=value`."""

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags

from halos_jax.cli.command_line import refuse_arguments, take_check
from halos_jax.cli.help import make_help, takes_help
from halos_jax.cli.overrides import apply_overrides, split_overrides
from halos_jax.cli.presets import explain_absent, load_preset
from halos_jax.config import ConfigError
from halos_jax.console.logs import start_logging
from halos_jax.errors import UserError

_CONFIG = flags.DEFINE_string("config", None, "A preset, e.g. configs/quickstart.py.")


def main(overrides: Sequence[tuple[str, str | None]]) -> None:
    """Read the preset and its overrides, and run the task that they describe."""
    if not _CONFIG.value:
        raise ConfigError(explain_absent())
    start_logging()
    config = load_preset(_CONFIG.value)
    errors = apply_overrides(config, overrides)
    from halos_jax.tasks import launch  # imports jax, which takes a second: only when needed

    launch.launch(launch.freeze_checked(config, errors))


def run() -> None:
    """Run the command line; print errors that a user can fix without a traceback.

    Exit codes: 0 done, 1 error, 75 stopped (run the same command again to resume), 130 stopped by
    Ctrl-C with nothing to save.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # it may lack characters, or get halves of some
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Silence the warning of transformers that PyTorch is missing: only its tokenizers are used.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    argv, overrides = split_overrides(sys.argv)
    try:
        if takes_help(argv[1:]):
            print(make_help(argv[1:], overrides), flush=True)
            return
        argv, overrides = take_check(argv, overrides)
        refuse_arguments(argv[1:], list(flags.FLAGS))
        app.run(lambda _: main(overrides), argv=argv)
    except KeyboardInterrupt:  # before `catch_signals` or after it
        _fail("Interrupted: stopped by Ctrl-C while there was nothing to save", 130)
    except BrokenPipeError:  # what reads the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except UserError as error:
        _fail(f"{type(error).__name__}: {error}", error.exit_code)
    except MemoryError:
        advice = "use less of the data (data.max_train), or a machine with more memory"
        _fail(f"MemoryError: this machine's own memory is used up; {advice}", 1)
    except Exception as error:
        if "jax" in sys.modules:
            from halos_jax import processes

            message = processes.explain_loss(error)
            if message:
                _fail(message, 1)
        raise


def _fail(message: str, code: int) -> NoReturn:
    """Exit with a message and a code; in a job of several processes, without waiting for others."""
    print(message, file=sys.stderr, flush=True)
    if "jax" in sys.modules:
        from halos_jax import processes

        if not processes.leave():
            sys.stdout.flush()
            os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
