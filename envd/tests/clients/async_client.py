"""E2B's Python client, asynchronous, against envd alone. Arguments as for the synchronous one."""

import asyncio
import os
import sys
import time

from e2b import (
    AsyncSandbox,
    CommandExitException,
    FilesystemEventType,
    NotFoundException,
    TimeoutException,
)
from e2b.sandbox.commands.command_handle import PtySize

work, big_bytes = sys.argv[1], int(sys.argv[3])


async def raises(kind, awaitable):
    try:
        await awaitable
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


async def wait_for(condition, what):
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up, what
        await asyncio.sleep(0.01)


async def commands(box):
    result = await box.commands.run("echo out; echo err >&2")
    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 0)
    error = await raises(CommandExitException, box.commands.run("exit 7"))
    assert error.exit_code == 7
    if os.geteuid() == 0:
        assert (await box.commands.run("id -un", user="nobody")).stdout == "nobody\n"
    await raises(TimeoutException, box.commands.run("sleep 60", timeout=1))


async def background(box):
    handle = await box.commands.run("cat; sleep 60", background=True, stdin=True, timeout=0)
    assert handle.pid in [p.pid for p in await box.commands.list()]
    again = await box.commands.connect(handle.pid)
    await box.commands.send_stdin(handle.pid, "hello\n")
    await wait_for(lambda: again.stdout == "hello\n" and handle.stdout == "hello\n", "both hear")
    await handle.disconnect()
    await box.commands.close_stdin(again.pid)
    assert await box.commands.kill(again.pid) is True
    await raises(CommandExitException, again.wait())
    assert await box.commands.kill(again.pid) is False


async def many_commands(box):
    async def one(number):
        # Another home: this machine's own may have a login script that takes its time.
        run = box.commands.run(
            f"sleep 0.2; echo {number}", envs={"HOME": work}, timeout=120, request_timeout=120
        )
        return (await run).stdout

    results = await asyncio.gather(*(one(number) for number in range(200)))
    assert results == [f"{number}\n" for number in range(200)]


async def files(box):
    path = f"{work}/async/a.txt"
    await box.files.write(path, "hello")
    assert await box.files.read(path) == "hello"
    assert await box.files.exists(path)
    assert [e.name for e in await box.files.list(f"{work}/async")] == ["a.txt"]
    await box.files.rename(path, f"{work}/async/b.txt")
    assert (await box.files.get_info(f"{work}/async/b.txt")).size == 5
    await box.files.remove(f"{work}/async")
    await raises(NotFoundException, box.files.read(path))


async def watch(box):
    directory = f"{work}/async-watched"
    await box.files.make_dir(directory)
    seen, ended = [], []
    handle = await box.files.watch_dir(
        directory,
        on_event=lambda e: seen.append((e.type, e.name)),
        on_exit=ended.append,
        recursive=True,
    )
    await box.files.write(f"{directory}/sub/f", "x")
    await box.files.write(f"{directory}/sub/f", "y")
    wanted = {(FilesystemEventType.CREATE, "sub/f"), (FilesystemEventType.WRITE, "sub/f")}
    await wait_for(lambda: wanted <= set(seen), seen)
    await handle.stop()
    handle = await box.files.watch_dir(directory, on_event=seen.append, on_exit=ended.append, timeout=1)
    await wait_for(lambda: ended and ended[-1] is not None, "the watch's deadline")
    assert isinstance(ended[-1], TimeoutException), ended


async def terminals(box):
    out = []
    handle = await box.pty.create(PtySize(rows=30, cols=100), on_data=lambda b: out.append(bytes(b)), timeout=30)
    await box.pty.resize(handle.pid, PtySize(rows=40, cols=120))
    await box.pty.send_stdin(handle.pid, b"stty size; exit 0\n")
    await handle.wait()
    assert b"40 120" in b"".join(out), out


async def big_files(box):
    block = os.urandom(1 << 20)

    async def blocks():
        for _ in range(big_bytes >> 20):
            yield block

    try:
        await box.files.write(f"{work}/async-big", blocks(), request_timeout=600)
    except TypeError:
        await box.files.write(f"{work}/async-big", block * (big_bytes >> 20), request_timeout=600)
    length = 0
    async for chunk in await box.files.read(f"{work}/async-big", format="stream"):
        length += len(chunk)
    assert length == big_bytes == os.path.getsize(f"{work}/async-big")
    os.remove(f"{work}/async-big")


async def main():
    box = await AsyncSandbox.create()
    for scenario in [commands, background, many_commands, files, watch, terminals, big_files]:
        started = time.monotonic()
        try:
            await scenario(box)
        except BaseException:
            print(f"failed: {scenario.__name__}", flush=True)
            raise
        print(f"ok: {scenario.__name__} ({time.monotonic() - started:.2f} s)", flush=True)


asyncio.run(main())
