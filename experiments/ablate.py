"""Tables 3, 4 and 5 (Sec. 4.4), Figure 1 from Table 3's models, and what the paper leaves open.

    python -m experiments.ablate --table 3                the miniature, on the shapes data set
    python -m experiments.ablate --table 4 --seeds 3 --markdown --json table4.json
    python -m experiments.ablate --table errata           our readings of the paper against others
    python -m experiments.ablate --table 5 --backbone B --dataset refcocog --data-root DATA
                                                          240 px and 50 epochs, as in Sec. 4.4

A cell is one model: both stages of train.py with one change and one seed, evaluated on the test
split and kept in OUT/CELL-SEED, with cell.json once it is done. A killed ablation continues where
it was, and tables share cells. A table varies --modules, --stage and --seed; every other flag of
train.py is taken as it is. With several seeds the table has mean +- sample standard deviation: a
difference smaller than twice that says nothing.

The miniature has half of B's image layers, so its Table 5 has half of the paper's counts, beside
the paper's own rows. Its text tower has 3 layers: from N = 3 on all of them have Adapters, and
Table 5a varies those of the image. Its whole model (*) has 2 SKE, a third of B's 6 and not half:
in Table 5c it stands beside the paper's N = 4.
"""

import argparse
import json
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn

import data
import train
from evaluate import MASK, evaluate, evolution
from experiments.bench_model import count_flops
from experiments.fusions import FUSIONS
from miniature.clip import TINY_CLIP
from risclip import CONFIGS, MHCA, RISCLIP
from support.checkpoint import is_stored
from support.files import DataError, check_writable, read_json, run, too_small, write_text
from support.pictures import save_picture
from support.runs import alone
from support.tables import table

# FLOPs are counted on a forward pass with this sentence.
SENTENCE = "the large red circle to the left of the small blue square"
# The paper's mIoU and oIoU of the whole model, RISCLIP-B on RefCOCOg's test split.
FULL = (62.64, 62.02)
# A row: its name, the change to Config, the paper's mIoU and oIoU; Table 5 has P@0.5, 0.7 and 0.9
# before them.
TABLE_3 = [
    ("frozen CLIP, decoder", {"modules": ()}, (23.86, 33.13)),
    ("+ Adapters", {"modules": ("adapter",)}, (48.29, 50.98)),
    ("+ CFE", {"modules": ("adapter", "cfe")}, (60.58, 58.39)),
    ("+ SKE", {}, FULL),
    ("all, CLIP fine-tuned", {"fine_tuned": True}, (57.88, 55.75)),
]
TABLE_4 = [
    ("MHCA (ours)", {}, FULL),
    ("MHSA on Concat", {"fusion": "mhsa"}, (62.63, 61.65)),
    ("MHCA on Concat", {"fusion": "mhca-concat"}, (62.04, 60.87)),
    ("PWAM, text to image", {"fusion": "pwam"}, (60.58, 59.29)),
    ("PWAM, both ways", {"fusion": "pwam-2"}, (61.01, 59.39)),
    ("SDF, text to image", {"fusion": "sdf"}, (59.8, 57.81)),
    ("SDF, both ways", {"fusion": "sdf-2"}, (60.28, 58.87)),
]
TABLE_5 = {
    "adapter_layers": {3: (71.81, 55.3, 11.29, 61.40, 60.84),
                       6: (72.73, 56.53, 11.87, 62.15, 61.33),
                       9: (72.50, 57.44, 14.03, 62.31, 60.68), 12: (73.19, 57.68, 14.21, *FULL)},
    "cfe_layers": {2: (72.56, 57.05, 14.16, 62.33, 61.34), 4: (72.33, 57.31, 13.89, 62.41, 61.47),
                   6: (73.19, 57.68, 14.21, *FULL)},
    "ske_layers": {2: (72.17, 56.72, 14.23, 62.30, 61.56), 4: (72.73, 57.68, 14.57, 62.79, 61.95),
                   6: (73.19, 57.68, 14.21, *FULL)},
}
# What the paper says in passing or not at all, one reading against another: a change to Config, or
# to how a model learns (train_cell). The miniature's CLIP was made with the value path, so it
# cannot judge the plain last layer.
ERRATA = [
    ("as we read the paper", {}, ()),
    ("frozen map: value path (3.1)", {"modules": ()}, ()),
    ("frozen map: plain last layer", {"modules": (), "value_path": False}, ()),
    ("raw cosine: temperature 1, threshold 0, fixed",
     {"map_temperature": 1.0, "map_threshold": 0.0, "fixed": "map"}, ()),
    ("scalers, attention's temperatures fixed (paper: up to 0.5 less)", {"fixed": "scalers"}, ()),
    ("no layer starts at zero (paper: about 0.6 less)", {"zero_start": False}, ()),
    ("end to end: both losses, no stages (3.5)", {"end_to_end": True}, ()),
    ("focal loss: alpha 0.5, gamma 0", {"alpha": 0.5, "gamma": 0.0}, ()),
    ("focal loss: alpha 0.25, gamma 2", {"alpha": 0.25, "gamma": 2.0}, ()),
]
FIXED = {"map": ("map_log_temperature", "map_threshold"),  # ends of parameters' names
         "scalers": (".scale", ".scale_mhca", ".scale_mhsa", ".scale_mlp", ".text_scale",
                     ".image_scale", ".temperature")}
