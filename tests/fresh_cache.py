"""A cache folder of a test's own, with what takes seconds already in it: kernels, and the choice of matrix products."""

from pathlib import Path

import torch

from sasrec_lab.files import user_cache
from sasrec_lab.ops import backend
from sasrec_lab.ops import library as kernels

SHARED = user_cache()  # as the tests themselves use it


def fill_shared_cache() -> None:
    """Compile the kernels, and choose how one thread multiplies matrices, if this machine has not done so yet."""
    kernels.library()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with backend.fastest_matmul(torch.device("cpu")):
        torch.set_num_threads(threads)


def cache_in(folder: Path) -> str:
    """Make a cache in this folder and return its parent, the value of XDG_CACHE_HOME."""
    own = folder / "cache" / "sasrec_lab"
    own.mkdir(parents=True, exist_ok=True)
    for made in [SHARED / "kernels", *SHARED.glob("matmul*.txt")]:
        if made.exists() and not (own / made.name).is_symlink():
            (own / made.name).symlink_to(made)
    return str(folder / "cache")
