"""The story: told to its end, as text and as JSON."""

import itertools
import json

from vsport import demo
from vsport.connection import State


def test_the_simulated_story_is_told_to_its_end(capsys):
    assert demo.run(demo.simulated, as_json=False) == 0
    told = capsys.readouterr().out
    assert "the last words arrive" in told
    assert "Who was connected when" in told
    assert "█" in told
    assert max(map(len, told.splitlines())) <= 80


def test_as_json_each_thing_is_an_object_a_line(capsys):
    assert demo.run(demo.simulated, as_json=True) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [thing["who"] for thing in told[:2]] == ["guest", "host"]
    assert all(earlier["seconds"] <= later["seconds"] for earlier, later in itertools.pairwise(told))


def test_the_timeline_shows_who_was_connected_when():
    timeline = demo.Timeline()
    end = 1.0
    timeline.start -= end
    timeline.changes = [(0.25 * end, State.D), (0.5 * end, State.A), (0.75 * end, State.C)]
    guest, host, _scale = (line.split()[-1] for line in timeline.draw().splitlines())
    assert guest == "·" * 15 + "█" * 30 + "·" * 15
    assert host == "·" * 30 + "█" * 30
