"""What every test with a real kernel stands on. The lab has to be there: a test that silently does not run proves
nothing."""

import contextlib
import tempfile
from pathlib import Path

import pytest

from vsport.lab import Guest, LabError, Tree, default_directory
from vsport.lab.daemon import daemon as serve


@pytest.fixture(scope="session")
def lab_tree():
    """The tree that guests boot from."""
    tree = default_directory() / "tree"
    if trouble := _trouble(tree):
        pytest.fail(trouble, pytrace=False)
    return tree


def _trouble(tree):
    try:
        return Tree(tree).check()
    except LabError as exc:
        return str(exc)


@pytest.fixture
def short_path():
    """A directory whose name leaves room for a Unix socket's."""
    with tempfile.TemporaryDirectory(prefix="vs-") as directory:
        yield Path(directory)


@pytest.fixture
def running():
    """What a test has started, ended in the opposite order."""
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def daemon(running, short_path):
    """Starts `vsport serve` with the given options and returns the path of its socket."""

    def start(*options):
        socket_path = short_path / "vm.sock"
        running.enter_context(serve(socket_path, options, short_path / "vsport.log"))
        return socket_path

    return start


@pytest.fixture
def boot(running, lab_tree):
    """Boots a guest: boot("uml", socket_path=..., ports=[...]) and whatever else Guest takes."""

    def start(kind, **options):
        return running.enter_context(Guest(kind, tree=lab_tree, **options))

    return start
