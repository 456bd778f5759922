"""The README's names exist, its commands parse, and those of Tables 1 and 2 train and evaluate."""

import importlib
import itertools
import json
import re
import shlex
from pathlib import Path

import open_clip
import pytest
from test_data import ref, write_set

import data
import evaluate
import train
from experiments import ablate

README = (Path(__file__).parent.parent / "README.md").read_text()
MODULES = ("ablate", "bench", "data", "evaluate", "fusions", "kernels", "predict", "risclip", "shapes",
           "train")
ROWS = [row.split("|")[1:3] for row in README.split("## Walkthrough")[1].split("\n## ")[0].splitlines()
        if row.startswith("| ")][1:]
NAMES = [name for _, here in ROWS for name in re.findall(r"`([a-z]+\.[^`]+)`", here)]


def commands():
    """Every `python FILE.py ...` in the README's blocks of commands, shell loops unrolled -> (module, arguments)."""
    found = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M):
        loops = []
        for line in "" if language else block.splitlines():
            if "done" in line:
                loops = []
            loops += re.findall(r"for (\w+) in ([^;]+); do", line)
            if match := re.match(r"\s*python (\w+)\.py( .*)?$", line.split("  #")[0]):
                for values in itertools.product(*(words.split() for _, words in loops)):
                    text = match[2] or ""
                    for (name, _), value in zip(loops, values):
                        text = text.replace(f"${name}", value)
                    assert "$" not in text, line
                    found.append((match[1], shlex.split(text)))
    return found


def names_a_thing(name, things):
    """Whether `file.py --flag` or `module.Class.attribute` exists; attributes are those of the class or of a thing."""
    if match := re.fullmatch(r"(\w+)\.py (--[\w-]+)", name):
        with pytest.raises(SystemExit):
            importlib.import_module(match[1]).parse_args(["--help"])
        return match[2]
    module, *rest = name.split(".")
    assert module in MODULES, name
    place = importlib.import_module(module)
    for part in rest:
        if not hasattr(place, part):  # an attribute of instances, or a field without a default
            place = next((t for t in things if type(t) is place), place)
        assert hasattr(place, part), f"the README's walkthrough names {name}, which does not exist"
        place = getattr(place, part)
    return None


def test_every_name_in_the_walkthrough_exists(tiny, capsys):
    tiny.add_decoder()
    things = [*tiny.modules(), tiny.config]
    assert len(NAMES) > 60
    for name in NAMES:
        flag = names_a_thing(name, things)
        printed = capsys.readouterr().out
        assert flag is None or re.search(rf"{flag}\b", printed), name
    with pytest.raises(AssertionError, match="does not exist"):
        names_a_thing("risclip.CFE.t2v", things)


def test_the_walkthrough_misses_no_part_of_the_paper():
    parts = " ".join(paper for paper, _ in ROWS)
    for part in ("Sec. 1-2", *(f"Sec. 3.{i}" for i in range(1, 6)), *(f"Sec. 4.{i}" for i in range(1, 6)), "A.1,",
                 "A.2.1", "A.2.2", "Eq. 1", "Eq. 2", "Eq. 3", *(f"Table {i}" for i in (1, 2, 3, 4, 5, "A1")),
                 *(f"Figure {i}" for i in (1, 2, 3, "A3", "A4")), "Figures A1, A2"):
        assert part in parts, part


def test_every_command_parses():
    found = commands()
    assert {module for module, _ in found} >= {"train", "predict", "evaluate", "ablate"}
    for module, arguments in found:
        importlib.import_module(module).parse_args(arguments)
    table_5 = {tuple(change) for _, change, _ in ablate.table_rows("5", "B")}
    assert table_5 == {(), ("adapter_layers",), ("cfe_layers",), ("ske_layers",)}


@pytest.fixture
def thin_clips(monkeypatch):
    """B's and L's towers, as deep as they are and a tenth as wide: heads of 4."""
    for name, image_heads, text_heads, shared in (("ViT-B-16-plus-240", 14, 10, 80), ("ViT-L-14-336", 16, 12, 48)):
        config = open_clip.get_model_config(name)
        config["embed_dim"] = shared
        config["vision_cfg"] |= {"width": 4 * image_heads, "head_width": 4}
        config["text_cfg"] |= {"width": 4 * text_heads, "heads": text_heads}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)


def test_the_commands_of_tables_1_and_2_train_and_evaluate(thin_clips, tmp_path, monkeypatch):
    """Two steps of every training; of each model's evaluations one is run, the others' splits are opened."""
    splits = {"refcocog": ("train", "val", "test"), "refcoco": ("train", "val", "testA", "testB")}
    splits["refcoco+"] = splits["refcoco"]
    for name, parts in splits.items():  # an image for each split, the same in all three sets
        refs = [ref(i, {"train": 1, "val": 2}.get(part, 3), part) for i, part in enumerate(parts)]
        write_set(tmp_path / "DATA", name, refs)
    monkeypatch.chdir(tmp_path)
    wanted = {(m, tuple(a)) for m, a in commands() if "--data-root" in a and a[a.index("--data-root") + 1] == "DATA"}
    trained = sorted(a for m, a in wanted if m == "train" and "--stage" in a)
    cells = [evaluate.parse_args(a) for m, a in sorted(wanted) if m == "evaluate"]
    assert len(trained) == 16  # two sizes, three sets and their union, two stages
    assert len({(args.checkpoint, args.dataset, args.split) for args in cells}) == 32  # two sizes, two tables, 8 cells
    for arguments in trained:
        size = "32" if "B" in arguments else "28"
        train.main(train.parse_args([*arguments, "--clip", "random", "--image-size", size, "--steps", "2",
                                     "--batch-size", "2", "--workers", "0", "--device", "cpu"]))
    done = set()
    for args in cells:
        assert len(data.RefCOCO(args.data_root, args.dataset, args.split)) > 0
        assert Path(args.checkpoint).is_dir()
        if args.figures:  # Figure A4's, of two models
            evaluate.main(args)
            assert (Path(args.figures) / "compared.png").exists()
        elif args.checkpoint not in done:
            evaluate.main(args)
            assert json.loads(Path(args.json).read_text())["sentences"] > 0
            done.add(args.checkpoint)
    assert len(done) == 8
