"""The command ``sharr``.

What only some commands need is imported there, so that the others answer at once. A command
returns its exit status: None or 0, or 1 when an operation failed; the others were still done.
"""

import contextlib
import errno
import fnmatch
import json
import math
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import click
import sharr
from sharr import _core

VERSION = "0.1.0"
CHUNK = 16 << 20  # bytes that are copied between two looks at the progress bar
BAR_AFTER = 1.0  # seconds
POINTS, PIXELS = 4000, 2048  # of one line and one side of a picture; more are strided down


class Failure(Exception):
    """An operation that failed, with the name and the reason to tell."""

    def __init__(self, name, message):
        super().__init__(name, message)
        self.name, self.message = name, message


# What is printed


def escape(text, backslash=True):
    """Text that breaks no line, terminal or encoding: a name may hold any byte but NUL."""
    if text.isprintable() and "\\" not in text:
        return text
    out = []
    for char in text:
        if "\udc80" <= char <= "\udcff":  # a byte that is no UTF-8
            out.append(f"\\x{ord(char) - 0xDC00:02x}")
        elif char == "\\" and backslash:
            out.append("\\\\")
        elif char.isprintable():
            out.append(char)
        else:
            out.append(char.encode("unicode_escape").decode())
    return "".join(out)


def complain(name, message):
    prefix = "sharr:"
    if sys.stderr.isatty() and wants_color():
        prefix = click.style(prefix, fg="red")
    name = f"{escape(name)}: " if name else ""
    print(prefix, name + escape(message, False), file=sys.stderr)


def wants_color():
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def style(text, **styles):
    return click.style(text, **styles) if sys.stdout.isatty() and wants_color() else text


def style_name(text):
    space, slash, name = text.rpartition("/")
    return style(space + slash, fg="blue", bold=True) + name if slash else name


def width(text):
    if text.isascii():
        return len(text)
    from wcwidth import wcswidth

    return wcswidth(text)


def print_table(header, rows, right=()):
    """Print aligned columns; those named in `right` to the right."""
    import tabulate

    tabulate.MIN_PADDING = 0  # beside the header
    names = [number for number, title in enumerate(header) if title == "NAME"]
    rows = [
        [style_name(cell) if number in names else cell for number, cell in enumerate(row)]
        for row in rows
    ]
    table = tabulate.tabulate(
        rows,
        [style(title, bold=True) for title in header],
        tablefmt="plain",
        disable_numparse=True,
        colalign=["right" if title in right else "left" for title in header] if rows else None,
    )
    for line in table.split("\n"):
        print(line.rstrip(" "))


def print_columns(texts):
    """Print as many columns as the terminal takes, down and then across, as ls does."""
    room = shutil.get_terminal_size().columns
    for lines in range(1, len(texts) + 1):
        columns = [texts[start : start + lines] for start in range(0, len(texts), lines)]
        widths = [max(map(width, column)) for column in columns]
        if sum(widths) + 2 * (len(columns) - 1) <= room or lines == len(texts):
            break
    for line in range(lines if texts else 0):
        cells = [column[line] for column in columns if line < len(column)]
        padding = [" " * (wide - width(text)) for text, wide in zip(cells, widths)]
        padding[len(cells) - 1] = ""
        print("  ".join(style_name(text) + spaces for text, spaces in zip(cells, padding)))


def print_json(value, indent=2):
    # A byte that is no UTF-8 stays a lone surrogate, \udcXX, which os.fsencode() turns back.
    print(json.dumps(value, indent=indent, allow_nan=False))


def size_text(size, human):
    if not human or size < 1024:
        return str(size)
    for unit in "KMGTPE":
        size /= 1024
        if size < 9.95:
            return f"{size:.1f}{unit}"
        if size < 1023.5 or unit == "E":
            return f"{size:.0f}{unit}"


# Names


def full(name):
    """The name as the library takes it: ./a and ../a are paths here."""
    if name not in (".", "..") and not name.startswith(("./", "../")):
        return name
    return absolute(name)


def absolute(path):
    try:
        return os.path.abspath(path)
    except FileNotFoundError as error:
        raise Failure(path, "the working directory is gone") from error


def uri(name):
    name = full(name)
    return name if "://" in name else ("file://" if name.startswith("/") else "shm://") + name


def path_of(name):
    scheme, _, rest = uri(name).partition("://")
    return rest if scheme == "file" else "/dev/shm/" + rest


def short(name):
    """The shortest name that is understood: a for shm://a, /data/a for file:///data/a."""
    return name.partition("://")[2]


GLOB = re.compile(r"[*?]|\[.+\]", re.DOTALL)


def is_pattern(name):
    return bool(GLOB.search(name)) and not os.path.lexists(path_of(name))


def split_pattern(pattern):
    """The directory that a pattern is in, what its names begin with there, and what is wanted."""
    scheme, separator, text = pattern.rpartition("://")
    # What comes before the pattern is a directory, which may have brackets in its name.
    head, slash, _ = text[: GLOB.search(text).start()].rpartition("/")
    where = scheme + separator + head + slash
    if uri(where).startswith("file://"):
        where = absolute(path_of(where))
    wanted = text[len(head + slash) :]
    base = short(uri(where)).rstrip("/") + "/" if head + slash else ""
    return where, base, wanted


def matching(pattern):
    where, base, wanted = split_pattern(pattern)
    try:
        found = sharr.list(where or "shm://")
    except OSError as error:
        raise Failure(pattern, error.strerror) from error
    return [
        info
        for info in found
        if fnmatch.fnmatchcase(short(info.name).removeprefix(base), wanted)
    ]


def matching_namespaces(pattern):
    """Those that the pattern fits, and in none of them another."""
    where, base, wanted = split_pattern(pattern)
    top = path_of(where or "shm://")
    scheme = "file://" if uri(where or "shm://").startswith("file://") else "shm://"
    found = []
    for directory, names, _ in os.walk(top):
        below = os.path.relpath(directory, top)
        for name in list(names):
            path = name if below == "." else f"{below}/{name}"
            if fnmatch.fnmatchcase(path, wanted):
                names.remove(name)
                found.append(f"{scheme}{base}{path}")
    return found


