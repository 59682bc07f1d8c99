"""Does every picture show the right digit in the right place?"""

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from difflab.metrics import Quality
from difflab.plots import curves, image_grid, quality_curves, save_image_grid, show_images, tile, trajectory
from difflab.quality_table import QualityTable, Row


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def _flat(*values: float, height: int = 2, width: int = 3) -> torch.Tensor:
    """One image of a single grey for each value."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, height, width)


def _greys(figure) -> list[float]:
    """The grey of every axes' image, in order."""
    return [round(float(axis.images[0].get_array().mean()), 4) for axis in figure.axes if axis.images]


# -- tile -------------------------------------------------------------------------------------------------------


def test_tile_lays_images_out_row_by_row_on_white():
    expected = np.ones((7, 9), dtype=np.float32)
    expected[1:3, 1:4] = 0
    expected[1:3, 5:8] = 0.5
    expected[4:6, 1:4] = 0.25  # and the fourth place stays white
    assert np.array_equal(tile(_flat(-1, 0, -0.5), columns=2, gap=1), expected)


def test_tile_keeps_an_image_upright():
    image = torch.tensor([[-1.0, 0.0, 1.0], [0.5, -0.5, -1.0]])[None, None]
    assert np.array_equal(tile(image, 1, gap=0), [[0, 0.5, 1], [0.75, 0.25, 0]])


def test_tile_clips_to_the_range_of_images():
    assert tile(_flat(-3, 3, height=1, width=1), 2, gap=0).tolist() == [[0, 1]]


def test_tile_takes_tensors_with_gradients_and_other_precisions():
    images = _flat(-1, 0).to(torch.bfloat16).requires_grad_()
    assert tile(images, 2, gap=0)[0].tolist() == [0, 0, 0, 0.5, 0.5, 0.5]


# -- figures ----------------------------------------------------------------------------------------------------


def test_image_grid_shows_the_tiles():
    images = _flat(-1, 0, 1)
    (axis,) = image_grid(images, columns=2, title="three").axes
    assert np.array_equal(axis.images[0].get_array(), tile(images, 2))
    assert axis.images[0].get_clim() == (0, 1), "greys must not be stretched"
    assert axis.get_title() == "three"
    (axis,) = image_grid(images).axes
    assert np.array_equal(axis.images[0].get_array(), tile(images, 3)), "no empty columns"


def test_show_images_has_one_axes_per_image_in_order():
    figure = show_images({"a": _flat(-1, -0.5, 0), "b": _flat(0.25, 0.5, 1)}, ["x", "y", "z"], "both")
    assert len(figure.axes) == 6
    assert _greys(figure) == [-1, -0.5, 0, 0.25, 0.5, 1]
    assert [axis.images[0].get_clim() for axis in figure.axes] == [(-1, 1)] * 6
    assert [axis.get_ylabel() for axis in figure.axes] == ["a", "", "", "b", "", ""]
    assert [axis.get_title() for axis in figure.axes] == ["x", "y", "z", "", "", ""]
    assert figure.get_suptitle() == "both"


def test_show_images_takes_rows_of_different_length():
    figure = show_images({"a": _flat(-1), "b": _flat(0, 1)})
    assert [len(axis.images) for axis in figure.axes] == [1, 0, 1, 1]
    assert _greys(figure) == [-1, 0, 1]


def test_trajectory_picks_evenly_from_first_to_last():
    states = [_flat(k / 10, -k / 10) for k in range(11)]
    figure = trajectory(states, count=4, rows=2, title="path")
    assert _greys(figure) == [0, 0.3, 0.7, 1, 0, -0.3, -0.7, -1]
    assert [axis.get_title() for axis in figure.axes[:4]] == ["x_T", "after 3", "after 7", "after 10"]
    assert [axis.get_ylabel() for axis in figure.axes[::4]] == ["sample 1", "sample 2"]


def test_short_trajectory_is_shown_whole():
    figure = trajectory([_flat(k / 2) for k in range(3)], count=10, rows=3)
    assert _greys(figure) == [0, 0.5, 1]


def test_curves_draws_each_line_and_passes_keywords_on():
    figure = curves({"a": ([1, 2, 3], [10, 20, 40]), "b": ([1, 3], [5, 6])}, "steps", "time", "cost", yscale="log")
    (axis,) = figure.axes
    assert [line.get_ydata().tolist() for line in axis.lines] == [[10, 20, 40], [5, 6]]
    assert axis.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == ("steps", "time", "cost")
    assert axis.get_yscale() == "log"
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "b"]
    assert curves({"a": ([1], [2])}, "", "").axes[0].get_legend() is None


def test_save_image_grid_writes_three_screen_pixels_to_a_pixel(tmp_path):
    path, images = tmp_path / "new" / "grid.png", _flat(-1, 0, 1)
    save_image_grid(path, images, columns=2)
    picture = plt.imread(path)[..., 0]
    assert picture.shape == (3 * 10, 3 * 12)
    assert np.allclose(picture[::3, ::3], tile(images, 2), atol=1 / 255)
    assert np.array_equal(picture[1::3, 2::3], picture[::3, ::3])


def test_log_ticks_are_the_measured_values():
    figure = curves({"a": ([5, 10, 50], [3, 2, 1])}, "steps", "distance", xscale="log")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["5", "10", "50"]


def test_quality_curves_draw_every_kind_of_row_and_the_floor():
    def row(method, calls, eta=0.0, schedule="uniform"):
        return Row(method, calls, eta, schedule, (Quality(9, 100.0 / calls, 0.9, 0.9, [0.1] * 10, 0.7),), 1.0)

    rows = [row("ddpm", 1000), row("ddim", 10), row("ddim", 50), row("ddim", 50, 1.0), row("ddim", 50, 0.5)]
    table = QualityTable(9, "float32", "cpu", 16, (*rows, row("ddim", 20, schedule="quadratic")), row("real", 1))
    figure = quality_curves(table, {10: 0.1, 1000: 9.0})
    left, middle, right = figure.axes
    labels = ["DDPM", "DDIM, η = 0", "DDIM, η = 0, quadratic", "DDIM, η = 0.5", "DDIM, η = 1"]
    assert [text.get_text() for text in left.get_legend().get_texts()] == labels
    assert [len(line.get_xdata()) for line in left.lines] == [1, 2, 1, 1, 1, 2] and len(middle.lines) == 6
    assert list(right.lines[0].get_ydata()) == [0.1, 9.0] and "n = 9" in left.get_ylabel()
