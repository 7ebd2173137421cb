"""Machine code of our own Triton kernels in artifacts, so that what packages call by name need not be compiled either.

Which kernels a program launches, with which constants, is decided where it runs: so a session rehearses prompts and
steps of usual sizes, and what they launch is written. What no rehearsal launched is compiled when it is first met.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skipstone.runtime.artifact.store import Store

if TYPE_CHECKING:
    from skipstone.kernels.binaries import Binary


def launched(rehearse: Callable[[], Any], device: torch.device) -> list[Binary]:
    """The kernels that are launched on a device while something runs; elsewhere than on CUDA devices there are none."""
    if device.type != "cuda":
        return []
    from skipstone.kernels.binaries import binaries, recorded

    with recorded() as compiled:
        rehearse()
    torch.cuda.synchronize(device)
    return binaries(compiled)


def write(found: Sequence[Binary], folder: Path) -> list[dict[str, str]]:
    """Write kernels, two files each.

    Returns:
        what to save of them, as plain data.
    """
    listed = []
    for number, kernel in enumerate(found):
        entry = {"hash": kernel.hash, "name": kernel.name}
        entry |= {"code": f"kernel-{number}.cubin", "about": f"kernel-{number}.json"}
        (folder / entry["code"]).write_bytes(kernel.code)
        (folder / entry["about"]).write_bytes(kernel.about)
        listed.append(entry)
    return listed


def restore(listed: Sequence[dict[str, str]], store: Store) -> None:
    """Put the kernels where Triton looks for them, with the consent of the user.

    Args:
        listed: what `write` returned.
        store: of its files.
    """
    if not listed:
        return
    from skipstone.kernels.binaries import Binary, restore

    found = [
        Binary(each["hash"], each["name"], *(store.path(each[file]).read_bytes() for file in ("code", "about")))
        for each in listed
    ]
    for binary in found:
        restore(binary)
