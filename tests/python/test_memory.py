"""Where arrays have their memory: huge pages, small tmpfs instances, several threads."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import sharr
from conftest import sharrfs_binary
from sharr import _core

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs")

MIB = 1 << 20

PRELUDE = """
import errno, os
import numpy as np
import sharr

MIB = 1 << 20

def taken(name):
    return os.stat(f"/dev/shm/{name}").st_blocks * 512

def raises(number, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except OSError as error:
        assert error.errno == number, error
        return str(error)
    raise AssertionError("no error")

def free():
    st = os.statvfs("/dev/shm")
    return st.f_bfree * st.f_bsize, st.f_ffree
"""


def with_shm(options, program, **kwargs):
    """Run a program with a /dev/shm of its own."""
    mount = f'mount -t tmpfs -o {options} none /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", mount, "bash", sys.executable, "-c",
         PRELUDE + textwrap.dedent(program)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, **kwargs,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@needs_root
@pytest.mark.parametrize("mode", ["advise", "within_size", "always"])
def test_huge_pages(mode):
    """Whole huge pages only, so that a file takes what it would without them."""
    with_shm(f"huge={mode},size=200m", """
        for nbytes in (0, 1, 4096, 100_000, MIB, 3 * MIB, 4 * MIB, 9 * MIB + 5, 80 * MIB - 4096):
            size = 4096 + nbytes
            needed = -(-size // 4096) * 4096
            for huge in (None, False, True):
                a = sharr.create("a", nbytes, "u1", huge=huge)
                got = sharr.info("a").huge
                wants = huge or huge is None and size >= 4 * MIB
                # Of what is too small to be asked for, the mount decides.
                if huge is not None or size >= 4 * MIB or size < 2 * MIB:
                    assert got == (size // (2 * MIB) * 2 * MIB if wants else 0), (nbytes, huge, got)
                assert taken("a") == needed, (nbytes, huge, taken("a"))
                assert not a.any()
                a[:] = 1
                del a
                sharr.delete("a")
            source = np.arange(nbytes, dtype="u4").astype("u1")
            a = sharr.put("a", source)
            assert (sharr.attach("a") == source).all()
            if size >= 4 * MIB:
                assert sharr.info("a").huge == size // (2 * MIB) * 2 * MIB
                assert taken("a") == needed
            del a
            sharr.delete("a")
        f = sharr.put("f", np.asfortranarray(np.arange(2.0 ** 20).reshape(1024, 1024)))
        assert f.flags.f_contiguous and f[3, 5] == 3 * 1024 + 5 and sharr.info("f").huge == 8 * MIB
        with sharr.build("b", 2 ** 20) as b:
            b[:] = 3
        assert sharr.info("b").huge == 8 * MIB
        assert sharr.list()[0].huge == 0
    """)  # fmt: skip


@needs_root
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse")
def test_huge_pages_are_told_and_given_back(tmp_path):
    """Of what they are, however and wherever one looks, and not of what the mount is called."""
    (tmp_path / "mnt").mkdir()
    with_shm("huge=always,size=100m", f"""
        import subprocess
        point = {str(tmp_path / "mnt")!r}
        sharr.create("a", 9 * MIB, "u1")
        sharr.create("sparse", 9 * MIB, "u1", reserve=False)
        assert taken("sparse") == 4096
        subprocess.run([{sharrfs_binary()!r}, "shm://", point], check=True)
        try:
            assert sharr.info("a").huge == sharr.info(f"{{point}}/a").huge == 8 * MIB
            for nbytes in (1, 3 * MIB):
                np.save(f"{{point}}/n.npy", np.ones(nbytes, "u1"))
                assert taken("n.npy") == -(-(128 + nbytes) // 4096) * 4096, taken("n.npy")
                assert sharr.attach("n.npy").all()
        finally:
            subprocess.run(["umount", point], check=True)
    """)  # fmt: skip
    with_shm("size=64m", """
        import subprocess
        subprocess.run(["mount", "-t", "tmpfs", "huge=always", "/dev/shm"], check=True)
        sharr.create("a", 9 * MIB, "u1")
        raises(errno.EOPNOTSUPP, sharr.create, "b", 9 * MIB, "u1", huge=True)
    """)


@needs_root
def test_a_hole_is_not_filled_by_looking():
    with_shm("huge=advise,size=64m", """
        a = sharr.create("a", 32 * MIB, "u1", reserve=False)
        a[20 * MIB] = 1
        before = taken("a")
        assert sharr.info("a").huge == 0 and taken("a") == before < MIB
        raises(errno.EINVAL, sharr.create, "b", 8 * MIB, "u1", reserve=False, huge=True)
    """)  # fmt: skip


@needs_root
def test_memory_that_is_locked_as_it_is_mapped():
    with_shm("huge=advise,size=80m", """
        import ctypes
        a = sharr.create("a", 32 * MIB, "u1", reserve=False)
        before = taken("a")
        assert ctypes.CDLL(None).mlockall(2) == 0  # MCL_FUTURE
        assert sharr.info("a").huge == 0 and taken("a") == before < MIB
        sharr.create("b", 16 * MIB, "u1")
        sharr.put("c", np.ones(16 * MIB, "u1"))
        assert sharr.info("b").huge == sharr.info("c").huge == 16 * MIB
        raises(errno.ENOSPC, sharr.create, "d", 200 * MIB, "u1")
        assert sorted(os.listdir("/dev/shm")) == ["a", "b", "c"]
    """)


@needs_root
def test_huge_pages_are_told_where_little_may_be_mapped():
    with_shm("huge=advise,size=128m", """
        import resource
        x = sharr.create("a", 64 * MIB + 1, "u1"); del x
        mapped = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 24 * MIB, -1))
        raises(errno.ENOMEM, sharr.attach, "a")
        assert sharr.info("a").huge == 64 * MIB
    """)  # fmt: skip


@needs_root
def test_no_huge_pages_there(tmp_path):
    with_shm("size=64m", """
        for nbytes in (1, 9 * MIB):
            told = raises(errno.EOPNOTSUPP, sharr.create, "a", nbytes, "u1", huge=True)
            assert "remount,huge=advise" in told, told
            assert os.listdir("/dev/shm") == []
        sharr.create("a", 9 * MIB, "u1")
        assert sharr.info("a").huge == 0
    """)  # fmt: skip
    with pytest.raises(OSError, match="huge=advise"):
        sharr.create(tmp_path / "a.npy", 9 * MIB, "u1", huge=True)
    assert list(tmp_path.iterdir()) == []


@needs_root
@pytest.mark.parametrize("options", ["huge=advise", "huge=always", "huge=never"])
def test_memory_ends_half_way(options):
    """Found out while it is taken: what is below 64 MiB is not looked at before."""
    with_shm(f"{options},size=24m", """
        before = free()
        source = np.ones(40 * MIB, "u1")
        for _ in range(3):
            told = raises(errno.ENOSPC, sharr.create, "a", 40 * MIB, "u1")
            assert "40.0 MiB needed" in told and "24.0 MiB free" in told, told
            raises(errno.ENOSPC, sharr.put, "a", source)
            raises(errno.ENOSPC, sharr.put_all, "d/", {"x": source[:MIB], "y": source})
            assert os.listdir("/dev/shm") == [] and free() == before
        a = sharr.put("a", source[: 23 * MIB])
        raises(errno.ENOSPC, sharr.create, "b", 2 * MIB, "u1")
        assert a.all() and os.listdir("/dev/shm") == ["a"]
    """)  # fmt: skip


@needs_root
@pytest.mark.parametrize("huge", ["advise", "never"])
def test_small_arrays_on_a_full_shm(huge):
    """They are written whole, the header with the elements, or not at all."""
    with_shm(f"huge={huge},size=256k", """
        source = np.arange(300_000).astype("u1")
        for name in ("a", "file:///dev/shm/a"):
            for pages in (1, 2, 3, 5, 20):
                filler = open("/dev/shm/filler", "wb")
                os.posix_fallocate(filler.fileno(), 0, free()[0] - pages * 4096)
                before = free()
                assert before[0] == pages * 4096
                for nbytes in (0, 1, 4096, 4097, 8192, 16384, 65536, 300_000):
                    fits = 4096 + nbytes <= pages * 4096
                    for make in (lambda: sharr.put(name, source[:nbytes]),
                                 lambda: sharr.create(name, nbytes, "u1")):
                        if fits:
                            a = make()
                            assert taken("a") == -(-(4096 + nbytes) // 4096) * 4096
                            a += 1
                            del a
                            sharr.delete(name)
                        else:
                            told = raises(errno.ENOSPC, make)
                            assert f"{pages * 4}.0 KiB free" in told, told
                        assert os.listdir("/dev/shm") == ["filler"], (pages, nbytes)
                        assert free() == before, (pages, nbytes)
                filler.close()
                os.unlink("/dev/shm/filler")
    """)  # fmt: skip


@needs_root
@pytest.mark.parametrize("options", ["huge=advise", "huge=never"])
def test_what_cannot_be_read_is_not_put(options, tmp_path):
    """To read a mapped file beyond its end is a SIGBUS, and so is a hole without memory for it."""
    with_shm(f"{options},size=64m", f"""
        before = free()
        for nbytes, there in ((MIB, 4096), (6 * MIB, MIB), (40 * MIB, MIB), (40 * MIB, 33 * MIB)):
            source = np.memmap({str(tmp_path / "source")!r}, "u1", "w+", shape=nbytes)
            os.truncate(source.filename, there)
            told = raises(errno.EFAULT, sharr.put, "a", source)
            assert "cut short" in told, told
            assert os.listdir("/dev/shm") == [] and free() == before
        # Its reader takes what its own copy needs.
        sparse = sharr.create("sparse", 40 * MIB, "u1", reserve=False)
        try:
            sharr.put("a", sparse)
        except OSError as error:
            assert error.errno in (errno.ENOSPC, errno.EFAULT), error
        else:
            raise AssertionError("no error")
        assert os.listdir("/dev/shm") == ["sparse"]
    """)  # fmt: skip


def test_processors_by_affinity():
    program = (
        "import os; from sharr import _core; "
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); print(_core.available_processors())"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "1\n"
    assert 1 <= _core.available_processors() <= len(os.sched_getaffinity(0))


def control_group():
    """A control group's directory, and how a limit of one processor is written in it."""
    for parent, limit in (("/sys/fs/cgroup/cpu", ("cpu.cfs_quota_us", "100000")),
                          ("/sys/fs/cgroup", ("cpu.max", "100000 100000"))):  # fmt: skip
        group = f"{parent}/sharr-test-{os.getpid()}"
        try:
            os.mkdir(group)
        except OSError:
            continue
        try:
            with open(f"{group}/{limit[0]}", "w") as file:
                file.write(limit[1])
            return group
        except OSError:
            os.rmdir(group)
    return None


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="has one processor only")
def test_processors_by_control_group():
    group = control_group()
    if group is None:
        pytest.skip("cannot make a control group with a CPU limit")
    try:
        program = f"""
            import os
            from sharr import _core
            os.makedirs("{group}/below", exist_ok=True)
            open("{group}/below/cgroup.procs", "w").write(str(os.getpid()))
            print(_core.available_processors())
        """
        command = [sys.executable, "-c", textwrap.dedent(program)]
        assert subprocess.check_output(command, text=True) == "1\n"
    finally:
        if os.path.isdir(f"{group}/below"):
            os.rmdir(f"{group}/below")
        os.rmdir(group)
