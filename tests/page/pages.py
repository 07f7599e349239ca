"""Pages for tests: hostile texts in every place a row or a model can put one, and a reader of what came out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from opsd.config import Config
from opsd.data import Example
from opsd.log import RunDir
from opsd.page.render import render
from opsd.page.replay import Answer, Candidate, Replayed, Side, Token
from opsd.report import rows_of_table
from tests.files import tone, write_wav

HOSTILE = (
    "<script>window.owned = 1</script>",
    "</script><script>window.owned = 1</script>",
    "\"'><img src=x onerror=window.owned=1>",
    "</p></article><style>*{display:none}</style>",
    "<!-- & &lt; &amp;lt; ]]> {{ 7 * 7 }} {% raw %}",
    "😀 👩‍👩‍👧 \u202eabc\u202c \u2028 ÿ",
    "w" * 20_000,
)
VOID = {"meta", "img", "br"}


def token(text: str, divergence: float | None = 0.25) -> Token:
    side = Side(0.5, 1.0, [Candidate(text, 0.5, True), Candidate("other", 0.25, False)])
    return Token(text, divergence, side, side)


def clip(folder: Path, text: str) -> Replayed:
    """A row with an image, a sound and `text` everywhere else."""
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "face.png")
    write_wav(folder / "voice.wav", tone(16_000, 220, 0.2))
    parts = [
        {"type": "image", "image": folder / "face.png"},
        {"type": "audio", "audio": folder / "voice.wav"},
        {"type": "text", "text": text},
    ]
    messages = [{"role": "user", "content": parts}]
    late = {"type": "image", "image": folder / "face.png"}
    row = Example(text, messages, text, text, None, text, (late,), folder / "rows.jsonl", 1)
    answer = Answer(text, False, [token(text), token("b", 0.0), token("c\n", None)])
    return Replayed(row, answer, answer)


def write_page(folder: Path, config: Config, replayed: list[Replayed]) -> str:
    """The page of a run of three logged steps."""
    folder.mkdir(exist_ok=True)
    directory = RunDir(folder)
    (folder / "config.yaml").write_text("# <script>window.owned = 1</script>\n")
    for step in (1, 2, 3):
        directory.append("metrics", {"step": step, "loss": 1 / step, "divergence": 1 / step, "accuracy": 0.5})
        record = {"step": step, "split": "test", "view": "student", "privilege": "none"}
        directory.append("evaluations", record | {"accuracy": 0.5, "low": 0.4, "high": 0.6, "n": 9})
    return render(directory, config, rows_of_table(directory.read("evaluations")), replayed, "Some clips.")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    text: str = ""


@dataclass
class Reader(HTMLParser):
    """Every element with its attributes and text; an unclosed or misnested one is an error."""

    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice on {tag}"
        self.elements.append(Element(tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(self.elements[-1])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop().tag == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open:
            self.open[-1].text += data

    @classmethod
    def of(cls, html: str) -> Reader:
        reader = cls()
        reader.feed(html)
        reader.close()
        assert not reader.open, f"unclosed: {[e.tag for e in reader.open]}"
        return reader

    def all(self, tag: str, **attributes: str) -> list[Element]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [e for e in self.elements if e.tag == tag and wanted.items() <= e.attributes.items()]

    def data(self) -> dict:
        return json.loads(self.all("script", id="data")[0].text)
