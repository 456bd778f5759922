import os
import tempfile

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: its kernels run on the CPU
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test downloads,
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp()  # nor finds what a user has downloaded

from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from risclip import CONFIGS, RISCLIP  # noqa: E402
from shapes import write_shapes  # noqa: E402


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small shapes world on disk: 60 scenes, and 4 for each of A.2.1's failures."""
    root = tmp_path_factory.mktemp("world")
    write_shapes(root, 60, seed=7, limits=4)
    return root


@pytest.fixture(scope="session")
def photos():
    """Two real photographs in RefCOCO's layout, where they are at hand (RISCLIP_PHOTOS or ../shared/photos)."""
    root = Path(os.environ.get("RISCLIP_PHOTOS", Path(__file__).parent.parent.parent / "shared" / "photos"))
    if not (root / "refcoco").is_dir():
        pytest.skip(f"no photographs in RefCOCO's layout at {root}: set RISCLIP_PHOTOS")
    return root


@pytest.fixture
def tiny():
    """The miniature, its modules moved away from their initial values so that each of them matters."""
    torch.manual_seed(0)
    model = RISCLIP(replace(CONFIGS["tiny"], clip="pretrained"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.startswith("clip.") and p.ndim > 0:
                p.add_(0.02 * torch.randn_like(p))
    return model.eval()
