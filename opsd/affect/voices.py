"""A voice clip: cue words -> pitch, loudness and rhythm -> 16 kHz mono samples. Only numpy.

A sum of the harmonics of a gliding pitch, weighted by three formants and an envelope of syllables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from opsd.affect.cues import Voice

RATE: Final = 16_000  # samples a second

PITCH: Final = {"high": (1.35, 1.6), "low": (0.66, 0.8)}  # times the speaker's own pitch
LOUDNESS: Final = {"loud": (0.55, 0.85), "quiet": (0.07, 0.13)}  # peak amplitude, of full scale
# pace -> (syllables a second, share of a syllable that sounds, pitch glide within a syllable, tremor depth)
PACE: Final = {
    "bouncing": (4.5, 0.75, 0.35, 0.0),
    "shaking": (2.5, 0.95, 0.0, 0.6),
    "clipped": (4.5, 0.45, -0.1, 0.0),
    "dragging": (1.8, 0.95, -0.15, 0.0),
}
# first three formants in Hz of the vowels a, e, i, o, u
VOWELS: Final = np.array(
    [[730, 1090, 2440], [530, 1840, 2480], [270, 2290, 3010], [570, 840, 2410], [300, 870, 2240]], float
)


WIDTHS: Final = np.array([90.0, 120.0, 160.0])  # of the formants, Hz
TOP_HERTZ: Final = 3500.0  # of the harmonics that are summed
STRIDE: Final = 64  # samples between two values of a harmonic's gain


@dataclass(frozen=True)
class VoiceRange:
    """How far a speaker may vary without changing a cue."""

    speaker: tuple[float, float] = (140.0, 175.0)  # own pitch, Hz
    seconds: tuple[float, float] = (0.75, 0.85)
    formants: tuple[float, float] = (0.95, 1.08)  # length of the vocal tract
    tempo: float = 0.08  # relative
    noise: tuple[float, float] = (0.001, 0.004)  # amplitude, of full scale


def speak(voice: Voice, look: VoiceRange, rng: np.random.Generator) -> np.ndarray:
    """One clip, [samples] float32 in -1..1. Every number not fixed by a cue word comes from `look`."""
    n = int(RATE * rng.uniform(*look.seconds))
    t = np.arange(n) / RATE
    rate, sounding, glide, tremor = PACE[voice.pace]
    rate *= 1 + rng.uniform(-look.tempo, look.tempo)
    phase = (t * rate + rng.uniform(0, 0.15)) % 1.0  # 0..1 within a syllable
    syllable = (t * rate).astype(int)
    envelope = np.where(phase < sounding, np.sin(np.pi * np.clip(phase / sounding, 0, 1)) ** 0.5, 0.0)
    shake = np.sin(2 * np.pi * (7.0 + rng.uniform(-0.7, 0.7)) * t + rng.uniform(0, 6.28))
    envelope = envelope * (1 + tremor * shake) / (1 + tremor)
    pitch = rng.uniform(*look.speaker) * rng.uniform(*PITCH[voice.pitch])
    hertz = pitch * (1 + glide * (phase - 0.5)) * (1 + 0.12 * tremor * shake)
    angle = 2 * np.pi * np.cumsum(hertz) / RATE

    formants = VOWELS[rng.integers(len(VOWELS), size=syllable.max() + 1)] * rng.uniform(*look.formants)
    # The gain of a harmonic changes slowly: it is worked out every STRIDE samples.
    # sin(k x) = 2 cos(x) sin((k - 1) x) - sin((k - 2) x): one multiplication instead of a sine.
    sound, before, here, twice_cos = np.zeros(n), np.zeros(n), np.sin(angle), 2 * np.cos(angle)
    coarse, centres = hertz[::STRIDE, None], formants[syllable[::STRIDE]]
    for k in range(1, int(TOP_HERTZ / hertz.max()) + 1):
        gain = (1 / (1 + ((k * coarse - centres) / WIDTHS) ** 2)).sum(1) / k**0.5
        sound += np.repeat(gain, STRIDE)[:n] * here
        before, here = here, twice_cos * here - before
    sound *= envelope
    sound *= rng.uniform(*LOUDNESS[voice.volume]) / np.abs(sound).max()
    sound += rng.uniform(*look.noise) * rng.standard_normal(n)
    return np.clip(sound, -1, 1).astype(np.float32)
