import json
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.files import DataError, check_writable


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
                     last=max(x for x, _ in points), top=1.05 * max(y for _, y in points), number=".2f")
        draw.line([place(x, y) for x, y in points], fill=BLUE, width=2)
    save_picture(sheet, out / "curve.png")
BLUE, PINK = (40, 90, 255), (255, 60, 160)  # ground truth and prediction, as in the paper's figures


# ---- Pictures -------------------------------------------------------------------------------------------------------

def overlay(image, mask, colour, strength=0.55):
    """PIL image with a bool mask (H, W) tinted and outlined."""
    pixels = np.asarray(image.convert("RGB"), np.float32).copy()
    mask = np.asarray(mask, bool)
    pixels[mask] = (1 - strength) * pixels[mask] + strength * np.array(colour, np.float32)
    inner = mask.copy()
    for axis in (0, 1):
        for shift in (1, -1):
            inner &= np.roll(mask, shift, axis)
    pixels[mask & ~inner] = colour
    return Image.fromarray(pixels.astype(np.uint8))


def wrap(text, width, font):
    """Breaks a text into lines that fit `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if not lines[-1] or font.getlength(longer) <= width else [*lines, word]
    return lines


def panel(pictures, caption, height=240):
    """Pictures side by side, the sentence under them."""
    pictures = [p.resize((max(1, round(p.width * height / p.height)), height), Image.LANCZOS) for p in pictures]
    font = ImageFont.load_default(15)
    width = sum(p.width for p in pictures) + 4 * (len(pictures) - 1)
    lines = wrap(caption, width - 8, font)
    sheet = Image.new("RGB", (width, height + 10 + 19 * max(2, len(lines))), "white")
    x = 0
    for p in pictures:
        sheet.paste(p, (x, 0))
        x += p.width + 4
    ImageDraw.Draw(sheet).text((4, height + 4), "\n".join(lines), fill="black", font=font, spacing=4)
    return sheet


def contact_sheet(panels, columns=3, gap=12):
    """Panels in a grid on white."""
    rows = [panels[i:i + columns] for i in range(0, len(panels), columns)]
    widths = [max(row[c].width for row in rows if c < len(row)) for c in range(min(columns, len(panels)))]
    heights = [max(p.height for p in row) for row in rows]
    sheet = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(rows) + 1)), "white")
    y = gap
    for row, height in zip(rows, heights):
        x = gap
        for p, width in zip(row, widths):
            sheet.paste(p, (x, y))
            x += width + gap
        y += height + gap
    return sheet


def axes(draw, box, title, last, top, number):
    """Grid, numbers and title of a plot from (0, 0) to (last, top). box: left, top, width, height in the picture;
    number: y's format. -> a function that says where in the picture (x, y) lies."""
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


def save_picture(picture, path):
    """Writes a picture whole or not at all. Raises DataError if it cannot be written."""
    check_writable(path, picture=True)
    path = Path(path)
    aside = path.with_name(f".partial-{os.getpid()}{path.suffix}")
    try:
        picture.save(aside)
        aside.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a format without such pixels
        aside.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written ({error}): give another place") from error


def heat(image, logits):
    """PIL image, dark, with a patch map (h, w) in pink, from its lowest value to its highest."""
    span = logits - logits.min()
    span = Image.fromarray((span / span.max().clamp(min=1e-6)).cpu().numpy()).resize(image.size, Image.BILINEAR)
    weight, pixels = np.asarray(span)[..., None], np.asarray(image.convert("RGB"), np.float32)
    return Image.fromarray(((1 - weight) * 0.3 * pixels + weight * np.array(PINK)).clip(0, 255).astype(np.uint8))
