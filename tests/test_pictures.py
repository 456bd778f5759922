"""What pictures show, in pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from miniature.shapes import COLOURS
from support.files import DataError
from support.pictures import (
    HEIGHT,
    PINK,
    PREDICTION,
    TRUTH,
    contact_sheet,
    fit,
    heat,
    outlined,
    panel,
    save_picture,
)
from support.tables import table

GREY = Image.new("RGB", (60, 40), (100, 100, 100))
SQUARE = np.zeros((40, 60), bool)
SQUARE[10:30, 20:40] = True


def colours(picture):
    return {tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3)}


@pytest.mark.parametrize("colour", [TRUTH, PREDICTION])
def test_a_mask_is_seen_as_it_is_with_a_line_around_it_and_the_rest_is_dark(colour):
    pixels = np.asarray(outlined(GREY, SQUARE, colour, height=240))
    inside = pixels[66:174, 126:234]  # the square is rows 60-180, columns 120-240
    assert (inside == 100).all() and (pixels[:50] == 50).all()
    assert colours(pixels) == {(100, 100, 100), (50, 50, 50), (0, 0, 0), colour}
    line = (pixels == colour).all(axis=2)
    assert line[57:60, 130:230].any(axis=0).all()  # all along the upper edge, outside


def test_no_colour_of_the_shapes_world_can_be_taken_for_an_outline():
    for colour in COLOURS.values():
        image = Image.new("RGB", GREY.size, colour)
        assert {TRUTH, PREDICTION}.isdisjoint(colours(image))
        picture = outlined(image, SQUARE, PREDICTION)
        assert PREDICTION in colours(picture) and (0, 0, 0) in colours(picture)  # and its edge


def test_an_empty_mask_is_all_dark_and_a_full_one_has_no_line():
    assert colours(outlined(GREY, SQUARE & False, PREDICTION)) == {(50, 50, 50)}
    full = colours(outlined(GREY, SQUARE | True, PREDICTION))
    assert (100, 100, 100) in full and (50, 50, 50) not in full and PREDICTION not in full


def test_heat_shows_the_map_and_not_the_place_between_its_extremes():
    low = colours(heat(GREY, torch.full((2, 3), 0.25)))
    high = colours(heat(GREY, torch.full((2, 3), 1.0)))
    assert high == {PINK} and len(low) == 1
    (pixel,) = low  # a quarter of the way from 30, three tenths of 100
    assert np.allclose(pixel, [30 + (c - 30) / 4 for c in PINK], atol=2)


@pytest.mark.parametrize("size, drawn", [((4000, 1), (960, 1)), ((1, 4000), (1, 240)),
                                         ((60, 40), (360, 240)), ((3000, 4000), (180, 240))])
def test_pictures_are_drawn_small_whatever_the_image(size, drawn):
    image = Image.new("RGB", size)
    assert fit(image).size == drawn
    mask = np.ones(size[::-1], bool)
    picture = panel({"a title": outlined(image, mask, TRUTH)}, "a sentence")
    assert picture.width <= 4 * HEIGHT and picture.height < HEIGHT + 80


def test_a_panel_has_its_titles_and_its_caption_and_a_sheet_its_panels():
    plain = panel({"": fit(GREY)})
    assert plain.size == fit(GREY).size
    titled, both = panel({"title": fit(GREY)}), panel({"title": fit(GREY)}, "a caption")
    assert plain.height < titled.height < both.height
    assert (0, 0, 0) in colours(titled.crop((0, 0, titled.width, 17)))
    sheet = contact_sheet([both] * 3, columns=2)
    assert sheet.size == (2 * both.width + 36, 2 * both.height + 36)


def test_a_picture_is_written_whole_or_not_at_all(tmp_path):
    save_picture(GREY, tmp_path / "deep" / "a.png")
    assert Image.open(tmp_path / "deep" / "a.png").size == GREY.size
    with pytest.raises(DataError, match="no picture format"):
        save_picture(GREY, tmp_path / "a.doc")
    with pytest.raises(DataError, match="cannot be written"):
        save_picture(GREY.convert("RGBA"), tmp_path / "a.jpg")
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


def test_a_table_in_markdown_and_in_columns():
    rows = [{"": "one", "n": 1}, {"": "three", "n": 3}]
    assert table(rows) == "|  | n |\n| --- | --- |\n| one | 1 |\n| three | 3 |"
    assert table(rows, markdown=False) == "       n\none    1\nthree  3"
