"""What documents name exists: links, files, fields of the config, cases; and they stay short."""

import re
import shutil
import subprocess
import sys

import pytest

from halos_jax.bench.workloads import CASES
from halos_jax.config import Config, schema
from tests import documents
from tests.documents import ROOT, list_code, list_documents, list_presets, read_blocks, read_text

DOCUMENTS = list_documents()
MOST_LINES = {"README.md": 200, ".github/CHANGELOG.md": 1000, ".github/CONTRIBUTING.md": 400}
MOST_LINES_OF_A_ROOM = 120
SECTIONS = {path.partition(".")[0] for path in schema.leaf_types(Config) if "." in path}
# Names of files that a document gives as an example, and those of models and of runs.
EXAMPLES = {"tests/a/test_b.py", "halos_jax/a/b.py", "FILE.py", "configs/NAME.py", "DIR/", "FINAL/"}
OF_RUNS = ("final/", "rounds/", "runs/", "checkpoints/", "adapter/", "compilation_cache/", "base/")
EXAMPLES_OF_FIELDS = {"field", "section.field"}
FILE = re.compile(r"(?<![\w*./-])[\w./-]+?(?:\.(?:py|sh|md|toml|ipynb)\b|/(?=$| ))")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FIELD = re.compile(r"(?:--config\.)?([a-z_]+(?:\.[a-z_0-9]+)+)(?:=.*)?")


def find_file(document: str, name: str) -> bool:
    """Tell whether a document's file is there: beside it, in the package, in the repository."""
    folders = [(ROOT / document).parent, ROOT, ROOT / "halos_jax"]
    return any((folder / name).exists() for folder in folders)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in LINK.findall(documents.strip_blocks(read_text(document))):
        if not target.startswith(("https://", "http://")):
            path, _, anchor = target.partition("#")
            there = (ROOT / document).parent / path if path else ROOT / document
            assert there.exists(), f"{document}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
                assert anchor in [make_anchor(one) for one in headings], f"{document}: {target}"


def make_anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_are_named_exist(document):
    for span in list_code(document):
        for name in FILE.findall(span):
            if name not in EXAMPLES and not name.startswith(OF_RUNS):
                assert find_file(document, name), f"{document}: {name}"


@pytest.mark.parametrize("document", [*DOCUMENTS, *list_presets()])
def test_fields_that_are_named_exist(document):
    leaves, free = schema.leaf_types(Config), schema.free_sections(Config)
    named = re.findall(r"--config\.([a-z_]+(?:\.[\w-]+)*)", read_text(document))
    if document.endswith(".md"):
        spans = [FIELD.fullmatch(span) for span in list_code(document)]
        named += [one[1] for one in spans if one and one[1].partition(".")[0] in SECTIONS]
    for path in named:
        is_file = path.rpartition(".")[2] in ("py", "html", "json", "jsonl")
        known = path in leaves or f"{path}.".startswith(tuple(f"{section}." for section in free))
        known |= path in SECTIONS | EXAMPLES_OF_FIELDS
        assert known or is_file, f"{document}: {path}"


@pytest.mark.parametrize("document", [*DOCUMENTS, *list_presets()])
def test_cases_of_the_benchmark_that_are_named_exist(document):
    for names in re.findall(r"\bcase=([\w,]+)", read_text(document)):
        assert {*names.split(",")} <= {*CASES, "all", "tiny", "NAME"}, f"{document}: {names}"


def test_variables_of_the_scripts_are_those_of_the_documents():
    files = [*(ROOT / "launch").glob("*.sh"), *(ROOT / "colabs").glob("*.ipynb")]
    scripts = "".join(file.read_text(encoding="utf-8") for file in files)
    texts = "".join(map(read_text, DOCUMENTS))
    pattern = r"HALOS_JAX_[A-Z]+"
    internal = {"HALOS_JAX_ROOT"}
    assert {*re.findall(pattern, texts)} == {*re.findall(pattern, scripts)} - internal


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_stay_short(document):
    lines = read_text(document).count("\n")
    assert lines <= MOST_LINES.get(document, MOST_LINES_OF_A_ROOM)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_are_of_languages_that_are_tested(document):
    assert {block.language for block in read_blocks(document)} <= {
        *("bash", "python", "diff"),
        *("text", "yaml"),  # what is printed, and files of other programs
    }


