"""The recipes by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from opsd.affect.recipes import iemocap, mafw, mceiu, meld, mer, mintrec2, msa, ovmerd
from opsd.affect.recipes.clip import Clip, Recipe
from opsd.affect.recipes.process import is_process, read_process
from opsd.affect.unibench.datasets import DATASETS
from opsd.affect.unibench.infer import QUESTION as OPEN_QUESTION

_EMOTION: Final = "Which emotion does the speaker show?"
_FACE: Final = "Which emotion does the person show?"
_SENTIMENT: Final = "Is the sentiment of the speaker positive, negative or neutral?"
_INTENT: Final = "What is the intent of the speaker?"


def _either(benchmark: str, published: Callable[[Path], list[Clip]]) -> Callable[[Path, int], list[Clip]]:
    """The benchmark's preprocessed folder where ROOT is one, otherwise the published layout."""
    dataset = DATASETS[benchmark]
    return lambda root, fold: read_process(dataset, root) if is_process(dataset, root) else published(root)


RECIPES: Final = {
    recipe.name: recipe
    for recipe in (
        Recipe("meld", "MELD", _either("meld", meld.read_meld), _EMOTION, meld.EMOTIONS),
        Recipe("mintrec2", "MIntRec 2.0", lambda root, _: mintrec2.read_mintrec2(root), _INTENT, mintrec2.INTENTS),
        Recipe("iemocap", "IEMOCAP", _either("iemocapfour", iemocap.read_iemocap), _EMOTION, iemocap.EMOTIONS),
        Recipe("mer2023", "MER2023", _either("mer2023", mer.read_mer2023), _FACE, mer.EMOTIONS),
        Recipe("mer2024", "MER2024", _either("mer2024", mer.read_mer2024), _FACE, mer.EMOTIONS),
        Recipe("cmu-mosi", "CMU-MOSI", _either("cmumosi", msa.read_msa), _SENTIMENT, msa.SENTIMENTS),
        Recipe("cmu-mosei", "CMU-MOSEI", _either("cmumosei", msa.read_msa), _SENTIMENT, msa.SENTIMENTS),
        Recipe("sims", "CH-SIMS", _either("sims", msa.read_msa), _SENTIMENT, msa.SENTIMENTS),
        Recipe("simsv2", "CH-SIMS v2", _either("simsv2", msa.read_msa), _SENTIMENT, msa.SENTIMENTS),
        Recipe("ov-merd", "OV-MERD and OV-MERD+", lambda root, _: ovmerd.read_ovmerd(root), OPEN_QUESTION, open=True),
        Recipe("mc-eiu", "MC-EIU, emotion", lambda root, _: mceiu.read_emotion(root), _EMOTION, mceiu.EMOTIONS),
        Recipe("mc-eiu-intent", "MC-EIU, intent", lambda root, _: mceiu.read_intent(root), _INTENT),
        Recipe("mafw", "MAFW", mafw.read_mafw, _FACE, mafw.EMOTIONS),
    )
}
