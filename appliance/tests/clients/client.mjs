// E2B's JavaScript client against a whole host. Each scenario fails by an exception.

import assert from 'node:assert/strict'
import { Sandbox } from 'e2b'

const box = await Sandbox.create('base', {
  timeoutMs: 600_000,
  metadata: { test: 'js', 'odd key': 'a b&c=d/ü%20' },
  envs: { COLOUR: 'blue' },
})
assert.equal((await box.commands.run('echo $COLOUR')).stdout, 'blue\n')
await box.files.write('/home/user/greeting', 'hello')
assert.equal(await box.files.read('/home/user/greeting'), 'hello')

const page = Sandbox.list({ query: { metadata: { 'odd key': 'a b&c=d/ü%20' } } })
assert.deepEqual((await page.nextItems()).map((b) => b.sandboxId), [box.sandboxId])
console.log('done: create')

let said = ''
const pty = await box.pty.create({
  cols: 90, rows: 30,
  onData: (data) => { said += new TextDecoder().decode(data) },
})
await box.pty.sendInput(pty.pid, new TextEncoder().encode('stty size; exit\n'))
await pty.wait()
assert.match(said, /30 90/)
console.log('done: terminal')

await box.pause()
assert.equal((await box.getInfo()).state, 'paused')
const same = await Sandbox.connect(box.sandboxId)
assert.equal(await same.files.read('/home/user/greeting'), 'hello')
assert.equal(await same.isRunning(), true)
console.log('done: pause and connect')

if (same.fork) {
  const [fork] = await same.fork({ count: 1 })
  assert.ok(fork.files, `No fork: ${fork}`)
  assert.equal(await fork.files.read('/home/user/greeting'), 'hello')
  assert.equal(await fork.kill(), true)
  console.log('done: fork')
}
const [metrics] = await same.getMetrics()
assert.ok(metrics.memTotal > 0)
assert.equal(await same.kill(), true)
assert.equal(await same.isRunning(), false)
assert.deepEqual(await Sandbox.list().nextItems(), [])
console.log('done: kill')
process.exit(0)
