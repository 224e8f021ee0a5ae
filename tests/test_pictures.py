"""The pictures of a run."""

from dact.tuning.pictures import dials_picture


def test_the_picture_of_the_dials_shows_the_baseline_and_the_setting_of_the_run():
    def curve(name, settings):
        return [
            {
                name: setting,
                "accuracy": 0.8 - 0.02 * step,
                "mean_exit_layer": 4.0 - step,
                "agreement": 1 - 0.05 * step,
            }
            for step, setting in enumerate(settings)
        ]

    figure = dials_picture(
        curve("tolerance", (0, 0.5)), curve("margin", (1.0, 0.8, 0.5)), 4, (2.5, 0.77), 0.79
    )
    upper, lower = figure.axes
    lines = {line.get_label(): line for line in upper.get_lines()}
    assert set(lines["baseline"].get_ydata()) == {79.0}
    assert (*lines["as set"].get_xdata(), *lines["as set"].get_ydata()) == (2.5, 77.0)
    assert list(lines["halting_margin"].get_xdata()) == [4.0, 3.0, 2.0]
    assert [text.get_text() for text in lower.texts] == ["0", "0.5", "1", "0.8", "0.5"]
