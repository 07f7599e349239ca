"""`python -m opsd.recipes NAME --root DIR --out rows.jsonl [--dry-run]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from opsd.affect.recipes.clip import SPLITS, Clip
from opsd.affect.recipes.registry import RECIPES
from opsd.affect.recipes.rows import MEDIA, Style, describe, missing, options, row_of
from opsd.cli import guard
from opsd.errors import InputError, raise_all, writing


def run(args: argparse.Namespace) -> None:
    """Read, describe, check, write. A dry run stops after the description."""
    recipe = RECIPES[args.name]
    if not args.root.is_dir():
        raise InputError("an existing folder", "none", file=args.root, field="--root")
    style = Style(_media(args.media), args.context, args.question)
    clips = recipe.read(args.root, args.fold)
    labels = options(recipe, clips)
    chosen = [clip for clip in clips if args.split in ("all", clip.split)]
    for line in describe(recipe, chosen, style):
        print(line)
    if args.dry_run:
        return
    if args.out is None:
        raise InputError("a .jsonl file to write", "nothing", field="--out")
    kept = [clip for clip in chosen if clip.label]
    whole = [clip for clip in kept if not missing(clip, style)]
    if not args.skip_missing:
        _refuse_missing(kept, style)
    _check(whole, args)
    with writing(args.out), args.out.open("w", encoding="utf-8") as file:
        for clip in whole:
            file.write(json.dumps(row_of(clip, recipe, style, labels), ensure_ascii=False) + "\n")
    print(f"{args.out}: {len(whole)} rows" + (f", {len(kept) - len(whole)} skipped" if len(whole) < len(kept) else ""))


def _media(text: str) -> tuple[str, ...]:
    chosen = tuple(name.strip() for name in text.split(","))
    if set(chosen) - set(MEDIA):
        raise InputError(f"some of {', '.join(MEDIA)}", repr(text), field="--media")
    return chosen


def _refuse_missing(clips: Sequence[Clip], style: Style) -> None:
    raise_all(
        [
            InputError("an existing file", "no file", file=path, field=clip.id, hint="--skip-missing leaves it out")
            for clip in clips
            for path in missing(clip, style)
        ]
    )


def _check(clips: Sequence[Clip], args: argparse.Namespace) -> None:
    """Before anything is written: something to write, somewhere to write it, and no id twice."""
    if not clips:
        raise InputError(f"clips of {args.split}", "none", file=args.root)
    if args.out.suffix not in (".jsonl", ".json") or not args.out.parent.is_dir():
        raise InputError("a .jsonl file in an existing folder", str(args.out), field="--out")
    seen: set[str] = set()
    for clip in clips:
        if clip.id in seen:
            raise InputError("every clip once", f"{clip.id!r} twice", file=args.root)
        seen.add(clip.id)


def _turns(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m opsd.recipes",
        description="Turns a local copy of a dataset into rows. The layouts are in opsd/affect/recipes.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("name", choices=sorted(RECIPES), metavar="NAME", help=", ".join(sorted(RECIPES)))
    add("--root", type=Path, required=True, help="the dataset's folder, as it is published or as MER-UniBench has it")
    add("--out", type=Path, help="rows (JSONL) to write")
    add("--split", default="train", choices=[*SPLITS, "all"], help="default train")
    add("--media", default=",".join(MEDIA), help="some of video,audio,text; text is the subtitle and the dialogue")
    add("--context", type=_turns, default=0, help="turns of the dialogue before the clip; default none")
    add("--question", help="instead of the recipe's own; the labels are added")
    add("--fold", type=int, default=1, help="of MAFW, 1 to 5")
    add("--skip-missing", action="store_true", help="leave out clips whose files are not there")
    add("--dry-run", action="store_true", help="only counts and missing files")
    add("--debug", action="store_true", help="show the traceback of an error")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return guard(run, parser(), argv)