def matching_some(pattern):
    found = matching(pattern)
    if not found:
        raise Failure(pattern, "no array matches")
    return found


def reason(name, error):
    """The name and the message to tell of an error that an operation on `name` raised."""
    if isinstance(error, Failure):
        return error.name, error.message
    if not isinstance(error, OSError):
        return name, str(error) or type(error).__name__
    told = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else name
    if told == full(name):
        told = name
    if isinstance(error, FileNotFoundError) and told == name:
        is_file = "/" not in name and os.path.exists(name)
        return name, "no such array" + (f"; the file is ./{name}" if is_file else "")
    if isinstance(error, IsADirectoryError):
        return told, "is a namespace, no array"
    return told, error.strerror or str(error)


ERRORS = (Failure, OSError, ValueError, TypeError, MemoryError)


def each(names, action):
    """Do the action for every name, tell which ones failed, and return the exit status."""
    status = 0
    for name in names:
        try:
            action(name)
        except ERRORS as error:
            complain(*reason(name, error))
            status = 1
    return status


REPLACES = ", -f replaces it"


def within(new_name, base):
    """As cp(1) has it: where the new name is a directory's, `base` in that."""
    if not os.path.isdir(path_of(new_name)):
        return new_name
    return new_name + base if new_name.endswith("/") else f"{new_name}/{base}"


@contextlib.contextmanager
def telling(name):
    """Turn what an operation on an array raises into a Failure."""
    try:
        yield
    except ERRORS as error:
        raise Failure(*reason(name, error)) from error


@contextlib.contextmanager
def telling_new(name, hint=REPLACES):
    """The same for an array that is being made."""
    with telling(name):
        try:
            yield
        except FileExistsError as error:
            if os.path.isdir(path_of(name)):
                hint = ", a namespace"
            raise Failure(name, error.strerror + hint) from error
        except FileNotFoundError as error:
            raise Failure(name, "no such directory") from error


# Completion

BASH = """\
_sharr() {
    local kind value quote=${COMP_WORDS[COMP_CWORD]:0:1} before=
    COMPREPLY=()
    while IFS=$'\\t' read -r kind value; do
        case $kind in
            file) compopt -o default ;;
            dir) compopt -o dirnames ;;
            typed)
                # Outside of quotes readline completes from the last colon on.
                if [[ $COMP_WORDBREAKS == *:* && $quote != [\\'\\"] ]]; then
                    before=${value%"${value##*:}"}
                fi
                ;;
            *)
                if [[ $value == */ ]]; then compopt -o nospace; fi
                value=${value#"$before"}
                # What is in quotes already needs no more, but for what counts in double ones.
                case $quote in
                    \\') ;;
                    '"') value=$(sed 's/[\\"$`]/\\\\&/g' <<<"$value") ;;
                    *) value=$(printf %q "$value") ;;
                esac
                COMPREPLY+=("$value")
                ;;
        esac
    done < <(_SHARR_COMPLETE="${COMP_LINE:0:COMP_POINT}" "$1" 2>/dev/null)
}
complete -F _sharr sharr
"""

ZSH = """\
#compdef sharr
_sharr() {
    local kind value
    local -a spaces values
    while IFS=$'\\t' read -r kind value; do
        case $kind in
            file) _files ;;
            dir) _files -/ ;;
            typed) ;;
            *) if [[ $value == */ ]]; then spaces+=("$value"); else values+=("$value"); fi ;;
        esac
    done < <(_SHARR_COMPLETE="${(j: :)words[1,CURRENT]}" "${words[1]}" 2>/dev/null)
    if (( $#spaces )); then compadd -S '' -a spaces; fi
    if (( $#values )); then compadd -a values; fi
}
if [[ $funcstack[1] == _sharr ]]; then _sharr "$@"; else compdef _sharr sharr; fi
"""


def print_completions(line):
    """Print what the command line could go on with: a kind, a tab and a word in each line.

    The first has the kind "typed" and what the others are to go on from.
    """
    from click.shell_completion import ShellComplete, split_arg_string

    end = "\0"  # of the word that is being typed, where that ends in a blank or is empty
    words = split_arg_string(line + end)[1:]
    typed = words.pop().removesuffix(end) if words else ""
    print("typed", typed, sep="\t")
    for item in ShellComplete(cli, {}, "sharr", "").get_completions(words, typed):
        if item.value.isprintable():
            print(item.type, item.value, sep="\t")


def complete_names(context, parameter, typed):
    """Names up to the next slash, as shells complete paths."""
    from click.shell_completion import CompletionItem

    if typed.startswith(("/", "./", "../", "~")):
        return [CompletionItem(typed, type="file")]
    scheme = "shm://" if typed.startswith("shm://") else ""
    found = {}
    with contextlib.suppress(OSError):
        for info in sharr.list():
            name = scheme + short(info.name)
            if name.startswith(typed):
                head, slash, _ = name[len(typed) :].partition("/")
                found[typed + head + slash] = None
    return [CompletionItem(name) for name in found]


# The command and what its commands share


class Commands(click.Group):
    def list_commands(self, context):
        return list(self.commands)  # in the order below


class Show(click.Command):
    def parse_args(self, context, args):
        """Let a SLICE begin with a minus sign and a digit, as no option does."""
        end = args.index("--") if "--" in args else len(args)
        hidden = [  # by what no argument has
            "\0" + arg if number < end and arg[:1] == "-" and arg[1:2].isdigit() else arg
            for number, arg in enumerate(args)
        ]
        rest = super().parse_args(context, hidden)
        for key, value in context.params.items():
            if isinstance(value, str):
                context.params[key] = value.removeprefix("\0")
        return rest


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="A NAME is shm://a, short a, or a path: /data/a.npy, ./a.npy. Most commands say more "
    "with --help. Exit status: 0, 1 if something failed, 2 if the command line is wrong.",
)
@click.version_option(VERSION, "-V", "--version", prog_name="sharr", message="%(prog)s %(version)s")
def cli():
    """Named NumPy arrays in shared memory."""


