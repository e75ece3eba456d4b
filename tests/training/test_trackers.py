import json

import pytest
from number_training import Smooth, finished_training, logged

from rq_hf.training import JSONLinesTracker


def test_json_lines_tracker_appends_a_line_for_everything_logged(tmp_path):
    for rate in (1, 2):
        tracker = JSONLinesTracker(tmp_path / "log.jsonl")
        tracker.store_init_configuration({"learning_rate": rate})
        tracker.log({"loss": 0.5}, step=rate)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"arguments": {"learning_rate": 1}},
        {"step": 1, "loss": 0.5},
        {"arguments": {"learning_rate": 2}},
        {"step": 2, "loss": 0.5},
    ]


def test_measures_speed_and_utilization(tmp_path):
    finished_training(tmp_path, model=Smooth, peak_teraflops=1e-6)
    forward = 2 * (2 * 4 + 4 * 1)  # two linear layers, one number per row
    for line in logged(tmp_path).values():
        assert line["digits_per_second"] == pytest.approx(3 * line["images_per_second"])
        # The first layer needs no gradient of its input.
        assert line["mfu"] == pytest.approx(line["images_per_second"] * (3 * forward - 2 * 2 * 4) / 1e6)
