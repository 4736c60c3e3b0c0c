// E2B's JavaScript client against envd alone. Arguments: a directory to work in, envd's pid, bytes
// of the big file.

import assert from 'node:assert/strict'
import fs from 'node:fs'
import {
  CommandExitError,
  FilesystemEventType,
  InvalidArgumentError,
  NotFoundError,
  Sandbox,
  TimeoutError,
} from 'e2b'

const [work, , bigText] = process.argv.slice(2)
const bigBytes = Number(bigText)
const sleep = (ms) => new Promise((done) => setTimeout(done, ms))

async function waitFor(condition, what) {
  const giveUp = Date.now() + 20_000
  while (!(await condition())) {
    assert(Date.now() < giveUp, what)
    await sleep(10)
  }
}

async function commands(box) {
  const result = await box.commands.run('echo out; echo err >&2')
  assert.deepEqual([result.stdout, result.stderr, result.exitCode], ['out\n', 'err\n', 0])
  await assert.rejects(box.commands.run('exit 7'), (e) => e instanceof CommandExitError && e.exitCode === 7)
  await assert.rejects(box.commands.run('sleep 60', { timeoutMs: 1000 }), TimeoutError)
  const env = await box.commands.run('pwd; echo $A', { cwd: work, envs: { A: 'b c' } })
  assert.equal(env.stdout, `${work}\nb c\n`)
  if (process.getuid() === 0) {
    assert.equal((await box.commands.run('id -un', { user: 'nobody' })).stdout, 'nobody\n')
  }
}

async function background(box) {
  const handle = await box.commands.run('cat; sleep 60', { background: true, stdin: true, timeoutMs: 0 })
  assert((await box.commands.list()).some((p) => p.pid === handle.pid))
  const again = await box.commands.connect(handle.pid)
  await box.commands.sendStdin(handle.pid, 'hello\n')
  await waitFor(() => again.stdout === 'hello\n' && handle.stdout === 'hello\n', 'both hear')
  await handle.disconnect()
  await box.commands.closeStdin(again.pid)
  assert.equal(await again.kill(), true)
  await assert.rejects(again.wait(), CommandExitError)
  assert.equal(await box.commands.kill(again.pid), false)
}

async function manyCommands(box) {
  // Another home: this machine's own may have a login script that takes its time.
  const options = { envs: { HOME: work }, timeoutMs: 120_000, requestTimeoutMs: 120_000 }
  const one = async (n) => (await box.commands.run(`sleep 0.2; echo ${n}`, options)).stdout
  const results = await Promise.all(Array.from({ length: 200 }, (_, n) => one(n)))
  assert.deepEqual(results, Array.from({ length: 200 }, (_, n) => `${n}\n`))
}

async function files(box) {
  const path = `${work}/js/deep/a ü.txt`
  assert.equal((await box.files.write(path, 'hello')).path, path)
  assert.equal(await box.files.read(path), 'hello')
  const bytes = await box.files.read(path, { format: 'bytes' })
  assert.equal(Buffer.from(bytes).toString(), 'hello')
  assert(await box.files.exists(path))
  assert.equal((await box.files.getInfo(path)).size, 5)
  assert.equal(await box.files.makeDir(`${work}/js/dir`), true)
  assert.equal(await box.files.makeDir(`${work}/js/dir`), false)
  const listed = (await box.files.list(`${work}/js`, { depth: 2 })).map((e) => e.name)
  assert.deepEqual(listed, ['deep', 'a ü.txt', 'dir'])
  await box.files.rename(path, `${work}/js/b`)
  assert(!(await box.files.exists(path)))
  await box.files.writeFiles([
    { path: `${work}/js/m 1`, data: 'one' },
    { path: `${work}/js/m"2`, data: 'two' },
  ])
  assert.equal(await box.files.read(`${work}/js/m 1`), 'one')
  assert.equal(await box.files.read(`${work}/js/m"2`), 'two')
  await box.files.write(`${work}/js/z`, 'zip '.repeat(10_000), { gzip: true })
  assert.equal(await box.files.read(`${work}/js/z`, { gzip: true }), 'zip '.repeat(10_000))
  await box.files.remove(`${work}/js`)
  await assert.rejects(box.files.read(path), NotFoundError)
  await assert.rejects(box.files.read(work), InvalidArgumentError)
}

async function watch(box) {
  const directory = `${work}/js-watched`
  await box.files.makeDir(directory)
  const seen = []
  const handle = await box.files.watchDir(directory, (e) => { seen.push(`${e.type} ${e.name}`) }, { recursive: true })
  await box.files.write(`${directory}/sub/f`, 'x')
  await box.files.write(`${directory}/sub/f`, 'y')
  const wanted = [`${FilesystemEventType.CREATE} sub/f`, `${FilesystemEventType.WRITE} sub/f`]
  await waitFor(() => wanted.every((w) => seen.includes(w)), seen)
  await handle.stop()
  await assert.rejects(box.files.watchDir(`${work}/none`, () => {}), NotFoundError)
}

async function terminals(box) {
  const out = []
  const handle = await box.pty.create({ cols: 100, rows: 30, timeoutMs: 30_000, onData: (d) => { out.push(Buffer.from(d)) } })
  await box.pty.resize(handle.pid, { cols: 120, rows: 40 })
  await box.pty.sendInput(handle.pid, Buffer.from('stty size; exit 0\n'))
  await handle.wait()
  assert(Buffer.concat(out).toString().includes('40 120'), Buffer.concat(out).toString())
  const other = await box.pty.create({ cols: 80, rows: 24, timeoutMs: 30_000, onData: () => {} })
  assert.equal(await box.pty.kill(other.pid), true)
  await assert.rejects(other.wait(), CommandExitError)
}

async function bigFiles(box) {
  const path = `${work}/js-big`
  await box.files.write(path, new Blob([new Uint8Array(bigBytes).fill(7)]), { requestTimeoutMs: 600_000 })
  assert.equal(fs.statSync(path).size, bigBytes)
  let length = 0
  for await (const chunk of await box.files.read(path, { format: 'stream', requestTimeoutMs: 600_000 })) {
    length += chunk.length
  }
  assert.equal(length, bigBytes)
  fs.rmSync(path)
}

const box = await Sandbox.create()
for (const scenario of [commands, background, manyCommands, files, watch, terminals, bigFiles]) {
  const started = Date.now()
  try {
    await scenario(box)
  } catch (error) {
    console.log(`failed: ${scenario.name}`)
    throw error
  }
  console.log(`ok: ${scenario.name} (${(Date.now() - started) / 1000} s)`)
}
process.exit(0)
