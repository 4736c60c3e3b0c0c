"""E2B's Python client, synchronous, against envd alone. Each scenario fails by an exception.

Arguments: a directory to work in, envd's pid, bytes of the big file. It runs as the user of envd.
"""

import hashlib
import io
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from e2b import (
    AuthenticationException,
    CommandExitException,
    FileType,
    FilesystemEventType,
    InvalidArgumentException,
    NotFoundException,
    Sandbox,
    TimeoutException,
)
from e2b.sandbox.commands.command_handle import PtySize

work, envd_pid, big_bytes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
MIB = 1 << 20


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def wait_for(condition, what):
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.01)


def peak_bytes():
    with open(f"/proc/{envd_pid}/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def reset_peak():
    with open(f"/proc/{envd_pid}/clear_refs", "w") as clear:
        clear.write("5")


def commands(box):
    result = box.commands.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 0)
    error = raises(CommandExitException, lambda: box.commands.run("echo x; exit 7"))
    assert (error.exit_code, error.stdout) == (7, "x\n")
    result = box.commands.run("pwd; echo $A", cwd=work, envs={"A": "b c"})
    assert result.stdout == f"{work}\nb c\n", result.stdout
    said = []
    box.commands.run("for i in 1 2 3; do echo $i; sleep 0.05; done", on_stdout=said.append)
    assert "".join(said) == "1\n2\n3\n", said
    assert box.commands.run("echo ü€").stdout == "ü€\n"
    raises(InvalidArgumentException, lambda: box.commands.run("true", cwd="/no/such/directory"))
    raises(AuthenticationException, lambda: box.commands.run("true", user="no-such-user"))


def users(box):
    if os.geteuid() != 0:
        return
    result = box.commands.run("id -un; id -u; echo $HOME $USER", user="nobody")
    lines = result.stdout.splitlines()
    assert lines[:2] == ["nobody", "65534"] and lines[2].endswith(" nobody"), lines
    assert box.commands.run("id -un", user="root").stdout == "root\n"


def timeouts(box):
    started = time.monotonic()
    handle = box.commands.run("sleep 60", background=True, timeout=1)
    raises(TimeoutException, handle.wait)
    assert time.monotonic() - started < 10
    wait_for(lambda: handle.pid not in [p.pid for p in box.commands.list()], "killed")


def background(box):
    script = f"echo started; touch {work}/started; sleep 60"
    handle = box.commands.run(script, background=True, timeout=0)
    wait_for(lambda: os.path.exists(f"{work}/started"), "started")
    listed = [p for p in box.commands.list() if p.pid == handle.pid]
    assert listed[0].cmd == "/bin/bash" and "sleep 60" in listed[0].args[-1], listed
    assert handle.kill() is True
    error = raises(CommandExitException, handle.wait)
    assert error.exit_code != 0 and error.stdout == "started\n"
    assert box.commands.kill(handle.pid) is False


def stdin(box):
    handle = box.commands.run("cat; echo end", background=True, stdin=True, timeout=20)
    box.commands.send_stdin(handle.pid, "one\n")
    box.commands.send_stdin(handle.pid, "two\n")
    if hasattr(box.commands, "stream_input"):
        box.commands.stream_input(handle.pid, ["three", "\n", "four\n"])
    box.commands.close_stdin(handle.pid)
    out = handle.wait().stdout
    assert out.startswith("one\ntwo\n") and out.endswith("end\n"), out
    raises(NotFoundException, lambda: box.commands.send_stdin(handle.pid, "late"))


def connect(box):
    handle = box.commands.run("read go; echo $go; sleep 0.1; echo done", background=True, stdin=True)
    again = box.commands.connect(handle.pid)
    assert again.pid == handle.pid
    handle.disconnect()
    box.commands.send_stdin(handle.pid, "went\n")
    assert again.wait().stdout == "went\ndone\n"
    raises(NotFoundException, lambda: box.commands.connect(handle.pid).wait())


def many_commands(box):
    def one(number):
        # Another home: this machine's own may have a login script that takes its time.
        run = box.commands.run(
            f"sleep 0.2; echo {number}", envs={"HOME": work}, timeout=120, request_timeout=120
        )
        return run.stdout

    with ThreadPoolExecutor(200) as pool:
        results = list(pool.map(one, range(200)))
    assert results == [f"{number}\n" for number in range(200)]


def files(box):
    path = f"{work}/files/deep/a.txt"
    info = box.files.write(path, "hello")
    assert (info.path, info.name, info.type) == (path, "a.txt", FileType.FILE)
    assert box.files.read(path) == "hello"
    assert bytes(box.files.read(path, format="bytes")) == b"hello"
    box.files.write(path, b"\x00\xff binary")
    assert bytes(box.files.read(path, format="bytes")) == b"\x00\xff binary"
    box.files.write(path, io.BytesIO(b"from a file"))
    assert box.files.read(path) == "from a file"
    assert box.files.exists(path) and not box.files.exists(path + ".no")
    entry = box.files.get_info(path)
    assert (entry.name, entry.size, entry.mode, entry.permissions) == ("a.txt", 11, 0o644, "-rw-r--r--")
    assert entry.type == FileType.FILE and entry.modified_time is not None
    assert box.files.make_dir(f"{work}/files/new/dir") is True
    assert box.files.make_dir(f"{work}/files/new/dir") is False
    listed = [(e.name, e.type) for e in box.files.list(f"{work}/files")]
    assert listed == [("deep", FileType.DIR), ("new", FileType.DIR)], listed
    deep = [e.path for e in box.files.list(f"{work}/files", depth=2)]
    assert deep == [f"{work}/files/{p}" for p in ("deep", "deep/a.txt", "new", "new/dir")], deep
    renamed = box.files.rename(path, f"{work}/files/b.txt")
    assert renamed.path == f"{work}/files/b.txt" and not box.files.exists(path)
    box.files.remove(f"{work}/files/b.txt")
    box.files.remove(f"{work}/files/new")
    assert not box.files.exists(f"{work}/files/new/dir")
    os.symlink("deep", f"{work}/files/link")
    assert box.files.get_info(f"{work}/files/link").symlink_target == "deep"
    raises(NotFoundException, lambda: box.files.read(f"{work}/files/none"))
    raises(NotFoundException, lambda: box.files.list(f"{work}/files/none"))
    raises(NotFoundException, lambda: box.files.rename(f"{work}/none", f"{work}/x"))
    raises(InvalidArgumentException, lambda: box.files.read(f"{work}/files"))
    raises(InvalidArgumentException, lambda: box.files.write(f"{work}/files", "x"))


