import os
import tempfile

# before anything imports triton: its kernels run on the CPU
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads,
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp()  # nor finds what a user has downloaded

from dataclasses import replace  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from miniature.shapes import write_shapes  # noqa: E402
from risclip import CONFIGS, RISCLIP  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small shapes world on disk: 60 scenes, and 4 for each of A.2.1's failures."""
    root = tmp_path_factory.mktemp("world")
    write_shapes(root, 60, seed=7, limits=4)
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two pictures of a photograph's size in RefCOCO's layout, with refs and sentences in all its
    splits."""
    from test_data import box, ref, write_set

    # how many sentences a ref has
    splits = {"train": (2, 3, 2, 2), "val": (2, 2), "testA": (2,), "testB": (2, 2)}
    refs = [(split, sentences) for split, counts in splits.items() for sentences in counts]
    refs = [
        ref(i, 1 + i % 2, split, ("the {} bowl", "fork {}", "left {}")[:n])
        for i, (split, n) in enumerate(refs)
    ]
    boxes = {r["ref_id"]: [box(40 + 30 * r["ref_id"], 60, 160, 200)] for r in refs}
    return write_set(
        tmp_path_factory.mktemp("photos"), "refcoco", refs, boxes, {1: (640, 480), 2: (500, 375)}
    )


@pytest.fixture
def tiny():
    """The miniature, its modules moved away from their initial values so that each of them matters.
    """
    torch.manual_seed(0)
    model = RISCLIP(replace(CONFIGS["tiny"], clip="pretrained"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("clip.") and p.ndim > 0:
                p.add_(0.02 * torch.randn_like(p))
    return model.eval()