HUMAN_TOO = {"help_option_names": ["--help"]}  # there -h is for sizes

name_argument = click.argument("name", shell_complete=complete_names)
names_argument = click.argument(
    "names", metavar="NAME...", nargs=-1, required=True, shell_complete=complete_names
)


def check_new_name(context, parameter, name):
    if name == "-":
        raise click.BadParameter("- is for files only; an array of that name is shm://-")
    return name


new_name_options = {"shell_complete": complete_names, "callback": check_new_name}
new_name_argument = click.argument("new_name", **new_name_options)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
human_option = click.option(
    "-h", "--human-readable", "human", is_flag=True, help="Print sizes like 1.5K, 230M, 2G."
)
force_option = click.option("-f", "--force", is_flag=True, help="Replace what is there.")


def modified(info):
    """When the file was last written, or None if somebody has just removed it."""
    try:
        return os.stat(path_of(info.name)).st_mtime
    except OSError:
        return None


def dtype_text(info, longest=None):
    try:
        text = str(info.dtype)
    except sharr.FormatError:  # one that only a later NumPy has
        return "?"
    return text if longest is None or len(text) <= longest else text[: longest - 3] + "..."


def describe(info):
    moment = modified(info)
    if moment is not None:
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
    return {
        "name": info.name,
        "dtype": dtype_text(info),
        "shape": info.shape,
        "order": info.order,
        "nbytes": info.nbytes,
        "modified": moment,
    }


def moment_text(moment):
    return "-" if moment is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


@cli.command(context_settings=HUMAN_TOO)
@click.argument("wheres", metavar="[WHERE]...", nargs=-1, shell_complete=complete_names)
@click.option("-l", "long", is_flag=True, help="Print dtype, shape, size and time of writing.")
@human_option
@click.option("-S", "by_size", is_flag=True, help="Largest first.")
@click.option("-t", "by_time", is_flag=True, help="Newest first.")
@click.option("-r", "backwards", is_flag=True, help="Reverse the order.")
@click.option("-1", "one", is_flag=True, help="One name in a line, on a terminal too.")
@click.option("-0", "--null", is_flag=True, help="Print plain names that end with NUL.")
@json_option
def ls(wheres, long, human, by_size, by_time, backwards, one, null, as_json):
    """List arrays.

    WHERE is shm:// if not given, a namespace, a directory (/data, ./data), an array, or a pattern
    in quotes. What is in namespaces below is listed, too; a pattern's * matches any text, slashes
    too. Names of one namespace are printed without it.
    """
    found = {}  # info by what is printed for it

    def look(where):
        if is_pattern(where):
            return found.update((short(info.name), info) for info in matching_some(where))
        try:
            infos = sharr.list(full(where))
        except NotADirectoryError:
            infos = [sharr.info(full(where))]
            return found.update((short(info.name), info) for info in infos)
        except FileNotFoundError as error:
            raise Failure(where, "no such array, namespace or directory") from error
        base = short(uri(where)).rstrip("/") + "/" if len(wheres) == 1 and where != "shm://" else ""
        found.update((short(info.name).removeprefix(base), info) for info in infos)

    status = each(wheres or ["shm://"], look)
    rows = sorted(found.items())
    if by_size:
        rows.sort(key=lambda row: -row[1].nbytes)
    if by_time:
        rows.sort(key=lambda row: -(modified(row[1]) or 0))
    if backwards:
        rows.reverse()
    if as_json:
        print_json([describe(info) for _, info in rows])
    elif null:
        sys.stdout.buffer.write(b"".join(os.fsencode(name) + b"\0" for name, _ in rows))
    elif long:
        lines = [
            (
                escape(dtype_text(info, 40), False), str(info.shape), size_text(info.nbytes, human),
                moment_text(modified(info)), escape(name),
            )
            for name, info in rows
        ]  # fmt: skip
        if lines:
            print_table(("DTYPE", "SHAPE", "SIZE", "MODIFIED", "NAME"), lines, right=("SIZE",))
    elif sys.stdout.isatty() and not one:
        print_columns([escape(name) for name, _ in rows])
    else:
        for name, _ in rows:
            print(style_name(escape(name)))
    return status


@cli.command(context_settings=HUMAN_TOO)
@names_argument
@human_option
@json_option
def info(names, human, as_json):
    """Tell what arrays are.

    A NAME may be a pattern in quotes.
    """
    found = []

    def look(name):
        names = [one.name for one in matching_some(name)] if is_pattern(name) else [full(name)]
        found.extend(map(sharr.info, names))

    status = each(names, look)
    descriptions = []
    for one in found:
        path = path_of(one.name)
        allocated = None
        with contextlib.suppress(OSError):
            allocated = os.stat(path).st_blocks * 512
        descriptions.append(
            describe(one)
            | {"allocated": allocated, "huge": one.huge, "format": one.format, "offset": one.offset, "path": path}
        )
    if as_json:
        print_json(descriptions)
        return status
    for number, (one, description) in enumerate(zip(found, descriptions)):
        if number:
            print()
        allocated = description["allocated"]
        huge = f", {size_text(one.huge, human)} in huge pages" if one.huge else ""
        lines = {
            "name": escape(one.name),
            "dtype": escape(dtype_text(one), False),
            "shape": one.shape,
            "order": one.order,
            "size": size_text(one.nbytes, human),
            "allocated": "-" if allocated is None else size_text(allocated, human) + huge,
            "modified": moment_text(modified(one)),
            "format": f"{one.format}, data at {one.offset}",
            "path": escape(description["path"]),
        }
        for key, value in lines.items():
            print(style(f"{key:<9}", bold=True), value)
    return status


# Copies


