"""The command sharr: each of its commands as a user calls it."""

import contextlib
import io
import json
import os
import pathlib
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import textwrap
import time

import numpy as np
import pytest
import sharr
from conftest import BUILD, PYTHON, ROOT, SHM, needs_root, sharrfs_binary, wait_until

SHARR = str(BUILD / "bin" / "sharr")
ENVIRONMENT = {
    "PATH": os.environ["PATH"], "TERM": "xterm-256color", "LC_ALL": "C.UTF-8",
    "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip


def sharr_command(*args, stdin=b"", command=(SHARR,), env=(), **kwargs):
    """Run the command; returns its status, what it printed, and what it told on stderr."""
    done = subprocess.run(
        [*command, *map(os.fspath, args)], input=stdin, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, timeout=120, env=ENVIRONMENT | dict(env), **kwargs,
    )  # fmt: skip
    assert b"Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def prints(*args, **kwargs):
    status, out, err = sharr_command(*args, **kwargs)
    assert (status, err) == (0, "")
    return out


def fails(status, *args, told="", lines=1, **kwargs):
    """The command ends with the status and tells why, one line for each thing that failed."""
    actual, out, err = sharr_command(*args, **kwargs)
    assert actual == status and err.endswith("\n"), err
    assert err.count("\n") == lines and all(
        line.startswith("sharr: ") for line in err.splitlines()
    ), err
    assert told in err, err
    return out


def on_terminal(*args, answer=b"", size=(24, 80), env=(), command=(SHARR,), stdout=None):
    """Run the command on a terminal; returns its status and what the terminal got."""
    import fcntl
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    process = subprocess.Popen(
        [*command, *map(os.fspath, args)], stdin=slave, stdout=stdout or slave, stderr=slave,
        env=ENVIRONMENT | dict(env), start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(slave)
    got = b""
    with contextlib.suppress(OSError):  # EIO: the last one has closed the terminal
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if not select.select([master], [], [], 1)[0]:
                # Ctrl-C that comes a moment before Python reads is only heard when that has ended.
                if answer == b"\x03" and b"[y/N]" in got:
                    os.write(master, answer)
                continue
            part = os.read(master, 65536)
            if not part:
                break
            if answer and b"[y/N]" in got + part and b"[y/N]" not in got:
                os.write(master, answer)
            got += part
    os.close(master)
    return process.wait(60), got.decode().replace("\r\n", "\n")


def make(name, array):
    array = np.asarray(array)
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    sharr.create(name, array.shape, array.dtype, order="F" if fortran else "C")[...] = array
    return array


def exists(name):
    return (SHM / name).exists()


# The command itself


def test_help_and_version():
    commands = [
        "ls", "info", "put", "get", "cp", "mv", "rm", "new", "show", "stat", "mount", "umount",
        "completion",
    ]  # fmt: skip
    for args in [(), ("-h",), ("--help",)]:
        out = prints(*args)
        listed = out.partition("Commands:\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in listed.splitlines()] == commands
    for command in commands:
        assert prints(command, "--help").startswith(f"Usage: sharr {command}")
    version = re.search(r"sharrfs VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text())[1]
    assert prints("--version") == prints("-V") == f"sharr {version}\n"


def test_usage_errors():
    for args in [
        ("nosuch",), ("--nosuch",), ("ls", "--nosuch"), ("info",), ("put",), ("put", "a"),
        ("get", "a"), ("cp", "a"), ("mv", "a"), ("rm",), ("new", "a"), ("show",), ("umount",),
        ("show", "a", "b", "c"), ("new", "a", "--shape", "x"), ("new", "a", "--shape", "-1"),
        ("new", "a", "--shape", "(3"), ("new", "a", "--shape", "3)"), ("new", "a", "--shape", "))"),
        ("new", "a", "--shape", "9" * 5000),
        ("new", "a", "--shape", "3", "--dtype", "f3"), ("new", "a", "--shape", "3", "--order", "K"),
        ("new", "a", "--shape", "3", "--dtype", "u1", "--fill", "256"),
        ("new", "a", "--shape", "3", "--fill", "no"),
        ("new", "a", "--shape", "3", "--sparse", "--fill", "1"),
        ("show", "a", "-o", "x.png"), ("show", "a", "--image", "--plot"),
        ("show", "a", "--json", "--plot"), ("mount", "a", "b", "c"), ("mount", "a", "--json"),
        ("completion", "fish"),
    ]:  # fmt: skip
        fails(2, *args, told="--help")


def test_a_module_and_a_link_are_the_command_too(name, tmp_path):
    make(name, [1, 2])
    path = {"PYTHONPATH": str(BUILD / "python")}
    assert prints("show", name, command=(PYTHON, "-m", "sharr"), env=path) == "[1 2]\n"
    (tmp_path / "sharr").symlink_to(SHARR)
    assert prints("show", name, command=(str(tmp_path / "sharr"),)) == "[1 2]\n"
    shutil.copy(SHARR, tmp_path / "copy")  # not beside the packages, but told of them
    assert prints("show", name, command=(str(tmp_path / "copy"),), env=path) == "[1 2]\n"
    assert fails(1, "ls", command=(str(tmp_path / "copy"),), told="PYTHONPATH") == ""


def test_what_is_missing_is_told(name, tmp_path):
    make(name, [1.0, 2.0])
    for module in ("click", "matplotlib"):
        (tmp_path / module).mkdir()
        (tmp_path / module / f"{module}.py").write_text(
            f"raise ModuleNotFoundError('no', name='{module}.part')"
        )
        env = {"PYTHONPATH": str(tmp_path / module)}
        told = f"{module} is missing: apt install python3-{module}"
        fails(1, "show", name, "--plot", "-o", tmp_path / "x.png", env=env, told=told)
    fails(1, "show", name, "--plot", env={"PATH": str(tmp_path)}, told="apt install chafa")
    assert not (tmp_path / "x.png").exists()


def test_a_closed_pipe_is_silent(name):
    make(name, np.zeros((1000, 100)))
    done = subprocess.run(
        ["bash", "-c", f"{SHARR} show -a {name} | head -n 1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stderr == "" and done.stdout.splitlines()[1] == str(128 + signal.SIGPIPE)


@pytest.mark.parametrize("closed, told", [
    ("<&-", ""), ("2>&-", ""), (">&-", "sharr: standard output: Bad file descriptor\n"),
])  # fmt: skip
def test_closed_streams(name, closed, told):
    make(name, [1])
    done = subprocess.run(
        ["bash", "-c", f"{SHARR} ls {name} {closed}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (bool(told), told)
    assert done.stdout == ("" if told else f"{name}\n")


def test_a_full_disk_is_told(name):
    make(name, [1])
    with open("/dev/full", "w") as full:
        done = subprocess.run([SHARR, "ls"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == (
        "sharr: standard output: No space left on device\n"
    )


def waits_for_input(name, *command):
    """A put that waits for the header of an array."""
    process = subprocess.Popen(
        [*command, SHARR, "put", "-", name], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    stack = pathlib.Path("/proc", str(process.pid), "wchan")
    wait_until(lambda: "pipe" in stack.read_text(), "reading")
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_silently(name, how):
    process = waits_for_input(name)
    process.send_signal(how)
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == 128 + how
    assert not exists(name)


def test_nohup(name):
    process = waits_for_input(name, "nohup")
    process.send_signal(signal.SIGHUP)
    file = io.BytesIO()
    np.save(file, np.arange(3))
    process.communicate(file.getvalue(), timeout=60)
    assert process.returncode == 0 and sharr.attach(name).tolist() == [0, 1, 2]


# ls and info


def test_ls(name):
    make(f"{name}/a", np.zeros((3, 4), "f4"))
    make(f"{name}/b/c", np.zeros(1 << 20, "u1"))
    (SHM / name / "no array").write_text("x")
    assert prints("ls", name) == prints("ls", f"shm://{name}/") == "a\nb/c\n"
    assert prints("ls", SHM / name) == prints("ls", f"file://{SHM / name}") == "a\nb/c\n"
    assert prints("ls", ".", cwd=SHM / name) == "a\nb/c\n"
    assert prints("ls", f"./{name}/b", cwd=SHM) == "c\n"
    assert prints("ls", f"{name}/a") == f"{name}/a\n"
    assert f"{name}/a\n{name}/b/c\n" in prints("ls")
    assert prints("ls", f"{name}/b", f"{name}/a") == f"{name}/a\n{name}/b/c\n"
    assert prints("ls", "-0", name) == "a\0b/c\0"
    assert prints("ls", "-r", name) == prints("ls", "-S", name) == "b/c\na\n"
    os.utime(SHM / name / "a", (0, 0))
    assert prints("ls", "-t", name) == "b/c\na\n" and prints("ls", "-tr", name) == "a\nb/c\n"

    os.utime(SHM / name / "b/c", (86400, 86400))
    assert prints("ls", "-l", name, env={"TZ": "UTC"}) == (
        "DTYPE    SHAPE          SIZE  MODIFIED          NAME\n"
        "float32  (3, 4)           48  1970-01-01 00:00  a\n"
        "uint8    (1048576,)  1048576  1970-01-02 00:00  b/c\n"
    )
    assert " 1.0M " in prints("ls", "-lh", name)
    assert json.loads(prints("ls", name, "--json"))[0] == {
        "name": f"shm://{name}/a", "dtype": "float32", "shape": [3, 4], "order": "C", "nbytes": 48,
        "modified": "1970-01-01T00:00:00Z",
    }  # fmt: skip


def test_ls_of_nothing(name):
    assert fails(1, "ls", name, told=f"{name}: no such array, namespace or directory") == ""
    (SHM / name).mkdir()
    assert prints("ls", name) == prints("ls", "-l", name) == ""
    assert on_terminal("ls", name) == (0, "")
    assert json.loads(prints("ls", name, "--json")) == []


def test_ls_tells_what_failed_and_lists_the_others(name):
    make(name, 1)
    assert fails(1, "ls", f"{name}-no", name, f"{name}-no2", lines=2) == f"{name}\n"


def test_patterns(name, tmp_path):
    for end in ("-a1", "-a2", "-b1", "/a1"):
        make(name + end, 1)
    assert prints("ls", f"{name}-a*") == f"{name}-a1\n{name}-a2\n"
    assert prints("ls", f"shm://{name}?a[2-9]") == f"{name}-a2\n"
    assert prints("ls", f"{name}*1") == f"{name}-a1\n{name}-b1\n{name}/a1\n"
    assert prints("info", f"{name}-a*").count("name ") == 2
    fails(1, "ls", f"{name}-c*", told="no array matches")
    fails(1, "info", f"{name}-c*", told="no array matches")

    np.save(tmp_path / "x1.npy", 1)
    np.save(tmp_path / "x2.npy", 2)
    assert prints("ls", tmp_path / "*1.npy") == f"{tmp_path}/x1.npy\n"
    assert prints("ls", "./*.npy", cwd=tmp_path) == f"{tmp_path}/x1.npy\n{tmp_path}/x2.npy\n"
    assert len(json.loads(prints("info", "--json", f"file://{tmp_path}/x*"))) == 2

    make(f"{name}-[a]", 1)  # a name that is there is no pattern
    assert prints("ls", f"{name}-[a]") == f"{name}-[a]\n"


def test_info(name):
    make(name, np.zeros((512, 4), ">f8", order="F"))
    lines = dict(line.split(None, 1) for line in prints("info", name).splitlines())
    assert lines.pop("modified")
    assert lines == {
        "name": f"shm://{name}", "dtype": ">f8", "shape": "(512, 4)", "order": "F", "size": "16384",
        "allocated": "20480", "format": "NPY 1.0, data at 4096", "path": f"/dev/shm/{name}",
    }  # fmt: skip
    assert "16K" in prints("info", "-h", name) and "20K" in prints("info", "-h", name)
    (described,) = json.loads(prints("info", "--json", name))
    assert described["shape"] == [512, 4] and described["offset"] == 4096
    assert described["path"] == f"/dev/shm/{name}" and described["allocated"] == 20480
    out = fails(1, "info", f"{name}-no", name, told=f"{name}-no: no such array")
    assert "(512, 4)" in out
    fails(1, "info", "/etc/passwd", told="/etc/passwd: not an array")


def test_names_of_all_bytes(name):
    weird = [
        os.fsdecode(f"{name}-".encode() + end)
        for end in (b"\n\x1b[31m", b"\xff", b"\t", "日本é".encode(), b" x", b"back\\slash")
    ]
    for one in weird:
        make(one, 1)
    pattern = f"{name}-*"
    lines = prints("ls", pattern).splitlines()
    shown = [r"\n\x1b[31m", r"\xff", r"\t", "日本é", " x", r"back\\slash"]
    assert sorted(lines) == sorted(f"{name}-{end}" for end in shown)
    assert len(prints("ls", "-l", pattern).splitlines()) == len(weird) + 1
    assert len(prints("info", pattern).split("\n\n")) == len(weird)
    found = json.loads(prints("ls", "--json", pattern))
    assert sorted(info["name"] for info in found) == sorted(f"shm://{one}" for one in weird)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert r"-\xe6\x97\xa5" in prints("ls", pattern, env=plain)
    status, out = on_terminal("ls", pattern)
    assert status == 0 and r"\n\x1b[31m" in out and "\x1b" not in out
    raw = subprocess.run([SHARR, "ls", "-0", pattern], stdout=subprocess.PIPE).stdout
    assert sorted(raw.rstrip(b"\0").split(b"\0")) == sorted(map(os.fsencode, weird))
    fails(1, "info", f"{name}-no\n\x1b[31m", told=rf"{name}-no\n\x1b[31m: no such array")
    prints("rm", *map(os.fsencode, weird))
    assert not list(SHM.glob(pattern))


def test_a_terminal_gets_columns_and_colours(name):
    for end in range(30):
        make(f"{name}/jobs/{end:02}", 1)
    status, out = on_terminal("ls", name, size=(24, 40), env={"NO_COLOR": "1"})
    assert status == 0 and "\x1b" not in out
    assert out.splitlines()[0].split() == ["jobs/00", "jobs/08", "jobs/16", "jobs/24"]
    assert max(map(len, out.splitlines())) <= 40 and len(out.split()) == 30
    assert len(on_terminal("ls", name, size=(24, 3))[1].splitlines()) == 30
    assert len(on_terminal("ls", "-1", name)[1].splitlines()) == 30
    assert "\x1b[" in on_terminal("ls", name)[1] and "\x1b[" in on_terminal("ls", "-l", name)[1]
    assert "\x1b[" not in on_terminal("ls", "-l", name, env={"TERM": "dumb"})[1]
    assert "\x1b[" not in on_terminal("ls", "--json", name)[1]
    assert on_terminal("info", f"{name}-no") == (
        1, f"\x1b[31msharr:\x1b[0m {name}-no: no such array\n",
    )  # fmt: skip


# put, get, cp, mv, rm


@pytest.mark.parametrize("array", [
    np.arange(12, dtype=">i4").reshape(3, 4), np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.array(7, "u1"), np.zeros((2, 0, 3)), np.array(["2020-01-01", "NaT"], "M8[D]"),
    np.array([(1, 2.5), (3, np.nan)], [("x", "u1"), ("y", "f8")]), np.array(["", ""], "S0"),
    np.arange(5_000_001, dtype="f8"),
], ids=lambda array: f"{array.dtype}-{array.shape}")  # fmt: skip
def test_put_and_get(name, tmp_path, array):
    np.save(tmp_path / "in.npy", array)
    assert prints("put", tmp_path / "in.npy", f"{name}-file") == ""
    assert prints("put", "-", f"{name}-pipe", stdin=(tmp_path / "in.npy").read_bytes()) == ""
    for one in (f"{name}-file", f"{name}-pipe"):
        made = sharr.attach(one)
        assert made.dtype == array.dtype and made.shape == array.shape
        assert made.tobytes() == array.tobytes()
        assert made.flags.f_contiguous == array.flags.f_contiguous
    assert prints("get", f"{name}-file", tmp_path / "out.npy") == ""
    out = np.load(tmp_path / "out.npy")
    assert out.dtype == array.dtype and out.shape == array.shape
    assert out.tobytes() == array.tobytes() and out.flags.fnc == array.flags.fnc
    assert (tmp_path / "out.npy").stat().st_mode == (tmp_path / "in.npy").stat().st_mode
    piped = subprocess.run([SHARR, "get", f"{name}-file", "-"], stdout=subprocess.PIPE, check=True)
    assert piped.stdout == (tmp_path / "out.npy").read_bytes()


@pytest.mark.parametrize("dtype", [[("größe", "f4"), ("名", "u1")], [("x" * 30000, "u1")]])
def test_put_takes_from_a_pipe_what_get_writes(name, dtype):
    array = np.ones(3, dtype)
    sharr.put(name, array)
    piped = subprocess.run([SHARR, "get", name, "-"], stdout=subprocess.PIPE, check=True).stdout
    prints("put", "-", f"{name}-2", stdin=piped)
    assert (sharr.attach(f"{name}-2") == array).all()
    assert sharr.attach(f"{name}-2").dtype == array.dtype


@needs_root
def test_holes_are_read_from_a_full_store(tmp_path):
    """The kernel has no page for the hole that a mapping of it would be read through."""
    script = """
        set -e
        mount -t tmpfs -o size=1m none /dev/shm
        sharr=$1
        "$sharr" new a --shape 1000,1000 --dtype u2 --order F --sparse
        printf 7 | dd of=/dev/shm/a bs=1 seek=1004096 conv=notrunc status=none
        head -c 2M /dev/zero > /dev/shm/full 2>/dev/null || true
        "$sharr" show a '12, 499:503'
        "$sharr" get a got.npy
        "$sharr" cp a ./copied.npy
        "$sharr" show a --json 0,0
        if /usr/bin/python3 -c 'import matplotlib' 2>/dev/null; then
            "$sharr" show a ...,0 --plot -o plot.png
        fi
    """
    command = ["unshare", "-m", "bash", "-c", textwrap.dedent(script), "bash"]
    out = prints(SHARR, command=command, cwd=tmp_path)
    expected = np.zeros((1000, 1000), "u2", order="F")
    expected[0, 500] = ord("7")
    assert out.startswith(f"{expected[12, 499:503]}\n") and '"data": 0}' in out
    for file in ("got.npy", "copied.npy"):
        assert (np.load(tmp_path / file) == expected).all()


def test_put_failures(name, tmp_path):
    np.save(tmp_path / "a.npy", np.arange(4))
    np.save(tmp_path / "object.npy", np.array([None]), allow_pickle=True)
    np.savez(tmp_path / "a.npz", np.arange(4))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "short.npy").write_bytes(whole[:-1])
    fails(1, "put", tmp_path / "no.npy", name, told="no.npy: No such file")
    for file in ("object.npy", "a.npz", "short.npy"):
        fails(1, "put", tmp_path / file, name, told=file)
    fails(1, "put", "/dev/null", name, told="/dev/null: not an array")
    if os.geteuid() == 0:
        os.chmod(tmp_path / "a.npy", 0)
        fails(1, "put", "a.npy", name, cwd=tmp_path, told="sharr: a.npy: Permission denied",
              command=("setpriv", "--bounding-set=-dac_override,-dac_read_search", SHARR))  # fmt: skip
        os.chmod(tmp_path / "a.npy", 0o644)
    for data in (b"", b"x", whole[:20], whole[:-1], (tmp_path / "object.npy").read_bytes()):
        fails(1, "put", "-", name, stdin=data)
    fails(1, "put", tmp_path, name)
    fails(1, "put", tmp_path / "a.npy", "a//b", told="a//b: ")
    assert not exists(name)
    prints("put", tmp_path / "a.npy", name)
    np.save(tmp_path / "b.npy", np.arange(5))
    fails(1, "put", tmp_path / "b.npy", name, told=f"{name}: File exists, -f replaces it")
    assert sharr.attach(name).size == 4
    prints("put", "-f", tmp_path / "b.npy", name)
    assert sharr.attach(name).size == 5


def test_get_writes_whole_files_or_none(name, tmp_path):
    make(name, np.arange(4))
    target = tmp_path / "a.npy"
    target.write_text("precious")
    fails(1, "get", name, target, told="a.npy: File exists, -f replaces it")
    assert target.read_text() == "precious"
    fails(1, "get", f"{name}-no", target, "-f", told=f"{name}-no: no such array")
    assert target.read_text() == "precious"
    (tmp_path / "link.npy").symlink_to(target)
    prints("get", "-f", name, tmp_path / "link.npy")
    assert np.load(target).tolist() == [0, 1, 2, 3] and (tmp_path / "link.npy").is_symlink()
    (tmp_path / "dir").mkdir()
    prints("get", name, tmp_path / "dir")
    prints("get", name, "relative.npy", cwd=tmp_path / "dir")
    assert sorted(os.listdir(tmp_path / "dir")) == sorted([f"{name}.npy", "relative.npy"])
    fails(1, "get", name, tmp_path / "no" / "a.npy", told="no/a.npy: No such file")
    fails(1, "get", name, "/dev/full", told="/dev/full: No space left")
    prints("get", name, "/dev/null")
    assert pathlib.Path("/dev/null").is_char_device()
    status, out = on_terminal("get", name, "-")
    assert status == 1 and "terminal" in out and "NUMPY" not in out
    limited = ["bash", "-c", 'trap "" XFSZ; ulimit -f 1; exec "$@"', "bash", SHARR]
    make(f"{name}-large", np.zeros(1 << 16))
    fails(1, "get", f"{name}-large", tmp_path / "large.npy", command=limited, told="too large")
    assert sorted(os.listdir(tmp_path)) == ["a.npy", "dir", "link.npy"]


def test_cp(name, tmp_path):
    array = make(name, np.arange(6.0).reshape(2, 3))
    prints("cp", name, f"{name}-new/b")
    prints("cp", f"shm://{name}-new/b", tmp_path / "c.npy")
    assert (sharr.attach(f"{name}-new/b") == array).all()
    assert (np.load(tmp_path / "c.npy") == array).all()


def test_cp_replaces_with_force_only(name):
    make(name, [1, 2])
    make(f"{name}-b", [3.0])
    old = sharr.attach(f"{name}-b")
    fails(1, "cp", name, f"{name}-b", told=f"{name}-b: File exists, -f replaces it")
    prints("cp", "-f", name, f"{name}-b")
    assert sharr.attach(f"{name}-b").tolist() == [1, 2] and old.tolist() == [3]
    fails(1, "cp", f"{name}-no", f"{name}-c", told=f"{name}-no: no such array")
    fails(1, "cp", name, f"/dev/shm/{name}-no/c", told=f"{name}-no/c: no such directory")


def test_into_a_directory(name, tmp_path):
    """As cp and mv have it."""
    make(f"{name}-a", [1])
    make(f"{name}/b", [2])
    np.save(tmp_path / "c.npy", [3])
    prints("cp", f"{name}-a", name)
    fails(1, "cp", f"{name}-a", name, told=f"{name}/{name}-a: File exists, -f replaces it")
    prints("cp", "-f", f"{name}-a", f"shm://{name}")
    prints("mv", f"{name}/b", "./", cwd=tmp_path)
    prints("put", "c.npy", name, cwd=tmp_path)
    prints("put", "c.npy", tmp_path / "..", cwd=tmp_path)
    assert sorted(os.listdir(SHM / name)) == ["c", f"{name}-a"]
    assert sorted(os.listdir(tmp_path)) == ["b", "c.npy"] and (tmp_path / "../c.npy").exists()
    (tmp_path / "../c.npy").unlink()
    with open(tmp_path / "c.npy", "rb") as file:
        fails(1, "put", "-", name, told=f"{name}: File exists, a namespace", stdin=file.read())
    for args in (("cp", f"{name}-a", "-"), ("mv", f"{name}-a", "-"), ("new", "-", "--shape", "1")):
        fails(2, *args, told="shm://-")


def test_copies_are_as_private_as_what_they_are_of(name, tmp_path):
    def mode(path):
        return path.stat().st_mode & 0o777

    make(name, [1, 2])
    os.chmod(SHM / name, 0o600)
    os.utime(SHM / name, (5, 5))
    umask = {"umask": 0o022}
    prints("cp", name, f"{name}-b", **umask)
    prints("get", name, tmp_path / "c", **umask)
    assert mode(SHM / f"{name}-b") == mode(tmp_path / "c") == 0o600
    os.chmod(SHM / f"{name}-b", 0o666)
    prints("cp", f"{name}-b", f"{name}-d", **umask)
    prints("get", "-f", f"{name}-b", tmp_path / "c", **umask)
    assert mode(SHM / f"{name}-d") == 0o644 and mode(tmp_path / "c") == 0o600
    prints("mv", name, tmp_path / "e", **umask)
    assert mode(tmp_path / "e") == 0o600 and (tmp_path / "e").stat().st_mtime == 5


def test_mv(name, tmp_path):
    make(name, [1, 2])
    make(f"{name}-b", [3.0])
    kept = sharr.attach(name)
    fails(1, "mv", name, f"{name}-b", told="File exists, -f replaces it")
    prints("mv", "-f", name, f"{name}-b")
    assert not exists(name)
    kept[0] = 7
    assert sharr.attach(f"{name}-b").tolist() == [7, 2]
    fails(1, "mv", name, f"{name}-c", told=f"{name}: no such array")
    assert os.stat(tmp_path).st_dev != os.stat(SHM).st_dev or pytest.skip("one file system")
    prints("mv", f"{name}-b", tmp_path / "moved.npy")  # a copy, to another file system
    assert np.load(tmp_path / "moved.npy").tolist() == [7, 2] and not exists(f"{name}-b")
    make(name, [1])
    fails(1, "mv", name, tmp_path / "moved.npy", told="File exists, -f replaces it")
    assert exists(name)


def test_mv_to_the_same_file(name, tmp_path):
    make(f"{tmp_path}/a", [1])
    os.link(tmp_path / "a", tmp_path / "b")
    for other in ("a", "b"):
        fails(1, "mv", "-f", "./a", f"./{other}", cwd=tmp_path, told="./a: is the same file as ./")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_errors_tell_names_as_they_were_given(name, tmp_path):
    make(name, [1])
    make(f"{tmp_path}/a", [1])
    for args in [
        ("show", "./no"), ("get", "./no", "x"), ("cp", "./no", name), ("mv", "./no", name),
        ("info", "./no"), ("rm", "./no"), ("put", "./no", name), ("ls", "./no"),
        ("ls", "./no/*"), ("show", "./no", "--plot"),
    ]:  # fmt: skip
        fails(1, *args, cwd=tmp_path, told=f"sharr: {args[1]}: ")
    for args in [
        ("cp", name, "./a"), ("mv", name, "./a"), ("cp", name, "./no/a"), ("mv", name, "./no/a"),
        ("put", "./a", "./a"),
    ]:  # fmt: skip
        fails(1, *args, cwd=tmp_path, told=f"sharr: {args[2]}: ")
    fails(1, "new", "./a", "--shape", "3", cwd=tmp_path, told="sharr: ./a: ")
    fails(1, "show", "./a", "5", cwd=tmp_path, told="sharr: ./a: ")
    fails(1, "show", "-1", told="sharr: -1: ")


def test_rm(name):
    for end in "abcd":
        make(f"{name}-{end}", 1)
    fails(1, "rm", f"{name}-no", f"{name}-a", told=f"{name}-no: no such array")
    assert not exists(f"{name}-a")
    prints("rm", "-f", f"{name}-no", f"{name}-no*")
    prints("rm", f"{name}-[b]")  # one match: no question
    assert not exists(f"{name}-b")
    fails(1, "rm", f"{name}-*", told="2 arrays match, and nobody is there to ask: use -f")
    assert exists(f"{name}-c") and exists(f"{name}-d")
    fails(1, "rm", f"{name}-x*", told="no array matches")
    prints("rm", "-f", f"{name}-*")
    assert not exists(f"{name}-c") and not exists(f"{name}-d")
    (SHM / f"{name}-text").write_text("no array")
    fails(1, "rm", "-f", f"{name}-text", told="not an array")
    assert exists(f"{name}-text")


@pytest.mark.parametrize(
    "answer, status, left",
    [(b"y\n", 0, 0), (b"n\n", 1, 12), (b"\n", 1, 12), (b"\x04", 1, 12), (b"\x03", 130, 12)],
)
def test_rm_asks(name, answer, status, left):
    for end in range(12):
        make(f"{name}-{end:02}", 1)
    actual, out = on_terminal("rm", f"{name}-*", answer=answer)
    assert actual == status and len(list(SHM.glob(f"{name}-*"))) == left
    assert f"{name}-09" in out and f"{name}-10" not in out and "and 2 more" in out
    assert "remove 12 arrays? [y/N]" in out


def test_rm_of_a_namespace(name):
    make(f"{name}/a", 1)
    make(f"{name}/b/c", 1)
    fails(1, "rm", name, told=f"{name}: is a namespace, -r removes it")
    fails(1, "rm", "-f", name, told="-r removes it")
    assert prints("ls", name) == "a\nb/c\n"
    prints("rm", "-r", name)
    assert not exists(f"{name}/a") and not exists(f"{name}/b/c")
    fails(1, "rm", "-r", f"{name}-no", told="no such array")
    for leaf in ("1/a", "2/x/a", "2/b"):
        make(f"{name}-{leaf}", 1)
    (SHM / f"{name}-3/empty").mkdir(parents=True)
    fails(1, "rm", "-r", f"{name}-?", told="3 arrays match")
    prints("rm", "-rf", f"{name}-2/x*")
    assert sorted(os.listdir(SHM / f"{name}-2")) == ["b"]
    prints("rm", "-r", "-f", f"{name}-?")
    assert not list(SHM.glob(f"{name}-*"))
    fails(1, "rm", "-r", f"{name}-?", told="no array matches")


def test_rm_of_everything_asks(name):
    make(f"{name}-a", 1)
    make(f"{name}-b", 1)
    fails(1, "rm", "-r", "shm://", told="nobody is there to ask")
    assert exists(f"{name}-a") and exists(f"{name}-b")


def test_copies_show_a_bar_on_a_terminal(name, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(1 << 22))
    impatient = [
        PYTHON, "-c",
        "import sys, sharr.cli; sharr.cli.BAR_AFTER = 0; sharr.cli.CHUNK = 1 << 22;"
        "sys.exit(sharr.cli.main())",
    ]  # fmt: skip
    path = {"PYTHONPATH": str(BUILD / "python")}
    for args in [
        ("put", tmp_path / "a.npy", name), ("cp", name, f"{name}-b"),
        ("get", name, tmp_path / "b.npy"),
    ]:  # fmt: skip
        status, out = on_terminal(*args, command=impatient, env=path)
        assert status == 0 and name in out and "100%" in out
        if args[0] != "get":
            prints("rm", args[2])
        else:
            (tmp_path / "b.npy").unlink()
        if args[0] == "put":
            prints(*args, command=impatient, env=path)  # no terminal, no bar
    assert (sharr.attach(name) == 0).all()


def test_a_bar_keeps_to_its_line(name, tmp_path):
    path = tmp_path / ("x" * 200)
    make(name, np.zeros(1 << 22))
    patient = "import sys, sharr.cli; sharr.cli.BAR_AFTER = 0; sys.exit(sharr.cli.main())"
    for term, shown in (("xterm", True), ("dumb", False)):
        env = {"PYTHONPATH": str(BUILD / "python"), "TERM": term}
        status, out = on_terminal("cp", "-f", name, path, command=[PYTHON, "-c", patient], env=env)
        assert status == 0 and ("100%" in out) is shown
        for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9?]*[a-zA-Z]", "", out)):
            assert len(line) <= 80


# new


def test_new(name):
    def made(*args):
        prints("new", name, *args)
        array = sharr.attach(name).copy("K")
        sharr.delete(name)
        return array

    array = made("--shape", "3,4", "--dtype", "f4")
    assert array.shape == (3, 4) and array.dtype == "f4" and not array.any()
    assert made("--shape", "(2, 3,)").shape == made("--shape", "2x3").shape == (2, 3)
    assert made("--shape", "5").dtype == "f8"
    assert made("--shape", "()").shape == made("--shape", "").shape == ()
    assert made("--shape", "0").size == 0
    assert made("--shape", "3,4", "--order", "F").flags.f_contiguous
    for dtype, fill, value in [
        ("f4", "2.5", 2.5), ("f8", "-inf", -np.inf), ("i2", "-7", -7), ("u8", "0xff", 255),
        ("?", "true", True), ("?", "0", False), ("c8", "1+2j", 1 + 2j), ("S3", "abc", b"abc"),
        ("U3", "é", "é"), ("M8[D]", "2020-02-03", np.datetime64("2020-02-03")), ("g", "0.5", 0.5),
    ]:  # fmt: skip
        array = made("--shape", "3", "--dtype", dtype, "--fill", fill)
        assert array.dtype == dtype and (array == value).all()
    assert made("--shape", "3", "--dtype", "[('x', 'f4'), ('y', 'i2')]").dtype.names == ("x", "y")
    assert made("--shape", "3", "--dtype", "f4,i2").dtype.itemsize == 6

    prints("new", name, "--shape", "1000,1000,1000", "--dtype", "u1", "--sparse")
    assert os.stat(SHM / name).st_blocks * 512 < 1 << 20
    fails(1, "new", name, "--shape", "3", told=f"{name}: File exists")
    fails(1, "new", f"{name}-b", "--shape", "10000000000000000", told="no space left")
    fails(1, "new", f"{name}-b", "--shape", "3", "--dtype", "O", told="object")
    assert not exists(f"{name}-b")


# show


def test_show_prints_as_numpy_does(name):
    array = make(name, np.arange(5000.0).reshape(50, 100) / 7)
    assert prints("show", name) == f"{array}\n" and "..." in prints("show", name)
    assert "..." not in prints("show", "-a", name)
    for text, part in [
        ("0", array[0]), ("-1,:3", array[-1, :3]), ("0, :5", array[0, :5]),
        ("::25, ::-50", array[::25, ::-50]), ("..., 0", array[..., 0]), ("[1:3, 7]", array[1:3, 7]),
        ("3,4", array[3, 4]), ("[0, 1]", array[[0, 1]]), ("[0, -1], [2, 3]", array[[0, -1], [2, 3]]), ("None, 1, -2:", array[None, 1, -2:]), (":0", array[:0]),
    ]:  # fmt: skip
        assert prints("show", name, text) == f"{part}\n"
    make(f"{name}-s", np.array([(1, 2.5), (3, 4)], [("x", "u1"), ("y", "f8")]))
    assert prints("show", f"{name}-s", "'y'") == "[2.5 4. ]\n"
    make(f"{name}-t", np.array("\x1b[31m", "U9"))
    assert prints("show", f"{name}-t") == "\\x1b[31m\n"
    fails(1, "show", f"{name}-no", told="no such array")


def test_show_refuses_what_is_no_slice(name):
    make(name, np.zeros((3, 4)))
    for text in [
        "", "a", "__import__('os').system('false')", "1 if 1 else 2", "0], a[1", "0)", "1.5", "1+1", "1is 2",
        "[0, 'a'], 2", "[1:2", "[[0, 1]]", ".T[0]", "(lambda: 0)()", "True", "0; 1", "--3x", "9" * 5000, "(" * 500, "b'x'",
    ]:  # fmt: skip
        fails(2, "show", "--", name, text, told="--help")
    for text in ["3", "0, 0, 0", "'x'", "..., ..."]:
        fails(1, "show", name, text, told=f"{name}: ")


def test_show_json(name):
    def data(array, *args):
        make(name, array)
        value = json.loads(prints("show", name, "--json", *args))
        sharr.delete(name)
        assert value["name"] == f"shm://{name}"
        return value["dtype"], value["shape"], value["data"]

    assert data(np.arange(6, dtype="i2").reshape(2, 3)) == (
        "int16", [2, 3], [[0, 1, 2], [3, 4, 5]],
    )  # fmt: skip
    assert data(np.arange(6.0).reshape(2, 3), "1, ::2") == ("float64", [2], [3, 5])
    assert data([1.5, np.nan, np.inf, -np.inf])[2] == [1.5, "NaN", "Infinity", "-Infinity"]
    assert data(np.array(2.5, "g"))[2] == 2.5
    assert data(np.array("-1e4000", "g"))[2] == "-1e+4000"
    assert data(np.array([0.1, 1e30], "f4"))[2] == [0.10000000149011612, 1.0000000150474662e30]
    assert data(np.array([3], "i8").view("M8"))[2] == [3]
    assert data([1 + 2j, np.nan])[2] == [[1, 2], ["NaN", 0]]
    assert data([True, False])[2] == [True, False]
    assert data(np.array([b"a\xff", b""]))[2] == ["a\\xff", ""]
    assert data(np.array(["é\n"]))[2] == ["é\n"]
    assert data(np.array(["2020-01-02", "NaT"], "M8[D]"))[2] == ["2020-01-02", "NaT"]
    assert data(np.array([[5, "NaT"]], "m8[ns]"))[2] == [[5, "NaT"]]
    assert data(np.array("NaT", "m8"))[2] == "NaT"
    assert data(np.array([5], "m8[s]")) == ("timedelta64[s]", [1], [5])
    assert data(np.frombuffer(b"ab", "V2"))[2] == ["6162"]
    assert data(np.array([(1, [2.5, np.nan])], [("x", "u1"), ("y", "f8", 2)]))[2] == [
        {"x": 1, "y": [2.5, "NaN"]}
    ]
    assert data(np.zeros((2, 0)))[1:] == ([2, 0], [[], []])


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


needs_drawing = pytest.mark.skipif(
    subprocess.run([PYTHON, "-c", "import matplotlib"], stderr=subprocess.DEVNULL).returncode != 0
    or shutil.which("chafa") is None,
    reason="needs matplotlib and chafa",
)


@needs_drawing
def test_image(name, tmp_path):
    from matplotlib.image import imread

    file = tmp_path / "x.png"
    make(f"{name}-f", np.linspace(0, 1, 20 * 30, dtype=">f4").reshape(20, 30))
    assert prints("show", "--image", f"{name}-f", "-o", file) == ""
    assert png_size(file) == (30, 20)
    prints("show", "--image", f"{name}-f", ":5, 10:", "-o", file, "--cmap", "gray")
    assert png_size(file) == (20, 5)
    pixels = imread(file)
    assert pixels[0, 0, 0] == 0 and pixels[4, 19, 0] == 1

    colours = np.zeros((4, 5, 3), "u1")
    colours[1, 2] = (255, 128, 0)
    make(f"{name}-c", colours)
    prints("show", "--image", f"{name}-c", "-o", file)
    assert png_size(file) == (5, 4)
    assert np.rint(imread(file)[1, 2, :3] * 255).tolist() == [255, 128, 0]
    make(f"{name}-a", np.ones((4, 5, 4), "f4"))
    prints("show", "--image", f"{name}-a", "-o", file)
    make(f"{name}-b", np.eye(3, dtype="?"))
    prints("show", "--image", f"{name}-b", "-o", file)
    make(f"{name}-n", np.full((3, 3), np.nan))
    prints("show", "--image", f"{name}-n", "-o", file)
    sharr.create(f"{name}-l", (30000, 10000), "u1", reserve=False)
    prints("show", "--image", f"{name}-l", "-o", file)
    assert png_size(file) == (2000, 2000)

    prints("show", "--image", f"{name}-f", "-o", "-1.png", cwd=tmp_path)
    assert png_size(tmp_path / "-1.png") == (30, 20)
    command = [SHARR, "show", "--image", f"{name}-f", "-o", "-"]
    piped = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout
    assert piped == (tmp_path / "-1.png").read_bytes() and not (tmp_path / "-").exists()
    status, out = on_terminal(*command[1:])
    assert status == 1 and "terminal" in out and "PNG" not in out

    out = prints("show", "--image", f"{name}-f")
    assert "float32" not in out and ">f4 (20, 30), 0 to 1" in out and len(out.splitlines()) > 5
    assert "\x1b[3" not in out
    status, out = on_terminal("show", "--image", f"{name}-f", env={"COLORTERM": "truecolor"})
    assert status == 0 and "\x1b[" in out and ">f4 (20, 30), 0 to 1" in out


@needs_drawing
def test_plot(name, tmp_path):
    file = tmp_path / "x.png"
    make(f"{name}-$x_", np.sin(np.arange(1000) / 50))
    prints("show", "--plot", f"{name}-$x_", "-o", file)
    assert png_size(file) == (800, 500)
    make(f"{name}-2", np.arange(30).reshape(3, 10))
    prints("show", "--plot", f"{name}-2", "-o", file)
    assert png_size(file) == (800, 500)
    sharr.create(f"{name}-l", 10**8, "u1", reserve=False)
    prints("show", "--plot", f"{name}-l", "-o", file)
    for one in (f"{name}-$x_", f"{name}-2", f"{name}-l"):
        assert " to " in prints("show", "--plot", one)
    status, out = on_terminal("show", "--plot", f"{name}-$x_", size=(20, 60))
    assert status == 0 and len(out.splitlines()) <= 20
    drawn = set(out) & {chr(code) for code in range(0x2801, 0x2900)}
    assert len(drawn) > 5


@needs_drawing
def test_a_plot_shows_numbers_that_stand_alone(name, tmp_path):
    from matplotlib.image import imread

    def colours(array):
        make(name, array)
        prints("show", "--plot", name, "-o", tmp_path / "x.png")
        sharr.delete(name)
        return (imread(tmp_path / "x.png")[60:430, 110:710, :3].std(axis=2) > 0.1).sum()

    assert colours([1, np.nan, 3, np.nan, 2, np.nan]) > 20 < colours([1.0, 2, 3])


@needs_drawing
def test_a_name_that_the_font_has_not(name, tmp_path):
    make(f"{name}-日本", [1, 2])
    prints("show", "--plot", f"{name}-日本", "-o", tmp_path / "x.png")


@needs_drawing
def test_a_plot_without_a_finite_number(name):
    make(name, [np.nan, np.inf])
    assert "nan to nan" in prints("show", "--plot", name)


@needs_drawing
def test_what_cannot_be_drawn(name, tmp_path):
    file = tmp_path / "x.png"
    make(f"{name}-1", np.zeros(3))
    make(f"{name}-2", np.zeros((30, 3, 5)))
    make(f"{name}-c", np.zeros((3, 3), "c8"))
    make(f"{name}-s", np.array(["a"]))
    make(f"{name}-0", np.zeros((0, 3)))
    make(f"{name}-far", [[1e308, -1e308]])
    for how, end in [
        ("--image", "1"), ("--image", "2"), ("--plot", "2"), ("--image", "c"), ("--plot", "c"),
        ("--plot", "s"), ("--plot", "0"), ("--image", "0"),
        ("--plot", "far"), ("--image", "far"),
    ]:  # fmt: skip
        fails(1, "show", how, f"{name}-{end}", "-o", file, told=f"{name}-{end}: ")
    fails(2, "show", "--image", f"{name}-c", "-o", file, "--cmap", "nosuch", told="nosuch")
    fails(1, "show", "--plot", f"{name}-1", "-o", tmp_path / "no" / "x.png", told="x.png: ")
    assert os.listdir(tmp_path) == []


# stat, mount, umount


def test_stat(name):
    make(name, np.ones(1 << 20, "u1"))
    (SHM / f"{name}-other").write_bytes(bytes(1 << 20))
    values = json.loads(prints("stat", "--json"))
    assert values["path"] == "/dev/shm" and values["count"] >= 1
    assert values["arrays"] >= 1 << 20 and values["others"] >= 1 << 20
    assert 0 < values["free"] <= values["total"] and values["available"] > 0
    lines = prints("stat").splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "total", "arrays", "others", "free", "available",
    ]  # fmt: skip
    assert lines[1].split()[1] == str(values["total"])
    assert re.search(r"total +[\d.]+[KMGT]", prints("stat", "-h"))


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="needs /dev/fuse")
@needs_root
def test_mount(name, tmp_path):
    make(f"{name}/a", [1, 2])
    point = tmp_path / "a mount"
    point.mkdir()
    env = {"PATH": f"{os.path.dirname(sharrfs_binary())}:{os.environ['PATH']}"}
    options = ["-o", "ro", "-o", "direct_io"]
    assert prints("mount", name, point.name, *options, cwd=tmp_path, env=env) == ""
    try:
        fails(1, "umount", point, env={"PATH": "/nonexistent"}, told="the program is missing")
        assert np.load(point / "a").tolist() == [1, 2]
        mounts = json.loads(prints("mount", "--json"))
        (ours,) = [one for one in mounts if one["mountpoint"] == str(point)]
        assert ours["source"] == f"shm://{name}" and "ro" in ours["options"].split(",")
        assert str(point) in prints("mount")
    finally:
        assert prints("umount", point.name, cwd=tmp_path) == ""
    assert os.listdir(point) == []
    fails(1, "umount", point, told="no mount of sharrfs")
    fails(1, "mount", name, tmp_path / "no\nsuch", env=env, told="no\\nsuch: No such file")
    fails(2, "mount", name, point, "-o", "bogus", env=env, told="bogus")
    for command in ("mount", "umount"):
        fails(2, command, "", env=env, told="a mount point is a directory", cwd=point)
    assert not os.path.ismount(point)


def test_mountpoints_that_are_hard_to_write(tmp_path):
    point = tmp_path / "a b\\日"
    point.mkdir()
    env = {"PYTHONIOENCODING": "utf-8"}
    prints("mount", "shm://", point)
    try:
        points = [mount["mountpoint"] for mount in json.loads(prints("mount", "--json", env=env))]
        assert str(point) in points
    finally:
        prints("umount", point)


@needs_root
def test_only_our_mounts_are_ended(tmp_path):
    subprocess.run(["mount", "-t", "tmpfs", "none", tmp_path], check=True)
    (tmp_path / "a").touch()
    fails(1, "umount", tmp_path, told="no mount of sharrfs")
    assert (tmp_path / "a").exists()
    subprocess.run(["umount", tmp_path], check=True)


def test_a_fill_tells_the_length(name):
    for dtype in ("U", "S", "str"):
        prints("new", name, "--shape", "2", "--dtype", dtype, "--fill", "abc")
        assert prints("show", name).count("abc") == 2
        sharr.delete(name)


def test_without_a_working_directory(name, tmp_path):
    for args in (("info", "./x"), ("ls", "./x*"), ("mount", ".")):
        gone = tmp_path / "gone"
        gone.mkdir()
        fails(1, *args, told="the working directory is gone", cwd=gone, preexec_fn=lambda: gone.rmdir())


def test_ctrl_c_while_it_starts():
    for delay in (0.03, 0.06, 0.09):
        process = subprocess.Popen([SHARR, "ls"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGINT)
        err = process.communicate()[1]
        # Before it has come to the command, Python itself may say something, and while it learns of
        # signals.
        assert b"numpy" not in err, err
        assert b"bin/sharr" not in err or b"import signal" in err, err


@pytest.mark.parametrize("dtype, fill", [
    ("M8[ns]", "3000-01-01"), ("M8[D]", "2020-01-01T12"), ("m8[s]", "99999999999999999999"),
    ("U3", "abcdef"), ("S2", "abcdef"), ("S2", "é"), ("f2", "1e10"), ("f4", "1e300"),
    ("c8", "1e300"),
])  # fmt: skip
def test_a_fill_that_would_be_another_value(name, dtype, fill):
    fails(2, "new", name, "--shape", "2", "--dtype", dtype, "--fill", fill, told="no value for")
    assert not exists(name)


@pytest.mark.parametrize("dtype, fill", [
    ("M8[D]", "NaT"), ("m8[s]", "NaT"), ("m8[s]", "-5"), ("M8[ns]", "2020-01-01"), ("U3", "é"),
    ("S2", "ab"), ("f4", "0.1"), ("f4", "-inf"), ("c8", "1+2j"), ("f16", "1e4000"),
])  # fmt: skip
def test_fills(name, dtype, fill):
    prints("new", name, "--shape", "2", "--dtype", dtype, "--fill", fill)
    wanted = np.array([fill] * 2).astype(dtype) if dtype != "f16" else [np.longdouble(fill)] * 2
    np.testing.assert_array_equal(sharr.attach(name), wanted)


@needs_drawing
@pytest.mark.parametrize("option, shape", [("--plot", (1_000_001,)), ("--image", (5000, 2000))])
def test_a_drawing_knows_the_extremes(name, option, shape):
    sharr.create(name, shape, "u1")[(1,) * len(shape)] = 99
    assert "0 to 99" in prints("show", option, name).splitlines()[-1]


# What others do meanwhile


def meddled(function, step, *args):
    """Run the command in a Python where `step` follows each call of the function."""
    code = f"""
        import os, sys, sharr, numpy as np
        from sharr import cli
        function = {function}
        def meddled(*args, **kwargs):
            result = function(*args, **kwargs)
            {step}
            return result
        {function} = meddled
        sys.exit(cli.main())
    """
    return (PYTHON, "-c", textwrap.dedent(code), *args)


def test_mv_keeps_what_replaced_its_source(name, tmp_path):
    make(name, [1, 2])
    step = f"sharr.put({name!r}, [3], replace=True)"
    command = meddled("cli.copy", step)
    env = {"PYTHONPATH": str(BUILD / "python")}
    fails(1, "mv", name, tmp_path / "a.npy", command=command, env=env, told="replaced while")
    assert sharr.attach(name).tolist() == [3] and np.load(tmp_path / "a.npy").tolist() == [1, 2]


@pytest.mark.parametrize("nameless", [True, False])
def test_get_keeps_a_file_that_came_meanwhile(name, tmp_path, nameless):
    make(name, [1, 2])
    step = "open('a.npy', 'w').write('precious')"
    if not nameless:
        step += "; os.O_TMPFILE = os.O_DIRECTORY"  # as a system without it takes the flag
    command = meddled("cli._core.format_header", step)
    env = {"PYTHONPATH": str(BUILD / "python")}
    fails(1, "get", name, "a.npy", command=command, env=env, cwd=tmp_path, told="File exists")
    assert (tmp_path / "a.npy").read_text() == "precious" and os.listdir(tmp_path) == ["a.npy"]


def test_get_that_is_killed_leaves_nothing(name, tmp_path):
    make(name, np.zeros(1000))
    process = subprocess.Popen(
        [*meddled("cli._core.format_header", "os.kill(os.getpid(), 9)"), "get", name, "a.npy"],
        env=ENVIRONMENT | {"PYTHONPATH": str(BUILD / "python")}, cwd=tmp_path,
    )  # fmt: skip
    assert process.wait(60) == -9 and os.listdir(tmp_path) == []


def test_get_to_what_is_no_file(name):
    make(name, [1, 2])
    for target in ("/dev/stdout", ">(cat)"):
        done = subprocess.run(["bash", "-c", f"{SHARR} get {name} {target} | cat; wait"],
                              stdout=subprocess.PIPE, check=True)  # fmt: skip
        assert done.stdout.startswith(b"\x93NUMPY")


def test_rm_asks_before_it_removes_anything(name):
    for letter in "abc":
        make(f"{name}-{letter}", [1])
    status, text = on_terminal("rm", f"{name}-a", f"{name}-[bc]", answer=b"n\n")
    assert status == 1 and "remove 2 arrays?" in text and exists(f"{name}-a")


# Completion


def complete(shell_line, shell="bash"):
    """What bash would offer for the line: a script sets what readline would set."""
    script = f"""
    PATH={BUILD / "bin"}:$PATH
    eval "$(sharr completion bash)"
    compopt() {{ echo "compopt $*"; }}
    COMP_LINE=$1 COMP_POINT=${{#1}}
    [[ $(complete -p sharr) == *_sharr* ]] || exit 1
    _sharr sharr "${{1##*[ :]}}"
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "-c", script, "bash", shell_line], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout.splitlines()


def test_completion_in_bash(name):
    for end in ("-a", "-b", "/c/d", "-with space", "-new\nline"):
        make(name + end, 1)
    assert set(complete("sharr ")) >= {"ls", "info", "put", "completion"}
    assert complete("sharr sh") == ["show"]
    assert "--json" in complete("sharr ls --")
    assert complete("sharr completion z") == ["zsh"]
    names = ["compopt -o nospace", f"{name}-a", f"{name}-b", f"{name}-with\\ space", f"{name}/"]
    for start in ("ls", "info", "show", "rm -f", "get", "cp x", "put x.npy", "show -a"):
        assert complete(f"sharr {start} {name}") == names, start
    assert complete(f"sharr ls {name}/") == ["compopt -o nospace", f"{name}/c/"]
    assert complete(f"sharr ls {name}/c/") == [f"{name}/c/d"]
    assert complete(f"sharr ls shm://{name}-a") == [f"//{name}-a"]
    assert complete(f"sharr info {name}-a {name}-b") == [f"{name}-b"]
    assert complete("sharr put ")[0] == complete("sharr ls ./")[0] == "compopt -o default"


def test_completion_in_an_interactive_bash(name):
    names = [f"{name}/only-one", f"{name}/my data", f"{name}:xx", "xx"]
    for one in names:
        make(one, [1, 2])
    master, slave = pty.openpty()
    process = subprocess.Popen(
        ["bash", "--norc", "-i"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env=ENVIRONMENT | {"PATH": f"{BUILD / 'bin'}:{os.environ['PATH']}", "PS1": "> "},
    )  # fmt: skip
    os.close(slave)
    got = ""

    def expect(text):
        nonlocal got
        while text not in got:
            assert select.select([master], [], [], 60)[0], got
            got += os.read(master, 65536).decode()
        got = got.partition(text)[2]

    os.write(master, b'eval "$(sharr completion bash)"; echo re""ady\n')
    expect("ready")
    try:
        for number, (typed, meant) in enumerate([
            (f"{name}/o", names[0]), (f"shm://{name}/o", names[0]), (f'"{name}/my', names[1]),
            (f"'{name}/my", names[1]), (f"{name}/my\\ d", names[1]), (f'"{name}/my d', names[1]),
            (f"{name}:x", names[2]), (f"'{name}:x", names[2]),
        ]):  # fmt: skip
            os.write(master, f"sharr info --json {typed}\t".encode())
            os.write(master, f"\x05; echo e''nd-{number}\n".encode())
            expect(f'"name": "shm://{meant}"')
            expect(f"end-{number}")
    finally:
        sharr.delete("xx")
    os.write(master, b"exit\n")
    assert process.wait(60) == 0
    os.close(master)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_completion_in_zsh(name):
    make(f"{name}/d", 1)
    script = f"""
    PATH={BUILD / "bin"}:$PATH
    compdef() {{ echo "compdef $*"; }}
    compadd() {{ echo "compadd $* : $spaces $values"; }}
    eval "$(sharr completion zsh)"
    words=(sharr show {name}) CURRENT=3
    _sharr
    words=(sharr show {name}/) CURRENT=3
    _sharr
    """
    done = subprocess.run(["zsh", "-fc", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "compdef _sharr sharr", f"compadd -S  -a spaces : {name}/ ",
        f"compadd -a values :  {name}/d",
    ] and done.stderr == ""  # fmt: skip
