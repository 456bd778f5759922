"""walkthrough.ipynb runs from top to bottom, without Jupyter, and every cell ends in a picture.

    python tests/test_walkthrough.py --write    runs it and stores what its cells give
"""

import ast
import base64
import io
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).parent.parent
NOTEBOOK = REPOSITORY / "walkthrough.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(cell, names):
    """A code cell -> what it prints, and its last expression."""
    *body, last = ast.parse("".join(cell["source"])).body
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(ast.Module(body, []), "walkthrough", "exec"), names)
        value = eval(compile(ast.Expression(last.value), "walkthrough", "eval"), names)
    return printed.getvalue(), value


def outputs(printed, picture, count):
    """What Jupyter stores of a cell's run."""
    png = io.BytesIO()
    picture.quantize(128).save(png, "PNG", optimize=True)  # a notebook that is quick to load
    data = {"image/png": base64.b64encode(png.getvalue()).decode(),
            "text/plain": [f"a picture of {picture.width} x {picture.height}"]}
    stream = {"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)}
    result = {"output_type": "execute_result", "execution_count": count, "metadata": {},
              "data": data}
    return [stream, result] if printed else [result]


def write():
    sys.path.insert(0, str(REPOSITORY))
    notebook, names = json.loads(NOTEBOOK.read_text()), {}
    for count, cell in enumerate(code_cells(notebook), 1):
        cell["execution_count"], cell["outputs"] = count, outputs(*run(cell, names), count)
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


@pytest.mark.parametrize("sentence", [None, "the large purple triangle left of the circle"])
def test_every_cell_runs_and_ends_in_a_picture_whatever_the_sentence(monkeypatch, sentence):
    monkeypatch.chdir(REPOSITORY)
    names, start = {}, time.process_time()
    for cell in code_cells(json.loads(NOTEBOOK.read_text())):
        if sentence:
            cell["source"] = [f'sentence = "{sentence}"\n' if line.startswith("sentence = ") else
                              line for line in cell["source"]]
        assert isinstance(run(cell, names)[1], Image.Image)
    assert sentence in (None, names["sentence"]) and time.process_time() - start < 30


def test_what_is_stored_is_what_its_cells_gave():
    for count, cell in enumerate(code_cells(json.loads(NOTEBOOK.read_text())), 1):
        *_, result = cell["outputs"]
        Image.open(io.BytesIO(base64.b64decode(result["data"]["image/png"]))).load()
        assert cell["execution_count"] == result["execution_count"] == count
    assert NOTEBOOK.stat().st_size < 1.5e6


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()