def find_stale(block) -> list[str]:
    """Return what of a diff's new side does not stand in its files word for word."""
    stale, file, lines = [], None, []

    def compare():
        text = "".join(f"{line}\n" for line in lines)
        if lines and (file is None or text not in (ROOT / file).read_text(encoding="utf-8")):
            stale.append(f"{block.place}: {file}: {lines[0]}")
        lines.clear()

    for line in block.text.splitlines():
        if line.startswith("+++ "):
            compare()
            file = line.removeprefix("+++ ").strip()
        elif line.startswith("@@"):
            compare()
        elif not line.startswith(("-", "---")):
            lines.append(line[1:])
    compare()
    return stale


@pytest.mark.parametrize("document", DOCUMENTS)
def test_diffs_are_of_the_code_as_it_is(document):
    blocks = [block for block in read_blocks(document) if block.language == "diff"]
    assert [line for block in blocks for line in find_stale(block)] == []


def test_a_stale_diff_is_found():
    text = "+++ tests/test_documents.py\n@@\n DOCUMENTS = list_documents()\n+MOST_LINES = 3\n"
    block = documents.Block("x.md", 3, "diff", text)
    assert find_stale(block) == ["x.md:3: tests/test_documents.py: DOCUMENTS = list_documents()"]
    kept = text.replace("+MOST_LINES = 3\n", "-MOST_LINES = 3\n")
    assert find_stale(documents.Block("x.md", 3, "diff", kept)) == []


# --------------------------------------------------------------------------- tests/documents.py


def test_a_shell_block_is_taken_as_a_shell_takes_it(tmp_path):
    text = (
        'run="python -m halos_jax.main"  # a comment\n'
        "export KEY=x\n"
        "A=1 $run --config=a.py \\\n  --config.data.map='b c'\n"
        "python - DIR <<'END'\nprint(\"$x\")\nEND\n"
    )
    block = documents.Block("a.md", 4, "bash", text)
    first, second = documents.record_commands(block, tmp_path / "run")
    assert first.is_main and first.place == "a.md:4-1" and first.document == "a.md"
    assert first.words[3:] == ("--config=a.py", "--config.data.map=b c") and first.stdin == ""
    assert (second.words, second.stdin) == (("python", "-", "DIR"), 'print("$x")')


@pytest.mark.parametrize("text", ["gcloud run\n", "python 'open\n", "$unset --config=x\n"])
def test_a_shell_block_that_cannot_run_is_an_error(text, tmp_path):
    with pytest.raises(ValueError, match=r"^a\.md:1: "):
        documents.record_commands(documents.Block("a.md", 1, "bash", text), tmp_path / "run")


def test_blocks_and_code_of_a_document(tmp_path):
    text = (
        "# A\n`x.py` and `a\nb`\n```bash\nls `y`\n```\n`python -m halos_jax.main --config=a.py`\n"
    )
    (tmp_path / "README.md").write_text(text)
    assert documents.list_documents(tmp_path) == ["README.md"]
    (block,) = documents.read_blocks("README.md", tmp_path)
    assert (block.language, block.line, block.text) == ("bash", 4, "ls `y`\n")
    assert documents.list_code("README.md", tmp_path)[:2] == ["x.py", "a b"]
    (command,) = documents.list_inline_commands("README.md", tmp_path)
    assert command.words == ("python", "-m", "halos_jax.main", "--config=a.py")
    (tmp_path / "README.md").write_text("```bash\nls\n")
    with pytest.raises(ValueError, match="does not end"):
        documents.read_blocks("README.md", tmp_path)


def test_the_spelling_is_checked(tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    check = [sys.executable, "-m", "codespell_lib"]
    assert subprocess.run([*check, *DOCUMENTS, "configs", "launch"], cwd=ROOT).returncode == 0
    (tmp_path / "a.md").write_text("a " + "mis" + "take is " + "mispel" + "led\n")
    found = subprocess.run(check, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode and "a.md:1: mispel" in found.stdout
