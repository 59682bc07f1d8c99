"""Does a report get what it needs from the machine, and nothing that only this machine has?"""

import base64

import matplotlib.pyplot as plt
import torch

from difflab import report


def test_environment_is_plain_text_without_paths():
    found = report.environment("cpu")
    assert found["PyTorch"] == torch.__version__ and "(cpu)" in found["device"]
    assert all(isinstance(value, str) and value for value in found.values())
    assert not any("/home" in value or "\n" in value for value in found.values())


def test_data_uri_holds_the_picture():
    figure, _ = plt.subplots()
    kind, data = report.data_uri(figure).split(",")
    plt.close(figure)
    assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")


def test_plain_text_leaves_the_pictures_out(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    report.show_report("## Results\n\n![time](data:image/png;base64,AAAA)")
    assert shown[0]["text/markdown"].endswith("AAAA)") and shown[0]["text/plain"].endswith("![time](picture)")
