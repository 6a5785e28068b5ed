"""The drop-in held against the real SharedArray package, and our reading of its objects.

Needs the package itself, several releases of it: scripts/peers makes them, and $SHARR_PEERS names
the directory of virtual environments that it left.
"""

import hashlib
import json
import os
import pathlib
import re
import subprocess

import numpy as np
import pytest
import SharedArray
import sharr
from conftest import PYTHON, SHM, needs_root, sharrfs_binary

HERE = pathlib.Path(__file__).parent
PEERS = pathlib.Path(os.environ.get("SHARR_PEERS", "/nonexistent"))
PROBES = sorted(PEERS.glob("*/bin/python"))

pytestmark = pytest.mark.skipif(not PROBES, reason="needs the peers: scripts/peers")


def output(*command, **kwargs):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment.update(kwargs)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def version(python):
    code = "from importlib.metadata import version as v; print(v('SharedArray'), v('numpy'))"
    return tuple(output(python, "-c", code).split())


def newest_peer():
    """Release 3.2.4 on the NumPy generation that this Python has."""
    for python in PROBES:
        release, numpy = version(python)
        if release == "3.2.4" and numpy.split(".")[0] == np.__version__.split(".")[0]:
            return python
    pytest.skip("no peer of release 3.2.4 for this NumPy")


# What differs, by case and by the place in its outcome, and why. Both are regular expressions.
ON_PURPOSE = [
    # We have what upstream has not
    (r"^(about|module|function/m)", "", "another module, with the functions of 2.x"),
    (r"a/b|/dir/x|/dev/shm/x|/no-dir/x", "", "names in namespaces, and paths"),
    (r"surrogate", "", "names that are not UTF-8"),
    (r"^list/element/(is SharedArray.ArrayDesc|module|pickle)", "", "it can be imported"),
    (r"^list/element/(type|bases)", r"class", "it can be imported"),
    (r"^list/element/doc", "", "in our words"),
    (r"", r"module", "3.x has no msync, mlock and munlock in the module"),
    (r"function/", r"type/class", "functions in Python instead of C"),
    # We refuse what would crash or leave rubbish
    (r"", r"^crash", "upstream crashes"),
    (r"^shape/(-|\(-|\(0, -|\(2, -|2\*\*|\(2\*\*|\(0, 2\*\*|\(3, -)", "",
     "impossible shapes are an error and leave nothing"),
    (r"^shape/(33|64) dims", "", "NumPy's own limit, and nothing is left"),
    (r"^full/", "", "memory that is not there is ENOSPC at creation, and nothing is left"),
    (r"object|class list|/O$", "", "object dtype is refused"),
    (r"FIFO", "", "a FIFO does not block"),
    (r"truncated while|is truncated", "", "the mapping ends elsewhere"),
    (r"^bad trailer", "", "undefined behaviour upstream"),
    (r"longer by|shifted by", "", "NPY files may be longer, and have their data anywhere"),
    (r"socket", r"errno|filename", "no array, like any other file"),
    (r"directory|file://dir$", r"errno|filename|error", "read-only attach says the same as read-write"),
    (r"^name/.*\.$|^name/file:///$|^name/file://x/$", "", "'.' and '..' are no names, for any call"),
    (r"5000 bytes", r"errno", "ENAMETOOLONG for every name that is too long"),
    (r"exists/bad dtype", "", "the dtype is looked at first"),
    # We keep what upstream loses
    (r"^dtype/(>|M8|m8|datetime|dtype >|class numpy.datetime)", r"dtype|native|contents",
     "byte order and datetime units are kept"),
    (r"^dtype/[qQ]$", r"class", "the same numbers under one name"),
    (r"^trailer", "", "every trailer is read, whichever build wrote it"),
    (r"reserved at create", "", "memory is reserved"),
    (r"mapping permissions", "", "made without a name, so the kernel shows none"),
    (r"^array/(create|attach)/writeable$", r"set|flag|write|view", "the flag can be given back, as NumPy has it"),
    (r"^base/use/bytes", r"bytes", "by the buffer that base gives for that"),
    # A process maps an object once
    (r"^life/attach sees create", r"shares memory|one address", "both are on one mapping"),
    (r"^life/del$", r"mapped after del", "the one mapping stays, made without a name"),
    # Details of types
    (r"", r"base/type", "the type of base"),
    (r"", r"base/size", "without a trailer there is no size but the data's"),
    (r"^base/", r"error|class|name|size|doc|msync|mlock|^$", "base is an ordinary read-only object"),
    (r"^sync/", r"filename", "errors name the array"),
    (r"as nobody/.*/delete", r"errno|error|filename", "whatever unlink(2) says"),
    (r"^list/(order|of hidden)", "", "sorted by name, namespaces included"),
]  # fmt: skip