class Progress:
    """A bar on a terminal for what takes more than a second."""

    def __init__(self, label, total):
        self.label, self.total = escape(label), total
        self.done, self.bar, self.start = 0, None, time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar:
            self.bar.__exit__(*error)

    def advance(self, count):
        self.done += count
        if self.bar:
            self.bar.update(count)
        elif (
            sys.stderr.isatty()
            and os.environ.get("TERM") != "dumb"
            and time.monotonic() - self.start >= BAR_AFTER
        ):
            # The bar begins its line anew with each step, which a second line would spoil.
            room = max(shutil.get_terminal_size().columns - 50, 10)
            while width(self.label) > room:
                self.label = "…" + self.label[2:]
            self.bar = click.progressbar(
                length=self.total, label=self.label, file=sys.stderr, width=0,
            )  # fmt: skip
            self.bar.__enter__()
            self.bar.update(self.done)


def opened(name):
    """What an array is, and a stream of its data.

    Not mapped, because to read a hole through a mapping takes memory, and kills where none is left.
    """
    fd, info = _core.open_array(full(name))
    stream = open(fd, "rb", buffering=0)
    stream.seek(info.offset)
    return info, stream


def read_header(stream):
    """The same of an NPY file that comes through a pipe."""
    head = stream.read(12)
    return _core.parse_header(head + stream.read(_core.header_size(head) - len(head))), stream


def read_data(source, info, stream, label, buffer):
    """Read all data into the buffer, or in parts if it is smaller; yield what came each time."""
    done, step = 0, min(CHUNK, len(buffer))
    with Progress(label, info.nbytes) as progress:
        while done < info.nbytes:
            at = done if len(buffer) == info.nbytes else 0
            view = buffer[at : at + min(step, info.nbytes - done)]
            count = stream.readinto(view)
            if not count:
                raise Failure(source, f"truncated: {done} of {info.nbytes} bytes of data")
            yield view[:count]
            done += count
            progress.advance(count)


@contextlib.contextmanager
def at_most(mode):
    """Files are made with the permissions `mode`, less the umask."""
    umask = os.umask(0o777)
    os.umask(umask | (0o777 & ~mode))
    try:
        yield
    finally:
        os.umask(umask)


def copy(source, info, stream, new_name, replace, mode=0o666):
    build = sharr.build(full(new_name), info.shape, info.dtype, order=info.order, replace=replace)
    with telling_new(new_name), at_most(mode), build as array:
        if info.nbytes:
            data = memoryview((array.T if info.order == "F" else array).reshape(-1).view("u1"))
            for _ in read_data(source, info, stream, new_name, data):
                pass


@cli.command()
@click.argument("file", metavar="FILE.npy", type=click.Path(allow_dash=True, readable=False))
@click.argument("name", **new_name_options)
@force_option
def put(file, name, force):
    """Make an array of an NPY file.

    FILE.npy is - for the standard input. Where NAME is a namespace or a directory, the array gets
    the name of the file in it.
    """
    try:
        if file == "-":
            info, stream = read_header(sys.stdin.buffer)
        elif os.path.exists(file) and not os.path.isfile(file):
            info, stream = read_header(open(file, "rb"))
        else:
            info, stream = opened(os.path.abspath(file))
    except OSError as error:
        raise Failure(file, error.strerror) from error
    base = os.path.basename(file)
    if not uri(name).startswith("file://"):
        base = base.removesuffix(".npy")
    with stream:
        copy(file, info, stream, name if file == "-" else within(name, base), force)


@contextlib.contextmanager
def whole_file(file, force):
    """A stream that becomes `file` when the block ends, or nothing if it raises or is killed.

    A file that it replaces leaves it its owner and permissions, as with cp(1).
    """
    if os.path.exists(file) and not os.path.isfile(file):  # a pipe or a device: not to be replaced
        with open(file, "wb") as stream:
            yield stream
        return
    taken = FileExistsError(errno.EEXIST, "File exists" + REPLACES, file)
    target = os.path.realpath(file)
    if os.path.lexists(target) and not force:
        raise taken
    directory = os.path.dirname(target)
    part = os.path.join(directory, f".sharr-part-{os.urandom(8).hex()}")
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_WRONLY, 0o666)
        nameless = True
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise type(error)(error.errno, error.strerror, file) from error
        fd = os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        nameless = False
    try:
        with open(fd, "wb") as stream:
            with contextlib.suppress(FileNotFoundError):
                old = os.stat(target)
                with contextlib.suppress(PermissionError):
                    os.fchown(fd, old.st_uid, old.st_gid)
                os.fchmod(fd, old.st_mode & 0o777)
            yield stream
            stream.flush()
            if nameless:
                # Of os.link only this form follows the symbolic link.
                os.link(f"/proc/self/fd/{fd}", part if force else target, src_dir_fd=fd)
        if force:
            os.rename(part, target)
        elif not nameless:
            give_name(part, target)
    except FileExistsError:
        raise taken from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)


@contextlib.contextmanager
def output_stream(file, force):
    """The standard output for -, unless it is a terminal, or a whole_file()."""
    if file == "-" and sys.stdout.isatty():
        raise Failure("", "the standard output is a terminal, which cannot take this")
    try:
        with contextlib.nullcontext(sys.stdout.buffer) if file == "-" else whole_file(
            file, force
        ) as stream:
            yield stream
    except OSError as error:
        raise Failure(file, error.strerror) from error


