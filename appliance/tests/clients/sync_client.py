"""E2B's Python client, synchronous, against a whole host. Each scenario fails by an exception.

Nothing here is special to this host but the names of its template and of its one plain HTTP host,
which the environment names. Guests may be emulated: every wait is generous.
"""

import time
import urllib.error
import urllib.request

from e2b import CommandExitException, FilesystemEventType, NotFoundException, Sandbox, SandboxQuery
from e2b import SandboxState
from e2b.sandbox.commands.command_handle import PtySize

PATIENCE = 120


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def wait_for(condition, what):
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, what
        time.sleep(0.05)


def ids(**query):
    """All pages, two at a time."""
    paginator = Sandbox.list(query=SandboxQuery(**query), limit=2)
    found = []
    while paginator.has_next:
        found += [box.sandbox_id for box in paginator.next_items()]
    assert len(found) == len(set(found)), found
    return set(found)


def create():
    box = Sandbox.create(
        "base",
        timeout=600,
        metadata={"test": "sync", "odd key": "a b&c=d/ü%20"},
        envs={"COLOUR": "blue"},
    )
    assert box.is_running()
    assert box.commands.run("echo $COLOUR").stdout == "blue\n"
    info = box.get_info()
    assert info.sandbox_id == box.sandbox_id and info.template_id == "base", info
    assert info.metadata["odd key"] == "a b&c=d/ü%20", info
    assert info.state == SandboxState.RUNNING and info.cpu_count == 1 and info.memory_mb == 256
    assert 590 < (info.end_at - info.started_at).total_seconds() < 610, info
    raises(NotFoundException, lambda: Sandbox.connect("nosuchsandbox"))
    assert Sandbox.kill("nosuchsandbox") is False
    return box


def commands_and_files(box):
    result = box.commands.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 0), result
    error = raises(CommandExitException, lambda: box.commands.run("exit 7"))
    assert error.exit_code == 7
    box.files.write("/home/user/greeting", "hello")
    assert box.files.read("/home/user/greeting") == "hello"
    big = bytes(range(256)) * 8192
    box.files.write("/home/user/big", big)
    assert bytes(box.files.read("/home/user/big", format="bytes")) == big
    names = {entry.name for entry in box.files.list("/home/user")}
    assert {"greeting", "big"} <= names, names
    events = []
    watch = box.files.watch_dir("/home/user")
    box.files.write("/home/user/new", "x")
    wait_for(
        lambda: events.extend(watch.get_new_events())
        or any(e.name == "new" and e.type == FilesystemEventType.WRITE for e in events),
        "the write is seen",
    )
    watch.stop()
    handle = box.commands.run("cat", background=True, stdin=True)
    box.commands.send_stdin(handle.pid, "in\n")
    box.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "in\n"


def terminal(box):
    said = bytearray()
    pty = box.pty.create(PtySize(rows=30, cols=90))
    box.pty.send_stdin(pty.pid, b"stty size; exit 3\n")
    error = raises(CommandExitException, lambda: pty.wait(on_pty=said.extend))
    assert error.exit_code == 3 and b"30 90" in said, said


def access(box):
    """The guest's daemon asks for its token, and what is the host's is not passed on."""

    def status(path, **headers):
        url = f"{box.envd_api_url}{path}"
        routing = {"E2b-Sandbox-Id": box.sandbox_id, "E2b-Sandbox-Port": "49983"}
        request = urllib.request.Request(url, headers=routing | headers)
        try:
            return urllib.request.urlopen(request, timeout=60).status
        except urllib.error.HTTPError as error:
            return error.code

    token = {"X-Access-Token": box._envd_access_token}
    assert status("/health") == 200
    assert status("/envs") == 401
    assert status("/envs", **token) == 200
    assert status("/ports", **token) == 404
    # A port that nobody listens on, and one that somebody does.
    closed = status("/", **{"E2b-Sandbox-Port": "8081"})
    assert closed == 502, closed
    serve = "while :; do printf 'HTTP/1.0 200 OK\\r\\n\\r\\nhi' | busybox nc -l -p 8080; done"
    server = box.commands.run(serve, background=True, user="root")
    wait_for(lambda: status("/", **{"E2b-Sandbox-Port": "8080"}) == 200, "the port answers")
    server.kill()


