"""Real files decoded by the real libraries, whole and broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opsd.errors import InputError
from opsd.media import load_audio, load_image
from tests.files import tone, write_wav

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


def test_audio_files_without_sound(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.wav: expected sound that can be decoded; found no samples"):
        load_audio(write_wav(tmp_path / "a.wav", np.zeros(0)), RATE)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"b\.png: expected a file with sound; found no audio stream"):
        load_audio(tmp_path / "b.png", RATE)