def give_name(part, target):
    try:
        os.link(part, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        os.rename(part, target)  # a file system without links


@cli.command()
@name_argument
@click.argument("file", metavar="FILE.npy", type=click.Path(allow_dash=True))
@force_option
def get(name, file, force):
    """Write an array to an NPY file.

    The file appears when it is whole. FILE.npy is - for the standard output, or a directory, where
    the file gets the name of the array.
    """
    with telling(name):
        info, stream = opened(name)
    if os.path.isdir(file):
        base = os.path.basename(path_of(name))
        file = os.path.join(file, base if base.endswith(".npy") else base + ".npy")
    buffer = memoryview(bytearray(min(CHUNK, info.nbytes)))
    mode = os.fstat(stream.fileno()).st_mode
    with stream, at_most(mode), output_stream(file, force) as output:
        output.write(_core.format_header(info))
        for data in read_data(name, info, stream, name, buffer):
            output.write(data)


@cli.command()
@name_argument
@new_name_argument
@force_option
def cp(name, new_name, force):
    """Copy an array.

    Where NEW_NAME is a namespace or a directory, to the same name in it.
    """
    new_name = within(new_name, os.path.basename(path_of(name)))
    with telling(name):
        info, stream = opened(name)
    with stream:
        copy(name, info, stream, new_name, force, os.fstat(stream.fileno()).st_mode)


@cli.command()
@name_argument
@new_name_argument
@force_option
def mv(name, new_name, force):
    """Give an array another name.

    Where NEW_NAME is a namespace or a directory, the same name in it. To another file system it is
    copied.
    """
    new_name = within(new_name, os.path.basename(path_of(name)))
    with telling(name):
        info, stream = opened(name)

    def is_still_there():
        """Who holds a file open knows that no other gets its number."""
        _, now = opened(name)
        with now:
            return os.path.samestat(*(os.fstat(one.fileno()) for one in (stream, now)))

    with stream:
        with telling_new(new_name):
            try:
                sharr.rename(full(name), full(new_name), replace=force)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
            else:
                with contextlib.suppress(OSError):
                    if is_still_there():  # as rename(2) has it
                        raise Failure(name, f"is the same file as {new_name}, so both stay")
                return
        status = os.fstat(stream.fileno())
        copy(name, info, stream, new_name, force, status.st_mode)
        with telling(new_name):
            os.utime(path_of(new_name), ns=(status.st_atime_ns, status.st_mtime_ns))
        with telling(name):
            if not is_still_there():
                raise Failure(name, "replaced while it was copied, so it stays")
            sharr.delete(full(name))


@cli.command()
@names_argument
@click.option("-f", "--force", is_flag=True, help="Do not ask, and do not mind what is missing.")
@click.option("-r", "--recursive", is_flag=True, help="Remove namespaces and what is in them.")
def rm(names, force, recursive):
    """Remove arrays.

    Who has one attached keeps it. A NAME may be a pattern in quotes: more than one array is
    removed after a question only, or with -f.
    """
    matches = {}
    namespaces = []
    plain = []

    def look(name):
        if is_pattern(name):
            whole = matching_namespaces(name) if recursive else []
            found = matching(name) if force or whole else matching_some(name)
            for namespace in whole:
                found += sharr.list(namespace)
            namespaces.extend(whole)
            matches.update((info.name, info) for info in found)
        elif recursive and uri(name).rstrip("/") == "shm:":
            matches.update((info.name, info) for info in sharr.list(full(name)))
        else:
            plain.append(name)

    def remove(name):
        if recursive and os.path.isdir(path_of(name)):
            return sharr.delete_all(full(name))
        try:
            sharr.delete(full(name), missing_ok=force)
        except IsADirectoryError as error:
            raise Failure(name, "is a namespace, -r removes it") from error

    status = each(names, look)
    if len(matches) > 1 and not force and not confirm(list(matches)):
        return 1
    status |= each(plain, remove) | each(namespaces, sharr.delete_all)
    return status | each(matches, lambda name: sharr.delete(name, missing_ok=True))


def confirm(found):
    if not sys.stdin.isatty():
        complain("rm", f"{len(found)} arrays match, and nobody is there to ask: use -f")
        return False
    for name in found[:10]:
        print(" ", escape(short(name)), file=sys.stderr)
    if len(found) > 10:
        print(f"  and {len(found) - 10} more", file=sys.stderr)
    return click.confirm(f"remove {len(found)} arrays?", err=True)


# New arrays


def bad(parameter, message):
    return click.BadParameter(escape(message, False), param_hint=parameter)


def parse_shape(context, parameter, text):
    """A shape as people write it: 3,4 or 3x4 or (3, 4) or 5; () or nothing for a single element."""
    inner = text.strip()
    if inner.startswith("(") and inner.endswith(")"):
        inner = inner[1:-1]
    parts = [part.strip() for part in inner.replace("x", ",").split(",")]
    if not parts[-1]:
        parts.pop()
    if not all(part.isdecimal() and len(part) < 20 for part in parts):
        raise bad("--shape", f"{text}: write it like 3,4")
    return tuple(map(int, parts))


def parse_dtype(context, parameter, text):
    import ast

    import numpy as np

    try:
        return np.dtype(ast.literal_eval(text) if text.startswith(("[", "{")) else text)
    except (TypeError, ValueError, SyntaxError) as error:
        raise bad("--dtype", f"{text}: no dtype; write it like f4, int64, u1, M8[ns]") from error


def parse_fill(text, dtype):
    import numpy as np

    try:
        if dtype.kind == "b":
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if dtype.kind in "iu":
            number = int(text, 0)
            if not np.iinfo(dtype).min <= number <= np.iinfo(dtype).max:
                raise ValueError
            return number
        if dtype.kind in "fc":
            with np.errstate(over="ignore"):
                number = dtype.type((complex if dtype.kind == "c" else np.longdouble)(text))
            if np.isinf(number) and "inf" not in text.lower():
                raise ValueError
            return number
        if dtype.kind in "Mm" and text == "NaT":
            return np.array(text, dtype)
        if dtype.kind in "SUMm":
            value = np.array(text).astype(dtype)
            exact = np.array(int(text), "i8") if dtype.kind == "m" else np.array(text, dtype.kind)
            if value.astype(exact.dtype) != exact:
                raise ValueError
            return value
    except (KeyError, ValueError, OverflowError):
        pass
    raise bad("--fill", f"{text}: no value for {dtype}")


@cli.command()
@click.argument("name", **new_name_options)
@click.option("--shape", required=True, callback=parse_shape, help="Like 3,4 or 1000.")
@click.option("--dtype", default="f8", show_default=True, callback=parse_dtype, help="Like f4.")
@click.option("--order", type=click.Choice("CF"), default="C", show_default=True)
@click.option("--fill", metavar="VALUE", help="The value of all elements.  [default: zero]")
@click.option("--sparse", is_flag=True, help="Take memory when it is written, not now.")
def new(name, shape, dtype, order, fill, sparse):
    """Make an array."""
    if sparse and fill is not None:
        raise click.UsageError("--sparse is not for an array that --fill writes")
    value = None if fill is None else parse_fill(fill, dtype)
    if value is not None and dtype.itemsize == 0:
        dtype = value.dtype  # as long as the text
    with telling_new(name, hint=""):
        if value is None:
            sharr.create(full(name), shape, dtype, order=order, reserve=not sparse)
        else:
            with sharr.build(full(name), shape, dtype, order=order) as array:
                array[...] = value


# Looking at elements


def parse_slice(text):
    """The index that Python would make of what stands between brackets; nothing is evaluated."""
    import ast
    import warnings

    text = text.strip()

    def number(node):
        sign = 1
        while isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            sign = -sign if isinstance(node.op, ast.USub) else sign
            node = node.operand
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return sign * node.value
        raise ValueError

    def index(node):
        if isinstance(node, ast.Slice):
            ends = (node.lower, node.upper, node.step)
            return slice(*(None if end is None else number(end) for end in ends))
        if isinstance(node, ast.List):
            return [number(element) for element in node.elts]
        if isinstance(node, ast.Constant) and (
            node.value in (None, ...) or isinstance(node.value, str)
        ):
            return node.value
        return number(node)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's about 1is 2
            try:
                tree = ast.parse(f"a[{text}]", mode="eval").body
            except SyntaxError:  # slices are in no list: the brackets are those of the index
                tree = ast.parse(f"a{text}", mode="eval").body
        if not isinstance(tree, ast.Subscript) or not isinstance(tree.value, ast.Name):
            raise ValueError
        if isinstance(tree.slice, ast.Tuple):
            return tuple(map(index, tree.slice.elts))
        return index(tree.slice)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise bad("SLICE", f"{text}: write it like 0, :5, ::2") from error


def nested(value, convert):
    if isinstance(value, list):
        return [nested(element, convert) for element in value]
    return convert(value)


def json_number(number):
    """JSON has no NaN and no infinities: they become the strings that float() takes.

    So does what is beyond a double.
    """
    value = float(number)
    if number != number:
        return "NaN"
    if number in (float("inf"), float("-inf")):
        return "Infinity" if number > 0 else "-Infinity"
    return value if math.isfinite(value) else str(number)


def json_elements(array):
    import numpy as np

    dtype = array.dtype
    if dtype.names is not None:
        if array.ndim:
            return [json_elements(np.asarray(element)) for element in array]
        return {field: json_elements(np.asarray(array[field])) for field in dtype.names}
    if dtype.kind == "f":
        return nested(array.tolist(), json_number)
    if dtype.kind == "c":
        return nested(array.tolist(), lambda z: [json_number(z.real), json_number(z.imag)])
    if dtype.kind == "M" and np.datetime_data(dtype)[0] != "generic":
        return np.datetime_as_string(array).tolist()
    if dtype.kind in "Mm":
        counts = array.astype("i8")
        return np.where(np.isnat(array), np.array("NaT", "O"), counts).tolist()
    if dtype.kind == "S":
        return nested(array.tolist(), lambda text: text.decode("utf8", "backslashreplace"))
    if dtype.kind == "V":
        return nested(array.tolist(), bytes.hex)
    return array.tolist()


@cli.command(cls=Show)
@name_argument
@click.argument("part", metavar="[SLICE]", default="...")
@click.option("-a", "--all", "everything", is_flag=True, help="Print all elements of a large one.")
@json_option
@click.option("--image", is_flag=True, help="Draw 2-D, or 3-D with 3 or 4 channels, as a picture.")
@click.option("--plot", is_flag=True, help="Draw 1-D, or the rows of 2-D, as lines.")
@click.option(
    "-o", "output", metavar="FILE.png",
    help="Draw to a file, or - for the standard output, not the terminal.",
)
@click.option("--cmap", default="viridis", show_default=True, help="Matplotlib's colours for 2-D.")
def show(name, part, everything, as_json, image, plot, output, cmap):
    """Print or draw an array.

    SLICE is what stands between brackets in Python: 0, or ':5, ::2' in quotes.
    """
    import numpy as np

    if as_json + image + plot > 1:
        raise click.UsageError("--json, --image and --plot exclude each other")
    if output is not None and not (image or plot):
        raise click.UsageError("-o is for --image and --plot")
    index = parse_slice(part)
    if image or plot:
        import logging

        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # not of its cache
    with telling(name):
        array = elements(name)
        try:
            array = np.asarray(array[index])
        except IndexError as error:
            raise Failure(name, str(error)) from error
        if as_json:
            data = json_elements(array)
        elif image:
            draw_image(name, array, output, cmap)
        elif plot:
            draw_plot(name, array, output)
        else:
            if everything:
                np.set_printoptions(threshold=sys.maxsize)
            text = str(array)
    if as_json:
        description = {"name": uri(name), "dtype": str(array.dtype), "shape": array.shape}
        print_json(description | {"data": data}, indent=None)
    elif not (image or plot):
        for line in text.split("\n"):
            print(escape(line, False))


def elements(name):
    """The array, mapped; if its file has holes, a copy that has them too, as opened() says why."""
    import numpy as np

    info, stream = opened(name)
    with stream:
        fd = stream.fileno()
        if os.fstat(fd).st_blocks * 512 >= info.offset + info.nbytes:
            return sharr.attach(full(name), "r")
        no_reserve = 0x4000  # MAP_NORESERVE, which Python knows from 3.13 on
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        data = mmap.mmap(-1, info.nbytes, flags)
        view, at = memoryview(data), info.offset
        while at < info.offset + info.nbytes:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break  # nothing but a hole is left
            end = min(os.lseek(fd, at, os.SEEK_HOLE), info.offset + info.nbytes)
            count = os.preadv(fd, [view[at - info.offset : end - info.offset]], at)
            if count == 0:
                break
            at += count
    return np.ndarray(info.shape, info.dtype, data, order=info.order)


def drawable(name, array):
    """As native floats; what is not finite as NaN."""
    import numpy as np

    if array.dtype.kind not in "biuf":
        raise Failure(name, f"{array.dtype} cannot be drawn, only real numbers")
    if array.size == 0:
        raise Failure(name, f"there is nothing to draw in the shape {array.shape}")
    with np.errstate(over="ignore"):
        array = array.astype("f8")
    array[~np.isfinite(array)] = np.nan
    return array


def limits(name, array):
    """The least and the greatest of all numbers that there are, in parts for the memory's sake."""
    import numpy as np

    lows, highs = [], []
    step = max(CHUNK // max(array[:1].nbytes, 1), 1)
    for start in range(0, len(array), step):
        values = drawable(name, array[start : start + step])
        if not np.isnan(values).all():
            lows.append(np.nanmin(values))
            highs.append(np.nanmax(values))
    if not lows:
        return math.nan, math.nan
    low, high = float(min(lows)), float(max(highs))
    if not math.isfinite(high - low):
        raise Failure(name, f"{low:g} and {high:g} are too far apart to be drawn")
    return low, high


def stride(length, most):
    return max(-(-length // most), 1)


def draw_image(name, array, output, cmap):
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.image import imsave

    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise Failure(name, f"a picture is 2-D, or 3-D with 3 or 4 channels, not {array.shape}")
    if cmap not in colormaps:
        raise bad("--cmap", f"{cmap}: try viridis, gray, magma or coolwarm")
    original = array
    array = array[:: stride(array.shape[0], PIXELS), :: stride(array.shape[1], PIXELS)]
    values = drawable(name, array)
    low, high = limits(name, original)
    if array.ndim == 2:
        pixels = colormaps[cmap]((values - low) / ((high - low) or 1), bytes=True)
    else:
        if array.dtype == "u1":
            low, high = 0, 255
        elif array.dtype.kind == "b" or (array.dtype.kind == "f" and low >= 0 and high <= 1):
            low, high = 0, 1
        scaled = np.nan_to_num((values - low) / ((high - low) or 1))
        pixels = np.rint(scaled * 255).astype("u1")
    draw(
        lambda file: imsave(file, pixels, format="png"),
        output,
        ["--scale", "max"],
        f"{original.dtype} {original.shape}, {low:g} to {high:g}",
    )


def draw_plot(name, array, output):
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[0] > 10):
        raise Failure(name, f"a plot is 1-D, or 2-D with up to 10 rows, not {array.shape}")
    rows = array.reshape(-1, array.shape[-1]) if array.size else array
    low, high = limits(name, rows.T)
    places = np.arange(array.shape[-1])
    step = stride(len(places), POINTS)
    if step > 1:  # the least and the greatest of each step, so that no peak is lost
        starts = places[::step]
        ends = [bound.reduceat(rows, starts, axis=1) for bound in (np.fmin, np.fmax)]
        rows, places = np.stack(ends, axis=2).reshape(len(rows), -1), starts.repeat(2)
    values = drawable(name, rows)
    if output is not None:
        figure = Figure(figsize=(8, 5), dpi=100)
        axes = figure.add_subplot()
        axes.grid(alpha=0.3)
        axes.set_title(escape(name).replace("$", r"\$"))
        thickness, mark = 1.2, "."
    else:
        columns, lines = shutil.get_terminal_size()
        lines = max(min(lines - 3, columns // 3), 5)
        figure = Figure(figsize=(columns * 8 / 100, lines * 16 / 100), dpi=100, facecolor="black")
        axes = figure.add_axes((0, 0.02, 1, 0.96))
        axes.axis("off")
        # Bright and sharp, or else the dots of which chafa makes lines have gaps.
        bright = ["#4fc3f7", "#ffb74d", "#81c784", "#e57373", "#ba68c8"]
        axes.set_prop_cycle(color=bright if sys.stdout.isatty() else ["white"])
        thickness, mark = 2.5, "s"
    for number, row in enumerate(values):
        (line,) = axes.plot(
            places, row, linewidth=thickness, antialiased=output is not None, label=f"row {number}"
        )
        # A number with none on either side is no line.
        gaps = np.isnan(np.pad(row, 1, constant_values=np.nan))
        alone = gaps[:-2] & ~gaps[1:-1] & gaps[2:]
        axes.plot(places[alone], row[alone], mark, color=line.get_color())
    if output is not None and len(values) > 1:
        axes.legend()
    canvas = FigureCanvasAgg(figure)
    draw(
        canvas.print_png,
        output,
        ["--symbols", "braille", "--fg-only", "--bg", "black"],
        f"{array.dtype} {array.shape}, {low:g} to {high:g}",
    )


def draw(write, output, options, caption):
    """Write a PNG to the output, or else have chafa draw it on the terminal."""
    import tempfile
    import warnings

    if output is not None:
        with output_stream(output, force=True) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a glyph that the font has not
            write(stream)
        return
    if shutil.which("chafa") is None:
        raise Failure("chafa", "is missing: apt install chafa, or draw to a file with -o")
    columns, lines = shutil.get_terminal_size()
    if sys.stdout.isatty():
        lines = max(lines - 2, 4)
    if not sys.stdout.isatty() or not wants_color():
        options = [*options, "--format", "symbols", "--colors", "none"]
    options = [*options, "--size", f"{columns}x{lines}"]
    with tempfile.TemporaryFile() as picture:
        write(picture)
        picture.seek(0)
        sys.stdout.flush()
        status = subprocess.run(["chafa", *options, "-"], stdin=picture).returncode
    if status == -signal.SIGPIPE:
        os.kill(os.getpid(), signal.SIGPIPE)
    if status:
        raise Failure("chafa", f"ended with status {status}")
    print(style(caption, dim=True))


# Memory and mounts


@cli.command("stat", context_settings=HUMAN_TOO)
@human_option
@json_option
def stat_command(human, as_json):
    """Tell what /dev/shm holds and what is free.

    Arrays are counted with the memory that they really take. Arrays that were removed but are
    still attached somewhere count as others.
    """
    space = os.statvfs("/dev/shm")
    total, free = space.f_blocks * space.f_frsize, space.f_bavail * space.f_frsize
    used = (space.f_blocks - space.f_bfree) * space.f_frsize
    files = {}
    found = sharr.list()
    for info in found:
        with contextlib.suppress(OSError):
            status = os.stat(path_of(info.name))
            files[status.st_dev, status.st_ino] = status.st_blocks * 512
    arrays = sum(files.values())
    values = {
        "total": total,
        "arrays": arrays,
        "others": max(used - arrays, 0),
        "free": free,
        "available": available_memory(),
    }
    if as_json:
        print_json({"path": "/dev/shm", "count": len(found)} | values)
        return
    notes = {
        "total": "of /dev/shm",
        "arrays": f"in {len(found)} array{'s' * (len(found) != 1)}",
        "others": "in other files and removed arrays",
        "free": "in /dev/shm",
        "available": "memory of the machine",
    }
    rows = [(key, size_text(value, human), notes[key]) for key, value in values.items()]
    print_table(("", "SIZE", ""), rows, right=("SIZE",))


def available_memory():
    with open("/proc/meminfo") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def find_sharrfs():
    here = os.path.dirname(os.path.realpath(sys.argv[0]))
    beside = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(__file__))))
    for directory in (here, os.path.join(beside, "bin")):
        found = shutil.which("sharrfs", path=directory)
        if found:
            return found
    return shutil.which("sharrfs") or "sharrfs"


def run(point, *command):
    """Run a program that mounts or unmounts; what it says of an error becomes one line."""
    try:
        done = subprocess.run(command, stderr=subprocess.PIPE)
    except FileNotFoundError as error:
        raise Failure(command[0], "the program is missing") from error
    said = os.fsdecode(done.stderr).strip()
    if done.returncode == 0:
        print(said, end="\n" if said else "", file=sys.stderr)
        return 0
    program = os.path.basename(command[0])
    lines = [line.removeprefix(f"{program}: ") for line in said.split("\n")]
    complain("", "; ".join(lines) if said else f"{point}: {program} failed")
    return min(max(done.returncode, 1), 2) if program == "sharrfs" else 1


def mount_point(context, parameter, path):
    if not path:
        raise click.BadParameter("a mount point is a directory, not nothing")
    return path


@cli.command()
@click.argument("places", metavar="[SOURCE] MOUNTPOINT", nargs=-1, type=click.Path())
@click.option("-o", "options", metavar="OPTIONS", multiple=True, help="As of sharrfs and mount.")
@json_option
def mount(places, options, as_json):
    """Show arrays as files in a directory.

    SOURCE is shm:// if not given, a namespace, or a directory. Without any argument the mounts
    that are there are listed.
    """
    if not places:
        return list_mounts(as_json)
    if as_json:
        raise click.UsageError("--json is for the list of mounts")
    if len(places) > 2:
        raise click.UsageError("there is more than a SOURCE and a MOUNTPOINT")
    source, point = places if len(places) == 2 else ("shm://", *places)
    point = absolute(mount_point(None, None, point))
    if not os.path.lexists(point):
        raise Failure(point, os.strerror(errno.ENOENT))
    arguments = [argument for option in options for argument in ("-o", option)]
    return run(point, find_sharrfs(), uri(source), point, *arguments)


def sharrfs_mounts():
    mounts = []
    with open("/proc/self/mounts", "rb") as lines:
        for line in lines:
            # The kernel writes white space and backslashes as three octal digits.
            source, point, kind, options = (
                os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), field))
                for field in line.split(b" ")[:4]
            )
            if kind == "fuse.sharrfs":
                mounts.append({"source": source, "mountpoint": point, "options": options})
    return mounts