def pause_and_connect(box):
    counter = "i=0; while :; do i=$((i+1)); echo $i > n; mv n count; sleep 0.05; done"
    handle = box.commands.run(counter, background=True, cwd="/home/user")
    read = lambda of: int(of.files.read("/home/user/count").strip() or 0)
    wait_for(lambda: box.files.exists("/home/user/count") and read(box) > 3, "it counts")
    before = read(box)
    assert box.pause() is not False
    assert box.pause() is False, "it is paused already"
    assert not box.is_running()
    assert box.get_info().state == SandboxState.PAUSED
    assert box.sandbox_id in ids(state=[SandboxState.PAUSED])
    assert box.sandbox_id not in ids(state=[SandboxState.RUNNING])
    # From elsewhere, with nothing but its id.
    same = Sandbox.connect(box.sandbox_id, timeout=300)
    assert same.is_running() and same.commands.run("echo $COLOUR").stdout == "blue\n"
    wait_for(lambda: read(same) > before, "the same process counts on")
    assert any(p.pid == handle.pid for p in same.commands.list())
    assert same.files.read("/home/user/greeting") == "hello"
    assert same.commands.kill(handle.pid)
    return same


def fork(box):
    if not hasattr(box, "fork"):
        return
    box.files.write("/home/user/forked", "before")
    forks = box.fork(count=2, timeout=300)
    assert len(forks) == 2 and all(isinstance(f, Sandbox) for f in forks), forks
    for number, other in enumerate(forks):
        assert other.files.read("/home/user/forked") == "before"
        other.files.write("/home/user/forked", str(number))
        assert other.commands.run("echo $COLOUR; hostname").stdout == f"blue\n{other.sandbox_id}\n"
    assert box.files.read("/home/user/forked") == "before", "the forks are on their own"
    info = forks[0].get_info()
    assert info.metadata["test"] == "sync" and info.template_id == "base", info
    tokens = {b._envd_access_token for b in [box, *forks]}
    assert len(tokens) == 3, "each has its own secret"
    for other in forks:
        assert other.kill()


def snapshot(box):
    if not hasattr(box, "create_snapshot"):
        return
    made = box.create_snapshot()
    assert box.is_running()
    listed = Sandbox.list_snapshots(sandbox_id=box.sandbox_id)
    assert [s.snapshot_id for s in listed.next_items()] == [made.snapshot_id]
    copy = Sandbox.create(made.snapshot_id, timeout=300)
    assert copy.files.read("/home/user/greeting") == "hello"
    assert copy.kill()
    assert Sandbox.delete_snapshot(made.snapshot_id)
    assert Sandbox.delete_snapshot(made.snapshot_id) is False


def lists(box):
    others = [Sandbox.create("base", timeout=300, metadata={"test": "list"}) for _ in range(2)]
    mine = {other.sandbox_id for other in others}
    assert ids(metadata={"test": "list"}) == mine
    assert ids(metadata={"odd key": "a b&c=d/ü%20"}) == {box.sandbox_id}
    assert ids(metadata={"test": "nothing"}) == set()
    assert ids() == mine | {box.sandbox_id}
    # One is killed when its time is up, the other is kept longer.
    others[0].set_timeout(1)
    others[1].set_timeout(900)
    wait_for(lambda: not others[0].is_running(), "its time is up")
    wait_for(lambda: others[0].sandbox_id not in ids(), "it is gone")
    raises(NotFoundException, others[0].get_info)
    assert others[1].is_running() and others[1].kill()
    assert others[1].kill() is False


def end_by_pause():
    lifecycle = {"on_timeout": "pause", "auto_resume": True}
    try:
        box = Sandbox.create("base", timeout=300, lifecycle=lifecycle)
    except TypeError:
        return
    box.files.write("/home/user/kept", "yes")
    box.set_timeout(1)
    wait_for(lambda: box.get_info().state == SandboxState.PAUSED, "it is paused in time")
    # Traffic for it brings it back; its time begins anew.
    assert box.files.read("/home/user/kept") == "yes"
    box.set_timeout(300)
    assert box.kill()


def metrics(box):
    (sample,) = box.get_metrics()
    assert sample.mem_total > 200 << 20 and 0 < sample.mem_used < sample.mem_total, sample
    assert sample.disk_total > 100 << 20 and sample.cpu_count == 1, sample


if __name__ == "__main__":
    box = create()
    for scenario in [commands_and_files, terminal, access]:
        scenario(box)
        print("done:", scenario.__name__, flush=True)
    box = pause_and_connect(box)
    print("done: pause_and_connect", flush=True)
    for scenario in [metrics, fork, snapshot, lists]:
        scenario(box)
        print("done:", scenario.__name__, flush=True)
    assert box.kill() and not box.is_running()
    end_by_pause()
    print("done: end_by_pause", flush=True)
    assert ids() == set()
