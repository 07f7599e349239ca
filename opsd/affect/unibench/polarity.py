"""Which everyday emotion words are pleasant and which are not: how labels become a sentiment without a second model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from opsd.affect.unibench.wheels import Wheels

_PLEASANT: Final = """
    positive amazed amused appreciative calm carefree caring cheerful comfortable confident content curious delighted
    eager elated encouraged energetic enjoyment enthusiastic excited fond friendly glad grateful happiness happy
    hopeful inspired interested joy joyful kind love loving moved optimistic peaceful playful pleased powerful proud
    relaxed relieved respected satisfied secure serene strong tender thankful thrilled trust trusting
"""
_UNPLEASANT: Final = """
    negative afraid aggressive agitated alarmed anger angry annoyed anxious apprehensive ashamed awkward bad bitter
    bored confused contempt critical depressed desperate disappointed disapproving disgust disgusted dissatisfied
    distressed embarrassed envious exhausted fear fearful frightened frustrated furious gloomy grief guilty hate
    helpless hopeless hostile hurt impatient insecure irritated jealous lonely mad miserable nervous offended
    overwhelmed pained panicked pessimistic rage rejected remorse resentful sad sadness sarcastic scared shame
    shocked sorrow stressed suspicious tense terrified threatened tired uncomfortable uneasy unhappy upset
    vulnerable weak worried worry
"""
POLARITY: Final = dict.fromkeys(_PLEASANT.split(), +1) | dict.fromkeys(_UNPLEASANT.split(), -1)


def polarity(word: str, wheels: Wheels) -> int:
    """+1, -1 or 0: of the word itself, or, where it is not listed, the majority of its groups under the wheels."""
    if word in POLARITY:
        return POLARITY[word]
    return _sign(sum(POLARITY.get(group or "", 0) for group in wheels.of(word)))


def sentiment(words: Iterable[str], wheels: Wheels) -> str:
    """The majority of the words: positive, negative, or neutral for none and for a tie."""
    total = _sign(sum(polarity(word, wheels) for word in words))
    return {1: "positive", -1: "negative", 0: "neutral"}[total]


def _sign(total: int) -> int:
    return (total > 0) - (total < 0)
