#!/usr/bin/env bash
# Pillow 11.0.0 and 13.0.0: a picture of 6 x 4 pixels with EXIF orientation 6 (to be turned by 90
# degrees). A TIFF's `size` is that of the turned picture as soon as it is open, while the tag still
# says 6; the pixels are turned on load, and then the tag is gone. Every other format keeps
# the stored size and the tag. Whoever swaps `size` by the tag swaps a TIFF's twice.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/finding.py" <<'PYTHON'
import io

import PIL
from PIL import Image, ImageOps

print("Pillow", PIL.__version__)
exif = Image.Exif()
exif[0x0112] = 6
for name in ("JPEG", "PNG", "WEBP", "TIFF"):
    file = io.BytesIO()
    Image.new("RGB", (6, 4)).save(file, name, exif=exif)
    image = Image.open(file)
    opened = image.size, image.getexif().get(0x0112)
    image.load()
    loaded = image.size, image.getexif().get(0x0112)
    upright = ImageOps.exif_transpose(Image.open(file)).size
    print(name, "opened", *opened, "loaded", *loaded, "upright", upright)
PYTHON
for version in 11.0.0 13.0.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q pillow==$version
  "$folder/$version/bin/python" "$folder/finding.py"
done | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
Pillow 11.0.0
JPEG opened (6, 4) 6 loaded (6, 4) 6 upright (4, 6)
PNG opened (6, 4) 6 loaded (6, 4) 6 upright (4, 6)
WEBP opened (6, 4) 6 loaded (6, 4) 6 upright (4, 6)
TIFF opened (4, 6) 6 loaded (4, 6) None upright (4, 6)
Pillow 13.0.0
JPEG opened (6, 4) 6 loaded (6, 4) 6 upright (4, 6)
PNG opened (6, 4) 6 loaded (6, 4) 6 upright (4, 6)
WEBP opened (6, 4) 6 loaded (6, 4) 6 upright (4, 6)
TIFF opened (4, 6) 6 loaded (4, 6) None upright (4, 6)
SEEN
