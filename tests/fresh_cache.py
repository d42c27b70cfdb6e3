"""A cache folder of a test's own, in which the kernels are compiled already: that takes seconds."""

from pathlib import Path

from sasrec_lab.files import user_cache
from sasrec_lab.ops import library as kernels

COMPILED = user_cache() / "kernels"  # as the tests themselves use them


def cache_in(folder: Path) -> str:
    own = folder / "cache" / "sasrec_lab"
    own.mkdir(parents=True, exist_ok=True)
    if kernels.library() is not None and not (own / "kernels").exists():
        (own / "kernels").symlink_to(COMPILED)
    return str(folder / "cache")
