"""E2B's Python client, asynchronous, against a whole host: several sandboxes at the same time."""

import asyncio

from e2b import AsyncSandbox, SandboxQuery, SandboxState


async def life(number):
    box = await AsyncSandbox.create("base", timeout=600, metadata={"number": str(number)})
    said = []
    result = await box.commands.run("echo one; echo two >&2", on_stdout=said.append)
    assert result.stdout == "one\n" and "".join(said) == "one\n", result
    await box.files.write("/home/user/number", str(number))
    assert await box.files.read("/home/user/number") == str(number)
    page = AsyncSandbox.list(query=SandboxQuery(metadata={"number": str(number)}))
    assert [b.sandbox_id for b in await page.next_items()] == [box.sandbox_id]
    await box.pause()
    assert (await box.get_info()).state == SandboxState.PAUSED
    same = await AsyncSandbox.connect(box.sandbox_id)
    assert await same.files.read("/home/user/number") == str(number)
    # Many streams of one sandbox at the same time.
    results = await asyncio.gather(*(same.commands.run(f"sleep 0.2; echo {n}") for n in range(8)))
    assert [int(r.stdout) for r in results] == list(range(8))
    assert await same.kill()
    assert not await same.is_running()


async def main():
    await asyncio.gather(*(life(number) for number in range(2)))
    page = AsyncSandbox.list()
    assert await page.next_items() == []


asyncio.run(main())
print("done: life")