def list_mounts(as_json):
    mounts = sharrfs_mounts()
    if as_json:
        print_json(mounts)
    elif mounts:
        rows = [(escape(m["source"]), escape(m["mountpoint"]), m["options"]) for m in mounts]
        print_table(("SOURCE", "MOUNTPOINT", "OPTIONS"), rows)


@cli.command()
@click.argument("mountpoint", type=click.Path(), callback=mount_point)
def umount(mountpoint):
    """End a mount."""
    point = os.path.realpath(mountpoint)
    if point not in [mount["mountpoint"] for mount in sharrfs_mounts()]:
        raise Failure(mountpoint, "no mount of sharrfs")
    return run(point, *(["umount"] if os.geteuid() == 0 else ["fusermount3", "-u"]), point)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh"]))
def completion(shell):
    """Print what makes a shell complete.

    For ~/.bashrc or ~/.zshrc: eval "$(sharr completion bash)", or zsh.
    """
    print({"bash": BASH, "zsh": ZSH}[shell], end="")


def run_command(arguments):
    try:
        with cli.make_context("sharr", arguments) as context:
            return cli.invoke(context) or 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.Abort as abort:
        if isinstance(abort.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        return 1
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "sharr"
        message = " ".join(error.format_message().split()).rstrip(".")
        complain(path.partition(" ")[2], f"{message} (see {path} --help)")
        return error.exit_code
    except Failure as failure:
        complain(failure.name, failure.message)
    except ModuleNotFoundError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None:
            raise  # the standard output's
        name, message = reason("", error)
        known = isinstance(error, ERRORS)
        complain(name, message if known else f"{type(error).__name__}: {message}")
    return 1


def open_missing_streams():
    """Have something where a standard stream was closed: no input, and an output that fails."""
    for name, access, mode in (
        ("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"),
    ):  # fmt: skip
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, access), mode))


def main(arguments=None):
    """Run the command and return its exit status.

    Parameters
    ----------
    arguments : list of str, optional
        Those of the process if not given.

    Returns
    -------
    int
    """

    def end(number, frame):
        raise SystemExit(128 + number)  # by way of what removes half a file

    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as the launcher has it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup(1) leaves it
        signal.signal(signal.SIGHUP, end)
    open_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    if "_SHARR_COMPLETE" in os.environ:
        print_completions(os.environ["_SHARR_COMPLETE"])
        return 0
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        status = run_command(arguments or ["--help"])
        sys.stdout.flush()
        return status
    except OSError as error:
        complain("standard output", error.strerror)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except KeyboardInterrupt:
        return 130
