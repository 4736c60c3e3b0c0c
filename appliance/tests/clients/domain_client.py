"""E2B's Python client over TLS, with names below a domain: no header tells the host which sandbox a
request is for.

Nobody resolves the domain, so the names that the client will ask for are written to /etc/hosts,
which is this process's own. The client reads that once: with a sandbox's name in it, it starts anew.
"""

import os
import sys

from e2b import Sandbox

DOMAIN = os.environ["E2B_DOMAIN"].partition(":")[0]


def resolve(*names):
    with open("/etc/hosts", "a", encoding="ascii") as hosts:
        hosts.write("".join(f"127.0.0.1 {name}\n" for name in names))


if len(sys.argv) == 1:
    box = Sandbox.create("base", timeout=600)
    resolve(f"49983-{box.sandbox_id}.{DOMAIN}")
    os.execv(sys.executable, [sys.executable, __file__, box.sandbox_id])

box = Sandbox.connect(sys.argv[1])
assert box.get_host(49983) == f"49983-{box.sandbox_id}.{os.environ['E2B_DOMAIN']}"
said = []
result = box.commands.run("echo one; echo two >&2", on_stdout=said.append)
assert (result.stdout, result.stderr, "".join(said)) == ("one\n", "two\n", "one\n"), result
content = os.urandom(1 << 20)
box.files.write("/home/user/content", content)
assert bytes(box.files.read("/home/user/content", format="bytes")) == content
assert [entry.name for entry in box.files.list("/home/user")].count("content") == 1
box.pause()
same = Sandbox.connect(box.sandbox_id)
assert same.commands.run("wc -c < /home/user/content").stdout.strip() == str(1 << 20)
assert same.kill()
print("done: domain")
