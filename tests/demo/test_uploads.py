import numpy as np
import pytest
from PIL import Image

from hf_dl.demo.uploads import open_image

from ..spaces.pages import HOSTILE, make_image, write_hostile, write_huge_png


class TestOpenImage:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_refuses_in_a_sentence(self, kind, tmp_path):
        path = tmp_path / "image.png"
        write_hostile(kind, path)
        with pytest.raises(ValueError, match=HOSTILE[kind]):
            open_image(path)

    def test_refuses_between_the_two_limits_of_pillow(self, tmp_path):
        write_huge_png(tmp_path / "large.png", side=10_000)  # Pillow itself would only warn
        with pytest.raises(ValueError, match="more than 50 million pixels"):
            open_image(tmp_path / "large.png")

    def test_refuses_a_file_cut_short(self, tmp_path):
        path = tmp_path / "cut.png"
        make_image((200, 200)).save(path)
        path.write_bytes(path.read_bytes()[:150])
        with pytest.raises(ValueError, match="not an image that can be read"):
            open_image(path)

    @pytest.mark.parametrize(
        ("mode", "value", "expected"),
        [
            ("RGB", (200, 100, 50), (200, 100, 50)),
            ("L", 100, (100, 100, 100)),
            ("1", 1, (255, 255, 255)),
            ("LA", (100, 255), (100, 100, 100)),
            ("LA", (100, 0), (255, 255, 255)),
            ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
            ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
        ],
    )
    def test_reads_png_of_any_mode(self, mode, value, expected, tmp_path):
        Image.new(mode, (30, 20), value).save(tmp_path / "a.png")
        image = open_image(tmp_path / "a.png")
        assert (image.mode, image.size, image.getpixel((3, 4))) == ("RGB", (30, 20), expected)

    def test_reads_16_bits_without_clipping(self, tmp_path):
        values = np.linspace(0, 65535, 256).astype(np.uint16)
        Image.fromarray(np.tile(values, (8, 1))).save(tmp_path / "deep.png")
        read = np.asarray(open_image(tmp_path / "deep.png"))
        assert np.abs(read[0, :, 0].astype(int) - np.arange(256)).max() <= 1

    def test_reads_floats(self, tmp_path):
        values = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
        Image.fromarray(values).save(tmp_path / "float.tiff")
        assert np.asarray(open_image(tmp_path / "float.tiff"))[0, :, 0].tolist() == [0, 128, 255, 0]

    def test_reads_cmyk(self, tmp_path):
        Image.new("CMYK", (30, 20), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
        red, green, blue = open_image(tmp_path / "a.jpg").getpixel((3, 4))
        assert red > 230 and green < 30 and blue < 30

    @pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
    def test_reads_the_first_picture_of_an_animation(self, suffix, tmp_path):
        first, second = Image.new("RGB", (30, 20), "red"), Image.new("RGB", (30, 20), "blue")
        first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
        red, green, blue = open_image(tmp_path / f"a.{suffix}").getpixel((3, 4))
        assert red > 240 and green < 15 and blue < 15

    def test_turns_a_photo_upright(self, tmp_path):
        image = make_image((60, 40))
        exif = Image.Exif()
        exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
        image.save(tmp_path / "photo.png", exif=exif)
        expected = image.transpose(Image.Transpose.ROTATE_270)
        assert open_image(tmp_path / "photo.png").tobytes() == expected.tobytes()

    @pytest.mark.parametrize(
        ("size", "expected"), [((4000, 1000), (384, 96)), ((5000, 1), (384, 1)), ((9, 7), (9, 7))]
    )
    def test_makes_large_images_small(self, size, expected, tmp_path):
        Image.new("RGB", size).save(tmp_path / "a.png")
        assert open_image(tmp_path / "a.png").size == expected
