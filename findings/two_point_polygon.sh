#!/usr/bin/env bash
# pycocotools 2.0.11: a polygon of two points (COCO's annotations have such strays) is a polygon of
# no area behind a longer one, but a box x, y, width, height if it comes as an array of one row,
# and a TypeError about 'bb' in front of a longer one. What it is depends on its place and type.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy==2.4.6 pycocotools==2.0.11
cat > "$folder/finding.py" <<'PYTHON'
import numpy as np
from pycocotools import mask as coco

two, three = [2.0, 3.0, 8.0, 9.0], [1.0, 1.0, 5.0, 1.0, 5.0, 5.0]
for name, polygons in (("behind", [three, two]), ("as an array", np.array([two])),
                       ("in front", [two, three])):
    try:
        drawn = coco.frPyObjects(polygons, 20, 20)
        print(name, "areas", coco.area(drawn).tolist(), "boxes", coco.toBbox(drawn).tolist())
    except TypeError as error:
        print(name, "TypeError:", error)
PYTHON
"$folder/venv/bin/python" "$folder/finding.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
behind areas [6, 0] boxes [[2.0, 1.0, 3.0, 3.0], [0.0, 0.0, 0.0, 0.0]]
as an array areas [72] boxes [[2.0, 3.0, 8.0, 9.0]]
in front TypeError: Argument 'bb' has incorrect type (expected numpy.ndarray, got list)
SEEN
