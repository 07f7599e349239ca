"""When a run is saved, and what with: after a step that is due, or the best so far, or the last for now."""

from __future__ import annotations

import shlex

from opsd import checkpoint
from opsd.checkpoint import Meta, State
from opsd.run import Run
from opsd.shelf import Shelf
from opsd.stop import Stopped


def save(run: Run, step: int) -> None:
    """A checkpoint after `step` steps; what was logged until then is on the disk before it."""
    if run.teacher_cache is not None and (step == run.config.train.steps or run.stop.asked):
        run.teacher_cache.store.flush()
    state = State.of(run.model, run.optimizer, run.teacher)
    with run.world.in_turn():
        if run.world.main:
            run.directory.sync()
            score, by = _score(run, step), run.config.checkpoint.best
            rows = step * run.config.train.prompts_per_step
            meta = Meta(step, rows, run.data, score, by if score is not None else None)
            shelf = Shelf(run.directory.checkpoints)
            checkpoint.save(shelf.path(step), meta, run.model, state)
            shelf.tidy(run.config.checkpoint)
    run.saved = step


def is_best(run: Run, step: int) -> bool:
    """Whether the weights after `step` steps were measured, and are better than every checkpoint."""
    by = run.config.checkpoint.best
    if by == "none":
        return False
    score = _score(run, step) if run.world.main else None  # the first process has written it
    best = score is not None and Shelf(run.directory.checkpoints).would_be_best(by, score)
    return bool(run.world.largest(float(best)))


def stop_if_asked(run: Run, step: int) -> None:
    """Before the update of a step: where any process was asked to stop, give up the step, save what was done before it.

    Raises Stopped. Before the first update there is nothing to save: the run will start over.
    """
    if run.world.largest(float(run.stop.asked)):
        run.stop.asked = True
        if step > run.saved:
            save(run, step)
        again = f"python -m opsd.train --resume {shlex.quote(str(run.directory.path))}"
        raise Stopped(f"stopped after {step} steps; {again} goes on")


def _score(run: Run, step: int) -> float | None:
    """What `checkpoint.best` goes by, of the weights after `step` steps; None where they were not measured."""
    by = run.config.checkpoint.best
    found = run.directory.read("evaluations") if by != "none" else []
    at = {"step": step, "split": "validation", "view": "student"}
    return next((float(r[by]) for r in found if at.items() <= r.items()), None)
