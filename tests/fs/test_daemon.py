"""The daemon as a citizen of the system: mount(8), fstab, service managers, signals, its manual."""

import errno
import fcntl
import io
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import textwrap

import numpy as np
import pytest
import sharr
from conftest import PYTHON, ROOT, SHM, needs_root, python, sharrfs_binary, wait_until
from mounts import daemons, fails, mode, mounted, mounting, needs_fuse, space, unmount

pytestmark = needs_fuse


def npy(value):
    file = io.BytesIO()
    np.save(file, value)
    return file.getvalue()


@pytest.fixture
def installed():
    """sharrfs where mount(8) looks for it, whatever PATH says; seen in our mount namespace only."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/usr/local/bin"], check=True)
    os.symlink(sharrfs_binary(), "/usr/local/bin/sharrfs")
    yield
    subprocess.run(["umount", "/usr/local/bin"], check=True)


@needs_root
@pytest.mark.parametrize("options", ["", "allow_other", "rw,direct_io", "defaults", "noatime,nofail", "relatime,nodiratime,lazytime,nosymfollow"])
def test_mount_t(name, tmp_path, installed, options):
    (tmp_path / "mnt").mkdir()
    sharr.create(name, 3)
    command = ["mount", "-t", "fuse.sharrfs", "shm://", tmp_path / "mnt"]
    subprocess.run([*command, *(["-o", options] if options else [])], check=True, timeout=30)
    try:
        assert (tmp_path / "mnt" / name).exists()
        (line,) = [li for li in open("/proc/self/mounts") if li.split()[1] == str(tmp_path / "mnt")]
        assert line.startswith("shm:// ") and " fuse.sharrfs " in line
        assert "nosuid" in line and "nodev" in line
        assert ("allow_other" in line) == ("allow_other" in options)
        shown = subprocess.run(["df", tmp_path / "mnt"], capture_output=True, text=True)
        assert "shm://" in shown.stdout
    finally:
        unmount(tmp_path / "mnt")


@needs_root
def test_fstab(name, tmp_path, installed):
    for directory in ("mnt", "two words", "data"):
        (tmp_path / directory).mkdir()
    np.save(tmp_path / "data/a.npy", np.arange(3))
    (tmp_path / "fstab").write_text(
        f"# arrays\nshm:// {tmp_path}/mnt fuse.sharrfs allow_other,noauto 0 0\n"
        f"file://{tmp_path}/data {tmp_path}/two\\040words fuse.sharrfs defaults 0 0\n"
    )
    sharr.create(name, 3)
    base = ["mount", "--fstab", tmp_path / "fstab"]
    try:
        subprocess.run([*base, tmp_path / "mnt"], check=True, timeout=30)
        assert (tmp_path / "mnt" / name).exists()
        subprocess.run([*base, "-a"], check=True, timeout=30)
        assert os.listdir(tmp_path / "two words") == ["a.npy"]
        subprocess.run([*base, "-a"], check=True, timeout=30)  # what is mounted stays
    finally:
        for directory in ("mnt", "two words"):
            subprocess.run(["umount", tmp_path / directory], check=True)
            wait_until(lambda: not daemons(tmp_path / directory), "its end")


@needs_root
def test_umount_lazily(space):
    """What is open stays usable until it is closed; then the daemon ends."""
    uri, behind, point = space
    (point / "a").write_bytes(npy(np.arange(1000.0)))
    new = open(point / "b", "wb")
    new.write(npy(np.ones(3)))
    with open(point / "a", "rb") as file:
        assert subprocess.run(["umount", point], capture_output=True).returncode != 0  # busy
        subprocess.run(["umount", "-l", point], check=True)
        assert not os.listdir(point) and daemons(point)
        assert file.read() == npy(np.arange(1000.0))
        os.close(os.dup(new.fileno()))  # which is not its end
        new.close()
        assert np.load(behind / "b").tolist() == [1] * 3
    wait_until(lambda: not daemons(point), "the daemon's end")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_busy_mount(name, tmp_path, how, mode):
    options = [] if mode == "passthrough" else ["-o", "direct_io"]
    daemon = subprocess.Popen(
        [sharrfs_binary(), "-f", "shm://", tmp_path, *options], stderr=-1, text=True
    )
    assert mode in next(line for line in daemon.stderr if "shm:// on" in line)
    (tmp_path / name).write_bytes(npy(np.arange(1000.0)))
    reader = os.open(tmp_path / name, os.O_RDONLY)
    writer = os.open(tmp_path / f"{name}2", os.O_WRONLY | os.O_CREAT)
    os.write(writer, npy(3.0))
    daemon.send_signal(how)
    assert daemon.wait(30) == 0
    wait_until(lambda: not mounted(tmp_path), "the mount to go")
    for fd in (reader, writer):
        fails(errno.ENOTCONN, os.close, fd)
    daemon.stderr.close()
    assert np.load(SHM / name).size == 1000 and not (SHM / f"{name}2").exists()


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_a_signal_ends_it_while_somebody_waits_for_a_lock(name, tmp_path, kind):
    sharr.create(name, 3)
    daemon = subprocess.Popen([sharrfs_binary(), "-f", "shm://", tmp_path], stderr=-1, text=True)
    assert any("shm:// on" in line for line in daemon.stderr)
    script = """
        import fcntl, sys
        file = open(sys.argv[1], "r+b")
        print(flush=True)
        getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX)
    """
    with open(SHM / name, "r+b") as file:
        getattr(fcntl, kind)(file, fcntl.LOCK_EX)
        waiting = subprocess.Popen(
            [PYTHON, "-c", textwrap.dedent(script), tmp_path / name, kind], stdout=-1, stderr=-1
        )
        waiting.stdout.readline()
        wait_until(lambda: pathlib.Path(f"/proc/{waiting.pid}/wchan").read_text() != "0", "it to wait")
        daemon.terminate()
        assert daemon.wait(30) == 0
        waiting.communicate(timeout=30)
        assert waiting.returncode != 0
    daemon.stderr.close()


@pytest.mark.parametrize("abstract", [False, True])
def test_service_managers_are_told(name, tmp_path, abstract):
    """As sd_notify(3) has it: READY=1 when the mount answers, STOPPING=1 when it ends."""
    (tmp_path / "mnt").mkdir()
    address = f"\0sharr-{name}" if abstract else str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(30)
        daemon = subprocess.Popen(
            [sharrfs_binary(), "-f", "shm://", tmp_path / "mnt"], stderr=-1, text=True,
            env={**os.environ, "NOTIFY_SOCKET": address.replace("\0", "@")},
        )  # fmt: skip
        told = manager.recv(4096).decode().splitlines()
        assert told[0] == "READY=1" and told[1].startswith(f"STATUS=shm:// on {tmp_path}/mnt: ")
        assert mounted(tmp_path / "mnt") and os.statvfs(tmp_path / "mnt").f_bsize
        daemon.terminate()
        assert manager.recv(4096) == b"STOPPING=1"
        assert daemon.wait(30) == 0
        daemon.stderr.close()


def test_nobody_listens(tmp_path):
    for path in ("/no/such/socket", "x" * 200, "/" + "x" * 200, ""):
        daemon = subprocess.Popen(
            [sharrfs_binary(), "-f", "shm://", tmp_path], stderr=-1, text=True,
            env={**os.environ, "NOTIFY_SOCKET": path},
        )  # fmt: skip
        assert any("shm:// on" in line for line in daemon.stderr)
        daemon.terminate()
        rest = daemon.communicate(timeout=30)[1]
        assert daemon.returncode == 0 and ("NOTIFY_SOCKET" in rest) == path.startswith("/")


@needs_root
def test_in_the_background_it_logs_to_syslog(name, tmp_path):
    """/dev/log of our own."""
    (tmp_path / "mnt").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        log.settimeout(30)
        # A /dev with that socket in it, seen by the daemon alone.
        script = """
            import os, subprocess, sys
            dev = sys.argv[1] + "/dev"
            os.mkdir(dev)
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", dev], check=True)
            for node in ("fuse", "null"):
                open(f"{dev}/{node}", "w").close()
                subprocess.run(["mount", "--bind", f"/dev/{node}", f"{dev}/{node}"], check=True)
            os.mkdir(f"{dev}/shm")
            subprocess.run(["mount", "--bind", "/dev/shm", f"{dev}/shm"], check=True)
            os.symlink(sys.argv[1] + "/log", f"{dev}/log")
            subprocess.run(["mount", "--rbind", dev, "/dev"], check=True)
            subprocess.run([sys.argv[2], "shm://", sys.argv[1] + "/mnt"], check=True)
            try:
                open(f"{sys.argv[1]}/mnt/{sys.argv[3]}", "wb").close()
            except OSError as error:
                print(error.errno)
            subprocess.run(["umount", sys.argv[1] + "/mnt"], check=True)
        """
        done = subprocess.run(
            ["unshare", "-m", PYTHON, "-c", textwrap.dedent(script), tmp_path, sharrfs_binary(), name],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.stdout == f"{errno.EINVAL}\n", done.stderr
        line = log.recv(4096).decode()
    assert re.search(rf"sharrfs\[\d+\]: shm://{name}: not published: not an array", line), line


def test_over_its_own_source(tmp_path):
    (tmp_path / "d/sub").mkdir(parents=True)
    np.save(tmp_path / "d/a.npy", np.arange(3))
    for source in (f"file://{tmp_path}/d", f"file://{tmp_path}/./d/../d"):
        done = subprocess.run(
            [sharrfs_binary(), source, tmp_path / "d"], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 1 and "is the source itself" in done.stderr
    # Above its source, and below: no deadlock either.
    with mounting(f"file://{tmp_path}/d", tmp_path / "d/sub"):
        assert os.listdir(tmp_path / "d/sub") == ["a.npy"]
        (tmp_path / "d/sub/b.npy").write_bytes(npy(np.arange(4)))
        assert np.load(tmp_path / "d/b.npy").tolist() == [0, 1, 2, 3]
        fails(errno.EBUSY, os.rmdir, tmp_path / "d/sub")
    np.save(tmp_path / "d/sub/c.npy", np.arange(5))
    with mounting(f"file://{tmp_path}/d/sub", tmp_path / "d"):
        assert os.listdir(tmp_path / "d") == ["c.npy"]
        assert sharr.attach(tmp_path / "d/c.npy", "c").tolist() == [0, 1, 2, 3, 4]
    assert sorted(os.listdir(tmp_path / "d")) == ["a.npy", "b.npy", "sub"]


@needs_root
def test_read_only(name, tmp_path):
    sharr.create(name, 3)
    with mounting("shm://", tmp_path, "-o", "ro"):
        assert np.load(tmp_path / name).shape == (3,)
        for call, *args in (
            (open, tmp_path / name, "r+b"), (open, tmp_path / "new", "wb"), (os.mkdir, tmp_path / "d"),
            (os.unlink, tmp_path / name), (os.rename, tmp_path / name, tmp_path / "y"),
            (os.chmod, tmp_path / name, 0o600), (os.utime, tmp_path / name),
        ):  # fmt: skip
            fails(errno.EROFS, call, *args)


# The manual


def options_of(text):
    short = set(re.findall(r"(?<![\w-])(-[a-zA-Z]\b|--[a-z-]+)", text)) - {"-o", "-u"}
    return short | {f"-o {name}" for name in re.findall(r"-o ([a-z_]+)", text)}


def test_the_manual_has_what_help_has():
    help_text = subprocess.run([sharrfs_binary(), "--help"], capture_output=True, text=True).stdout
    manual = (ROOT / "fs/sharrfs.1").read_text()
    section = manual[manual.index(".SH OPTIONS") : manual.index(".SH FILES THAT")]
    section = re.sub(r'[\\"]|^\.(BR?|TP|PP|BI|SH).?', "", section, flags=re.M).replace("\\-", "-")
    ours, theirs = options_of(help_text), options_of(section)
    assert ours == theirs, ours ^ theirs
    assert "--help" in ours and "-o direct_io" in ours


def test_what_help_has_works(tmp_path):
    sharr_options = options_of(
        subprocess.run([sharrfs_binary(), "--help"], capture_output=True, text=True).stdout
    )
    for option in sorted(sharr_options - {"-h", "--help", "-V", "--version", "-f", "-d"}):
        words = option.split()
        words[-1] += "=3" if words[-1] == "max_threads" else ""
        if words[-1] == "allow_other" and os.geteuid() != 0:
            continue
        with mounting("shm://", tmp_path, *words):
            assert os.statvfs(tmp_path).f_bsize
    for option in ("-V", "--version", "-h", "--help"):
        assert subprocess.run([sharrfs_binary(), option], stdout=-3).returncode == 0
    for option in ("-f", "-d"):
        daemon = subprocess.Popen([sharrfs_binary(), option, "shm://", tmp_path], stderr=-1, text=True)
        assert any("shm:// on" in line for line in daemon.stderr)
        daemon.terminate(), daemon.communicate(timeout=30)
        assert daemon.returncode == 0


@pytest.mark.skipif(not shutil.which("man"), reason="needs man")
def test_the_manual_is_well_formed():
    done = subprocess.run(
        ["man", "--warnings", "-l", ROOT / "fs/sharrfs.1"], capture_output=True, text=True,
        env={**os.environ, "MANWIDTH": "80", "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == "" and "SEE ALSO" in done.stdout


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_the_unit_is_well_formed(tmp_path):
    unit = (ROOT / "fs/sharrfs@.service.in").read_text()
    unit = unit.replace("@CMAKE_INSTALL_FULL_BINDIR@/sharrfs", str(sharrfs_binary()))
    (tmp_path / "sharrfs@mnt-arrays.service").write_text(unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / "sharrfs@mnt-arrays.service"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "sharrfs" not in done.stderr, done.stderr