TITLES = {"adapter_layers": "Adapters, last N layers", "cfe_layers": "CFE, last N layers",
          "ske_layers": "SKE, N"}


def table_rows(table, backbone):
    """-> [(row name, change to Config, the paper's numbers)]."""
    if table != "5":
        return {"3": TABLE_3, "4": TABLE_4, "errata": ERRATA}[table]
    rows = []
    for field, papers in TABLE_5.items():
        half = 2 if backbone == "tiny" else 1
        own = getattr(CONFIGS[backbone], field) or max(papers) // half  # None: all layers
        for theirs, numbers in papers.items():
            n = theirs // half
            notes = [f"paper: {theirs}"] if n != theirs else []
            all_text = backbone == "tiny" and n > TINY_CLIP["text_cfg"]["layers"]
            if field == "adapter_layers" and all_text:
                notes.append("all 3 text layers")
            name = f"{TITLES[field]} = {n}{'*' if n == own else ''}"
            name += f" ({', '.join(notes)})" if notes else ""
            rows.append((name, {} if n == own else {field: n}, numbers))
    return rows


def cell_name(change):
    """{"modules": ("adapter", "cfe")} -> "modules-adapter+cfe"; the unchanged model is "full"."""
    def word(value):
        return "+".join(value) or "none" if isinstance(value, tuple) else value
    return "_".join(f"{k}-{word(v)}" for k, v in change.items()) or "full"


# ---- A cell ------------------------------------------------------------------------------------

def costs(model):
    """Parameters that a run trains (both stages), and the FLOPs of a forward pass with one image
    and one sentence. A parameter that no gradient reaches is not trained: where a fusion shows the
    text no image, CFE's way back to the text is idle."""
    size, config = model.config.image_size, model.config
    model = model.cpu().eval().requires_grad_(True)
    images, tokens = torch.zeros(1, 3, size, size), model.tokenize([SENTENCE])
    flops = count_flops(model, images, tokens)
    model.zero_grad()
    sum(y.sum() for y in model(images, tokens).values()).backward()
    trained = sum(p.numel() for name, p in model.named_parameters() if is_stored(name, config)
                  and (p.grad is not None or name.startswith("clip.")))
    return {"trained_parameters": trained, "flops": flops}


def run_cell(args, change, seed, learn, held_out):
    """Trains and evaluates one cell, or reads what it gave -> its result. Raises DataError if the
    cell that is there was run with other settings."""
    of_config = {k: v for k, v in change.items() if hasattr(CONFIGS[args.backbone], k)}
    fuse = FUSIONS[change["fusion"]] if "fusion" in change else MHCA
    out = args.out / f"{cell_name(change)}-{seed}"
    run = argparse.Namespace(**vars(args.run) | dict(out=out, seed=seed, fuse=fuse,
                                                     changes=of_config))
    asked = {"change": change, "seed": seed, "dataset": run.dataset, "split": args.split,
             "limit": args.limit, "image_size": run.image_size, "clip": run.clip,
             "accumulate": run.accumulate, "refs": len(learn.refs),
             "stage 1": train.stage_settings(run, 1), "stage 2": train.stage_settings(run, 2)}
    asked, file = json.loads(json.dumps(asked)), run.out / "cell.json"
    if file.exists():
        saved = read_json(file)
        before = saved.get("asked", {}) if isinstance(saved, dict) else {}
        if changed := [f"{k} was {before.get(k)}, now {v}" for k, v in asked.items()
                       if before.get(k) != v]:
            raise DataError(f"{file} is of another run ({changed[0]}): give another --out")
        return saved
    run.out.mkdir(parents=True, exist_ok=True)
    train.check_run(run, (1, 2))
    model = train_cell(run, change, learn)
    result = evaluate(model, held_out, workers=run.workers, limit=args.limit)[MASK]
    result |= costs(model) | {"asked": asked}
    write_text(file, json.dumps(result, indent=1) + "\n")
    return result


def train_cell(run, change, learn):
    """Both stages, with what a row of ERRATA changes of how a model learns -> the model."""
    losses = [partial(loss, **{k: change[k] for k in ("alpha", "gamma") if k in change})
              for loss in (train.locator_loss, train.refiner_loss)]

    def prepare(model):
        for name, module in model.named_modules() if not change.get("zero_start", True) else ():
            ours = isinstance(module, nn.Linear) and not name.startswith("clip.")
            if ours and not module.weight.any():
                module.reset_parameters()  # a checkpoint's are no longer zero and stay
        for name, p in model.named_parameters():
            if name.endswith(FIXED.get(change.get("fixed"), ())):
                p.requires_grad_(False)

    def all_learn(model):
        model.requires_grad_(True).clip.requires_grad_(False)

    def both_losses(model, batch):
        # Once: batch norm counts its passes.
        output = model(batch["images"], batch["tokens"], batch["image_index"])
        return sum(loss(lambda *_: output, batch) for loss in losses)
    # A stage 2 that nothing came before, with as many sentences as stage 1.
    if change.get("end_to_end"):
        first = train.stage_settings(run, 1)
        kept = {k: first[k] for k in ("steps", "epochs", "lr", "batch_size")}
        single = argparse.Namespace(**vars(run) | {"stage": "2"} | kept)
        return train.run_stage(single, 2, learn, all_learn, both_losses)[0]
    train.run_stage(run, 1, learn, prepare, losses[0])
    return train.run_stage(run, 2, learn, None, losses[1])[0]


