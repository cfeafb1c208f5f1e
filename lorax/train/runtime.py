"""Settings of the process that make XLA on CPU faster. The command line applies them; the library never does.

Two things:

- Compiled programs are kept in the user's cache folder: the second start of the same run skips the compiler.
- On Linux, glibc is asked for huge pages. A step allocates gigabytes of temporaries that are mapped and
  unmapped each time; with 4 KiB pages the kernel spends a part of the step on page faults. The setting is
  read when a process starts, so the process replaces itself once, before anything heavy is imported.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb=1"
MARK = "LORAX_RUNTIME"


def huge_pages() -> None:
    """Restart this process with huge pages for malloc, if that can help and has not been done.

    Nothing happens outside Linux with glibc, when the user set GLIBC_TUNABLES, when the kernel has huge pages
    off, or when the process was not started as a plain script or module.
    """
    if os.environ.get(MARK) or "GLIBC_TUNABLES" in os.environ or not _kernel_allows():
        return
    if not sys.orig_argv or not sys.executable:
        return
    os.environ[MARK] = "1"
    os.environ["GLIBC_TUNABLES"] = TUNABLE
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_compiled_programs() -> None:
    """Keep compiled programs in lorax's cache folder, unless the user chose a place for them."""
    import jax

    from lorax.models.resolve import cache_dir

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    # A cache that cannot be written (a full disk, a read-only home) costs time and nothing else.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")


def _kernel_allows() -> bool:
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False
    return "[never]" not in modes
