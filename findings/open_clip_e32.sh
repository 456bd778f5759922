#!/usr/bin/env bash
# open_clip 3.3.0: the weights `laion400m_e32` of ViT-B-16-plus-240 (RISCLIP-B) are downloaded from
# the Hub by preference, from a repository named ..._e31; the address it would use without the Hub
# is e32's. We read open_clip's table, not the repository: which epoch lies there, we do not know.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-deps open_clip_torch==3.3.0
cat > "$folder/finding.py" <<'PYTHON'
import ast
import importlib.util
from pathlib import Path

package = Path(importlib.util.find_spec("open_clip").origin).parent  # found, not imported: no torch
for statement in ast.parse((package / "pretrained.py").read_text()).body:
    if isinstance(statement, ast.Assign) and statement.targets[0].id == "_VITB16_PLUS_240":
        for tag in statement.value.keywords:
            for place in tag.value.keywords:
                print(tag.arg, place.arg, place.value.value)
    if isinstance(statement, ast.FunctionDef) and statement.name == "download_pretrained":
        print("default:", [f"{name.arg}={value.value}" for name, value in zip(
            statement.args.args[-2:], statement.args.defaults)])
PYTHON
"$folder/venv/bin/python" "$folder/finding.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
laion400m_e31 url https://github.com/mlfoundations/open_clip/releases/download/v0.2-weights/vit_b_16_plus_240-laion400m_e31-8fb26589.pt
laion400m_e31 hf_hub timm/vit_base_patch16_plus_clip_240.laion400m_e31/
laion400m_e32 url https://github.com/mlfoundations/open_clip/releases/download/v0.2-weights/vit_b_16_plus_240-laion400m_e32-699c4b84.pt
laion400m_e32 hf_hub timm/vit_base_patch16_plus_clip_240.laion400m_e31/
default: ['prefer_hf_hub=True', 'cache_dir=None']
SEEN
