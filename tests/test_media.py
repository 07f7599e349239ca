"""Real files decoded by the real libraries, whole and broken."""

from __future__ import annotations

import re
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from opsd.errors import InputError
from opsd.media import load_audio, load_image, load_video
from tests.files import tone, write_wav
from tests.videos import pictures, write_video

RATE = 16000


def test_audio_at_the_models_rate_is_the_file(tmp_path: Path) -> None:
    samples = tone(RATE, 440)
    loaded = load_audio(write_wav(tmp_path / "a.wav", samples), RATE)
    assert (loaded.dtype, loaded.shape) == (np.float32, samples.shape)
    np.testing.assert_allclose(loaded, samples, atol=1e-4)


def test_audio_is_resampled_and_channels_averaged(tmp_path: Path) -> None:
    left = tone(44100, 440)
    path = write_wav(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)], axis=1), 44100)
    loaded = load_audio(path, RATE)
    np.testing.assert_allclose(loaded[1000:-1000], (tone(RATE, 440) / 2)[1000:-1000], atol=2e-3)
    assert abs(len(loaded) - RATE) <= 1  # the resampler's tail is not lost


def test_images_are_rgb_and_upright(tmp_path: Path) -> None:
    picture = Image.new("RGB", (3, 2), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    picture.save(tmp_path / "a.png", exif=exif)
    Image.new("L", (4, 4), 7).save(tmp_path / "b.png")
    turned = load_image(tmp_path / "a.png")
    assert (turned.mode, turned.size, turned.getpixel((0, 0))) == ("RGB", (2, 3), (0, 0, 255))
    assert load_image(tmp_path / "b.png").getpixel((0, 0)) == (7, 7, 7)


def test_greys_of_16_bits_stay_greys(tmp_path: Path) -> None:
    deep = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "deep.png"))[..., 1], deep >> 8)


def test_bad_images(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"a\.png: expected an image that can be decoded; found cannot identify image"):
        load_image(path)
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(
        InputError, match=r"a\.png: expected an image that can be decoded; found image file is truncated"
    ):
        load_image(path)


