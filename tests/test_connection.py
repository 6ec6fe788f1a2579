"""The connection table: complete, closed, and true to its own rules on every path."""

import itertools

import pytest

from vsport.connection import LETS_THROUGH, TABLE, Cause, Effect, Policy, Refused, State, Transition

CAUSES = list(Cause)
MOVES = {Cause.RESTORE, Cause.HANDOVER}


def bits(state):
    return state.host_connected, state.device_ready, state.guest_connected


def expected_bits(state, cause):
    """The reference model: what each cause does to the three bits, said without a table."""
    host, ready, guest = bits(state)
    match cause:
        case Cause.HOST_CONNECT:
            host = True
        case Cause.HOST_DISCONNECT:
            host = False
        case Cause.PORT_READY:
            ready = True
        case Cause.GUEST_OPEN:
            guest = guest or ready
        case Cause.GUEST_CLOSE:
            guest = False
        case Cause.RESET | Cause.UNPLUG:
            ready = guest = False
    return host, ready, guest


def step(state, cause):
    row = TABLE[state, cause]
    return (state, ()) if isinstance(row, Refused) else row


def test_every_pair_of_state_and_cause_is_listed():
    assert set(TABLE) == set(itertools.product(State, Cause))


@pytest.mark.parametrize(("state", "cause"), list(itertools.product(State, Cause)))
def test_each_pair_moves_the_bits_as_the_model_says(state, cause):
    after, _effects = step(state, cause)
    assert bits(after) == expected_bits(state, cause)


def test_open_is_a_level_so_repeats_change_nothing():
    """R-CON-39."""
    for state, cause in itertools.product(State, [Cause.GUEST_OPEN, Cause.GUEST_CLOSE, Cause.HOST_CONNECT]):
        once, _ = step(state, cause)
        assert step(once, cause) in [(once, ()), Transition(once)]


def test_a_driver_that_is_not_ready_cannot_open_or_close():
    """R-CON-31."""
    for state in (State.B_UNREADY, State.C_UNREADY):
        for cause in (Cause.GUEST_OPEN, Cause.GUEST_CLOSE):
            row = TABLE[state, cause]
            assert isinstance(row, Refused)
            assert row.rule == "R-CON-31"


def test_nothing_is_said_to_a_driver_that_is_not_ready():
    """R-CON-31: whatever makes the port unready, or leaves it so, sends no message about it."""
    told = {Effect.ANNOUNCE, Effect.TELL_GUEST_OPEN, Effect.TELL_GUEST_CLOSED}
    for (state, cause), row in TABLE.items():
        if isinstance(row, Transition) and not row.state.device_ready:
            assert not told & set(row.effects), (state, cause)


@pytest.mark.parametrize("depth", range(1, 6))
def test_on_every_path_both_sides_know_the_truth(depth):
    """Walks every path of ``depth`` causes; what each side was told last is what is so now."""
    for path in itertools.product(CAUSES, repeat=depth):
        state, host_as_told, guest_as_told = State.B_UNREADY, False, False
        for cause in path:
            before = state
            state, effects = step(state, cause)
            if cause in MOVES:
                guest_as_told = None  # the back end was made a moment ago
            if not state.device_ready or not before.device_ready:
                host_as_told = False  # a driver that begins anew knows of no host
            for effect in effects:
                if effect in (Effect.TELL_GUEST_OPEN, Effect.TELL_GUEST_CLOSED):
                    host_as_told = effect is Effect.TELL_GUEST_OPEN
                if effect in (Effect.TELL_BACK_END_OPEN, Effect.TELL_BACK_END_CLOSED):
                    told = effect is Effect.TELL_BACK_END_OPEN
                    assert told is not guest_as_told, f"told twice on {path}"
                    guest_as_told = told
            if state.device_ready:
                assert host_as_told is state.host_connected, path
            assert guest_as_told is state.guest_connected, path


@pytest.mark.parametrize(
    ("policy", "told_if_open", "told_if_closed"),
    [
        (Policy.SILENT, [], []),
        (Policy.REPLAY, [True], []),
        (Policy.BACKEND, [], []),
        (Policy.RECONNECT, [False, True], [False]),
    ],
)
def test_each_answer_of_the_thread_lets_the_back_end_hear_its_part(policy, told_if_open, told_if_closed):
    """The bug of 2011, Levy's and Armbruster's replay, Shah's own section, Liguori's close and open."""
    words = {Effect.TELL_BACK_END_OPEN: True, Effect.TELL_BACK_END_CLOSED: False}
    for state in State:
        row = TABLE[state, Cause.RESTORE]
        assert isinstance(row, Transition)
        let = [effect for effect in row.effects if effect in LETS_THROUGH[policy]]
        told = [words[effect] for effect in let if effect in words]
        assert told == (told_if_open if state.guest_connected else told_if_closed)
        assert (Effect.LOAD_BACK_END in let) is (policy in {Policy.BACKEND, Policy.RECONNECT})


@pytest.mark.parametrize("cause", [Cause.PAUSE, Cause.RESUME, Cause.SAVE, Cause.RESTORE, Cause.HANDOVER])
def test_what_happens_to_the_machine_moves_no_bit(cause):
    """R-MIG-25: a pause keeps everything, and a move brings what was saved."""
    for state in State:
        after, _effects = step(state, cause)
        assert after is state


def test_a_moved_port_tells_its_back_end_the_truth_before_anything_else_can_happen():
    """Nothing flows by a restore or a handover itself: bytes wait for the RESUME that follows."""
    for state, cause in itertools.product(State, MOVES):
        _, effects = step(state, cause)
        assert Effect.FLOW not in effects
        assert effects[-1] is (Effect.TELL_BACK_END_OPEN if state.guest_connected else Effect.TELL_BACK_END_CLOSED)


def test_a_host_that_leaves_leaves_no_chain_behind():
    """R-CON-48: the chains go back before the guest hears that the host has gone."""
    for (state, cause), row in TABLE.items():
        if cause is Cause.HOST_DISCONNECT and state.host_connected:
            assert isinstance(row, Transition)
            assert row.effects[0] is Effect.RETURN_CHAINS


def test_an_unplugged_port_has_given_back_its_chains():
    """R-CON-49."""
    for state in State:
        row = TABLE[state, Cause.UNPLUG]
        assert isinstance(row, Transition)
        assert row.effects[0] is Effect.RETURN_CHAINS
