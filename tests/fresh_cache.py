"""A cache folder for a test, with links to what takes seconds to make: kernels and the choice of matmul backend."""

from contextlib import suppress
from pathlib import Path

import torch

from sasrec_lab.files import user_cache
from sasrec_lab.ops import backend
from sasrec_lab.ops import library as kernels

SHARED = user_cache()  # read here, before a test sets XDG_CACHE_HOME


def fill_shared_cache() -> None:
    """Compile the kernels, and choose how one thread multiplies matrices, if this machine has not done so yet."""
    kernels.library()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with backend.fastest_matmul(torch.device("cpu")):
        pass  # choosing is all
    torch.set_num_threads(threads)


def cache_in(folder: Path) -> str:
    """Make a cache in this folder and return its parent, the value of XDG_CACHE_HOME."""
    own = folder / "cache" / "sasrec_lab"
    own.mkdir(parents=True, exist_ok=True)
    for made in [SHARED / "kernels", *SHARED.glob("matmul*.txt")]:
        if made.exists():
            with suppress(FileExistsError):  # from another process of the test, or an earlier command
                (own / made.name).symlink_to(made)
    return str(folder / "cache")
