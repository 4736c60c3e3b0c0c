"""Wrenn's Python client against a whole host. Each scenario fails by an exception.

Nothing here is special to this host but the name of its template and its URL, which the environment
names. Guests may be emulated: every wait is generous.
"""

import asyncio
import os

from wrenn import AsyncCapsule, Capsule
from wrenn.client import WrennClient
from wrenn.exceptions import (
    WrennAuthenticationError,
    WrennConflictError,
    WrennNotFoundError,
    WrennValidationError,
)


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def lifecycle(capsule):
    capsule.wait_ready(timeout=120)
    assert capsule.is_running()
    info = capsule.get_info()
    assert (info.template, info.vcpus, info.memory_mb, info.timeout_sec) == ("base", 1, 256, 600)
    assert info.created_at <= info.started_at
    assert [c.id for c in Capsule.list()] == [capsule.capsule_id]
    capsule.ping()
    capsule.pause(wait=True)
    assert not capsule.is_running()
    raises(WrennConflictError, lambda: capsule.commands.run("true"))
    capsule.resume(wait=True)
    same = Capsule.connect(capsule.capsule_id)
    assert same.is_running()


def commands(capsule):
    result = capsule.commands.run("echo $COLOUR; echo two >&2; exit 5", envs={"COLOUR": "blue"})
    assert (result.stdout, result.stderr, result.exit_code) == ("blue\n", "two\n", 5), result
    assert capsule.commands.run("pwd", cwd="/tmp").stdout == "/tmp\n"
    events = list(capsule.commands.stream("echo one; sleep 0.1; echo two; exit 3"))
    assert [e.type for e in events][0] == "start" and events[0].pid > 0, events
    assert "".join(e.data for e in events if e.type == "stdout") == "one\ntwo\n", events
    assert events[-1].type == "exit" and events[-1].exit_code == 3, events

    handle = capsule.commands.run("echo begun; sleep 60", background=True, tag="sleeper")
    assert handle.tag == "sleeper" and handle.pid > 0
    listed = {p.tag: p for p in capsule.commands.list()}
    assert listed["sleeper"].pid == handle.pid and listed["sleeper"].cmd == "/bin/sh", listed
    stream = capsule.commands.connect(handle.pid)
    assert next(stream).type == "start"
    capsule.commands.kill(handle.pid)
    assert list(stream)[-1].type == "exit"
    assert "sleeper" not in {p.tag for p in capsule.commands.list()}
    raises(WrennNotFoundError, lambda: capsule.commands.kill(4_000_000))


def files(capsule):
    content = os.urandom(300_000)
    capsule.files.write("/tmp/w/content", content)
    assert capsule.files.read_bytes("/tmp/w/content") == content
    capsule.files.write("/tmp/w/text", "grüße\n")
    assert capsule.files.read("/tmp/w/text") == "grüße\n"
    big = [os.urandom(1 << 20) for _ in range(3)]
    capsule.files.upload_stream("/tmp/w/big", iter(big))
    assert b"".join(capsule.files.download_stream("/tmp/w/big")) == b"".join(big)
    made = capsule.files.make_dir("/tmp/w/sub")
    assert (made.name, made.type, made.path) == ("sub", "directory", "/tmp/w/sub"), made
    assert capsule.files.make_dir("/tmp/w/sub").name == "sub", "twice is as good as once"
    capsule.commands.run("ln -s text /tmp/w/link")
    entries = {e.name: e for e in capsule.files.list("/tmp/w")}
    assert set(entries) == {"content", "text", "big", "sub", "link"}, entries
    assert entries["content"].size == 300_000 and entries["link"].type == "symlink", entries
    assert capsule.files.exists("/tmp/w/text") and not capsule.files.exists("/tmp/w/none")
    capsule.files.remove("/tmp/w")
    assert not capsule.files.exists("/tmp/w")
    raises(WrennNotFoundError, lambda: capsule.files.read("/tmp/w/text"))


def terminals(capsule):
    with capsule.pty(cmd="/bin/sh", cols=91, rows=17, envs={"COLOUR": "red"}) as term:
        said = b""
        for event in term:
            if event.type == "started":
                tag = event.tag
                term.write(b"stty size; echo $COLOUR; echo gr\xc3\xbc\xc3\x9fe\n")
            elif event.type == "output":
                said += event.data
                if b"17 91" in said and b"red" in said and said.count("grüße".encode()) >= 2:
                    break
        term.resize(100, 30)
        with capsule.pty_connect(tag) as again:
            again.write(b"stty size; exit 4\n")
            said, code = b"", None
            for event in again:
                if event.type == "output":
                    said += event.data
                elif event.type == "exit":
                    code = event.exit_code
            assert b"30 100" in said and code == 4, (said, code)


def templates(capsule):
    capsule.files.write("/home/user/kept", "kept")
    made = capsule.create_snapshot(name="wrenn-made")
    assert (made.name, made.type) == ("wrenn-made", "snapshot"), made
    with WrennClient() as client:
        assert [t.name for t in client.snapshots.list(type="snapshot")] == ["wrenn-made"]
        assert "base" in {t.name for t in client.snapshots.list()}
        copy = Capsule(template="wrenn-made", wait=True)
        assert copy.files.read("/home/user/kept") == "kept"
        copy.destroy(wait=True)
        client.snapshots.delete("wrenn-made")
        raises(WrennNotFoundError, lambda: client.snapshots.delete("wrenn-made"))
        assert client.capsules.stats().current.running_count == 1
        assert client.capsules.metrics(capsule.capsule_id).points[0].mem_bytes > 0


def refusals():
    raises(WrennNotFoundError, lambda: Capsule.connect("nosuchcapsule"))
    raises(WrennNotFoundError, lambda: Capsule(template="nosuchtemplate"))
    raises(WrennValidationError, lambda: Capsule(template="../etc"))
    raises(WrennAuthenticationError, lambda: Capsule.list(api_key="e2b_wrong"))


async def asynchronous():
    capsule = await AsyncCapsule.create(template="base", wait=True)
    runs = (capsule.commands.run(f"sleep 0.2; echo {n}") for n in range(5))
    assert [int(r.stdout) for r in await asyncio.gather(*runs)] == list(range(5))
    await capsule.files.write("/tmp/x", "async")
    assert await capsule.files.read("/tmp/x") == "async"
    await capsule.destroy(wait=True)


capsule = Capsule(template="base", timeout=600)
for scenario in (lifecycle, commands, files, terminals, templates):
    scenario(capsule)
    print(f"done: {scenario.__name__}")
capsule.destroy(wait=True)
refusals()
asyncio.run(asynchronous())
assert Capsule.list() == []
print("done: refusals, asynchronous")
