"""Masks, maps and curves drawn with PIL. Pictures are made small before anything is drawn on them,
so that no image is too large to show."""

import json

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from support.files import check_writable, whole

BLUE, PINK = (40, 90, 255), (255, 60, 160)  # of curves
# The outlines of ground truth and prediction, both edged in black: no shape has such a line.
TRUTH, PREDICTION = (255, 255, 255), (255, 0, 200)
HEIGHT = 240  # of a picture, in pixels


def fit(image, height=HEIGHT):
    """A PIL image in RGB, `height` pixels high, or less if it were wider than four times that."""
    scale = min(height / image.height, 4 * height / image.width)
    size = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize(tuple(size), Image.LANCZOS)


def fit_mask(mask, size):
    """A bool mask (H, W) -> of size (width, height)."""
    return np.asarray(Image.fromarray(mask).convert("L").resize(size, Image.BILINEAR)) > 127


def outlined(image, mask, colour, height=HEIGHT):
    """PIL image and bool mask (H, W) -> the image, dark where the mask is not, and its outline."""
    image = fit(image, height)
    inside = Image.fromarray(fit_mask(mask, image.size)).convert("L")
    line, edge = (inside.filter(ImageFilter.MaxFilter(width)) for width in (5, 7))
    picture = image.point(lambda value: value // 2)
    for paint, where in (("black", edge), (colour, line), ("black", inside),
                         (image, inside.filter(ImageFilter.MinFilter(3)))):
        picture.paste(paint, (0, 0, *image.size), where)
    return picture


def heat(image, weights, colour=PINK, dark=0.3, height=HEIGHT):
    """PIL image, darkened, under a map (h, w): no colour at 0, nothing but the colour at 1."""
    image = fit(image, height).point(lambda value: round(value * dark))
    weights = Image.fromarray(np.uint8(255 * np.asarray(weights, np.float32).clip(0, 1)))
    image.paste(colour, (0, 0, *image.size), weights.resize(image.size, Image.BILINEAR))
    return image


def wrap(text, width, font):
    """Breaks a text into lines that fit `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = not lines[-1] or font.getlength(longer) <= width
        lines = [*lines[:-1], longer] if fits else [*lines, word]
    return lines


def panel(pictures, caption="", gap=4, narrowest=160):
    """{title: picture} side by side, the titles over them and a caption under all."""
    small, font = ImageFont.load_default(13), ImageFont.load_default(15)
    widths = [max(picture.width, narrowest) for picture in pictures.values()]
    titles = [wrap(title, width, small) for title, width in zip(pictures, widths)]
    width = sum(widths) + gap * (len(widths) - 1)
    lines = wrap(caption, width - 2 * gap, font)
    top = 17 * max(map(len, titles)) if any(pictures) else 0
    bottom = top + max(picture.height for picture in pictures.values())
    height = bottom + 10 + 19 * len(lines) if caption else bottom
    sheet = Image.new("RGB", (width, height), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for picture, title, width in zip(pictures.values(), titles, widths):
        draw.text((x, 0), "\n".join(title), fill="black", font=small, spacing=4)
        sheet.paste(picture, (x, top))
        x += width + gap
    draw.text((gap, bottom + 4), "\n".join(lines), fill="black", font=font, spacing=4)
    return sheet


def contact_sheet(panels, columns=3, gap=12):
    """Panels in a grid on white."""
    rows = [panels[i:i + columns] for i in range(0, len(panels), columns)]
    widths = [max(p.width for p in panels[c::columns]) for c in range(min(columns, len(panels)))]
    heights = [max(p.height for p in row) for row in rows]
    size = sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(rows) + 1)
    sheet, y = Image.new("RGB", size, "white"), gap
    for row, height in zip(rows, heights):
        x = gap
        for p, width in zip(row, widths):
            sheet.paste(p, (x, y))
            x += width + gap
        y += height + gap
    return sheet


def axes(draw, box, title, last, top, number):
    """Grid, numbers and title of a plot from (0, 0) to (last, top).

    box: left, top, width, height in the picture. number: y's format. -> a function that says where
    in the picture (x, y) lies.
    """
    font = ImageFont.load_default(13)
    left, floor = box[0] + 60, box[1] + box[3] - 40
    right, rise = left + box[2] - 80, box[3] - 70
    for i in range(5):
        y, x = floor - rise * i / 4, left + (right - left) * i / 4
        draw.line([(left, y), (right, y)], fill=(220, 220, 220))
        draw.text((left - 45, y - 8), format(top * i / 4, number), fill="black", font=font)
        draw.text((x - 12, floor + 6), f"{last * i / 4:.0f}", fill="black", font=font)
    draw.text((left, box[1] + 8), title, fill="black", font=font)
    return lambda x, y: (left + (right - left) * x / last, floor - rise * y / top)


def draw_curve(out, width=720, height=300):
    """--out/curve.png: the loss of each stage against its steps, from log.jsonl."""
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    stages = sorted({line["stage"] for line in lines})
    sheet = Image.new("RGB", (width * len(stages), height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, stage in enumerate(stages):
        points = [(line["step"], line["loss"]) for line in lines
                  if line["stage"] == stage and "skipped_step" not in line]
        place = axes(draw, (column * width, 0, width, height), f"stage {stage}: loss against step",
                     last=max(x for x, _ in points), top=1.05 * max(y for _, y in points),
                     number=".2f")
        draw.line([place(x, y) for x, y in points], fill=BLUE, width=2)
    save_picture(sheet, out / "curve.png")


def save_picture(picture, path):
    """Writes a picture whole or not at all. Raises DataError if it cannot be written."""
    check_writable(path, picture=True)
    with whole(path) as aside:
        picture.save(aside)
