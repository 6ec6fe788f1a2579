"""What all tests share."""

import signal

from hypothesis import settings

# Machines are shared: how long an example takes says nothing about the code.
settings.register_profile("vsport", deadline=None)
settings.load_profile("vsport")

# Who is started in the background by a shell ignores some signals, and so would every process that tests start.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)