@pytest.mark.parametrize("content", [b"", b"RIFF", b"not sound at all" * 100])
def test_bad_audio(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.wav: expected sound that can be decoded; found Invalid data"):
        load_audio(path, RATE)


def test_a_wav_that_was_cut_is_told_from_a_short_one(tmp_path: Path) -> None:
    path = write_wav(tmp_path / "a.wav", tone(RATE, 300, 2.0))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.wav: expected sound .* to its end; found 32,022 of 64,036 bytes"):
        load_audio(path, RATE)
    path.write_bytes(whole[:4] + b"\xff\xff\xff\xff" + whole[8:])  # as written to a pipe
    assert len(load_audio(path, RATE)) == 2 * RATE


def write_mp3(path: Path, seconds: int, **options: str) -> bytes:
    """In the container that the name says."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libmp3lame", rate=RATE, layout="mono")
        heard = av.AudioFrame.from_ndarray(tone(RATE, 300, seconds).astype(np.float32)[None], "fltp", "mono")
        heard.sample_rate = RATE
        container.mux([*stream.encode(heard), *stream.encode()])
    return path.read_bytes()


def test_an_mp3_that_was_cut_is_told_from_a_short_one(tmp_path: Path) -> None:
    path = tmp_path / "a.mp3"
    whole = write_mp3(path, 4, write_xing="1")
    assert len(load_audio(path, RATE)) == pytest.approx(4 * RATE, rel=0.03)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.mp3: expected sound .* to its end; found [12]\.\d\d s of 4\.00 s"):
        load_audio(path, RATE)
    whole = write_mp3(path, 4, write_xing="0")  # says nothing of its length, so that a part is a file
    path.write_bytes(whole[: len(whole) // 2])
    assert len(load_audio(path, RATE)) == pytest.approx(2 * RATE, rel=0.05)


def test_audio_files_without_sound(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.wav: expected sound that can be decoded; found no samples"):
        load_audio(write_wav(tmp_path / "a.wav", np.zeros(0)), RATE)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"b\.png: expected a file with sound; found no audio stream"):
        load_audio(tmp_path / "b.png", RATE)


def test_a_video_is_what_is_on_the_screen_in_the_middle_of_equal_parts(tmp_path: Path) -> None:
    frames = pictures(20)
    path = write_video(tmp_path / "a.avi", frames, rate=10, sound=tone(RATE, 300, 2.0))
    video = load_video(path, 4)  # the middles are at 0.25, 0.75, 1.25, 1.75 s
    assert (video.frames.dtype, video.length) == (np.uint8, 2.0)
    assert video.seconds == pytest.approx((0.2, 0.7, 1.2, 1.7)) and video.step == pytest.approx(0.5)
    np.testing.assert_array_equal(video.frames, frames[[2, 7, 12, 17]])
    np.testing.assert_allclose(load_audio(path, RATE), tone(RATE, 300, 2.0), atol=1e-4)  # its own track
    one = load_video(path, 1)
    np.testing.assert_array_equal(one.frames, frames[[10]])
    assert one.step == 2.0


def test_a_short_video_gives_the_frames_it_has_once(tmp_path: Path) -> None:
    frames = pictures(3)
    video = load_video(write_video(tmp_path / "a.avi", frames), 16)
    np.testing.assert_array_equal(video.frames, frames)
    assert video.seconds == pytest.approx((0.0, 0.1, 0.2))
    slides = write_video(tmp_path / "b.mkv", frames, times=[0, 30, 34])  # the first stays for three seconds
    assert load_video(slides, 4).seconds == pytest.approx((0.0, 3.0), abs=1e-3)
    assert load_video(slides, 16).seconds == pytest.approx((0.0, 3.0), abs=1e-3)  # mkv says 3.4 s


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx"), ("a.mov", "mpeg4"), ("a.h264", "libx264")]
)
def test_containers_and_codecs(tmp_path: Path, name: str, codec: str) -> None:
    """Frames that are coded out of order come in order; a stream without times or length is timed by its rate."""
    frames = pictures(20)
    video = load_video(write_video(tmp_path / name, frames, rate=25, codec=codec), 4)
    assert video.seconds == pytest.approx((0.08, 0.28, 0.48, 0.68), abs=0.05)
    levels = video.frames.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(levels, frames[[2, 7, 12, 17]].mean(axis=(1, 2, 3)), atol=6)


def test_a_video_that_begins_late_has_its_own_length(tmp_path: Path) -> None:
    path = write_video(tmp_path / "late.mkv", pictures(4), times=[50, 51, 52, 53])  # ten a second
    video = load_video(path, 2)
    assert video.length == pytest.approx(0.4) and video.seconds == pytest.approx((0.1, 0.3))


def test_videos_are_upright(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.avi", pictures(2))
    lying = load_video(path, 1).frames[0]
    monkeypatch.setattr("opsd.media._quarter_turns", lambda frame: 1)
    np.testing.assert_array_equal(load_video(path, 1).frames[0], np.rot90(lying))


def test_bad_videos(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(InputError) as caught:
            load_video(path, 4)
        return str(caught.value).replace(f"{tmp_path}/", "")

    whole = write_video(tmp_path / "a.mkv", pictures(40), codec="mpeg4", sound=tone(RATE, 300, 5.0)).read_bytes()
    assert load_video(tmp_path / "a.mkv", 4).length == 4.0  # the sound is longer
    half = tmp_path / "half.mkv"
    half.write_bytes(whole[: len(whole) // 2])
    found = r"half\.mkv: expected a video that can be decoded to its end; found [0-2]\.\d\d s of 4\.00 s"
    assert re.fullmatch(found, refusal(half))
    whole = write_video(tmp_path / "b.avi", pictures(40), codec="mpeg4").read_bytes()
    cut = tmp_path / "cut.avi"
    cut.write_bytes(whole[: len(whole) * 8 // 10])  # FFmpeg finds a shorter video in it, and nothing wrong
    assert re.fullmatch(r"cut\.avi: expected a video that can .* to its end; found \d\.\d\d s of 4\.00 s", refusal(cut))
    (tmp_path / "none.mp4").write_bytes(b"not a video" * 100)
    assert refusal(tmp_path / "none.mp4").startswith(
        "none.mp4: expected a video that can be decoded; found Invalid data"
    )
    (tmp_path / "empty.mp4").write_bytes(b"")
    assert refusal(tmp_path / "empty.mp4").startswith(
        "empty.mp4: expected a video that can be decoded; found Invalid data"
    )
    spoken = write_wav(tmp_path / "b.wav", tone(RATE, 440))
    assert refusal(spoken) == "b.wav: expected a file with moving pictures; found no video stream"


@pytest.mark.parametrize("sound", [False, True])
def test_a_matroska_with_a_hole_is_refused(tmp_path: Path, sound: bool) -> None:
    def load(path: Path) -> object:
        return load_audio(path, RATE) if sound else load_video(path, 4)

    path = tmp_path / "a.mkv"
    whole = write_mp3(path, 20) if sound else write_video(path, pictures(200), codec="mpeg4").read_bytes()
    load(path)
    third = len(whole) // 3
    path.write_bytes(whole[:third] + bytes(third) + whole[2 * third :])
    with pytest.raises(InputError, match=r"a\.mkv: expected a Matroska file that is whole; found nothing readable"):
        load(path)
    path.write_bytes(whole[: 2 * third])  # a file that ends early has no hole, and is told by its length
    with pytest.raises(InputError, match=r"a\.mkv: expected .* decoded to its end; found 1\d\.\d\d s of 2"):
        load(path)
