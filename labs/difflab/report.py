"""What a written report needs from the machine: what it ran on, pictures as text, and a place to be read."""

from __future__ import annotations

import base64
import datetime
import io
import platform
import re
from pathlib import Path

import torch
from matplotlib.figure import Figure

__all__ = ["data_uri", "environment", "show_report"]


def environment(device: str | torch.device = "cpu") -> dict[str, str]:
    """What a measurement was made on; names and versions only, no paths."""
    device = torch.device(device)
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {
        "device": f"{accelerator} ({device.type})" if accelerator else f"{_processor()} ({device.type})",
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "operating system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def data_uri(figure: Figure) -> str:
    """A figure as the address of a PNG that holds the picture itself: nothing has to be loaded from elsewhere."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def show_report(markdown: str) -> None:
    """Display a Markdown report below the cell; where only plain text is kept, without the pictures."""
    from IPython.display import display

    plain = re.sub(r"\(data:image/[^)]*\)", "(picture)", markdown)
    display({"text/markdown": markdown, "text/plain": plain}, raw=True)
