"""Twenty rows with pictures, standing in for your own: `python examples/quickstart/rows.py FOLDER`.

Writes FOLDER/rows.jsonl and FOLDER/faces/*.png. A row is what the student is shown (`prompt`), what only the teacher is
told (`rationale`), and what the answer is graded by (`label`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from PIL import Image

from opsd.affect.clips import FRAMES, QUESTION, TRAIN, make_clip
from opsd.affect.faces import film


def main(folder: Path) -> None:
    (folder / "faces").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(20):
        clip, rng = make_clip(TRAIN, seed=1, index=index)
        picture = f"faces/{index:02d}.png"
        Image.fromarray(film(clip.face, TRAIN.face, FRAMES, rng)[0]).save(folder / picture)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
        row = {
            "id": f"mine-{index:02d}",
            "prompt": [{"role": "user", "content": content}],
            "subtitle": clip.subtitle,
            "rationale": clip.rationale,
            "label": clip.label,
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} rows: {folder / 'rows.jsonl'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
