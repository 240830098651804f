"""The documents of the repository taken apart: their blocks, their commands and what they name.

A document is a Markdown file, or the docstring of a preset. The shell blocks of documents are run
by a real shell in which every program is a recorder, so that quotes, variables and here-documents
mean what they mean to a user.
"""

import ast
import dataclasses
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Programs that a shell block may call. Any other is unknown to its shell, and an error.
PROGRAMS = ("python", "bash", "pip", "pytest", "ruff", "mypy", "codespell", "pre-commit", "git")
PROGRAMS += ("lm_eval", "alpaca_eval")
_MAIN = re.compile(r"python -m halos_jax\.main(?:\s+--[^\s`]+)+")
_RECORDER = """#!{bash}
stdin=; [[ -p /dev/stdin || -f /dev/stdin ]] && stdin=$(</dev/stdin)
printf '%s\\x1f' "${{0##*/}}" "$@" "$stdin" >>"$CALLS"; printf '\\x1e' >>"$CALLS"
"""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a document: its language ("bash"), its text, the line where it begins."""

    document: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"


@dataclasses.dataclass(frozen=True)
class Command:
    """What a document has a user call: the program's name, its arguments, and what it reads."""

    place: str
    words: tuple[str, ...]
    stdin: str = ""

    @property
    def document(self) -> str:
        return self.place.rpartition("-")[0].partition(":")[0]

    @property
    def is_main(self) -> bool:
        """Whether it is the program of this repository, by itself or through its script."""
        return self.words[:3] == ("python", "-m", "halos_jax.main")


def list_documents(root: Path = ROOT) -> list[str]:
    """List the paths of all Markdown files, relative to the repository."""
    files = [*root.glob("*.md"), *root.glob(".github/*.md")]
    for folder in ("halos_jax", "configs", "launch", "tests", "colabs"):
        files += (root / folder).rglob("*.md")
    return sorted(file.relative_to(root).as_posix() for file in files)


def list_presets(root: Path = ROOT) -> list[str]:
    """List the paths of all presets, relative to the repository."""
    return sorted(file.relative_to(root).as_posix() for file in root.glob("configs/*.py"))


def read_text(document: str, root: Path = ROOT) -> str:
    """Return a Markdown file, or a preset's docstring with its first line where it is."""
    text = (root / document).read_text(encoding="utf-8")
    return text if document.endswith(".md") else ast.get_docstring(ast.parse(text), clean=False)


def read_blocks(document: str, root: Path = ROOT) -> list[Block]:
    """Return the fenced blocks of a Markdown file.

    Raises:
      ValueError: for a fence that is not closed.
    """
    blocks, opened = [], None
    for number, line in enumerate(read_text(document, root).splitlines(), 1):
        if line.startswith("```") and opened is None:
            opened = Block(document, number, line[3:].strip(), "")
        elif line.startswith("```"):
            blocks.append(opened)
            opened = None
        elif opened is not None:
            opened = dataclasses.replace(opened, text=f"{opened.text}{line}\n")
    if opened is not None:
        raise ValueError(f"{opened.place}: a block that does not end")
    return blocks


def strip_blocks(text: str) -> str:
    """Return Markdown without its fenced blocks."""
    return re.sub(r"^```.*?^```[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)


def list_code(document: str, root: Path = ROOT) -> list[str]:
    """List what stands between backticks outside of blocks, line breaks as spaces."""
    spans = re.findall(r"`([^`]+)`", strip_blocks(read_text(document, root)))
    return [re.sub(r"\s+", " ", span) for span in spans]


def record_commands(block: Block, folder: Path) -> list[Command]:
    """Run a shell block with recorders for programs; return what it has called, in order.

    Args:
      folder: an empty folder to run it in.

    Raises:
      ValueError: where the shell does not understand it, or a program is none of `PROGRAMS`.
    """
    programs, calls = folder / "programs", folder / "calls"
    programs.mkdir(parents=True)
    for name in PROGRAMS:
        (programs / name).write_text(_RECORDER.format(bash=_find_bash()))
        (programs / name).chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    calls.touch()
    done = subprocess.run(
        [_find_bash(), "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env={"PATH": str(programs), "CALLS": str(calls), "HOME": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(f"{block.place}: {done.stderr.strip()}")
    found = []
    for number, call in enumerate(calls.read_text().split("\x1e")[:-1], 1):
        *words, stdin, _ = call.split("\x1f")
        found.append(Command(f"{block.place}-{number}", tuple(words), stdin))
    return found


def _find_bash() -> str:
    places = ("/bin/bash", "/usr/bin/bash", *(f"{p}/bash" for p in os.get_exec_path()))
    return next(place for place in places if os.access(place, os.X_OK))


def list_inline_commands(document: str, root: Path = ROOT) -> list[Command]:
    """Return the program's commands that stand between the lines of a text."""
    if document.endswith(".md"):
        found = [span for span in list_code(document, root) if _MAIN.fullmatch(span)]
    else:
        found = [one.rstrip(").") for one in _MAIN.findall(read_text(document, root))]
    return [
        Command(f"{document}-{number}", tuple(one.split())) for number, one in enumerate(found, 1)
    ]


def list_commands(folder: Path, root: Path = ROOT) -> Iterator[Command]:
    """Yield every command of every document; `folder` is where shell blocks are run."""
    for document in [*list_documents(root), *list_presets(root)]:
        yield from list_inline_commands(document, root)
        for block in read_blocks(document, root) if document.endswith(".md") else ():
            if block.language == "bash":
                yield from record_commands(block, folder / re.sub(r"\W", "-", block.place))
