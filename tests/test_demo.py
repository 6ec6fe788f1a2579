"""The story: told to its end, as text and as JSON."""

import itertools
import json

from vsport import demo
from vsport.cli import main
from vsport.connection import LETS_THROUGH, Policy, State


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


# -- a machine is moved ------------------------------------------------------------------------------------------------


def test_of_all_policies_silence_alone_kills_the_agent(capsys):
    """The story of 2011, and what each of its four answers has the new back end told."""
    assert demo.run_moves(as_json=True) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    happenings, outcomes = told[:-5], told[-5:]
    assert all({"seconds", "who", "what"} == thing.keys() for thing in happenings)
    assert [outcome["policy"] for outcome in outcomes] == ["silent", "replay", "backend", "reconnect", "default"]
    assert [outcome["answered"] for outcome in outcomes] == [False, True, True, True, True]
    assert outcomes[0]["told"] == []
    assert outcomes[1]["told"] == ["open"]
    assert outcomes[3]["told"] == outcomes[4]["told"] == ["what it saved", "closed", "open"]


def test_the_moves_end_in_a_table(capsys):
    assert main(["demo", "--migrate"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert any("the agent is dead to it" in line for line in told)
    policies = ["silent", "replay", "backend", "reconnect", "default"]
    assert [line.split()[0] for line in told[-7:-1]] == ["restore=", *policies]
    assert max(map(len, told)) <= 90


def test_moves_that_do_not_go_as_told_are_an_error(capsys, monkeypatch):
    monkeypatch.setitem(LETS_THROUGH, Policy.REPLAY, frozenset())
    assert main(["demo", "--migrate", "--json"]) == 1
    assert "restore=replay" in capsys.readouterr().err
