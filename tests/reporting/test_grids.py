import numpy as np
import pytest
from PIL import Image

from hf_dl.reporting.grids import SEGMENT_COLORS, color_segments, image_grid


def plain(color, size=8):
    return np.full((size, size, 3), color, dtype=np.uint8)


class TestColorSegments:
    def test_each_label_has_its_color(self):
        mask = np.array([[0, 1], [11, 12]])
        colored = color_segments(mask)
        assert colored.shape == (2, 2, 3) and colored.dtype == np.uint8
        for y in range(2):
            for x in range(2):
                assert tuple(colored[y, x]) == tuple(SEGMENT_COLORS[mask[y, x] % 12])

    def test_twelve_colors_differ(self):
        assert len({tuple(color) for color in SEGMENT_COLORS.tolist()}) == 12


class TestImageGrid:
    def test_images_are_where_they_belong(self, tmp_path):
        colors = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 0), (0, 255, 255)]]
        rows = [[plain(color) for color in row] for row in colors]
        path = image_grid(rows, tmp_path / "sheet.png", titles=["one", "two", "three"], cell=1.0)
        assert path == tmp_path / "sheet.png"
        sheet = Image.open(path).convert("RGB")
        head = 30  # a quarter of an inch
        assert sheet.size == (3 * 120, 2 * 120 + head)
        for y, row in enumerate(colors):
            for x, color in enumerate(row):
                assert sheet.getpixel((x * 120 + 58, head + y * 120 + 58)) == color
        assert sheet.getpixel((2 * 120 + 58, head + 120 + 58)) == (255, 255, 255)  # the second row is shorter

    @pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
    def test_an_image_keeps_its_shape(self, shape, tmp_path):
        image = np.zeros((*shape, 3), dtype=np.uint8)
        sheet = np.asarray(Image.open(image_grid([[image]], tmp_path / "a.png", cell=1.0)).convert("L"))
        inside = sheet[2:, :] < 128
        rows, columns = inside.any(axis=1).sum(), inside.any(axis=0).sum()
        assert (rows, columns) == pytest.approx(tuple(0.97 * 120 * side / 8 for side in shape), abs=1)
        assert np.argwhere(inside).mean(axis=0) == pytest.approx((0.485 * 120 + 2, 0.485 * 120), abs=3)

    def test_titles_are_drawn_above_their_column(self, tmp_path):
        rows = [[plain((9, 9, 9)), plain((9, 9, 9))]]
        sheet = np.asarray(Image.open(image_grid(rows, tmp_path / "a.png", titles=["", "two"], cell=1.0)).convert("L"))
        head = sheet[:28]
        assert head[:, :120].min() == 255 and head[:, 120:].min() < 128

    def test_labels_are_drawn_left_of_their_row(self, tmp_path):
        rows = [[plain((0, 255, 0))], [plain((0, 0, 255))]]
        path = image_grid(rows, tmp_path / "a.png", labels=["", "two"], cell=1.0)
        sheet = Image.open(path).convert("RGB")
        assert sheet.size == (30 + 120, 2 + 240)  # a quarter of an inch more
        side = np.asarray(sheet.convert("L"))[:, :28]
        assert side[:120].min() == 255 and side[125:].min() < 128
        assert sheet.getpixel((30 + 58, 60)) == (0, 255, 0) and sheet.getpixel((30 + 58, 180)) == (0, 0, 255)

    def test_captions_are_drawn_below_their_image(self, tmp_path):
        rows = [[plain((0, 255, 0))] * 2, [plain((0, 0, 255))] * 2, [plain((255, 0, 0))]]
        path = image_grid(rows, tmp_path / "a.png", captions=[["", "a text that is a little longer"], []], cell=1.0)
        sheet = Image.open(path).convert("RGB")
        assert sheet.size == (240, 2 + 3 * 120 + 19)  # only the first row is higher
        gap = np.asarray(sheet.convert("L"))[122:139]
        assert gap[:, :118].min() == 255 and gap[:, 122:].min() < 128 and gap[:, 238:].min() == 255
        assert sheet.getpixel((58, 60)) == (0, 255, 0) and sheet.getpixel((58, 2 + 139 + 60)) == (0, 0, 255)
        assert sheet.getpixel((58, 2 + 139 + 180)) == (255, 0, 0)

    def test_letters_of_other_alphabets_give_no_warning(self, tmp_path):
        assert image_grid([[plain((0, 255, 0))]], tmp_path / "a.png", captions=[["红 🙂 дом"]]).is_file()

    def test_an_image_is_not_smoothed(self, tmp_path):
        checks = np.where(np.indices((4, 4)).sum(0)[..., None] % 2, 255, 0).astype(np.uint8).repeat(3, axis=2)
        sheet = np.asarray(Image.open(image_grid([[checks]], tmp_path / "a.png", cell=1.0)).convert("L"))
        inside = sheet[10:110, 10:110]
        assert np.isin(inside, (0, 255)).mean() > 0.97

    @pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
    def test_the_suffix_says_the_format(self, suffix, tmp_path):
        content = image_grid([[plain((1, 2, 3))]], tmp_path / f"a.{suffix}").read_bytes()
        assert {"png": b"\x89PNG", "svg": b"<svg ", "pdf": b"%PDF"}[suffix] in content

    def test_the_same_picture_is_the_same_file(self, tmp_path):
        first, second = (image_grid([[plain((1, 2, 3))]], tmp_path / name) for name in ("a.png", "b.png"))
        assert first.read_bytes() == second.read_bytes()

    @pytest.mark.parametrize("rows", [[], [[]], [[], []]])
    def test_no_image_is_refused(self, rows, tmp_path):
        with pytest.raises(ValueError, match="rows contains no image"):
            image_grid(rows, tmp_path / "a.png")
        assert not list(tmp_path.iterdir())
