"""The page in a real browser, where there is one: its script runs, keys and pointer work, texts do nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from opsd.config import load_config
from tests.page.pages import HOSTILE, Reader, clip, write_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "chrome-headless-shell")

# Does what a person would, and leaves what it saw in an element of the page. It is given the policy's leave.
PERSON = """
const seen = [], errors = [];
addEventListener("error", (event) => errors.push(event.message));
const note = () => seen.push([document.activeElement.textContent, card.hidden ? null : card.innerText]);
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const first = document.querySelector(".answer > span");
first.focus(); note();
for (const key of ["ArrowRight", "End", "Home", "Escape"]) { press(key); note(); }
first.dispatchEvent(new MouseEvent("mouseover", { bubbles: true })); note();
first.parentElement.dispatchEvent(new MouseEvent("mouseleave")); note();
const chart = document.querySelector(".chart:nth-child(2) svg");
chart.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
const audio = document.querySelector("audio");
audio.addEventListener("loadedmetadata", finish); audio.addEventListener("error", finish);
if (audio.readyState > 0) finish();
function finish() {
  const node = document.createElement("output");
  node.id = "seen";
  node.textContent = JSON.stringify({
    seen, errors, owned: window.owned ?? null, seconds: audio.duration,
    stops: document.querySelectorAll(".answer [tabindex]").length,
    wide: document.documentElement.scrollWidth > document.documentElement.clientWidth,
    pictures: [...document.images].map((image) => image.naturalWidth),
    reading: chart.parentElement.querySelector(".reading").innerText.replace(/\\s+/g, " "),
  });
  document.body.append(node);
}
"""


def browser() -> str:
    """A Chromium on the path, or one that Playwright has installed."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    home = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright"))
    kept = [p for p in home.glob("chromium*/*/*") if p.name in ("chrome", "headless_shell", "chrome-headless-shell")]
    if found is None and not kept:
        pytest.skip("no Chromium on the path, nor one of Playwright's")
    return found or str(kept[0])


def run(folder: Path, page: str, *options: str) -> subprocess.CompletedProcess[str]:
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    as_root = ["--no-sandbox"] if os.geteuid() == 0 else []
    return subprocess.run(
        [browser(), "--headless", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr", *as_root,
         f"--user-data-dir={folder / 'profile'}", "--window-size=1280,1600", *options, file.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    """What the person saw on a page with every hostile text, and what the browser's console said."""
    folder = tmp_path_factory.mktemp("browser")
    config = load_config(None, ["model.path=x"])
    clips = [clip(folder, text) for text in ("first", *HOSTILE)]
    page = write_page(folder, config, clips)
    helped = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page)
    helped = helped.replace("</body>", f"<script>{PERSON}</script></body>")
    done = run(folder, helped, "--dump-dom", "--virtual-time-budget=5000")
    return json.loads(Reader.of(done.stdout).all("output", id="seen")[0].text), done.stderr


def test_every_text_is_only_text(visited):
    seen, console = visited
    assert seen["owned"] is None and seen["errors"] == []
    assert "CONSOLE" not in console, console


def test_keys_go_from_token_to_token_and_the_card_has_both_sides(visited):
    seen = visited[0]["seen"]
    assert [text for text, _ in seen] == ["first", "b", "c⏎\n", "first", "first", "first", "first"]
    card = " ".join(seen[0][1].split())
    assert card == (
        "first divergence 0.250 nats student first 50.0 % other 25.0 % this token 50.0 %; entropy 1.000 nats "
        "teacher first 50.0 % other 25.0 % this token 50.0 %; entropy 1.000 nats"
    )
    assert "0.000 nats" in seen[1][1] and seen[4][1] is None, "Escape closes the card"
    assert seen[5][1] == seen[0][1] and seen[6][1] is None, "so do pointing and leaving"
    assert visited[0]["stops"] == 2 * (1 + len(HOSTILE)), "one Tab stop per answer"


def test_media_load_curves_read_and_nothing_is_wider_than_the_window(visited):
    seen = visited[0]
    assert seen["seconds"] == pytest.approx(0.2, abs=0.01)
    assert set(seen["pictures"]) == {40}
    assert seen["reading"] == "loss 0.5 divergence 0.5 at step 2"
    assert not seen["wide"]


@pytest.mark.parametrize("dark", [False, True])
def test_the_picture_has_the_ground_the_heat_and_the_clip(tmp_path, dark):
    page = write_page(tmp_path, load_config(None, ["model.path=x"]), [clip(tmp_path, "token")])
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    console = run(tmp_path, page, f"--screenshot={tmp_path / 'page.png'}", *scheme).stderr
    assert "CONSOLE" not in console, "the page's own policy refuses nothing of it"
    with Image.open(tmp_path / "page.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert ((0x14, 0x17, 0x1B) if dark else (0xF7, 0xF7, 0xF5)) in colours, "the ground"
    assert (200, 30, 30) in colours, "the face"
    assert any(r > 200 and 120 < g < 190 and b < 120 for r, g, b in colours) or dark, "the heat"