def forms(box):
    many = [{"path": f"{work}/forms/{n} ü.txt", "data": f"content {n}"} for n in range(20)]
    written = box.files.write_files(many)
    assert [w.path for w in written] == [m["path"] for m in many]
    for file in many:
        assert box.files.read(file["path"]) == file["data"]
    text = "compress me " * 10_000
    box.files.write(f"{work}/forms/gzip", text, gzip=True)
    assert box.files.read(f"{work}/forms/gzip", gzip=True) == text
    info = box.files.write(f"{work}/forms/meta", "x", metadata={"kind": "test"})
    assert info.metadata == {"kind": "test"}
    assert box.files.get_info(f"{work}/forms/meta").metadata == {"kind": "test"}


def owners(box):
    if os.geteuid() != 0:
        return
    box.files.write(f"{work}/owned/file", "x", user="nobody")
    assert box.files.get_info(f"{work}/owned/file").owner == "nobody"
    assert box.files.get_info(f"{work}/owned").owner == "nobody"
    raises(AuthenticationException, lambda: box.files.write(f"{work}/y", "x", user="no-such-user"))


def watch(box):
    directory = f"{work}/watched"
    box.files.make_dir(directory)
    handle = box.files.watch_dir(directory, recursive=True)
    box.files.write(f"{directory}/f", "1")
    box.files.write(f"{directory}/f", "2")
    box.commands.run(f"mkdir -p {directory}/sub/deep && echo x > {directory}/sub/deep/g")
    box.files.rename(f"{directory}/f", f"{directory}/h")
    seen = []

    def complete():
        seen.extend((e.type, e.name) for e in handle.get_new_events())
        return {
            (FilesystemEventType.CREATE, "f"),
            (FilesystemEventType.WRITE, "f"),
            (FilesystemEventType.CREATE, "sub/deep/g"),
            (FilesystemEventType.RENAME, "f"),
            (FilesystemEventType.CREATE, "h"),
        } <= set(seen)

    wait_for(complete, seen)
    assert not [name for _, name in seen if "envd" in name], seen
    handle.stop()
    raises(Exception, handle.get_new_events)
    raises(NotFoundException, lambda: box.files.watch_dir(f"{work}/none"))
    raises(InvalidArgumentException, lambda: box.files.watch_dir(f"{directory}/h"))


def terminals(box):
    handle = box.pty.create(PtySize(rows=30, cols=100), timeout=30, cwd=work)
    out = []
    box.pty.send_stdin(handle.pid, b"stty size; tty\n")
    box.pty.resize(handle.pid, PtySize(rows=40, cols=120))
    box.pty.send_stdin(handle.pid, b"stty size; exit 3\n")
    error = raises(CommandExitException, lambda: handle.wait(on_pty=lambda b: out.append(bytes(b))))
    text = b"".join(out).decode()
    assert error.exit_code == 3 and "40 120" in text and "/dev/pts/" in text, text
    handle = box.pty.create(PtySize(rows=24, cols=80), timeout=30)
    again = box.pty.connect(handle.pid)
    handle.disconnect()
    assert box.pty.kill(again.pid) is True
    raises(CommandExitException, again.wait)
    assert box.pty.kill(again.pid) is False


def big_files(box):
    path = f"{work}/big"
    block = hashlib.sha256(b"block").digest() * (MIB // 32)
    count = big_bytes // MIB
    expected = hashlib.sha256()

    class Blocks(io.RawIOBase):
        left = count

        def readable(self):
            return True

        def readinto(self, into):
            raise NotImplementedError

        def read(self, size=-1):
            if self.left == 0:
                return b""
            self.left -= 1
            expected.update(block)
            return block

    reset_peak()
    before = peak_bytes()
    started = time.monotonic()
    box.files.write(path, Blocks(), request_timeout=600)
    up = time.monotonic() - started
    assert os.path.getsize(path) == big_bytes
    found = hashlib.sha256()
    started = time.monotonic()
    for chunk in box.files.read(path, format="stream", request_timeout=600):
        found.update(chunk)
    down = time.monotonic() - started
    assert found.digest() == expected.digest()
    grown = peak_bytes() - before
    mib = big_bytes / MIB
    print(f"big: {mib:.0f} MiB up {mib / up:.0f} MiB/s, down {mib / down:.0f} MiB/s, "
          f"peak {peak_bytes() / MIB:.1f} MiB, grown by {grown / MIB:.1f} MiB")
    assert grown < 32 * MIB, grown
    os.remove(path)


box = Sandbox.create()
assert box.is_running()
for scenario in [commands, users, timeouts, background, stdin, connect, many_commands, files, forms,
                 owners, watch, terminals, big_files]:
    started = time.monotonic()
    try:
        scenario(box)
    except BaseException:
        print(f"failed: {scenario.__name__}", flush=True)
        raise
    print(f"ok: {scenario.__name__} ({time.monotonic() - started:.2f} s)", flush=True)
