"""What README and docs say exists, parses and trains: names, links, commands, Tables 1 and 2."""

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

ROOT = Path(__file__).parent.parent
PAGES = {page: page.read_text() for page in
         [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("findings/*.md")]}
README, PAPER = PAGES[ROOT / "README.md"], PAGES[ROOT / "docs/paper.md"]
INDEX = [row.split("|")[1:3] for row in PAPER.split("## Index")[1].split("\n## ")[0].splitlines()
         if row.startswith("| ")][1:]
NAMES = [name for _, here in INDEX for name in re.findall(r"`([a-z]+\.[^`]+)`", here)]
TOP = ("data", "evaluate", "predict", "risclip", "train")
TORCHRUN = r"torchrun --nproc-per-node \d+"
ROOMS = ("experiments", "kernels", "miniature", "support")


def commands(text):
    """Every `python FILE.py ...` and `python -m MODULE ...` of a page's blocks -> (module, flags).

    Shell loops are unrolled.
    """
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M):
        loops = []
        for line in block.splitlines():
            loops += re.findall(r"for (\w+) in ([^;]+); do", line)
            if line.strip() == "done":
                loops.pop()
            command = re.match(rf"\s*(?:python|{TORCHRUN}) (?:-m )?([\w.]+)(.*)", line)
            if not command or command[1] == "venv":
                continue
            for values in itertools.product(*(words.split() for _, words in loops)):
                flags = command[2]
                for (name, _), value in zip(loops, values):
                    flags = flags.replace(f"${name}", value)
                assert "$" not in flags, line
                found.append((command[1].removesuffix(".py"), shlex.split(flags, comments=True)))
    return found


ALL = [command for text in PAGES.values() for command in commands(text)]


def module_of(name):
    """`support.figures.extremes` -> the module support.figures, ["extremes"]."""
    first, *rest = name.split(".")
    assert first in TOP + ROOMS, name
    if first in TOP or not (ROOT / first / f"{rest[0]}.py").exists():  # kernels.adapter_reference
        return importlib.import_module(first), rest
    return importlib.import_module(f"{first}.{rest[0]}"), rest[1:]


def check_name(name, things):
    """`module.Class.attribute` exists; attributes are those of the class or of one of `things`."""
    place, rest = module_of(name)
    for part in rest:
        if not hasattr(place, part):  # an attribute of instances, or a field without a default
            place = next((t for t in things if type(t) is place), place)
        assert hasattr(place, part), f"docs/paper.md names {name}, which does not exist"
        place = getattr(place, part)


def test_every_name_in_the_index_exists(tiny, capsys):
    tiny.add_decoder()
    things = [*tiny.modules(), tiny.config]
    assert len(NAMES) > 60
    for name in NAMES:
        if command := re.fullmatch(r"([\w.]+?)(?:\.py)? (--[\w-]+)", name):
            with pytest.raises(SystemExit):
                importlib.import_module(command[1]).parse_args(["--help"])
            assert re.search(rf"{command[2]}\b", capsys.readouterr().out), name
        else:
            check_name(name, things)
    with pytest.raises(AssertionError, match="does not exist"):
        check_name("risclip.CFE.t2v", things)


def test_the_index_misses_no_part_of_the_paper():
    parts = " ".join(paper for paper, _ in INDEX)
    for part in ("Sec. 1-2", *(f"Sec. 3.{i}" for i in range(1, 6)),
                 *(f"Sec. 4.{i}" for i in range(1, 6)), "A.1,", "A.2.1", "A.2.2",
                 "Eq. 1", "Eq. 2", "Eq. 3", *(f"Table {i}" for i in (1, 2, 3, 4, 5, "A1")),
                 *(f"Figure {i}" for i in (1, 2, 3, "A3", "A4")), "Figures A1, A2"):
        assert part in parts, part


def test_every_command_parses():
    assert {module for module, _ in ALL} >= {"train", "predict", "evaluate", "data",
                                             "experiments.ablate", "experiments.bench_model"}
    for module, flags in ALL:
        importlib.import_module(module).parse_args(flags)
    table_5 = {tuple(change) for _, change, _ in ablate.table_rows("5", "B")}
    assert table_5 == {(), ("adapter_layers",), ("cfe_layers",), ("ske_layers",)}


def test_the_first_prediction_finds_its_files():
    flags = next(flags for module, flags in commands(README) if module == "predict")
    for path in flags[:2]:
        assert (ROOT / path).exists(), path


def test_the_first_screen_has_the_five_commands():
    screen = README.split("\n## ")[0].splitlines()
    for command in ("pip install -r requirements.txt", "python predict.py", "python train.py",
                    "python train.py --backbone B --stage 1", "pytest"):
        assert any(line.startswith(command) for line in screen), command


def anchor(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_link_leads_somewhere():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("http"):
                continue
            name, _, place = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), f"{page.name}: {link}"
            if place:
                headings = re.findall(r"^#+ (.*)", target.read_text(), re.M)
                assert place in map(anchor, headings), f"{page.name}: {link}"


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 165


@pytest.mark.parametrize("room", [".", *ROOMS, "tests"])
def test_lines_have_at_most_100_columns(room):
    sources = [*(ROOT / room).glob("*.py"), *(ROOT / room).glob("README.md")]
    wide = [f"{path.relative_to(ROOT)}:{number}" for path in sources
            for number, line in enumerate(path.read_text().splitlines(), 1)
            if len(line) > 100 and not line.startswith("|") and "://" not in line]
    assert not wide, f"{len(wide)} wider lines, from {wide[0]} on"


@pytest.fixture
def thin_clips(monkeypatch):
    """B's and L's towers, as deep as they are and a tenth as wide: heads of 4."""
    for name, image_heads, text_heads, shared in (("ViT-B-16-plus-240", 14, 10, 80),
                                                  ("ViT-L-14-336", 16, 12, 48)):
        config = open_clip.get_model_config(name)
        config["embed_dim"] = shared
        config["vision_cfg"] |= {"width": 4 * image_heads, "head_width": 4}
        config["text_cfg"] |= {"width": 4 * text_heads, "heads": text_heads}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)


def test_the_commands_of_tables_1_and_2_train_and_evaluate(thin_clips, tmp_path, monkeypatch):
    """Two steps of every training. Of each model's evaluations one is run, the others' splits are
    opened."""
    splits = {"refcocog": ("train", "val", "test"), "refcoco": ("train", "val", "testA", "testB")}
    splits["refcoco+"] = splits["refcoco"]
    for name, parts in splits.items():  # an image for each split, the same in all three sets
        refs = [ref(i, {"train": 1, "val": 2}.get(part, 3), part) for i, part in enumerate(parts)]
        write_set(tmp_path / "DATA", name, refs)
    monkeypatch.chdir(tmp_path)
    wanted = {(m, tuple(a)) for m, a in commands(PAPER)
              if "--data-root" in a and a[a.index("--data-root") + 1] == "DATA"}
    trained = sorted(a for m, a in wanted if m == "train" and "--stage" in a)
    cells = [evaluate.parse_args(a) for m, a in sorted(wanted) if m == "evaluate"]
    assert len(trained) == 16  # two sizes, three sets and their union, two stages
    # Two sizes, two tables, 8 cells.
    assert len({(args.checkpoint, args.dataset, args.split) for args in cells}) == 32
    for arguments in trained:
        size = "32" if "B" in arguments else "28"
        train.main(train.parse_args([*arguments, "--clip", "random", "--image-size", size,
                                     "--steps", "2", "--batch-size", "2", "--workers", "0",
                                     "--device", "cpu"]))
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
