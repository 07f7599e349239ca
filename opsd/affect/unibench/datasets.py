"""The nine test sets as data: where the benchmark's preprocessed folders keep labels, subtitles, videos and sound.

Folders and files as in the official `config.py` and dataset classes (zeroQiaoba/AffectGPT); counts from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True)
class Dataset:
    name: str  # as in the official result folders, results-NAME
    title: str
    clips: int
    kind: Literal["discrete", "valence", "open"]  # scored by HIT, WAF, EW-F1
    folder: str
    labels: str = "label.npz"
    corpus: str = "test_corpus"  # the array of the label file that has the test clips
    codes: tuple[str, ...] = ()  # label names, where the file has class numbers
    session: str | None = None  # IEMOCAP: the fifth letter of a test clip's name
    subtitles: str = "transcription-engchi-polish.csv"
    language: str = "english"  # the column of the subtitle file
    video: str = "video"
    audio: str = "audio"

    @property
    def metric(self) -> str:
        return {"discrete": "HIT", "valence": "WAF", "open": "EW-F1"}[self.kind]


MELD_CODES: Final = ("anger", "joy", "sadness", "neutral", "disgust", "fear", "surprise")
IEMOCAP_CODES: Final = ("happy", "sad", "neutral", "anger")

DATASETS: Final = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            "mer2023",
            "MER2023",
            411,
            "discrete",
            "mer2023-dataset-process",
            labels="label-6way.npz",
            corpus="test1_corpus",
            language="chinese",
        ),
        Dataset(
            "mer2024",
            "MER2024",
            1169,
            "discrete",
            "mer2024-dataset-process",
            labels="label-6way.npz",
            corpus="test1_corpus",
            subtitles="transcription_merge.csv",
            language="chinese",
        ),
        Dataset("meld", "MELD", 2610, "discrete", "meld-process", codes=MELD_CODES, video="subvideo", audio="subaudio"),
        Dataset(
            "iemocapfour",
            "IEMOCAP",
            1241,
            "discrete",
            "iemocap-process",
            labels="label_4way.npz",
            corpus="whole_corpus",
            codes=IEMOCAP_CODES,
            session="5",
            video="subvideo-tgt",
            audio="subaudio",
        ),
        Dataset("cmumosi", "MOSI", 686, "valence", "cmumosi-process", video="subvideo", audio="subaudio"),
        Dataset("cmumosei", "MOSEI", 4659, "valence", "cmumosei-process", video="subvideo_new", audio="subaudio"),
        Dataset("sims", "SIMS", 457, "valence", "sims-process", language="chinese"),
        Dataset("simsv2", "SIMS v2", 1034, "valence", "simsv2-process", language="chinese", video="video_new"),
        Dataset(
            "ovmerdplus",
            "OV-MERD+",
            532,
            "open",
            "ovmerdplus-process",
            labels="ovlabel.csv",
            subtitles="subtitle_eng.csv",
            language="sentence",
        ),
    )
}