IGNORED = {"message", "mapped", "file_size", "doc", "filename2", "page_offset"}


def leaves(outcome, path=()):
    if isinstance(outcome, dict):
        for key, value in outcome.items():
            if key not in IGNORED:
                key = "ArrayDesc" if key == "SharedArray.ArrayDesc" else key
                yield from leaves(value, (*path, key))
    elif isinstance(outcome, list):
        for key, value in enumerate(outcome):
            yield from leaves(value, (*path, str(key)))
    else:
        yield "/".join(path), outcome


def differences(theirs, ours):
    theirs, ours = dict(leaves(theirs)), dict(leaves(ours))
    return [
        (path, theirs.get(path, "nothing"), ours.get(path, "nothing"))
        for path in {**theirs, **ours}
        if theirs.get(path, "nothing") != ours.get(path, "nothing")
    ]


@needs_root
def test_outcome_by_outcome():
    """Some thousand calls, each in a process of its own: value, type, exception, errno, filename."""
    peer = newest_peer()
    theirs = json.loads(output(peer, HERE / "peer_probe.py"))
    ours = json.loads(
        output(PYTHON, HERE / "peer_probe.py", PYTHONPATH=os.environ["PYTHONPATH"])
    )
    assert theirs.keys() == ours.keys() and len(theirs) > 1000
    unexpected = [
        (case, *difference)
        for case in theirs
        for difference in differences(theirs[case], ours[case])
        if not any(
            re.search(cases, case) and re.search(place, difference[0])
            for cases, place, _ in ON_PURPOSE
        )
    ]
    assert unexpected == [], "\n".join(map(str, unexpected))


@pytest.mark.parametrize("peer", PROBES, ids=[python.parts[-3] for python in PROBES])
def test_objects_that_the_package_wrote(name, peer, tmp_path):
    """Attached, listed, shown in the mount and deleted, from every trailer format."""
    objects = json.loads(output(peer, HERE / "peer_write.py", name))
    objects = objects["objects"] if isinstance(objects, dict) and "objects" in objects else objects
    assert len(objects) > 5
    mount = tmp_path / "mnt"
    mount.mkdir()
    subprocess.run([sharrfs_binary(), "shm://", mount], check=True)
    try:
        listed = {info.name: info for info in sharr.list()}
        described = {desc.name.decode(): desc for desc in SharedArray.list()}
        for one in objects:
            where = one["name"].removeprefix("shm://")
            dtype, shape = np.dtype(one["dtype"]), tuple(one["shape"])
            if len(shape) > getattr(np, "MAXDIMS", 64):
                with pytest.raises(ValueError):
                    sharr.attach(where)
                continue
            for a in (sharr.attach(where), SharedArray.attach(where), sharr.attach(mount / where)):
                assert a.dtype == dtype and a.shape == shape
                assert hashlib.sha256(a.tobytes()).hexdigest() == one["sha256"]
            info = listed[f"shm://{where}"]
            assert (info.dtype, info.shape, info.format) == (dtype, shape, "SharedArray")
            assert described[where].dims == shape and described[where].dtype is dtype.type
            assert os.getxattr(mount / where, "user.sharr.dtype").decode() == str(dtype)
            assert os.getxattr(mount / where, "user.sharr.shape").decode() == str(shape)
            assert (mount / where).read_bytes() == (SHM / where).read_bytes()
        for number, one in enumerate(objects):
            where = one["name"].removeprefix("shm://")
            (sharr.delete, SharedArray.delete, lambda n: os.unlink(mount / n))[number % 3](where)
            assert not (SHM / where).exists()
    finally:
        subprocess.run(["umount", mount], check=True)
