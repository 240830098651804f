"""A page: what it holds, what may run in it, how large it is."""

import base64
import gzip
import html.parser
import itertools
import json
import math
import re
import sys

import pytest

from halos_jax.report import page
from halos_jax.report.page import describe_run, hash_script, load_library, read_part, render
from halos_jax.report.recorded import read_run
from tests.report.written_runs import make_sample, write_config, write_lines, write_round, write_run

BAD = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


class Reader(html.parser.HTMLParser):
    """Collects the elements of a page, and the text of its scripts by their ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._script = dict(attrs).get("id", "") if tag == "script" else None

    def handle_endtag(self, tag):
        self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        else:
            self.text += data

    def data(self, name):
        return json.loads(gzip.decompress(base64.b64decode(self.scripts[f"data-{name}"])))


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    workdir = write_run(tmp_path_factory.mktemp("run") / "<b>first & best</b>")
    held_out = [make_sample("a", 0, BAD, 1.0), make_sample("a", 1, "x" * 1_000_000, 0.0)]
    write_round(workdir, 3, files={"eval.jsonl": held_out})
    text = render(describe_run(read_run(workdir)))
    return Reader(text), text


def test_the_page_shows_the_run(read):
    reader, _ = read
    for said in ("<b>first & best</b>", "Is it learning?", "0.500 ±0.100", "How to repeat it"):
        assert said in reader.text
    charts = {one["name"]: one for one in reader.data("charts")}
    assert charts["reward"]["lines"][0]["y"] == [0.0, 0.5, 1.0]
    prompts = {one["id"]: one for one in reader.data("held_out")["prompts"]}
    assert prompts["a"]["cells"][-1][0][0] == BAD
    assert [one["round"] for one in reader.data("trained")["prompts"]] == [1, 2]


def test_text_of_models_is_nowhere_but_in_base64(read):
    reader, text = read
    assert "owned" not in text and "question a" not in text and "drawn 1" not in text
    assert not any(tag == "img" for tag, _ in reader.tags)


def test_only_hashed_scripts_may_run_and_nothing_is_loaded(read):
    reader, _ = read
    policies = [a["content"] for tag, a in reader.tags if a.get("http-equiv")]
    (policy,) = policies
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["base-uri"] == "'none'"
    program = reader.scripts[""]
    assert rules["script-src"].split() == [hash_script(program), load_library()[0]]
    loaded = [a for tag, a in reader.tags if tag in ("script", "link", "img", "iframe")]
    assert all("src" not in a and "href" not in a for a in loaded)
    assert not any(name.startswith("on") for _, a in reader.tags for name in a)
    assert not any("//" in str(value) for _, a in reader.tags for value in a.values())
    assert "url(" not in read_part("page.css") and "@import" not in read_part("page.css")


@pytest.mark.parametrize("name", ["data.js", "charts.js", "samples.js"])
def test_the_scripts_make_no_markup_of_text_and_run_no_text(name):
    found = re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|fetch\(|import\b",
        read_part(name),
    )
    assert found == [] and "</script" not in read_part(name).lower()


def test_the_library_comes_along_whole(read):
    from plotly.offline import get_plotlyjs

    reader, _ = read
    packed = base64.b64decode(reader.scripts["data-plotly"])
    assert gzip.decompress(packed).decode() == get_plotlyjs()


def test_without_the_library_tables_and_samples_are_there_and_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    load_library.cache_clear()
    reader = Reader(render(describe_run(read_run(write_run(tmp_path)))))
    load_library.cache_clear()
    assert "pip install plotly" in reader.text and "data-plotly" not in reader.scripts
    assert "0.500 ±0.100" in reader.text and reader.data("held_out")["prompts"]


def test_a_page_stays_below_ten_megabytes_and_says_what_is_left_out(tmp_path, monkeypatch):
    """The bounds on samples, at a hundredth of their size."""
    monkeypatch.setattr(page, "HELD_OUT_SIZE", page.HELD_OUT_SIZE // 100)
    monkeypatch.setattr(page, "TRAINED_SIZE", page.TRAINED_SIZE // 100)
    write_config(tmp_path)
    for round in range(3):
        rows = [
            make_sample(str(number), 0, hash_script(f"{round} {number}") * 20, 1.0)
            for number in range(300)
        ]
        write_round(tmp_path, round, files={"eval.jsonl": rows})
    reader = Reader(text := render(describe_run(read_run(tmp_path))))
    packed = len(reader.scripts["data-held_out"])
    assert packed < page.HELD_OUT_SIZE * 1.05
    assert re.search(r"\d+ of 300 held-out prompts are shown", reader.text)
    others = len(text) - packed  # the library and all that is no sample
    assert others + 100 * (page.HELD_OUT_SIZE + page.TRAINED_SIZE) < 10_000_000


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    reader = Reader(render(describe_run(read_run(write_config(tmp_path)))))
    assert reader.data("charts") == [] and "data-held_out" not in reader.scripts


def test_a_page_replaces_the_one_before(tmp_path):
    path = tmp_path / "new" / "report.html"
    assert page.write_page("old", path) == 3 and page.write_page("newer", path) == 5
    assert path.read_text() == "newer" and [one.name for one in path.parent.iterdir()] == [
        path.name
    ]


def test_the_evaluation_of_a_task_has_its_samples(tmp_path):
    write_config(tmp_path, task="eval")
    write_lines(tmp_path / "eval.jsonl", [make_sample("a", 0, "only", 1.0)])
    reader = Reader(render(describe_run(read_run(tmp_path))))
    assert reader.data("held_out")["prompts"][0]["cells"][0][0][0] == "only"


def test_names_that_are_no_utf8_are_shown_with_a_mark(tmp_path):
    page.write_page("<p>caf\udce9.jsonl</p>", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == "<p>caf?.jsonl</p>"


def test_flags_fields_and_numbers_are_not_broken_in_their_middle(tmp_path):
    start = {"kind": "start", "time": 0, "command": "python -m x --config.workdir=<b> --seed"}
    workdir = write_run(tmp_path, seed=12345, data__train="x" * 40)
    write_lines(workdir / "journal.jsonl", [start])
    text = render(describe_run(read_run(workdir)))
    flag = '<span class="flag">{}</span>'
    flags = (flag.format("--config.workdir=&lt;b&gt;"), flag.format("--seed"))
    assert f'<pre class="command">python -m x {flags[0]} {flags[1]}</pre>' in text
    assert '<td class="path">seed</td><td class="short">12345</td>' in text
    assert f'<td class="path">data.<wbr>train</td><td>{"x" * 40}</td>' in text
    assert text.startswith("<!doctype html>")


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_the_colours_of_lines_can_be_told_apart_and_seen(scheme):
    """In CIELAB, where a difference of 2.3 is just noticed; contrasts are those of WCAG."""
    found = re.findall(r"--(c\d|card): (#\w{6})", read_part("page.css"))
    colours = dict(found[scheme * 9 : scheme * 9 + 9])
    card = colours.pop("card")
    labs = [to_lab(one) for one in colours.values()]
    assert len(labs) == 8
    assert min(math.dist(*pair) for pair in itertools.combinations(labs, 2)) > 24
    lights = [sorted((to_light(one)[1], to_light(card)[1])) for one in colours.values()]
    assert all((high + 0.05) / (low + 0.05) > 3 for low, high in lights)


def to_light(colour):
    """Return CIE XYZ, by the white point, of a colour of sRGB as #rrggbb."""
    values = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    r, g, b = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in values)
    return (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )


def to_lab(colour):
    x, y, z = (
        one ** (1 / 3) if one > 0.008856 else 7.787 * one + 4 / 29 for one in to_light(colour)
    )
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)