# ---- A table -----------------------------------------------------------------------------------

def mean_and_spread(values):
    """Two decimals, and the sample standard deviation where there is more than one value."""
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def row_of(name, cells, paper, table):
    """A row's columns, from the results of its seeds and the paper's numbers."""
    columns = [*(("P@0.5", "P@0.7", "P@0.9") if table == "5" else ()), "mIoU", "oIoU"]
    row = {"": name} | {c: mean_and_spread([cell[c] for cell in cells]) for c in columns}
    row |= {f"mIoU {kind}": mean_and_spread([cell["kinds"][kind]["mIoU"] for cell in cells])
            for kind in cells[0].get("kinds", ())}
    row |= {"trained, M": f"{cells[0]['trained_parameters'] / 1e6:.2f}",
            "GFLOPs": f"{cells[0]['flops'] / 1e9:.2f}"}
    if paper:
        row["paper " + " / ".join(columns)] = " / ".join(f"{p:.2f}" for p in paper)
    return row


def figure_1(args, held_out):
    """OUT/figure1.png: maps of Table 3's models of seed 0, each trained with the modules it has,
    and the last one's mask."""
    models = {name: RISCLIP.from_pretrained(args.out / f"{cell_name(change)}-0").to(args.run.device)
              for name, change, _ in TABLE_3[:4]}
    save_picture(evolution(models, held_out), args.out / "figure1.png")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="more flags: train.py's (python train.py --help)",
                                     allow_abbrev=False)
    parser.add_argument("--table", choices=("3", "4", "5", "errata"), required=True)
    parser.add_argument("--backbone", choices=("tiny", "B"), default="tiny")
    parser.add_argument("--seeds", type=int, default=1, metavar="N",
                        help="0 ... N - 1 (default: 1)")
    parser.add_argument("--split", help="evaluated on (default: test; of refcoco, refcoco+ and "
                        "your own JSON, val)")
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate the first N images only")
    parser.add_argument("--out", type=Path, help="the cells (default: runs/ablate-BACKBONE)")
    parser.add_argument("--json", metavar="F", help="also write every cell's figures there")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    args, rest = parser.parse_known_args(argv)
    args.out = args.out or Path("runs") / f"ablate-{args.backbone}"
    args.run = train.parse_args(["--backbone", args.backbone, "--resume", *rest])
    if (args.run.stage, args.run.modules, args.run.seed) != ("all", None, 0):
        parser.error("--stage, --modules and --seed are what a table varies: leave them out")
    if wrong := too_small(args, seeds=1, limit=1):
        parser.error(wrong)
    if args.backbone == "B":  # Sec. 4.4
        args.run.image_size = args.run.image_size or 240
        args.run.epochs = args.run.epochs or 50
    args.split = args.split or ("test" if args.run.dataset in ("shapes", "refcocog") else "val")
    return args


def main(args):
    if args.json:
        check_writable(args.json)
    train.check_run(argparse.Namespace(**vars(args.run) | {"out": args.out}), (1, 2))
    check_writable(args.out / "cell.json")
    with alone(args.out):
        return run_table(args)


def run_table(args):
    """Every cell of the table, and what is printed and drawn of them."""
    train.have_data(args.run)
    learn, held_out = (data.RefCOCO(args.run.data_root, args.run.dataset, split)
                       for split in ("train", args.split))
    rows, results = table_rows(args.table, args.backbone), {}
    for i, (name, change, paper) in enumerate(rows):
        cells = []
        for seed in range(args.seeds):
            print(f"row {i + 1} of {len(rows)}, seed {seed}: {name}", flush=True)
            cells.append(run_cell(args, change, seed, learn, held_out))
        results[name] = {"paper": paper, "seeds": cells}
    print(f"\nTable {args.table}, {args.backbone} on {args.run.dataset} {args.split}, "
          f"{args.seeds} seed(s); the paper's are RISCLIP-B's on RefCOCOg's test split\n")
    print(table([row_of(name, row["seeds"], row["paper"], args.table)
                 for name, row in results.items()], args.markdown))
    written = [args.out]
    if args.table == "3":
        figure_1(args, held_out)
        written.append(args.out / "figure1.png")
    if args.json:
        write_text(args.json, json.dumps({"table": args.table, "rows": results}, indent=1) + "\n")
        written.append(args.json)
    print(f"\nwrote {', '.join(map(str, written))}")


if __name__ == "__main__":
    sys.exit(run(main, parse_args()))
